"""Out of memory: exit 6, what was in use at the height, what to change, and no process left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest

from kt_hf import failing

RECIPE = """
    import resource
    from kt_hf import Data, Model, Recipe, Strategy, Train, main, register

    @register("strategy", "squeeze")
    class Squeeze(Strategy):
        '''Leaves the process 200 MB more than it has.'''

        def ready(self, model, run):
            pages = int(open("/proc/self/statm").read().split()[0])
            limit = pages * resource.getpagesize() + 200 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "image_size": 8, "patch_size": 2}
    model = Model(config="vit", config_overrides=wide)
    training = {"per_device_train_batch_size": 800, "max_steps": 2, "dataloader_num_workers": 1, "report_to": "none"}
    stage = Train("a", model=model, training=training, strategies=["finetune", "squeeze"])
    if __name__ == "__main__":
        main(Recipe(data=Data("digits", "source"), stages=[stage]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are set as Linux has them")
def test_memory_that_runs_out_in_the_first_step(tmp_path):
    (tmp_path / "r.py").write_text(textwrap.dedent(RECIPE))
    command = [sys.executable, "r.py", "--output-dir", str(tmp_path / "out")]
    child = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    said = child.communicate(timeout=600)[1]
    assert child.returncode == 6, said[-2000:]
    assert "Traceback" not in said
    found = json.loads((tmp_path / "out" / "error.json").read_text())
    assert found["code"] == 6 and "out of memory" in found["cause"] and "GB in use" in found["cause"]
    for knob in ("per_device_train_batch_size", "forward_chunk_size", "gradient_checkpointing"):
        assert knob in found["remedy"]
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "[enforce fail at alloc_cpu.cpp:131] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8 bytes. Error code 12 (Cannot allocate memory)",
    ],
)
def test_what_the_libraries_say_is_understood(text):
    code, cause, remedy, _ = failing.describe(RuntimeError(text))
    assert code == 6 and cause.startswith("out of memory") and "per_device_train_batch_size" in remedy
