"""`main`: what the last line of a recipe file calls. Reads the command line, runs the recipe, turns faults into exit
codes.

Torch is not imported before the grammar has been checked.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from kt_hf import failing, signals
from kt_hf import recipe as grammar
from kt_hf.errors import Collector


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    epilog = "settings: dotted key=value, such as training.max_steps=60"
    p = argparse.ArgumentParser(prog=prog, description="Run a recipe.", epilog=epilog, allow_abbrev=False)
    p.add_argument("settings", nargs="*", metavar="key=value", help="overrides; lists are entered by index or by name")
    p.add_argument("--config", metavar="FILE", help="YAML file of further settings, or of a whole recipe")
    p.add_argument("--output-dir", metavar="DIR", help="default: runs/<recipe>")
    p.add_argument(
        "--print", action="store_true", dest="print_only", help="print the resolved recipe and the plan, then stop"
    )
    timed = "as --print, and time three steps of every training on its own data; the output folder stays as it is"
    p.add_argument("--time-steps", action="store_true", help=timed)
    p.add_argument("--overwrite", action="store_true", help="set the former content of the output folder aside")
    changed = "continue a run although this setting has changed"
    p.add_argument("--allow-changed", metavar="KEY", action="append", default=[], help=changed)
    p.add_argument("--debug", action="store_true", help="tracebacks and more log lines")
    return p


def main(recipe: Any, argv: Sequence[str] | None = None) -> Any:
    """Run a recipe with the overrides of the command line; exits the process with the code of a failure."""
    options = parser().parse_intermixed_args(argv)
    name = Path(sys.argv[0]).stem or "recipe"
    return execute(recipe, options, name)


def execute(recipe: Any, options: argparse.Namespace, name: str) -> Any:
    """Run with parsed options. A failure is one line of cause and one of remedy, `error.json`, and an exit code."""
    output: list[Path] = [Path(options.output_dir)] if options.output_dir else []
    set_up_logging(options.debug)
    signals.install()
    try:
        return _run(recipe, options, name, output)
    except (Exception, KeyboardInterrupt) as error:
        if options.debug:
            logging.getLogger("kt_hf").exception("the failure in full")
        folder = output[0] if output and not _only_looks(options) else None
        failing.fail(error, folder, create=bool(options.output_dir))


def _only_looks(options: argparse.Namespace) -> bool:
    return options.print_only or options.time_steps


class _Console(logging.StreamHandler):
    """Our own handler, so that it can be told from those which others attach. It says no token, nor does a traceback
    in it."""

    def format(self, record: logging.LogRecord) -> str:
        from kt_hf.hub import scrub

        return scrub(super().format(record))


def set_up_logging(debug: bool) -> None:
    main_process = int(os.environ.get("RANK", 0)) == 0
    level = logging.DEBUG if debug else logging.INFO if main_process else logging.ERROR
    for name in ("kt_hf", "kt_hf_plugins"):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers[:] = [h for h in logger.handlers if not isinstance(h, _Console)]  # its stream may be closed
        if not logger.handlers:
            handler = _Console()
            handler.setFormatter(logging.Formatter("%(message)s"))
            logger.addHandler(handler)
            logger.propagate = False


def read_changes(options: argparse.Namespace, raw: dict[str, Any], collect: Collector) -> dict[str, Any]:
    """The recipe with `--config` and the command line's settings applied, in that order."""
    config: list[grammar.Change] = []
    if options.config:
        with collect():
            loaded = grammar.from_yaml(options.config)
            if isinstance(loaded.get("stages"), list):
                raw = grammar.normalise(loaded)
            else:
                config = grammar.leaves(loaded)
    changes: list[grammar.Change] = []
    for text in options.settings:
        with collect():
            changes.append(grammar.parse_override(text))
    grammar.override(raw, changes, collect, config)
    return grammar.normalise(raw)


def _run(recipe: Any, options: argparse.Namespace, name: str, output: list[Path]) -> Any:
    collect = Collector()
    raw = read_changes(options, grammar.normalise(recipe), collect)
    resolved = grammar.resolve(raw, collect)
    folder = Path(options.output_dir or Path("runs") / (resolved.name or name))
    output[:] = [folder]
    grammar.raise_all(resolved, collect)
    set_threads(resolved)
    die_with_parent()
    with uncollected() if "kt_hf.runner" not in sys.modules else nullcontext():
        from kt_hf import runner  # imports torch

    return runner.run_resolved(
        resolved,
        raw,
        folder,
        print_only=_only_looks(options),
        time_steps=options.time_steps,
        overwrite=options.overwrite,
        allow_changed=options.allow_changed,
    )


@contextmanager
def uncollected() -> Iterator[None]:
    """For imports: the garbage collector would go through all that was imported again and again, which takes one second
    of the six to a first step. What there is by then lives to the end and is left out of later collections, too."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if before:
            gc.enable()


def set_threads(resolved: Any) -> None:
    """CPU threads of this rank: the recipe's, else the user's, else the cores divided by the ranks of this machine.

    `accelerate launch` and torchrun set OMP_NUM_THREADS to 1 by themselves, which cannot be told from a user's 1: say
    training.num_threads=1 for that.
    """
    wanted = resolved.training.num_threads
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ
    if not wanted and os.environ.get("OMP_NUM_THREADS") and not (launched and os.environ["OMP_NUM_THREADS"] == "1"):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = wanted or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def die_with_parent() -> None:
    """Ask Linux for a SIGTERM when a launcher dies, so that no orphan trains on. Only under a launcher."""
    if sys.platform != "linux" or (
        "ACCELERATE_MIXED_PRECISION" not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    ):
        return
    import ctypes

    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        pass
