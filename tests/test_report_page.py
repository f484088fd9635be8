"""The page: escaped, self-contained, and without error or network in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import synthetic_evidence as synthetic

from kt_hf import evidence, plots, report
from kt_hf.errors import IntegrityError, RecipeError

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the path")
EVIL = "<script>document.title='ran'</script>\"'&"


@pytest.fixture(scope="module")
def large():
    return evidence.build(
        "large & <b>", synthetic.large(), seconds=300.0, created="2025-01-02", versions={"a": "1"}, replicates=200
    )


@pytest.fixture(scope="module")
def small():
    return evidence.build("small", [synthetic.stage("only", 0.8, 1, compare=["majority"])], replicates=100)


@pytest.fixture(scope="module")
def evil():
    labels = [EVIL, "b", "c"]
    stages = [
        synthetic.stage(f"{EVIL}{i}", 0.7 + i / 10, labels=labels, description=[EVIL], lineage={EVIL: EVIL})
        for i in (0, 1)
    ]
    stages[1].compare = [f"@{EVIL}0"]
    stages[0].data = stages[1].data = {**stages[0].data, "name": EVIL, "path": EVIL}
    return evidence.build(EVIL, stages, notes=[EVIL], versions={EVIL: EVIL}, replicates=50)


class Tags(HTMLParser):
    """Every start tag with its attributes; checks that tags are closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def pages(request):
    return [report.html(request.getfixturevalue(name)) for name in ("large", "small", "evil")]


def test_nothing_is_loaded_and_nothing_runs(request, large, small, tmp_path):
    report.compare_html([large, small], tmp_path / "both.html")
    for page in [*pages(request), (tmp_path / "both.html").read_text()]:
        tags = Tags(page)
        assert not tags.open
        names = {tag for tag, _ in tags.found}
        assert not names & {
            "script",
            "img",
            "iframe",
            "object",
            "embed",
            "audio",
            "video",
            "base",
            "form",
            "use",
            "image",
        }
        for tag, attributes in tags.found:
            assert not any(key.startswith("on") for key in attributes), tag
            assert not {"src", "srcset", "xlink:href"} & attributes.keys()
            assert attributes.get("href", "data:,") == "data:,"
        style = re.search(r"<style>(.*?)</style>", page, re.S).group(1)
        assert "url(" not in style and "@import" not in style
        assert "nan" not in re.findall(r'="([^"]*)"', page) and "inf" not in page.split("<body>")[0]


def test_what_comes_from_data_is_escaped(evil):
    page = report.html(evil)
    assert "<script" not in page and "&lt;script&gt;" in page


def test_the_page_holds_its_parts(large):
    page = report.html(large)
    parts = ["Gain over each baseline", "Quality against cost", "Learning curves", "Gain per class: mean over finetune"]
    parts += [
        "Confusion: best stage and its baseline",
        "Stages in detail",
        "Validation labels were used",
        "helped",
        "hurt",
        "no evidence",
    ]
    for part in [*parts, "Settings tried", "optimizer steps", "base_model", "prefers-color-scheme: dark"]:
        assert part in page, part
    ranks = [page.index(f"<b>{name}</b>") for name in ("mean", "finetune", "scratch", "probe", "outside")]
    assert ranks == sorted(ranks)


def test_load_checks_the_schema(small, tmp_path):
    with pytest.raises(RecipeError, match=r"no report\.json"):
        report.load(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(small))
    assert report.load(tmp_path) == small == report.load(tmp_path / "report.json")
    (tmp_path / "report.json").write_text(json.dumps({**small, "schema": "kt_hf.report/99"}))
    with pytest.raises(IntegrityError, match="kt_hf.report/99".replace(".", r"\.")):
        report.load(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(IntegrityError, match="not JSON"):
        report.load(tmp_path)


def test_show_one_run_and_several(large, small, tmp_path):
    for name, found in (("a", large), ("b", small), ("c", small)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(found))
    one = report.show([tmp_path / "a"])
    assert "finetune" in one and "- Validation labels were used" in one
    several = report.show([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    assert "small (b)" in several and "small (c)" in several and "not tested against each other" in several
    twice = report.show([tmp_path / "b", tmp_path / "b" / "report.json"])
    assert "small (b) (1)" in twice and "small (b) (2)" in twice
    row = next(line for line in several.splitlines() if line.startswith("only"))
    assert row.split()[1] == "-" and row.count(" to ") == 2


def test_labels_of_the_scatter_do_not_overlap():
    room = plots.Room(1000, 480)
    for i in range(14):
        assert room.place(500 + 6 * i, 200 + 3 * i, 120) is not None
    for i, a in enumerate(room.boxes):
        for b in room.boxes[:i]:
            assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]


def test_a_label_on_the_left_of_its_point_ends_there():
    points = [
        plots.Point("mean", 2.0, 88.9, 88.0, 90.0, "c1", ""),
        plots.Point("other", 2.05, 88.7, 88.0, 90.0, "c2", ""),
    ]
    drawn = plots.scatter(points, "cost", "quality")
    places = {
        name: (float(x), anchor)
        for x, anchor, name in re.findall(
            r'<text x="([0-9.]+)" y="[0-9.]+" text-anchor="(\w+)"[^>]*>(mean|other)<', drawn
        )
    }
    dots = [float(x) for x in re.findall(r'<circle cx="([0-9.]+)"', drawn)]
    assert places["mean"][1] == "end" and places["mean"][0] <= min(dots) - 5
    assert places["other"][1] == "start" and places["other"][0] >= max(dots) + 5


def test_the_headings_of_a_small_confusion_matrix_fit():
    drawn = plots.confusion(["a", "b"], [[3, 1], [0, 4]])
    width = float(re.search(r'viewBox="0 0 ([0-9.]+)', drawn).group(1))
    middle = float(re.search(r'<text x="([0-9.]+)"[^>]*>predicted class', drawn).group(1))
    assert middle + plots.text_width("predicted class") / 2 <= width


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 97), (1e-7, 3e-7), (5, 5), (1e6, 3e9)])
def test_ticks_lie_within(low, high):
    for marks in (plots.ticks(low, high), plots.log_ticks(max(low, 1e-9), max(high, 2e-9))):
        assert marks and len(marks) <= 14
        assert all(low - 1e-9 * abs(low) <= t <= high * (1 + 1e-9) or low <= 0 for t in marks)


def browse(page, folder) -> tuple[str, list[str], list[str]]:
    """(DOM, messages of the console, addresses asked for) of a page in a headless browser that reaches no network."""
    log = folder / "net.json"
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--no-first-run", f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0"]
    command += [f"--log-net-log={log}", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1400,3000"]
    done = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], requests(log, page.as_uri())


@needs_browser
@pytest.mark.parametrize("name", ["large", "small", "evil"])
def test_a_real_browser_shows_it_without_error_or_request(request, name, tmp_path):
    report.write_html(request.getfixturevalue(name), tmp_path / "report.html")
    dom, console, asked = browse(tmp_path / "report.html", tmp_path)
    assert (console, asked) == ([], [])
    assert ("Quality against cost" in dom) == (name != "small"), "one stage has nothing to be compared with"
    assert "<svg" in dom and "<title>ran</title>" not in dom


@needs_browser
def test_the_browser_would_tell(tmp_path):
    """The same look finds an error and a request where there are some."""
    text = '<img src="http://nowhere.invalid/x.png"><script>console.error("told")</script>'
    (tmp_path / "bad.html").write_text(f"<!doctype html><html><body>{text}</body></html>")
    _, console, asked = browse(tmp_path / "bad.html", tmp_path)
    assert len(console) == 1 and asked == ["http://nowhere.invalid/x.png"]


def requests(log, page: str) -> list[str]:
    """Addresses that the page itself asked for: those of the net log that name it as initiator."""
    text = log.read_text()
    try:
        events = json.loads(text)["events"]
    except ValueError:  # the log of a browser that was ended at once lacks its end
        events = json.loads(text.rstrip().rstrip(",") + "]}")["events"]
    asked = [e.get("params", {}) for e in events]
    urls = {p["url"] for p in asked if "url" in p and str(p.get("initiator", "")) not in ("", "not an origin")}
    return sorted(u for u in urls if u != page and not u.startswith(("file:", "data:")))
