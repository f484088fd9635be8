"""A second run's preprocessing is found again; what has changed is computed anew, also where it lies in another module.

Every case is a process of its own: code that was read once is not read again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TASK = """
from kt_hf_plugins.text_classification import TextClassification
from mine import words
from mine.used import unrelated


class Mine(TextClassification):
    def preprocess(self, rows, loaded, train, augment=None):
        print("COMPUTED", flush=True)
        return super().preprocess({**rows, "text": [words.clean(t) for t in rows["text"]]}, loaded, train, augment)
"""
FILES = {
    "mine/__init__.py": "",
    "mine/task.py": TASK,
    "mine/words.py": "def clean(text):\n    from .deep.letters import lower\n\n    return lower(text)\n",
    "mine/deep/__init__.py": "",
    "mine/deep/letters.py": "def lower(text):\n    return text.lower()\n",
    "mine/used.py": "def unrelated():\n    return 1\n",
    "mine/other.py": "def nobody():\n    return 2\n",
}
CHILD = """
import json, sys
import datasets, helpers
from kt_hf.data import DataInfo
from kt_hf.loader import Rows
from mine.task import Mine

source = datasets.load_dataset("parquet", data_files=sys.argv[1], cache_dir=sys.argv[2], split="train")
info = DataInfo("texts", {"train": source}, {"text": "text", "label": "label"}, ["a", "b"], "the-same")
task = Mine()
loaded = task.load(helpers.config("text"), info)
for change in sys.argv[3:]:
    exec(change)
rows = Rows(info, "train", task, loaded, train=True)
print("ROWS", json.dumps([rows[(0, i)]["input_ids"] for i in range(len(rows))]), flush=True)
"""


@pytest.fixture
def project(tmp_path):
    import datasets

    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    texts = ["Upper Case", "lower case", "MiXeD words"]
    rows = {"text": texts, "label": datasets.ClassLabel(names=["a", "b"]).str2int(list("aba")), "index": [0, 1, 2]}
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["a", "b"]), index=datasets.Value("int64")
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "texts.parquet")
    return tmp_path


def run(project: Path, *changes: str) -> tuple[bool, list[list[int]]]:
    """(computed and not found, the token ids)."""
    path = os.pathsep.join([str(project), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(project / "texts.parquet"), str(project / "cache"), *changes],
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    found = next(line for line in lines if line.startswith("ROWS "))
    return "COMPUTED" in lines, json.loads(found[5:])


@pytest.mark.slow
def test_only_what_the_rows_depend_on_is_computed_again(project):
    computed, first = run(project)
    assert computed
    assert run(project) == (False, first), "the second run finds what the first one left"

    deep = project / "mine/deep/letters.py"
    deep.write_text("def lower(text):\n    return text.lower().replace('case', 'words')\n")
    computed, second = run(project)
    assert computed and second != first, "a function that is imported by an imported function has changed"
    deep.write_text(FILES["mine/deep/letters.py"])
    (project / "mine/other.py").write_text("def nobody():\n    return 3\n")
    assert run(project) == (False, first), "what it was before is found, and nothing imports what else has changed"

    normalise = (
        "from tokenizers import normalizers; "
        "loaded.processor.backend_tokenizer.normalizer = normalizers.Replace('e', 'a')"
    )
    computed, third = run(project, normalise)
    assert computed and third != first, "the same vocabulary, another normaliser"


@pytest.mark.slow
def test_code_without_a_file_is_never_found_again(project):
    notebook = (
        "import types; module = types.ModuleType('notebook'); sys.modules['notebook'] = module; "
        "module.Mine = Mine; exec('class Cell(Mine): pass', vars(module)); module.Cell.__module__ = 'notebook'; "
        "task = module.Cell()"
    )
    assert run(project, notebook)[0] and run(project, notebook)[0]
    assert run(project)[0] and not run(project)[0]


def test_a_file_that_was_written_after_this_process_began_counts_for_it_alone(project, monkeypatch):
    from kt_hf import sources

    monkeypatch.syspath_prepend(str(project))
    import kt_hf

    monkeypatch.setattr(kt_hf, "BEGAN", (project / "mine/words.py").stat().st_mtime + 1)
    before = sources.digest(["mine.task"])
    assert sources.digest(["mine.task"]) == before
    monkeypatch.setattr(kt_hf, "BEGAN", 0.0)
    assert sources.digest(["mine.task"]) != before


def test_libraries_are_not_read_wherever_they_were_installed(project, monkeypatch):
    """pip can install into any folder, and a library can be a checkout: of thousands of files none is parsed."""
    import kt_hf
    from kt_hf import sources

    monkeypatch.setattr(kt_hf, "BEGAN", time.time() + 3600)
    for name in ("bought", "cloned"):
        package = project / name / name
        package.mkdir(parents=True)
        for file in ("__init__", "a", "b"):
            (package / f"{file}.py").write_text(f"from {name} import a, b\n")
        monkeypatch.syspath_prepend(str(project / name))
    installed = project / "bought" / "bought-1.5.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: bought\nVersion: 1.5\n")
    (installed / "RECORD").write_text("bought/__init__.py,,\nbought/a.py,,\nbought/b.py,,\n")
    beside = project / "bought" / "beside.py"  # one's own, in the folder that was named to pip
    beside.write_text("")
    (project / "mine" / "task.py").write_text("import beside\nimport bought.a\nimport cloned.a\n")
    monkeypatch.syspath_prepend(str(project))
    monkeypatch.setattr(sources, "MANY_FILES", 2)
    read, parsed = [], sources._parsed
    monkeypatch.setattr(sources, "_parsed", lambda path, *facts: read.append(path.name) or parsed(path, *facts))

    def found() -> str:
        for cached in (sources._installed, sources._distributed, sources._of_many_files, sources._version):
            cached.cache_clear()
        return sources.digest(["mine.task"])

    first = found()
    assert set(read) == {"task.py", "beside.py"}, "the task's own, what is one's own beside a library, and nothing else"
    assert found() == first
    beside.write_text("changed = True\n")
    assert found() != first
    beside.write_text("")
    (project / "bought" / "bought" / "b.py").write_text("changed = True\n")
    assert found() == first, "what was installed changes with its version"
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: bought\nVersion: 1.6\n")
    second = found()
    assert second != first
    (project / "cloned" / "cloned" / "b.py").write_text("changed = True\n")
    assert found() not in (first, second), "and a checkout when a file of it was written"
