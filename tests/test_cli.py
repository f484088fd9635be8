"""The command `kt-hf`: what starts without torch, exit codes, and one line of cause with one of remedy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kt_hf import cli

HEAVY = ("torch", "pydantic", "yaml", "numpy", "transformers", "datasets", "accelerate", "kt_hf_plugins")


def kt_hf(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kt_hf.cli", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **environment}
    )


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """(exit code, what was said)."""
    with pytest.raises(SystemExit) as caught:
        cli.main(list(arguments))
    return int(caught.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["--version"], ["push", "--help"]])
def test_what_starts_without_heavy_libraries(arguments: list[str]):
    code = (
        "import sys\nfrom kt_hf import cli\n"
        f"try: cli.main({arguments!r})\nexcept SystemExit: pass\n"
        f"print('LOADED', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_import_of_the_package_is_cheap():
    code = f"import sys, kt_hf; print([m for m in {(*HEAVY, 'importlib.metadata', 'argparse')!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=Path(cli.__file__).parents[1],
    )
    assert done.stdout.strip() == "[]"


def test_list_names_every_kind_and_package(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(f"{kind}:" in out for kind in ("task", "strategy", "merge", "ensemble"))
    assert "finetune" in out and "kt_hf" in out


def test_list_check_tells_a_broken_plugin_by_name_and_code(tmp_path: Path):
    from test_registry import write_package

    write_package(tmp_path, "planted_bad", "raise RuntimeError('no luck')", strategy_broken="Bad")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    listed, checked = kt_hf("list", PYTHONPATH=path), kt_hf("list", "--check", PYTHONPATH=path)
    assert listed.returncode == 0 and "no luck" not in listed.stdout
    lines = {line.split()[0]: line for line in checked.stdout.splitlines() if line.startswith("  ")}
    assert "RuntimeError: no luck" in lines["broken"] and "planted_bad" in lines["broken"]
    assert all(line.endswith("ok") for name, line in lines.items() if name != "broken") and len(lines) >= 10
    assert checked.returncode == 1


@pytest.mark.parametrize("name", ["distill", "uniform_soup", "mean", "text-classification", "strategy:ema"])
def test_show_gives_settings_defaults_and_composition(name: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["show", name]) == 0
    out = capsys.readouterr().out
    assert "settings" in out and "composition:" in out
    if name == "distill":
        assert "default 2.0" in out and "required" in out and "arXiv:1503.02531" in out and "alpha=0.0" in out


def test_unknown_names_get_the_nearest(capsys: pytest.CaptureFixture[str]):
    code, said = fails(capsys, "show", "destill")
    assert (
        code == 2
        and "there is no plugin called 'destill'" in said
        and "did you mean 'distill'" in said
        and "Traceback" not in said
    )


def test_unknown_commands_and_options_are_usage_errors(capsys: pytest.CaptureFixture[str]):
    assert fails(capsys, "lst")[0] == 2
    assert fails(capsys, "list", "--chek")[0] == 2
    assert fails(capsys)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run"], 2, "RECIPE.yaml"),
        (["run", "missing.yaml"], 2, "missing.yaml"),
        (["predict", "no/such-folder-here", "a text", "--task", "nonsense"], 2, "nonsense"),
        (["report", "missing-run"], None, "missing-run"),
        (["new-plugin", "Not A Name"], 2, "no name for a plugin"),
        (["push", "missing-stage", "me/model", "--token-file", "missing-token"], 2, "missing-token"),
        (["push", "missing-stage", "me/model"], 2, "missing-stage"),
        (["check-plugin", "finetune", "nonsense"], 2, "nonsense"),
    ],
)
def test_mistakes_are_one_line_of_cause_and_one_of_remedy(
    arguments: list[str], code: int | None, said: str, capsys: pytest.CaptureFixture[str]
):
    found, text = fails(capsys, *arguments)
    assert found in ((code,) if code else (2, 4)) and said in text and "Traceback" not in text
    if "usage:" not in text:
        assert text.startswith("error: ") and len(text.strip().splitlines()) <= 2


def test_debug_shows_the_traceback(tmp_path: Path):
    assert "Traceback" not in kt_hf("show", "destill").stderr
    assert "Traceback" in kt_hf("show", "destill", "--debug").stderr


def test_a_closed_pipe_is_no_failure_to_talk_about():
    command = f"{sys.executable} -m kt_hf.cli list | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == "" and done.returncode in (0, 141)


def test_push_takes_its_token_from_a_file_and_never_says_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    from kt_hf import hub

    given: dict[str, Any] = {}

    def push(folder: str, repo: str, **rest: Any) -> Any:
        given.update(folder=folder, repo=repo, **rest)
        return SimpleNamespace(url="https://hub/me/model", created=True)

    monkeypatch.setattr(hub, "push", push)
    (tmp_path / "token").write_text("a-secret-token\n")
    assert (
        cli.main(
            ["push", "stage", "me/model", "--private", "--revision", "dev", "--token-file", str(tmp_path / "token")]
        )
        == 0
    )
    assert given == {
        "folder": "stage",
        "repo": "me/model",
        "private": True,
        "revision": "dev",
        "token": "a-secret-token",
    }
    captured = capsys.readouterr()
    assert "a-secret-token" not in captured.out + captured.err and "https://hub/me/model" in captured.out
    assert fails(capsys, "push", "stage", "me/model", "--token", "a-secret-token")[0] == 2


def test_run_goes_through_the_recipe_launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from kt_hf import launch

    seen: list[Any] = []
    monkeypatch.setattr(launch, "execute", lambda recipe, options, name: seen.append((recipe, options, name)))
    (tmp_path / "mine.yaml").write_text("stages:\n- train: a\n")
    assert (
        cli.main(["run", str(tmp_path / "mine.yaml"), "training.max_steps=3", "--output-dir", "out", "data.path=x"])
        == 0
    )
    recipe, options, name = seen[0]
    assert recipe == {"stages": [{"train": "a"}]} and name == "mine"
    assert options.settings == ["training.max_steps=3", "data.path=x"] and options.output_dir == "out"


def test_run_prints_the_plan_of_a_yaml_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vit = {"config": "vit", "config_overrides": {**sizes, "image_size": 8, "patch_size": 4}}
    recipe = {"data": {"path": "digits", "max_examples": 40}, "model": vit, "stages": [{"train": "mine"}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    output = tmp_path / "out"
    assert (
        cli.main(["run", str(tmp_path / "recipe.yaml"), "training.max_steps=3", "--print", "--output-dir", str(output)])
        == 0
    )
    out = capsys.readouterr().out
    assert "train mine" in out and "max_steps: 3" in out and not (output / "recipe.yaml").exists()


def test_predict_writes_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from kt_hf import inference

    monkeypatch.setattr(
        inference, "predict", lambda *a, **k: {"input": ["x"], "prediction": ["cat"], "probability": [0.75]}
    )
    assert cli.main(["predict", "model", "x"]) == 0
    assert capsys.readouterr().out.splitlines() == ["input  prediction  probability", "x      cat         0.7500"]
    assert cli.main(["predict", "model", "x", "--output", str(tmp_path / "a.jsonl")]) == 0
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"input": "x", "prediction": "cat", "probability": 0.75}
    assert fails(capsys, "predict", "model", "x", "--output", "a.docx")[0] == 2


def test_what_is_imported_is_left_out_of_collections_and_these_go_on(tmp_path):
    """In a process of its own, and where the import fails, too."""
    code = (
        "import gc\nfrom kt_hf.launch import uncollected\n"
        "with uncollected():\n    import decimal; found = [gc.isenabled()]\n"
        "found += [gc.isenabled(), gc.get_freeze_count() > 1000]\n"
        "try:\n    with uncollected():\n        import no_such_module\n"
        "except ImportError:\n    found.append(gc.isenabled())\n"
        "gc.disable()\nwith uncollected():\n    pass\nfound.append(gc.isenabled())\nprint(found)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "[False, True, True, True, False]"
