"""Publishing and loading with the real clients against a Hub on loopback.

The clients read their environment when they are imported, so they live in one process of their own, which takes
commands as lines of JSON (see `work` at the end); the Hub runs in the test's process, where its state can be checked.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import READER, WRITER, HubServer, Loopback, Storage

from kt_hf import hub as kt_hub
from kt_hf.errors import IntegrityError, RecipeError
from kt_hf.hub import scrub
from kt_hf.model_card import model_card

CONFIG = b'{"model_type": "bert"}\n'
REPO = "writer/model"


# --- the process with the clients -------------------------------------------------------------------------------------


def environment(home: Path, endpoint: str, **more: str) -> dict[str, str]:
    """Nothing of the caller's Hugging Face settings or proxies, and no address but loopback."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()}
    ours = {
        "HF_ENDPOINT": endpoint,
        "HF_TOKEN": WRITER,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "HF_DEBUG": "1",  # the client then logs every request: the token must not be in there either
        "OMP_NUM_THREADS": "1",
    }
    return clean | ours | more


class Client:
    """The other end of `work`."""

    def __init__(self, home: Path, endpoint: str, **more: str):
        home.mkdir(parents=True, exist_ok=True)
        self.home, self.log = home, home / "stderr.log"
        self.said: list[str] = []
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(home, endpoint, **more),
                cwd=home,
            )

    def do(self, command: str, env: dict[str, str | None] | None = None, **arguments: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"do": command, "env": env or {}, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        self.said.append(line)
        return json.loads(line)

    def push(self, folder: Path, repo: str = REPO, **arguments: Any) -> dict[str, Any]:
        """`env` and `constants` (of kt_hf.hub) hold for this call only."""
        return self.do("push", folder=str(folder), repo=repo, **arguments)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(timeout=20)


@pytest.fixture(scope="session")
def hub_of_session() -> Iterator[HubServer]:
    with Storage() as storage, HubServer(storage) as server:
        yield server


@pytest.fixture(scope="session")
def client(hub_of_session: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(tmp_path_factory.mktemp("client"), hub_of_session.url)
    yield client
    client.close()


@pytest.fixture
def hub(hub_of_session: HubServer) -> Iterator[HubServer]:
    """An empty Hub without faults; afterwards, storage must have seen no token."""
    hub_of_session.heal()
    hub_of_session.storage.heal()
    hub_of_session.repos.clear()
    hub_of_session.storage.objects.clear()
    hub_of_session.requests.clear()
    hub_of_session.storage.requests.clear()
    yield hub_of_session
    assert not [request for request in hub_of_session.storage.requests if "authorization" in request.headers]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stage directory whose model is a few bytes: for everything but loading."""
    model = tmp_path / "student" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_bytes(CONFIG)
    (model / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      " + bytes(range(256)) * 40)
    (model / "README.md").write_text("---\ntags:\n- kt_hf\n---\n\n# student\n")
    return model.parent


def state(hub: HubServer) -> dict[str, Any]:
    """Everything that a reader of the Hub can see."""
    return {name: (dict(repo.branches), len(repo.commits)) for name, repo in hub.repos.items()}


def published(hub: HubServer, repo: str = REPO, branch: str = "main") -> dict[str, bytes]:
    return {name: blob.data for name, blob in hub.head(repo, branch).tree.items() if not name.startswith(".")}


def local(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "model").iterdir()}


def refused(reply: dict[str, Any], *words: str) -> None:
    """The reply is an error for the user: exit code 5, one line of cause, one of remedy, no traceback in either."""
    assert reply.get("error") == "HubError" and reply["exit_code"] == 5, reply
    for part in (reply["cause"], reply["remedy"]):
        assert part and "\n" not in part and "Traceback" not in part and len(part) < 500, reply
    text = f"{reply['cause']} {reply['remedy']}".lower()
    assert all(word.lower() in text for word in words), reply
    # Not even a debug traceback leads to the client's exceptions, which hold requests.
    assert "direct cause" not in reply["traceback"] and "During handling" not in reply["traceback"]


# --- loading back -----------------------------------------------------------------------------------------------------


def test_full_model_loads_back_with_the_same_logits(hub: HubServer, client: Client, tmp_path: Path) -> None:
    saved = client.do("save_text", folder=str(tmp_path / "model"))
    reply = client.push(tmp_path, "writer/full")
    assert reply["sha"] == hub.head("writer/full").oid, reply
    loaded = client.do("load_text", repo="writer/full")
    assert loaded["logits"] == saved["logits"] and loaded["tokens"] == saved["tokens"], (saved, loaded)
    weights = hub.head("writer/full").tree["model.safetensors"].sha256
    assert hub.storage.seen(f"/object/{weights}", "GET"), "it must have come over HTTP"


def test_adapter_and_its_base_load_back_with_the_same_logits(hub: HubServer, client: Client, tmp_path: Path) -> None:
    client.do("save_text", folder=str(tmp_path / "base"))
    client.push(tmp_path / "base", "writer/base")
    saved = client.do("save_adapter", base="writer/base", folder=str(tmp_path / "adapter" / "model"))
    assert saved.get("base_logits") and saved["logits"] != saved["base_logits"], saved
    client.push(tmp_path / "adapter", "writer/adapter")
    assert "model.safetensors" not in hub.head("writer/adapter").tree
    loaded = client.do("load_adapter", repo="writer/adapter")
    assert loaded["logits"] == saved["logits"], (saved, loaded)


def test_dual_encoder_loads_back_with_the_same_logits(hub: HubServer, client: Client, tmp_path: Path) -> None:
    saved = client.do("save_dual", folder=str(tmp_path / "model"))
    client.push(tmp_path, "writer/dual")
    loaded = client.do("load_dual", repo="writer/dual")
    assert len(saved["logits"]) == 2 and loaded["logits"] == saved["logits"], (saved, loaded)


# --- one commit -------------------------------------------------------------------------------------------------------


def test_a_push_is_a_single_commit_with_every_file(hub: HubServer, client: Client, folder: Path) -> None:
    reply = client.push(folder)
    assert reply["created"] and reply["sha"] == hub.head(REPO).oid and reply["sha"] in reply["url"]
    assert published(hub) == local(folder)
    assert len(hub.seen("/commit/", "POST")) == 1 and len(hub.repos[REPO].commits) == 2
    sent = json.loads(hub.seen("/commit/", "POST")[0].body.splitlines()[0])["value"]
    assert sent["parentCommit"] == hub.head(REPO).parent
    assert sent["summary"] == "Publish student with kt_hf"
    assert hub.storage.requests, "weights go to storage"


def test_pushing_again_commits_nothing(hub: HubServer, client: Client, folder: Path) -> None:
    first = client.push(folder)
    before = state(hub)
    hub.requests.clear()
    second = client.push(folder)
    assert (second["sha"], second["created"]) == (first["sha"], False) and state(hub) == before
    assert not hub.seen("preupload|/commit/|lfs")
    assert any("nothing to commit" in line for line in second["log"])
    for path in ((folder / "model" / "config.json"), (folder / "model" / "model.safetensors")):
        path.write_bytes(path.read_bytes()[:-2] + b"!\n")  # other content of the same size
        assert client.push(folder)["created"] and published(hub) == local(folder)


def test_files_of_an_earlier_model_go_in_the_same_commit(hub: HubServer, client: Client, folder: Path) -> None:
    """A left-over single file would be loaded in place of shards, an adapter on top of a merged model."""
    stale = {"model-00001-of-00002.safetensors": b"old", "adapter_config.json": b"{}", "pytorch_model.bin": b"old"}
    kept = {"figures/curve.png": b"png", "LICENSE": b"text", "photo.jpg": b"jpg"}
    hub.add_repo(REPO, {**stale, **kept})
    assert client.push(folder)["created"]
    assert published(hub) == local(folder) | kept and len(hub.repos[REPO].commits) == 3


def test_branch_is_created_and_main_left_alone(hub: HubServer, client: Client, folder: Path) -> None:
    main = hub.add_repo(REPO).oid
    reply = client.push(folder, revision="v2/beta")
    assert hub.head(REPO, "v2/beta").oid == reply["sha"] and hub.head(REPO).oid == main
    assert published(hub, branch="v2/beta") == local(folder)


def test_private_repository(hub: HubServer, client: Client, folder: Path) -> None:
    assert client.push(folder, private=True)["created"] and hub.repos[REPO].private
    before = state(hub) | {"writer/open": ({"main": hub.add_repo("writer/open").oid}, 1)}
    refused(client.push(folder, "writer/open", private=True), "public", "writer/open")
    assert state(hub) == before and not hub.seen("/writer/open/preupload")


def test_name_without_namespace_goes_to_the_user(hub: HubServer, client: Client, folder: Path) -> None:
    assert client.push(folder, "model")["created"] and published(hub, "writer/model") == local(folder)


# --- refusals and conflicts -------------------------------------------------------------------------------------------


def test_missing_token_is_told_before_anything_is_sent(hub: HubServer, client: Client, folder: Path) -> None:
    refused(client.push(folder, env={"HF_TOKEN": None}), "no Hub token", "hf auth login", "HF_TOKEN")
    refused(client.push(folder, token="two words\n"), "characters")
    assert not hub.requests


def test_wrong_token(hub: HubServer, client: Client, folder: Path) -> None:
    hub.add_repo(REPO)
    before = state(hub)
    refused(client.push(folder, token="hf_wrong0123456789"), "does not accept the token", "write access")
    assert state(hub) == before and not hub.storage.requests


@pytest.mark.parametrize("repo", [REPO, "writer/new", "stranger/model"])
def test_no_permission(hub: HubServer, client: Client, folder: Path, repo: str) -> None:
    hub.add_repo(REPO)
    before = state(hub)
    refused(client.push(folder, repo, token=READER), "may not write", repo)
    assert state(hub) == before and not hub.storage.requests


def test_offline_is_told_at_once(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    offline = Client(tmp_path / "offline", hub.url, HF_HUB_OFFLINE="1")
    refused(offline.push(folder), "offline", "HF_HUB_OFFLINE")
    offline.close()
    assert not hub.requests


def test_commit_of_somebody_else_in_between(hub: HubServer, client: Client, folder: Path) -> None:
    hub.add_repo(REPO)
    hub.fail("serve", "/commit/", times=1, before=lambda: hub.add_commit(REPO, {"theirs.md": b"x"}))
    refused(client.push(folder), "changed by someone else", "push again")
    assert set(published(hub)) == {"theirs.md"}
    assert client.push(folder)["created"] and published(hub) == local(folder) | {"theirs.md": b"x"}


def test_unexpected_head(hub: HubServer, client: Client, folder: Path) -> None:
    old = hub.add_repo(REPO).oid
    new = hub.add_commit(REPO, {"theirs.md": b"x"}).oid
    before = state(hub)
    refused(client.push(folder, expected_parent=old), "not expected", old[:12], new[:12])
    assert state(hub) == before and not hub.storage.requests
    assert client.push(folder, expected_parent=new)["created"]


# --- faults -----------------------------------------------------------------------------------------------------------

# The steps in their order; the pattern matches the request's path.
STEPS = {
    "create": "/api/repos/create",
    "head": r"/api/models/writer/model/revision/main",
    "tree": r"/api/models/writer/model/tree/",
    "card": "/api/validate-yaml",
    "preupload": "/preupload/",
    "batch": "/objects/batch",
    "verify": "/lfs/verify",
    "commit": "/commit/main",
}


REFUSALS = {401: "token", 403: "may not write", 404: "not found", 409: "changed", 412: "changed", 418: "418"}


@pytest.mark.parametrize(
    ("step", "status"),
    # A 409 on creation only means that the repository exists.
    [(step, status) for step in STEPS for status in REFUSALS if (step, status) != ("create", 409)],
)
def test_refusals_are_told_at_once(hub: HubServer, client: Client, folder: Path, step: str, status: int) -> None:
    hub.add_repo(REPO)
    before = state(hub)
    hub.fail("status", STEPS[step], status=status, text=f"reason {WRITER}")
    if step == "create" and status in (401, 403):  # the client then looks whether the repository is there already
        hub.fail("status", STEPS["head"], status=status)
        hub.fail("status", "/api/models/writer/model$", status=status)
    refused(client.push(folder), REFUSALS[status])
    assert state(hub) == before and len(hub.seen(STEPS[step])) <= 2


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_server_errors_are_retried_then_told(hub: HubServer, client: Client, folder: Path, status: int) -> None:
    hub.add_repo(REPO)
    before = state(hub)
    for step in ("head", "preupload", "commit"):
        hub.heal()
        hub.requests.clear()
        hub.fail("status", STEPS[step], status=status)
        refused(client.push(folder), f"answers {status}", "later")
        assert state(hub) == before and kt_hub.ATTEMPTS <= len(hub.seen(STEPS[step])) <= kt_hub.ATTEMPTS + 1


@pytest.mark.parametrize("kind", ["status", "drop", "drop_body", "lost_reply"])
def test_each_step_survives_one_fault(hub: HubServer, client: Client, folder: Path, kind: str) -> None:
    for step, path in STEPS.items():
        hub.repos.clear()
        hub.storage.objects.clear()
        hub.heal()
        hub.fail(kind, path, times=1)
        reply = client.push(folder)
        assert reply.get("created"), (step, reply)
        assert published(hub) == local(folder) and len(hub.repos[REPO].commits) == 2, step


def test_storage_faults_are_retried_then_told(hub: HubServer, client: Client, folder: Path) -> None:
    hub.storage.fail("status", "/upload/")
    refused(client.push(folder), "answers 503", "nothing was published")
    assert not published(hub)
    hub.storage.heal()
    hub.storage.fail("drop", "/upload/", times=1)
    assert client.push(folder)["created"] and published(hub) == local(folder)


def test_lost_reply_is_no_second_commit(hub: HubServer, client: Client, folder: Path) -> None:
    hub.fail("lost_reply", STEPS["commit"], times=1)
    reply = client.push(folder)
    assert reply["created"] and reply["sha"] == hub.head(REPO).oid
    assert len(hub.seen(STEPS["commit"])) == 1 and len(hub.repos[REPO].commits) == 2
    assert any("reply was lost" in line for line in reply["log"])


def test_every_reply_lost(hub: HubServer, client: Client, folder: Path) -> None:
    """The commit is accepted, then the whole Hub goes away: it is unknown what happened, and that is said."""
    hub.add_repo(REPO)
    hub.fail("lost_reply", STEPS["commit"], before=lambda: hub.fail("drop", "/api/"))
    refused(client.push(folder), "not known whether", "HF_ENDPOINT")
    hub.heal()
    again = client.push(folder)
    assert not again["created"] and len(hub.repos[REPO].commits) == 2


def test_lost_reply_below_a_commit_of_somebody_else(hub: HubServer, client: Client, folder: Path) -> None:
    """Accepted, lost, and already built upon: our files are there, so it is done."""
    hub.fail("lost_reply", STEPS["commit"], times=1)
    hub.fail("serve", STEPS["head"], times=1)
    hub.fail("serve", STEPS["head"], times=1, before=lambda: hub.add_commit(REPO, {"theirs.md": b"x"}))
    assert client.push(folder)["created"]
    assert published(hub) == local(folder) | {"theirs.md": b"x"} and len(hub.seen(STEPS["commit"])) == 1


def test_lost_request_and_a_commit_of_somebody_else(hub: HubServer, client: Client, folder: Path) -> None:
    hub.fail("drop", STEPS["commit"], times=1, before=lambda: hub.add_commit(REPO, {"theirs.md": b"x"}))
    refused(client.push(folder), "not expected", "push again")
    assert set(published(hub)) == {"theirs.md"} and len(hub.seen(STEPS["commit"])) == 1


@pytest.mark.parametrize("step", ["create", "head", "tree", "card", "preupload", "batch", "commit"])
def test_html_instead_of_json(hub: HubServer, client: Client, folder: Path, step: str) -> None:
    hub.add_repo(REPO)
    before = state(hub)
    hub.fail("html", STEPS[step], status=200)
    refused(client.push(folder), "not what a Hub sends", "login page")
    assert state(hub) == before


def test_unreadable_metadata_of_the_card(hub: HubServer, client: Client, folder: Path) -> None:
    (folder / "model" / "README.md").write_text("---\ntags: [unclosed\n---\n")
    refused(client.push(folder), "answers 400", "expected ',' or ']'")
    assert not published(hub) and not hub.storage.requests


def test_html_with_a_refusal(hub: HubServer, client: Client, folder: Path) -> None:
    for step in ("card", "commit"):
        hub.heal()
        hub.fail("html", STEPS[step], status=403)
        refused(client.push(folder), "may not write")
    assert not published(hub)


@pytest.mark.parametrize("step", ["create", "head", "preupload", "batch", "commit"])
@pytest.mark.parametrize("status", [302, 307, 308])
def test_redirects_to_other_hosts_are_not_followed(
    hub: HubServer, client: Client, folder: Path, step: str, status: int
) -> None:
    hub.add_repo(REPO)
    before = state(hub)
    with Loopback() as elsewhere:
        hub.fail("redirect", STEPS[step], status=status, to=elsewhere.url)
        refused(client.push(folder), "another host", elsewhere.url.removeprefix("http://"))
        assert not elsewhere.requests
    assert state(hub) == before


def test_redirects_within_the_host_are_followed(hub: HubServer, client: Client, folder: Path) -> None:
    """As the Hub does for renamed repositories."""
    hub.fail("redirect", STEPS["head"], times=1, status=307, to="")
    assert client.push(folder)["created"] and published(hub) == local(folder)


def test_retry_after_is_obeyed_within_bounds(hub: HubServer, client: Client, folder: Path) -> None:
    hub.fail("status", STEPS["preupload"], times=1, status=429, headers={"Retry-After": "1"})
    start = time.monotonic()
    assert client.push(folder)["created"] and 1 <= time.monotonic() - start < 10
    hub.repos.clear()
    hub.fail("status", STEPS["preupload"], status=429, headers={"Retry-After": "86400"})
    start = time.monotonic()
    refused(client.push(folder), "429", "86400 s")
    assert time.monotonic() - start < 10 and not published(hub)


def test_repository_creation_that_is_always_busy(hub: HubServer, client: Client, folder: Path) -> None:
    """The client repeats this one without a pause and without an end."""
    text = "Cannot create repo: another conflicting operation is in progress"
    hub.fail("status", STEPS["create"], status=409, text=text)
    refused(client.push(folder), "409", "later")
    assert len(hub.seen(STEPS["create"])) == kt_hub.ATTEMPTS


def test_server_that_does_not_answer(hub: HubServer, client: Client, folder: Path) -> None:
    hub.fail("stall", STEPS["head"], seconds=3.0)
    start = time.monotonic()
    refused(client.push(folder, constants={"TIMEOUT_SECONDS": 0.1}), "in time", "network")
    assert time.monotonic() - start < 3 and not published(hub)


def test_no_server(client: Client, folder: Path, hub: HubServer, tmp_path: Path) -> None:
    with Loopback() as gone:
        address = gone.url
    alone = Client(tmp_path / "alone", address)
    refused(alone.push(folder), "cannot be reached", address, "HF_ENDPOINT")
    alone.close()


# --- the token --------------------------------------------------------------------------------------------------------


def test_token_is_nowhere(hub: HubServer, client: Client, folder: Path) -> None:
    """Not in what was said, in debug logs, in tracebacks, in the client's home, in what was published."""
    client.push(folder, commit_message=f"with {WRITER}")
    assert "with ***" in hub.head(REPO).title
    hub.fail("status", STEPS["head"], status=403, text=f"{WRITER} may not; Bearer {WRITER}")
    refused(client.push(folder), "may not write", "***")
    assert client.log.stat().st_size > 1000 and "Send: curl" in client.log.read_text(), "debug logging is on"
    places = [path for path in [*client.home.rglob("*"), *folder.rglob("*")] if path.is_file()]
    assert not [path for path in places if WRITER.encode() in path.read_bytes()]
    assert not [line for line in client.said if WRITER in line]
    assert not [name for name, data in published(hub).items() if WRITER.encode() in data]
    assert not [r for r in hub.requests if WRITER.encode() in r.body or WRITER in r.path]


@pytest.mark.parametrize("secret", [WRITER, "hf_" + "AbCdEfGh" * 4 + "ij"])
def test_file_with_a_token_is_not_published(hub: HubServer, client: Client, folder: Path, secret: str) -> None:
    (folder / "model" / "generation_config.json").write_text(json.dumps({"note": secret}))
    reply = client.push(folder)
    assert (reply["error"], reply["exit_code"]) == ("IntegrityError", 4) and not hub.requests
    assert "generation_config.json" in reply["cause"] and secret not in json.dumps(reply)


@pytest.mark.parametrize("base", ["/somewhere/model", "../base", "~/base", "."])
def test_an_adapter_whose_base_is_a_folder_here_is_not_published(
    hub: HubServer, client: Client, folder: Path, base: str
) -> None:
    (folder / "model" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    reply = client.push(folder)
    assert (reply["error"], reply["exit_code"]) == ("RecipeError", 2) and not hub.requests
    assert "nobody else has" in reply["cause"] and "lora.save=merged" in reply["remedy"]


def test_scrub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_dummy")
    assert scrub("hf_dummy, 'hf_abcdefghijkl' Bearer eyJ0.x-y and mine", "mine") == "***, '***' Bearer *** and ***"
    for harmless in ("kt_hf_plugins.lora", "hf_hub_download", "import kt_hf", "hf-internal-testing/tiny"):
        assert scrub(harmless) == harmless


# --- what may be published --------------------------------------------------------------------------------------------


def test_hidden_files_stay_at_home(hub: HubServer, client: Client, folder: Path) -> None:
    (folder / "model" / ".cache").mkdir()
    (folder / "model" / ".cache" / "x.json").write_text("{}")
    (folder / "model" / ".env").write_text("SECRET=1")
    client.push(folder)
    assert set(published(hub)) == {"config.json", "model.safetensors", "README.md"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a/optimizer.PT", "rng.pth", "cache.pkl", "last.ckpt"])
def test_pickles_are_refused(folder: Path, name: str) -> None:
    path = folder / "model" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x80\x04N.")
    with pytest.raises(IntegrityError, match="pickle"):
        kt_hub.push(folder, REPO, token=WRITER)


def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    link = folder / "model" / "extra.json"
    for target, words in ((secret, "out of the folder"), (tmp_path, "link"), (tmp_path / "absent", "link")):
        link.symlink_to(target)
        with pytest.raises(IntegrityError, match=words):
            kt_hub.push(folder, REPO, token=WRITER)
        link.unlink()
    outside = tmp_path / "stage"
    outside.mkdir()
    (outside / "model").symlink_to(folder / "model")
    with pytest.raises(IntegrityError, match="link out of"):
        kt_hub.push(outside, REPO, token=WRITER)


def test_link_within_the_folder_is_published(hub: HubServer, client: Client, folder: Path) -> None:
    (folder / "model" / "copy.json").symlink_to("config.json")
    (folder / "model" / "merges.txt").touch()  # an empty file is one, too
    client.push(folder)
    assert (published(hub)["copy.json"], published(hub)["merges.txt"]) == (CONFIG, b"")


def test_folder_and_name_are_checked_first(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for where in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(RecipeError, match="publish"):
            kt_hub.push(where, REPO, token=WRITER)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("stages: []")
    with pytest.raises(RecipeError, match="output of a run"):
        kt_hub.push(tmp_path / "run", REPO, token=WRITER)
    for name in ("a/b/c", "a b", "-x/y", ""):
        with pytest.raises(RecipeError, match="namespace/name"):
            kt_hub.push(folder, name, token=WRITER)


# --- the model card ---------------------------------------------------------------------------------------------------


def a_card(**changes: Any) -> str:
    arguments: dict[str, Any] = {
        "model_name": "student",
        "task": "text-classification",
        "sentence": "Distillation helped: 0.91 against 0.88.",
        "base_model": "prajjwal1/bert-small",
        "base_model_relation": "finetune",
        "teacher": [("/home/me/runs/teacher", "0123abcd")],
        "datasets": [("nyu-mll/glue", "validation", "fingerprint1")],
        "metrics": [{"name": "accuracy", "value": 0.91, "low": 0.9, "high": 0.92, "seeds": 3}],
        "settings": {"learning_rate": 2e-5, "strategies": ["lora", {"distill": {"temperature": 4.0}}]},
        **changes,
    }
    return model_card(arguments.pop("model_name"), **arguments)


def test_card_has_a_model_index(hub: HubServer, client: Client, folder: Path) -> None:
    from huggingface_hub import ModelCard

    text = a_card()
    data = ModelCard(text).data
    assert data.base_model == "prajjwal1/bert-small" and data.base_model_relation == "finetune"
    assert (data.pipeline_tag, data.library_name, data.datasets) == (
        "text-classification",
        "transformers",
        ["nyu-mll/glue"],
    )
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_split) == ("accuracy", 0.91, "validation")
    assert result.metric_args == {"low": 0.9, "high": 0.92, "num_seeds": 3}
    assert "| accuracy | 0.91 | [0.9, 0.92] | 3 |" in text and "Distillation helped" in text
    assert "`teacher` at revision `0123abcd`" in text and "/home" not in text
    block = text.split("```yaml\n")[1].split("\n```")[0]
    assert yaml.safe_load(block) == {"learning_rate": 2e-5, "strategies": ["lora", {"distill": {"temperature": 4.0}}]}
    (folder / "model" / "README.md").write_text(text)
    assert client.push(folder)["created"], "the Hub accepts its metadata"


def test_card_of_a_merge_names_its_parents() -> None:
    from huggingface_hub import ModelCard

    parents = [("org/a", "1" * 40), ("org/b", None), ("/data/runs/c", None)]
    text = a_card(base_model=None, base_model_relation="merge", parents=parents, teacher=())
    assert ModelCard(text).data.base_model == ["org/a", "org/b"]
    assert "- parent: `c`" in text and "/data" not in text


def test_card_has_no_local_path_and_no_token(tmp_path: Path) -> None:
    secret = "hf_" + "AbCdEfGh" * 4 + "ij"
    text = a_card(
        base_model=str(tmp_path / "base"),
        sentence=f"trained on {tmp_path}/train.csv with {secret}",
        datasets=[(str(tmp_path / "train.csv"), "train", None)],
        settings={
            "data": tmp_path / "train.csv",
            "note": f"see {tmp_path}/notes",
            "windows": "C:\\Users\\me\\x",
            "t": secret,
        },
    )
    assert str(tmp_path) not in text and tmp_path.parent.name not in text and secret not in text and "Users" not in text
    assert "base_model" not in text.split("---")[1] and "- base model: `base`" in text and "train.csv" in text
    assert a_card(sentence="see https://huggingface.co/org/model/tree").count("https://huggingface.co/org/model/tree")


def test_card_survives_awkward_values() -> None:
    from huggingface_hub import ModelCard

    text = a_card(
        model_name="a: b\n---\nc | d",
        settings={"prompt": "```\nx\n```", "yes": "no", "colon": "a: b", "none": None, "shape": (1, 2)},
        metrics=[{"name": "f1", "value": float("nan")}, {"name": "accuracy", "value": 1, "dataset": "other/set"}],
    )
    data = ModelCard(text).data
    assert [result.metric_type for result in data.eval_results] == ["accuracy"]
    assert data.eval_results[0].dataset_name == "other/set" and "| f1 | nan |" in text
    block = text.split("````yaml\n")[1].split("\n````")[0]
    assert yaml.safe_load(block)["prompt"] == "```\nx\n```" and yaml.safe_load(block)["yes"] == "no"
    with pytest.raises(RecipeError, match="valid: finetune, adapter, merge, quantized"):
        a_card(base_model_relation="finetuned")


# --- the server itself ------------------------------------------------------------------------------------------------


def ask(server: Loopback, method: str, path: str, body: bytes = b"", token: str = WRITER) -> tuple[int, bytes]:
    host, port = server.server_address[:2]
    connection = http.client.HTTPConnection(str(host), port, timeout=10)
    connection.request(method, path, body, {"Authorization": f"Bearer {token}"} if token else {})
    response = connection.getresponse()
    answer = response.status, response.read()
    connection.close()
    return answer


def test_server_checks_blobs_and_parents(hub: HubServer) -> None:
    """A test against a server that takes everything would prove little."""
    head = hub.add_repo(REPO).oid
    oid = "0" * 64
    large = {"key": "lfsFile", "value": {"path": "x.safetensors", "algo": "sha256", "oid": oid, "size": 3}}

    def commit(parent: str | None, *operations: dict[str, Any]) -> int:
        header = {"key": "header", "value": {"summary": "s"} | ({"parentCommit": parent} if parent else {})}
        body = b"\n".join(json.dumps(line).encode() for line in (header, *operations))
        return ask(hub, "POST", f"/api/models/{REPO}/commit/main", body)[0]

    assert (commit(None), commit("1" * 40), commit(head, large)) == (409, 412, 400) and hub.head(REPO).oid == head
    assert ask(hub.storage, "PUT", f"/upload/{oid}/3", b"abc", token="")[0] == 400
    assert ask(hub, "GET", "/api/whoami-v2", token="hf_nobody")[0] == 401
    assert json.loads(ask(hub, "GET", "/api/whoami-v2")[1])["name"] == "writer"
    assert ask(hub, "HEAD", f"/{REPO}/resolve/main/.gitattributes") == (200, b"")


# --- the other process ------------------------------------------------------------------------------------------------

TEXTS = ["good film", "a bad and long film"]


class Lines(logging.Handler):
    """What kt_hf logs at INFO and above, as text."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def do_push(folder: str, repo: str, constants: dict[str, float] | None = None, **arguments: Any) -> dict[str, Any]:
    """`kt_hf.hub.push`, and what a user would be shown of its failure, and `--debug` besides."""
    kept = {name: getattr(kt_hub, name) for name in ("FIRST_WAIT_SECONDS", "TIMEOUT_SECONDS")}
    for name, value in ({"FIRST_WAIT_SECONDS": 0.01} | (constants or {})).items():
        setattr(kt_hub, name, value)
    lines = Lines()
    logging.getLogger("kt_hf").addHandler(lines)
    try:
        commit = kt_hub.push(folder, repo, **arguments)
        return {"sha": str(commit), "url": commit.url, "created": commit.created, "log": lines.lines}
    finally:
        logging.getLogger("kt_hf").removeHandler(lines)
        for name, value in kept.items():
            setattr(kt_hub, name, value)


def text_logits(model: Any, tokenizer: Any) -> list[list[float]]:
    import torch

    with torch.no_grad():
        return model.eval()(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.tolist()


def do_save_text(folder: str) -> dict[str, Any]:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *sorted({word for text in TEXTS for word in text.split()})]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", unk_token="[UNK]")
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SMALL, vocab_size=len(words), num_labels=3))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"logits": text_logits(model, tokenizer), "tokens": tokenizer(TEXTS)["input_ids"]}


def do_load_text(repo: str) -> dict[str, Any]:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(repo), AutoTokenizer.from_pretrained(repo)
    return {"logits": text_logits(model, tokenizer), "tokens": tokenizer(TEXTS)["input_ids"]}


def do_save_adapter(base: str, folder: str) -> dict[str, Any]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    before = text_logits(model, tokenizer)
    torch.manual_seed(1)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(folder)
    return {"base_logits": before, "logits": text_logits(adapted, tokenizer)}


def do_load_adapter(repo: str) -> dict[str, Any]:
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    model = AutoPeftModelForSequenceClassification.from_pretrained(repo, num_labels=3)
    base = model.peft_config["default"].base_model_name_or_path
    return {"logits": text_logits(model, AutoTokenizer.from_pretrained(base))}


def dual_logits(model: Any) -> list[list[float]]:
    import torch

    pixels = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)
    with torch.no_grad():
        outputs = model.eval()(input_ids=torch.tensor([[1, 2, 3], [4, 5, 6]]), pixel_values=pixels)
    return outputs.logits_per_image.tolist()


def do_save_dual(folder: str) -> dict[str, Any]:
    import torch
    from transformers import BertConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel, ViTConfig

    torch.manual_seed(0)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**SMALL, image_size=16, patch_size=8), BertConfig(**SMALL, vocab_size=11), projection_dim=8
    )
    model = VisionTextDualEncoderModel(config)
    model.save_pretrained(folder)
    return {"logits": dual_logits(model)}


def do_load_dual(repo: str) -> dict[str, Any]:
    from transformers import VisionTextDualEncoderModel

    return {"logits": dual_logits(VisionTextDualEncoderModel.from_pretrained(repo))}


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def describe(error: Exception) -> dict[str, Any]:
    text = {name: getattr(error, name, None) for name in ("cause", "remedy", "exit_code")}
    return {"error": type(error).__name__, "traceback": "".join(traceback.format_exception(error)), **text}


def work() -> None:
    """Answer each command on standard input with a line on standard output; everything else goes to standard error."""
    answers, sys.stdout = sys.stdout, sys.stderr
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    for line in sys.stdin:
        command = json.loads(line)
        action, env = command.pop("do"), command.pop("env")
        before = dict(os.environ)
        for name, value in env.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        try:
            reply = globals()[f"do_{action}"](**command)
        except Exception as error:
            reply = describe(error)
        os.environ.clear()
        os.environ.update(before)
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    work()
