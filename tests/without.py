"""`without.py SCRIPT ARGUMENT...` runs a script as if what gpu_check.py must not need were not installed."""

import runpy
import sys

NAMES = {"datasets", "evaluate", "open_clip", "pydantic", "torchvision", "sklearn", "pyarrow", "tensorboard"}


class Without:
    """A finder that does not find these."""

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in NAMES else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


if __name__ == "__main__":
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
