"""Trains in a process of its own that kills itself: `resume_child.py FOLDER TEACHER STEP`."""

import os
import signal
import sys
from pathlib import Path

import conftest  # noqa: F401  the environment first
import test_resume

from kt_hf import Strategy


class Kill(Strategy):
    """SIGKILL after the update of a step: nothing is flushed, nothing is cleaned up."""

    def __init__(self, step: int):
        super().__init__()
        self.left = step

    def after_step(self, model, progress):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    folder, teacher, step = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    test_resume.trainer(folder, "text", "lora+distill+ema", teacher, {"kill": Kill(step)}).run()
