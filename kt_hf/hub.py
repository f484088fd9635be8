"""The Hub: publish a model directory in one commit, describe it in a model card, say plainly what went wrong.

`push` sends all files in a single commit whose parent is the head that was read just before, so that readers of the
repository see either the old tree or the new one. It owns every retry: the client's own back-off sleeps as long as a
server asks it to, and never repeats the one request that matters, the commit. When the reply to that request is lost,
the head is read again: our files are there -> done, head unchanged -> again, anything else -> a conflict.

All failures end in `HubError` (exit code 5), except files that must not be published: `IntegrityError` (exit code 4).
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kt_hf.errors import HubError, IntegrityError, KtError, RecipeError

logger = logging.getLogger(__name__)

# Tests shorten the waits; nothing else changes these.
ATTEMPTS = 4
FIRST_WAIT_SECONDS = 1.0  # doubles with each attempt
MAX_WAIT_SECONDS = 30.0  # a server that asks for more is not waited for
TIMEOUT_SECONDS = 60.0  # to connect, and for each read or write; the client's own default is to wait forever

PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
# What from_pretrained may pick up from the top of a repository. Left over from an earlier push, such a file would be
# loaded in place of, or together with, the new ones, so the commit deletes it.
LOADED = PICKLES | {".safetensors", ".json", ".txt", ".model", ".jinja"}
TRY_AGAIN = frozenset({408, 429, 500, 502, 503, 504})

_TOKEN_LIKE = re.compile(r"(?<![A-Za-z0-9_])(?:hf|api_org)_(?:(?:oauth|jwt)_[\w.\-]+|[A-Za-z0-9]{8,})")
_REAL_TOKEN = re.compile(rb"(?<![A-Za-z0-9_])(?:hf|api_org)_(?:oauth_|jwt_)?[A-Za-z0-9]{30,}")
_BEARER = re.compile(r"(?i)\bbearer\s+[^\s'\",]+")


class Commit(str):
    """The sha of the commit that holds the files; `url` is its page, `created` is False when nothing had changed."""

    url: str
    created: bool

    def __new__(cls, sha: str, url: str, created: bool) -> Commit:
        commit = super().__new__(cls, sha)
        commit.url, commit.created = url, created
        return commit


def push(
    folder: str | Path,
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    expected_parent: str | None = None,
) -> Commit:
    """Publish a model directory, or a stage directory that holds `model/`, as one commit to `repo`.

    The repository and the branch `revision` (default `main`) are created when they do not exist. Hidden files are left
    out. Files of an earlier model at the top of the repository that loading would pick up are deleted in the same
    commit; everything else in it stays. When the head already holds the same files, nothing is committed.
    `expected_parent` is the commit that the caller believes to be the head.

    Raises:
        HubError: no token, not accepted, not permitted, conflict, offline, network or server failure.
        IntegrityError: a pickle, a link out of the folder, or a file that holds a token.
        RecipeError: no such folder, a malformed repository name, or an adapter whose base is a folder here.
    """
    root = _model_folder(Path(folder))
    files = _files_to_publish(root)
    _check_name(repo)
    token = _usable_token(token)
    _refuse_tokens(files, token)
    _refuse_a_base_at_home(files)
    from huggingface_hub import HfApi

    publication = _Publication(
        api=HfApi(token=token, library_name="kt_hf"),
        repo=repo,
        branch=revision or "main",
        private=private,
        message=scrub(commit_message or f"Publish {_stage_name(root)} with kt_hf", token),
        files=files,
        parent=expected_parent,
        secret=token,
    )
    with _guarded_client():
        return publication.run()


def scrub(text: str, *secrets: str) -> str:
    """The text without anything that looks like a Hub token, without the environment's tokens and without `secrets`."""
    known = {os.environ.get(name, "").strip() for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")} | set(secrets)
    for secret in sorted(known, key=len, reverse=True):
        if len(secret) >= 4:  # shorter ones would blank out ordinary words
            text = text.replace(secret, "***")
    return _TOKEN_LIKE.sub("***", _BEARER.sub("Bearer ***", text))


# --- what is published ------------------------------------------------------------------------------------------------


def _model_folder(folder: Path) -> Path:
    """`folder/model` of a stage directory, otherwise `folder` itself."""
    remedy = "give a stage directory or its model/ folder"
    root = folder / "model" if (folder / "model").is_dir() and not (folder / "config.json").exists() else folder
    if not root.is_dir():
        raise RecipeError(f"there is no folder '{folder}' to publish", remedy)
    if (root / "checkpoints").is_dir() or (root / "recipe.yaml").exists():
        raise RecipeError(f"'{folder}' is the output of a run, not a finished model", remedy)
    if not root.resolve().is_relative_to(folder.resolve()):
        raise IntegrityError(f"'{root}' is a link out of '{folder}'", "publish the folder that it points to")
    return root


def _stage_name(root: Path) -> str:
    root = root.resolve()
    return root.parent.name if root.name == "model" else root.name


def _files_to_publish(root: Path) -> dict[str, Path]:
    """The regular files below `root` by their path in the repository, hidden ones left out."""
    files: dict[str, Path] = {}
    for where, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (Path(where) / name).is_symlink():
                raise IntegrityError(f"'{Path(where) / name}' is a link to a folder", "put the files themselves there")
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(where) / name
            files[path.relative_to(root).as_posix()] = _publishable(path, root)
    if not files:
        raise RecipeError(f"'{root}' holds no files to publish", "give a stage directory or its model/ folder")
    return files


def _publishable(path: Path, root: Path) -> Path:
    target = path.resolve()
    if not target.is_relative_to(root.resolve()):
        raise IntegrityError(f"'{path}' is a link out of the folder", "put the file itself there, or remove the link")
    if not target.is_file():
        raise IntegrityError(f"'{path}' is not a regular file", "remove it from the folder")
    if path.suffix.lower() in PICKLES:
        raise IntegrityError(
            f"'{path}' may be a pickle, which runs code when it is loaded", "save it as safetensors, or remove it"
        )
    return target


def _refuse_tokens(files: Mapping[str, Path], token: str) -> None:
    """A published token is a stolen one. Weights are not searched: they hold numbers."""
    for name, path in files.items():
        if path.suffix.lower() in {".safetensors", ".parquet", ".arrow"}:
            continue
        if path.stat().st_size == 0:
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = content.find(token.encode()) >= 0 or _REAL_TOKEN.search(content) is not None
        if found:
            raise IntegrityError(f"'{name}' holds a Hub token", "remove it from the file, and revoke the token")


def _refuse_a_base_at_home(files: Mapping[str, Path]) -> None:
    """An adapter whose base is a folder here could be loaded by nobody else."""
    path = files.get("adapter_config.json")
    base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") if path else None
    if isinstance(base, str) and (base.startswith(("/", ".", "~")) or Path(base).exists()):
        raise RecipeError(
            f"the adapter's base is the folder '{Path(base).name}' of this machine, which nobody else has",
            "train with lora.save=merged, or publish the base and put its name into base_model_name_or_path of "
            "adapter_config.json",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_blob_sha1(path: Path) -> str:
    """The name that git gives to the content: sha1 of a header with the size in bytes, then the bytes."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _is_same(path: Path, remote: Any) -> bool:
    """Whether the repository's file has the local file's content, by what the Hub keeps of it: sha256 or git's sha1."""
    if remote is None or remote.size != path.stat().st_size:
        return False
    return remote.lfs.sha256 == _sha256(path) if remote.lfs else remote.blob_id == _git_blob_sha1(path)


# --- one commit -------------------------------------------------------------------------------------------------------


@dataclass
class _Publication:
    """One call of `push`, over all of its attempts."""

    api: Any
    repo: str
    branch: str
    private: bool
    message: str
    files: dict[str, Path]
    parent: str | None  # the head that the commit builds on; once set, it may not change
    secret: str = field(repr=False)
    exists: bool = False  # the repository
    sent: bool = False  # a commit, or at least its uploads
    _additions: list[Any] = field(default_factory=list)

    def run(self) -> Commit:
        """Attempt until done, refused, or out of attempts."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self.attempt()
            except KtError:
                raise
            except Exception as error:
                # Only its text is kept: the exception itself may lead to requests, and those hold the token.
                fault = _explain(error, self.repo, self.api.endpoint)
            wait = fault.wait or FIRST_WAIT_SECONDS * 2 ** (attempt - 1)
            if not fault.again or attempt == ATTEMPTS or wait > MAX_WAIT_SECONDS:
                break
            cause = scrub(fault.cause, self.secret)
            logger.warning("%s; attempt %d of %d in %.3g s", cause, attempt + 1, ATTEMPTS, wait)
            time.sleep(wait)
        return self.give_up(fault)

    def attempt(self) -> Commit:
        if not self.exists:
            self.repo = self.api.create_repo(self.repo, private=self.private or None, exist_ok=True).repo_id
            self.exists = True
        head, remote = self.read_head()
        if done := self.found(head, remote):
            return done
        if self.parent is not None and not (head or "").startswith(self.parent):
            raise _Fault(
                f"{self.repo} has a commit that was not expected: its head is {(head or 'empty')[:12]}, "
                f"not {self.parent[:12]}",
                "look at that commit, then push again to publish on top of it",
            )
        self.parent = head
        return self.commit(head, remote)

    def commit(self, head: str | None, remote: Mapping[str, Any]) -> Commit:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if not self._additions:  # kept over attempts: they remember what was hashed and uploaded
            self._additions = [CommitOperationAdd(name, str(path)) for name, path in self.files.items()]
        deletions = [CommitOperationDelete(name) for name in self.stale(remote)]
        if deletions:
            logger.info("deleting files of an earlier model: %s", ", ".join(d.path_in_repo for d in deletions))
        self.sent = True
        info = self.api.create_commit(
            self.repo,
            [*self._additions, *deletions],
            commit_message=self.message,
            revision=self.branch,
            parent_commit=head,
        )
        logger.info("published %d files: %s", len(self.files), info.commit_url)
        return Commit(info.oid, info.commit_url, created=True)

    def read_head(self) -> tuple[str | None, dict[str, Any]]:
        """The branch's commit and its files. The tree is read by the commit's sha, so that the two belong together."""
        from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

        try:
            info = self.api.model_info(self.repo, revision=self.branch)
        except RevisionNotFoundError:
            if self.branch == "main":
                raise
            self.api.create_branch(self.repo, branch=self.branch, exist_ok=True)
            info = self.api.model_info(self.repo, revision=self.branch)
        if self.private and info.private is False:
            raise _Fault(
                f"{self.repo} exists and is public, but a private repository was asked for",
                "make it private in its settings, or choose another name",
            )
        try:
            tree = list(self.api.list_repo_tree(self.repo, recursive=True, revision=info.sha))
        except EntryNotFoundError:  # a commit without files
            tree = []
        return info.sha, {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}

    def stale(self, remote: Mapping[str, Any]) -> list[str]:
        old = (name for name in remote if name not in self.files and "/" not in name and not name.startswith("."))
        return sorted(name for name in old if Path(name).suffix.lower() in LOADED)

    def found(self, head: str | None, remote: Mapping[str, Any]) -> Commit | None:
        """The head as our commit, if it already holds what we publish."""
        if head is None or self.stale(remote):
            return None
        if not all(_is_same(path, remote.get(name)) for name, path in self.files.items()):
            return None
        if self.sent:
            logger.info("the reply was lost, but the commit is there: %s", head)
        else:
            logger.info("%s already holds the same files: nothing to commit", self.repo)
        return Commit(head, f"{self.api.endpoint}/{self.repo}/commit/{head}", created=self.sent)

    def give_up(self, fault: _Fault) -> Commit:
        """Raise the error, unless the commit turns out to have been accepted all the same."""
        outcome = "nothing was published"
        if self.sent:
            try:
                head, remote = self.read_head()
                if done := self.found(head, remote):
                    return done
            except Exception:
                outcome = "it is not known whether the commit was accepted; pushing again is safe either way"
        raise HubError(scrub(f"{fault.cause} ({outcome})", self.secret), scrub(fault.remedy, self.secret))


# --- the client, bounded ----------------------------------------------------------------------------------------------


class _Fault(Exception):
    """What went wrong in words for the user, and whether to try again; `wait`: the seconds the server asked for."""

    def __init__(self, cause: str, remedy: str, again: bool = False, wait: float = 0.0):
        super().__init__(cause)
        self.cause, self.remedy, self.again, self.wait = cause, remedy, again, wait


@contextmanager
def _guarded_client() -> Iterator[None]:
    """The client's HTTP session with time-outs, without sleeps of its own, and without redirects to other hosts.

    Faults are raised as `_Fault`, which the client's back-off does not catch, so that they arrive here at once.
    """
    from huggingface_hub import get_session

    client: Any = get_session()
    send, hooks = client.send, client.event_hooks
    client.send = _bounded(send)
    client.event_hooks = {**hooks, "response": [*hooks.get("response", []), _check_response]}
    try:
        yield
    finally:
        client.send, client.event_hooks = send, hooks


def _bounded(send: Callable[..., Any]) -> Callable[..., Any]:
    """`send` with a time-out on every request (parts of the client ask for none) and network errors in words."""

    def bounded(request: Any, **kwargs: Any) -> Any:
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), TIMEOUT_SECONDS)
        try:
            return send(request, **kwargs)
        except Exception as error:
            if not any(cls.__name__ == "TransportError" for cls in type(error).__mro__):
                raise
            what = "did not answer in time" if "Timeout" in type(error).__name__ else "cannot be reached"
            detail = _one_line(str(error)) or type(error).__name__
            raise _Fault(
                f"{request.url.scheme}://{_host(request.url)} {what}: {detail}",
                "check the network, proxies and HF_ENDPOINT, then push again",
                # A request that cannot be written at all, or to no known kind of address, will not get better.
                again=type(error).__name__ not in {"LocalProtocolError", "UnsupportedProtocol"},
            ) from None

    return bounded


def _check_response(response: Any) -> None:
    """Stop at redirects that leave the host, at statuses that call for another attempt, and at errors sent as text."""
    request, status = response.request, response.status_code
    if response.has_redirect_location and "authorization" in request.headers:
        target = request.url.join(response.headers["location"])
        if _leaves(request.url, target):
            raise _Fault(
                f"{_host(request.url)} redirects to another host, {_host(target)}, which was not followed",
                "check HF_ENDPOINT and proxies; neither the token nor the model was sent there",
            )
    if status in TRY_AGAIN:
        raise _busy(status, _host(request.url), response.headers.get("retry-after", ""))
    if request.url.path.endswith("/api/repos/create") and status == 409:
        response.read()
        if "conflicting operation" in response.text:  # the client would repeat it at once, forever
            raise _busy(status, _host(request.url), "")
    if request.url.path.endswith("/api/validate-yaml") and status > 400:
        from huggingface_hub.utils import hf_raise_for_status

        response.read()
        hf_raise_for_status(response)  # the client would read it as JSON first


def _host(url: Any) -> str:
    """Host and port, without the rest of an address, which may be signed."""
    return str(url.host) + (f":{url.port}" if url.port else "")


def _leaves(source: Any, target: Any) -> bool:
    if source.host != target.host:
        return True
    upgraded = (source.scheme, source.port, target.scheme, target.port) == ("http", None, "https", None)
    return not upgraded and (source.scheme, source.port) != (target.scheme, target.port)


def _busy(status: int, host: str, retry_after: str) -> _Fault:
    wait = float(retry_after) if retry_after.strip().isdigit() else 0.0
    asks = f" and asks to wait {wait:.0f} s" if wait else ""
    what = "limits the number of requests" if status == 429 else "is busy or failing"
    later = (
        f"push again in {wait:.0f} s or later" if wait else "push again later; https://status.huggingface.co tells more"
    )
    return _Fault(f"{host} {what}: it answers {status}{asks}", later, again=True, wait=wait)


# --- errors in words --------------------------------------------------------------------------------------------------


def _explain(error: BaseException, repo: str, endpoint: str) -> _Fault:
    """The fault behind an exception of the client, which may be wrapped in others."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _Fault):
            return cause
        if isinstance(cause, OfflineModeIsEnabled):
            return _offline()
        if (response := getattr(cause, "response", None)) is not None:
            message = getattr(cause, "server_message", None) or ""
            return _refused(response.status_code, _one_line(message), repo, endpoint)
        cause = cause.__cause__
    if isinstance(error, KeyError | TypeError | AttributeError | json.JSONDecodeError):
        return _Fault(
            f"the reply of {endpoint} is not what a Hub sends ({type(error).__name__}: {_one_line(str(error))})",
            "check HF_ENDPOINT and proxies: a login page in between is a common reason",
        )
    what = f"{type(error).__name__}: {_one_line(str(error))}"
    return _Fault(f"publishing to {repo} failed: {what}", "mend what it names, then push again")


def _refused(status: int, message: str, repo: str, endpoint: str) -> _Fault:
    said = f" ({message})" if message else ""
    tokens = f"{endpoint}/settings/tokens"
    words = {
        401: ("the Hub does not accept the token", f"make one with write access at {tokens}, then `hf auth login`"),
        403: (f"the token may not write to {repo}", f"give it write access at {tokens}, or choose another repository"),
        404: (f"{repo} was not found at {endpoint}", "check the name, and that the token may see the repository"),
        409: (f"{repo} was changed by someone else meanwhile", "look at the new commit, then push again"),
        413: (f"the Hub refuses the size of the request for {repo}", "publish fewer or smaller files"),
    }
    words[402], words[412] = words[403], words[409]
    cause, remedy = words.get(status, (f"the Hub refuses to publish {repo}: it answers {status}", "mend what it names"))
    return _Fault(f"{cause}{said}", remedy)


def _offline() -> _Fault:
    return _Fault("publishing needs the network, but offline mode is on", "unset HF_HUB_OFFLINE and push again")


def _one_line(text: str, limit: int = 200) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _check_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        cause = f"'{scrub(str(repo))}' is not the name of a repository: {scrub(_one_line(str(error)))}"
        raise RecipeError(cause, "write it as namespace/name") from None


def _usable_token(token: str | None) -> str:
    """The given token, or the one that the Hugging Face tools would use; checked before anything is sent."""
    from huggingface_hub import get_token, is_offline_mode

    if is_offline_mode():
        fault = _offline()
        raise HubError(fault.cause, fault.remedy)
    if token is None:
        try:
            token = get_token()
        except Exception as error:
            raise HubError(f"no Hub token: {scrub(_one_line(str(error)))}", "run `hf auth login`") from None
    token = (token or "").strip()
    if not token:
        raise HubError("there is no Hub token", "run `hf auth login`, or set HF_TOKEN to a token with write access")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise HubError("the Hub token holds characters that no token has", "copy it again from the Hub's settings page")
    return token
