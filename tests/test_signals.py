"""Faults 13: the first signal ends a training after its step, with a checkpoint; the second one at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kt_hf import checkpoint

ROOT = Path(__file__).parent.parent
RECIPE = """
import time
from kt_hf import Data, Evaluate, Model, Recipe, Strategy, Train, main, register
from kt_hf.digits import VIT

@register("strategy", "slow")
class Slow(Strategy):
    '''Makes every step and every evaluation take a while.'''
    def after_step(self, model, progress):
        time.sleep({sleep})
    def eval_model(self, model):
        time.sleep({evaluation})
        return model

recipe = Recipe(
    name="slow",
    data=Data("digits", "target", validation_size=50),
    model=Model(config="vit", config_overrides={{**VIT, "hidden_size": 16, "intermediate_size": 16,
                                                 "num_hidden_layers": 1, "num_attention_heads": 2}}),
    training={{"max_steps": {steps}, "per_device_train_batch_size": 4, "eval_steps": {every}, "logging_steps": 5,
               "report_to": "none", "num_threads": 1}},
    stages=[Train("one", strategies=["finetune", "slow"])],
)
if __name__ == "__main__":
    main(recipe)
"""


def start(tmp_path: Path, launcher: tuple[str, ...] = (), name: str = "out", env=None, **settings) -> subprocess.Popen:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.format(**{"sleep": 0.2, "evaluation": 0.0, "steps": 60, "every": 0, **settings}))
    command = [*(launcher or (sys.executable,)), str(recipe), "--output-dir", str(tmp_path / name)]
    return subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # a shell in the background ignores SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(child: subprocess.Popen, condition, what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if child.poll() is not None or time.monotonic() > end:
            child.kill()
            raise AssertionError(f"no {what}; the child said: {child.communicate()[0][-3000:]}")
        time.sleep(0.02)


def training(tmp_path: Path, child: subprocess.Popen) -> None:
    """Wait until steps are being made: the folder of the stage has been there for a while."""
    wait_for(child, (tmp_path / "out" / "one").is_dir, "stage")
    time.sleep(3.0)


def saved(tmp_path: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint.steps(tmp_path / "out" / "one" / "checkpoints")]


def rerun_equals_uninterrupted(tmp_path: Path) -> str:
    """Finish the interrupted run and an uninterrupted one, without the sleeping; all they leave is equal."""
    said = []
    for name in ("out", "whole"):
        child = start(tmp_path, name=name, sleep=0)
        said.append(child.communicate(timeout=200)[0])
        assert child.returncode == 0, said[-1][-3000:]
    models = [load_file(tmp_path / name / "one" / "model" / "model.safetensors") for name in ("out", "whole")]
    assert all((models[0][key] == models[1][key]).all() for key in models[0])
    facts = [json.loads((tmp_path / name / "one" / "stage.json").read_text()) for name in ("out", "whole")]
    assert facts[0]["curve"] == facts[1]["curve"] and facts[0]["evaluations"] == facts[1]["evaluations"]
    return said[0]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_after_the_step_with_a_checkpoint(number, code, tmp_path):
    child = start(tmp_path)
    training(tmp_path, child)
    child.send_signal(number)
    said = child.communicate(timeout=20)[0]
    assert child.returncode == code, said[-3000:]
    assert len(saved(tmp_path)) == 1 and 0 < saved(tmp_path)[0] < 60
    assert f"interrupted by {number.name}; saved at step {saved(tmp_path)[0]}" in said and "Traceback" not in said
    assert json.loads((tmp_path / "out" / "error.json").read_text())["code"] == code
    if number == signal.SIGTERM:
        step = saved(tmp_path)[0]
        assert f"resumed at step {step}" in rerun_equals_uninterrupted(tmp_path)
        assert not (tmp_path / "out" / "error.json").exists()


def test_the_same_signal_again_ends_at_once(tmp_path):
    child = start(tmp_path, sleep=30)  # a step that takes longer than anybody waits
    training(tmp_path, child)
    child.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert child.poll() is None, "the first one waits for the step"
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=5) == 143 and saved(tmp_path) == []
    child.stdout.close()


@pytest.mark.slow
def test_an_evaluation_is_left_and_made_up_for(tmp_path):
    """A signal within an evaluation does not wait for it; the resumed run begins with it."""
    child = start(tmp_path, sleep=0.02, evaluation=6, every=30)
    said = []
    for line in child.stdout:
        said.append(line)
        if "one: 60" in line or "plan:" in line:
            break
    wait_for(child, (tmp_path / "out" / "one").is_dir, "stage")
    time.sleep(4.0)  # thirty steps take a second, the evaluation six
    child.send_signal(signal.SIGTERM)
    said.append(child.communicate(timeout=30)[0])
    assert child.returncode == 143, "".join(said)[-3000:]
    assert saved(tmp_path) == [30], "".join(said)[-3000:]
    facts = json.loads((tmp_path / "out" / "one" / "checkpoints" / "step-000030" / "trainer.json").read_text())
    assert facts["evaluations"] == []
    every = {"every": 30}
    for name in ("out", "whole"):
        child = start(tmp_path, name=name, sleep=0, **every)
        text = child.communicate(timeout=200)[0]
        assert child.returncode == 0, text[-3000:]
    facts = [json.loads((tmp_path / name / "one" / "stage.json").read_text()) for name in ("out", "whole")]
    assert [e["step"] for e in facts[0]["evaluations"]] == [30, 60]
    assert facts[0]["evaluations"] == facts[1]["evaluations"] and facts[0]["curve"] == facts[1]["curve"]


@pytest.mark.slow
def test_two_ranks_end_together(tmp_path):
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    child = start(tmp_path, torchrun)
    training(tmp_path, child)
    child.send_signal(signal.SIGTERM)  # to the launcher, which passes it on
    child.communicate(timeout=60)
    assert len(saved(tmp_path)) == 1
    assert json.loads((tmp_path / "out" / "error.json").read_text())["code"] == 143


@pytest.mark.slow
def test_a_process_that_waits_in_c_ends_too(tmp_path):
    """A rank whose others never come: Python's own handlers do not run in there."""
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}
    child = start(tmp_path, env=env)
    wait_for(child, lambda: listens(29871), "rendezvous")
    time.sleep(1.0)
    began = time.monotonic()
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=30) == 143 and time.monotonic() - began > 5
    child.stdout.close()


def listens(port: int) -> bool:
    return any(f":{port:04X} " in Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6"))


def test_a_launcher_that_dies_takes_its_child_along(tmp_path):
    """Accelerate's launcher of one process dies of SIGKILL without telling its child."""
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu")
    child = start(tmp_path, launcher)
    training(tmp_path, child)
    assert alive(tmp_path), "the child itself must be seen, or the test sees nothing"
    child.kill()
    child.wait()
    end = time.monotonic() + 20
    while alive(tmp_path) and time.monotonic() < end:
        time.sleep(0.1)
    assert not alive(tmp_path) and len(saved(tmp_path)) == 1
    assert json.loads((tmp_path / "out" / "error.json").read_text())["code"] == 143
    child.stdout.close()


def alive(tmp_path: Path) -> list[int]:
    """Python processes that run the recipe itself, not its launcher."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if str(tmp_path / "recipe.py") in words[1:3]:
            found.append(int(path.parent.name))
    return found
