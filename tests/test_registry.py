"""The registry: what is found without importing anything, and that a broken plugin hurts nobody else."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kt_hf import Strategy, probing, registry
from kt_hf.errors import RecipeError

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install packages as pip would leave them: a module and a dist-info folder on sys.path."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(package: str, source: str, **points: str) -> None:
        write_package(tmp_path, package, source, **points)
        registry.refresh()

    registry.refresh()
    yield install
    registry.refresh()
    for name in [n for n in sys.modules if n.startswith("planted_")]:
        del sys.modules[name]


def write_package(folder: Path, package: str, source: str, **points: str) -> None:
    (folder / f"{package}.py").write_text(source)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    groups: dict[str, list[str]] = {}
    for name, attribute in points.items():
        kind, _, name = name.partition("_")
        groups.setdefault(kind, []).append(f"{name} = {package}:{attribute}")
    text = "".join(f"[kt_hf.{kind}]\n" + "\n".join(lines) + "\n" for kind, lines in groups.items())
    (info / "entry_points.txt").write_text(text)


GOOD = '''
from kt_hf import Strategy
class Good(Strategy):
    """Does nothing."""
'''


def others_work() -> bool:
    return all(registry.load("strategy", name) for name in ("finetune", "ema", "distill"))


def test_built_in_plugins_come_through_entry_points():
    found = registry.entries()["strategy", "finetune"]
    assert found.target == "kt_hf_plugins.finetune:Finetune" and found.distribution.replace("-", "_") == "kt_hf"


def test_an_installed_plugin_is_listed_without_import_and_loaded_when_named(install: Install):
    install("planted_good", GOOD, strategy_planted="Good")
    assert "planted" in registry.names("strategy") and "planted_good" not in sys.modules
    assert issubclass(registry.load("strategy", "planted"), Strategy)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
        ("import a_library_that_nobody_has", "a_library_that_nobody_has"),
        ("this is no Python", "SyntaxError"),
        ("raise SystemExit('I need a GPU')", "I need a GPU"),
        ("x = 1", "AttributeError"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_named_and_hurts_nobody(install: Install, source: str, said: str):
    install("planted_bad", source, strategy_bad="Good")
    assert "bad" in registry.names("strategy")
    with pytest.raises(RecipeError) as caught:
        registry.load("strategy", "bad")
    assert "strategy 'bad' of package planted_bad" in caught.value.cause and said in caught.value.cause
    assert others_work()


def test_two_packages_with_one_name_are_both_refused_by_name(install: Install):
    install("planted_one", GOOD, strategy_twice="Good", strategy_mine="Good")
    install("planted_two", GOOD, strategy_twice="Good")
    with pytest.raises(RecipeError, match="planted_one and by planted_two"):
        registry.load("strategy", "twice")
    assert registry.load("strategy", "mine").__name__ == "Good" and others_work()


def test_a_built_in_name_stays_with_kt_hf_and_the_other_is_shown(install: Install):
    install("planted_thief", GOOD, strategy_ema="Good")
    assert registry.load("strategy", "ema").__name__ == "Ema"
    assert [(e.name, e.distribution) for e in registry.shadowed()] == [("ema", "planted_thief")]


def test_another_api_version_is_refused(install: Install):
    install("planted_old", GOOD + "    api_version = 99\n", strategy_old="Good")
    with pytest.raises(RecipeError, match="plugin API 99"):
        registry.load("strategy", "old")
    assert others_work()


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(RecipeError) as caught:
        registry.find("strategy", "finetunes")
    assert "did you mean 'finetune'" in caught.value.remedy


def test_register_is_for_this_process_and_refuses_taken_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registry, "_registered", {})

    @registry.register("strategy", "from-a-notebook", paper="A paper")
    class Mine(Strategy):
        """Does nothing."""

    assert registry.load("strategy", "from-a-notebook") is Mine and Mine.paper == "A paper"
    registry.register("strategy", "from-a-notebook")(Mine)  # a cell that is run again
    with pytest.raises(RecipeError, match="already registered"):
        registry.register("strategy", "ema")(Mine)
    with pytest.raises(RecipeError, match="unknown kind"):
        registry.register("strategies", "x")


def test_probing_says_what_is_wrong_with_which(install: Install):
    install("planted_good", GOOD, strategy_good="Good", merge_wrong="Good")
    install("planted_dead", "import os; os._exit(3)", strategy_dead="Good")
    install("planted_killed", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)", strategy_killed="Good")
    install("planted_loud", "print('hello'); raise ValueError('no')", strategy_loud="Good")
    wanted = ["good", "wrong", "dead", "killed", "loud", "finetune"]
    found = {
        e.name: problem
        for e, problem in probing.probe([e for e in registry.entries().values() if e.name in wanted]).items()
    }
    assert found["good"] == "" and found["finetune"] == ""
    assert "no subclass of kt_hf.MergeMethod" in found["wrong"]
    assert "exit code 3" in found["dead"] and "signal 9" in found["killed"] and "ValueError: no" in found["loud"]
    assert not any(name in sys.modules for name in ("planted_good", "planted_dead", "planted_loud"))


def test_a_recipe_finds_its_task_beside_a_broken_one(install: Install):
    """Tasks are tried one by one where the data decide: a broken one of somebody else's is passed over."""
    from kt_hf import Data, reading, roles

    install("planted_task", "raise SystemExit(1)", task_broken="Good")
    features = reading.read(Data("digits"))["train"].features
    assert [name for name, _ in roles.fitting_tasks(features, None)] == ["image-classification"]
