"""What code depends on, read from files: a module's text and that of all it imports, directly or not.

Nothing is run or imported for it. What is not seen: modules that are imported by a computed name, and files that code
reads.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import sys
import uuid
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import kt_hf

_THIS_PROCESS = uuid.uuid4().hex
MANY_FILES = 500
"""Of a package, more than are read and parsed."""


def digest(names: Iterable[str]) -> str:
    """A hash of the code of these modules with all that they import.

    Installed packages count by their version, but for those that the modules themselves are in; packages of very many
    files that lie elsewhere (a library's own checkout) by when their files were written. Code without a file (a
    notebook), or whose file was written after this process began, so that what runs may be older, gives a hash that no
    other process has.
    """
    roots = set(names)
    own = {name.partition(".")[0] for name in roots}
    parts, waiting, seen = [f"python {sys.version}"], sorted(roots), set[str]()
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        if name in seen or (top in sys.stdlib_module_names and name not in roots):
            continue
        seen.add(name)
        path = _file(name)
        if path is None:
            parts.append(f"{name} {_THIS_PROCESS if name in roots else ''}")
        elif top not in own and any(_installed(top, folder) for folder in path.parents):
            parts.append(f"{top} {_version(top)}")
        elif top not in own and (written := _of_many_files(top)):
            parts.append(f"{top} {written}")
        else:
            text, imported = _read(path, name)
            parts.append(f"{name} {text}")
            waiting += imported
    return hashlib.sha256("\n".join(sorted(set(parts))).encode()).hexdigest()


def _file(name: str) -> Path | None:
    """Where a module's code is; None for one that has no file, or that is not there."""
    module = sys.modules.get(name)
    if module is not None:
        file = getattr(module, "__file__", None)
        return Path(file) if file and Path(file).is_file() else None
    top, *rest = name.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    for word in rest:  # not by `find_spec`, which would import the packages on the way
        if spec is None or spec.submodule_search_locations is None:
            return None
        spec = PathFinder.find_spec(f"{spec.name}.{word}", list(spec.submodule_search_locations))
    return Path(spec.origin) if spec is not None and spec.origin and Path(spec.origin).is_file() else None


@functools.cache
def _installed(top: str, folder: Path) -> bool:
    """Whether a package was installed into a folder: an environment's, or one that was named to pip, in which code of
    one's own may lie as well."""
    if folder.name in ("site-packages", "dist-packages"):
        return True
    return next(folder.glob("*.dist-info"), None) is not None and top in _distributed()


@functools.cache
def _distributed() -> set[str]:
    """Top-level names of all distributions."""
    return set(importlib.metadata.packages_distributions())


@functools.cache
def _of_many_files(top: str) -> str:
    """When the files of a package were written, if it has too many to read one by one; empty for one that has few."""
    path = _file(top)
    if path is None or path.name != "__init__.py":
        return ""
    files = [(str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(path.parent.rglob("*.py"))]
    if len(files) <= MANY_FILES:
        return ""
    late = _THIS_PROCESS if max(written for _, written, _ in files) >= kt_hf.BEGAN * 1e9 else ""
    return hashlib.sha256(repr(files).encode()).hexdigest() + late


@functools.cache
def _version(top: str) -> str:
    """An installed package's version; of a package that goes by another name than its distribution, when it was
    installed."""
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        path = _file(top)
        return "" if path is None else str(path.stat().st_mtime_ns)


def _read(path: Path, name: str) -> tuple[str, list[str]]:
    """(what stands for the file's content, the modules that it may import)."""
    facts = path.stat()
    text, imported = _parsed(path, facts.st_mtime_ns, facts.st_size)
    if facts.st_mtime >= kt_hf.BEGAN:
        text += _THIS_PROCESS
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return text, [found for level, base, word in imported for found in _names(package, level, base, word)]


@functools.lru_cache(1024)
def _parsed(path: Path, mtime: int, size: int) -> tuple[str, list[tuple[int, str, str]]]:
    content = path.read_bytes()
    try:
        found = list(_imports(ast.parse(content))) if path.suffix == ".py" else []
    except SyntaxError:  # a file that nobody could have imported
        found = []
    return hashlib.sha256(content).hexdigest(), found


def _imports(node: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(dots before the name, module, name in it) of every import, also of those within functions."""
    if isinstance(node, ast.Import):
        yield from ((0, alias.name, "") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from ((node.level, node.module or "", alias.name) for alias in node.names)
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for branch in node.orelse:  # what is imported for type checkers does nothing
            yield from _imports(branch)
    else:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.expr):
                yield from _imports(child)


def _names(package: str, level: int, base: str, word: str) -> Iterator[str]:
    """The modules that an import may name: all packages on the way; for `from a import b` a.b, or where b is from."""
    if level:
        parents = package.split(".")
        base = ".".join([*parents[: len(parents) - level + 1], *([base] if base else [])])
    words = base.split(".")
    yield from (".".join(words[:i]) for i in range(1, len(words) + 1))
    if word and word != "*":
        source = getattr(vars(sys.modules[base]).get(word), "__module__", None) if base in sys.modules else None
        if isinstance(source, str) and source in sys.modules:
            yield source
        elif _file(f"{base}.{word}") is not None:
            yield f"{base}.{word}"
