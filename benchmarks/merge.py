"""Merging three Llama checkpoints of 1 GB each in bf16, several shards: seconds against `cp` of the inputs and against
mergekit, start-up apart, and the anonymous memory of a process that merges.

    python benchmarks/merge.py [--mergekit PYTHON] [--rounds 7] [--layers 8] [--work DIR] [--methods ties della ...]

PYTHON is the interpreter of an environment that has mergekit. The aims: at most 1.25 times `cp`, at least 1.5 times
faster than mergekit, and above the memory after `import torch` at most 2 x largest tensor x models + 200 MB. By default
a merge also waits until its bytes are on the disk, which `cp` does not: both are shown with and without. With --methods
those merges are timed instead, of three parents and their base, beside the linear one and mergekit's of the same name
(the aim is ten times faster); their results go to a file of their own.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from ratios import compare, paired, report

from kt_hf import merging, registry
from kt_hf.tensor_files import Spec, Writer

PARENTS = 3
HIDDEN, INNER, VOCABULARY = 2048, 5632, 32000
SHARD = 270_000_000

MERGEKIT = """
import sys, time, yaml, shutil
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
output, parents = sys.argv[1], sys.argv[2:]
config = {"merge_method": "linear", "dtype": "bfloat16", "parameters": {"normalize": True},
          "models": [{"model": p, "parameters": {"weight": 1.0}} for p in parents]}
config = MergeConfiguration.model_validate(config)
began = time.perf_counter()
run_merge(config, output, MergeOptions(copy_tokenizer=False, quiet=True))
print(f"seconds {time.perf_counter() - began}")
"""

MEMORY = """
import sys, threading, time, json
from pathlib import Path
import torch
def anonymous():
    return int(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("RssAnon"))) * 1024
before = anonymous()
most, stop = [before], threading.Event()
def watch():
    while not stop.wait(0.002):
        most[0] = max(most[0], anonymous())
from kt_hf import merging, registry
watcher = threading.Thread(target=watch)
watcher.start()
output, method, given, base, *folders = sys.argv[1:]
base = merging.Parents([Path(base)], ["base"]) if base else None
with merging.Parents([Path(f) for f in folders], folders) as parents:
    merging.merge(registry.load("merge", method)(**json.loads(given)), parents, base, Path(output), sync=False)
stop.set()
watcher.join()
print(json.dumps({"above": most[0] - before}))
"""


def memory(method: str, given: dict[str, Any], base: Path | None, parents: list[Path], work: Path) -> int:
    """Anonymous bytes of a process that merges, above those after `import torch`."""
    command = [sys.executable, "-c", MEMORY, str(work / "ours"), method, json.dumps(given), str(base or "")]
    done = subprocess.run([*command, *map(str, parents)], check=True, capture_output=True, text=True)
    clear(work / "ours")
    return int(json.loads(done.stdout.splitlines()[-1])["above"])


def allowed(inputs: int) -> int:
    return 2 * VOCABULARY * HIDDEN * 2 * inputs + 200_000_000


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    small = HIDDEN // 4
    for i in range(layers):
        head = f"model.layers.{i}"
        for name, rows in (("q", HIDDEN), ("k", small), ("v", small), ("o", HIDDEN)):
            yield f"{head}.self_attn.{name}_proj.weight", (rows, HIDDEN)
        yield f"{head}.mlp.gate_proj.weight", (INNER, HIDDEN)
        yield f"{head}.mlp.up_proj.weight", (INNER, HIDDEN)
        yield f"{head}.mlp.down_proj.weight", (HIDDEN, INNER)
        yield f"{head}.input_layernorm.weight", (HIDDEN,)
        yield f"{head}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def make(folder: Path, seed: int, layers: int) -> Path:
    """A Llama checkpoint of random weights."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    draw = torch.Generator().manual_seed(seed)
    writer = Writer(folder, [Spec(n, torch.bfloat16, s) for n, s in shapes(layers)], "model.safetensors", SHARD)
    for name, shape in shapes(layers):
        tensor = torch.randn(shape, generator=draw).mul_(0.02).bfloat16()
        writer.write(name, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    writer.finish()
    writer.close()
    return folder


def clear(folder: Path) -> None:
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def copy(parents: list[Path], work: Path, sync: bool) -> float:
    output = work / "copies"
    output.mkdir()
    began = time.perf_counter()
    subprocess.run(["cp", "-r", *map(str, parents), str(output)], check=True)
    if sync:
        for path in output.rglob("*.safetensors"):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    clear(output)
    return seconds


def ours(parents: list[Path], work: Path, sync: bool, threads: int) -> float:
    output = work / "ours"
    began = time.perf_counter()
    with merging.Parents(parents, [p.name for p in parents]) as opened:
        merging.merge(merging.WeightedMean([1.0] * PARENTS), opened, None, output, sync=sync, threads=threads)
    seconds = time.perf_counter() - began
    clear(output)
    return seconds


def theirs(python: str, parents: list[Path], work: Path) -> float:
    output = work / "theirs"
    command = [python, "-c", MERGEKIT, str(output), *map(str, parents)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    clear(output)
    return float(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("seconds ")))


RELATED = """
import sys, time, json
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
output, method, base, parents = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
said = json.loads(sys.stdin.read())
config = {"merge_method": method, "dtype": "bfloat16", "base_model": base,
          "models": [{"model": p, "parameters": said} for p in parents]}
config = MergeConfiguration.model_validate(config)
began = time.perf_counter()
run_merge(config, output, MergeOptions(copy_tokenizer=False, quiet=True))
print(f"seconds {time.perf_counter() - began}")
"""
METHODS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "ties": ({"density": 0.2}, "ties", {"weight": 1.0, "density": 0.2}),
    "breadcrumbs": ({"density": 0.9, "outliers": 0.01}, "breadcrumbs", {"weight": 1.0, "density": 0.9, "gamma": 0.01}),
    "dare": ({"density": 0.5}, "dare_linear", {"weight": 1.0, "density": 0.5}),
    "della": ({"density": 0.5, "epsilon": 0.2}, "della", {"weight": 1.0, "density": 0.5, "epsilon": 0.2}),
}
"""Ours -> our settings, and mergekit's name and settings for the same."""


def related(method: str, given: dict[str, Any], base: Path, parents: list[Path], work: Path) -> float:
    """Seconds of one of our merges with a base, without waiting for the disk."""
    output = work / "ours"
    began = time.perf_counter()
    with merging.Parents(parents, [p.name for p in parents]) as opened, merging.Parents([base], ["base"]) as start:
        merging.merge(registry.load("merge", method)(**given), opened, start, output, sync=False)
    seconds = time.perf_counter() - began
    clear(output)
    return seconds


def their_related(
    python: str, method: str, given: dict[str, Any], base: Path, parents: list[Path], work: Path
) -> float:
    command = [python, "-c", RELATED, str(work / "theirs"), method, str(base), *map(str, parents)]
    done = subprocess.run(command, input=json.dumps(given), check=True, capture_output=True, text=True)
    clear(work / "theirs")
    return float(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("seconds ")))


def time_methods(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        work = Path(name)
        base, *parents = [make(work / f"model{i}", i, options.layers) for i in range(PARENTS + 1)]
        os.sync()
        turns: dict[str, Callable[[], Any]] = {
            "linear": functools.partial(ours, parents, work, False, torch.get_num_threads())
        }
        for method in options.methods:
            given, their_name, their_given = METHODS[method]
            turns[method] = functools.partial(related, method, given, base, parents, work)
            if options.mergekit:
                turns[f"mergekit {their_name}"] = functools.partial(
                    their_related, options.mergekit, their_name, their_given, base, parents, work
                )
        seconds = compare(turns, options.rounds)
        above = {m: memory(m, METHODS[m][0], base, parents, work) for m in options.methods}
    rows = []
    for what, took in seconds.items():
        row = {
            "what": what,
            "seconds": sorted(took)[len(took) // 2],
            "ratio to linear": paired(took, seconds["linear"]),
        }
        theirs = seconds.get(f"mergekit {METHODS[what][1]}" if what in METHODS else "")
        row["mergekit's ratio to it"] = paired(theirs, took) if theirs else ""
        row["anonymous bytes above torch"] = above.get(what, "")
        rows.append(row)
    facts = {"rounds": options.rounds, "parents": PARENTS, "layers": options.layers}
    facts |= {"merge_threads": torch.get_num_threads(), "anonymous_bytes_allowed": allowed(PARENTS + 1)}
    report("merge_with_base", rows, **facts)


def agreement(python: str, parents: list[Path], work: Path) -> float:
    """The largest difference between mergekit's result and ours."""
    from kt_hf.tensor_files import open_model

    with merging.Parents(parents, [p.name for p in parents]) as opened:
        merging.merge(merging.WeightedMean([1.0] * PARENTS), opened, None, work / "ours")
    subprocess.run([python, "-c", MERGEKIT, str(work / "theirs"), *map(str, parents)], check=True, capture_output=True)
    a, b = open_model(work / "ours"), open_model(work / "theirs")
    assert a.keys() == b.keys()
    most = max(float((a[n].float() - b[n].float()).abs().max()) for n in a)
    clear(work / "ours")
    clear(work / "theirs")
    return most


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mergekit", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--work", default=tempfile.gettempdir())
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[])
    options = parser.parse_args()
    if options.methods:
        time_methods(options)
        return
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        work = Path(name)
        parents = [make(work / f"parent{i}", i, options.layers) for i in range(PARENTS)]
        os.sync()
        size = sum(p.stat().st_size for p in parents[0].glob("*.safetensors"))
        turns = {
            "cp": functools.partial(copy, parents, work, False),
            "kt_hf": functools.partial(ours, parents, work, False, threads),
            "kt_hf, 1 thread": functools.partial(ours, parents, work, False, 1),
            "cp + fsync": functools.partial(copy, parents, work, True),
            "kt_hf + fsync (default)": functools.partial(ours, parents, work, True, threads),
        }
        facts = {}
        if options.mergekit:
            turns["mergekit"] = functools.partial(theirs, options.mergekit, parents, work)
            facts["largest_difference_to_mergekit"] = agreement(options.mergekit, parents, work)
        seconds = compare(turns, options.rounds)
        above = memory("uniform_soup", {}, None, parents, work)
    rows = [
        {
            "what": what,
            "seconds": sorted(took)[len(took) // 2],
            "ratio to cp": paired(took, seconds["cp"]),
            "ratio to cp + fsync": paired(took, seconds["cp + fsync"]),
            **({"ratio to mergekit": paired(took, seconds["mergekit"])} if options.mergekit else {}),
        }
        for what, took in seconds.items()
    ]
    facts |= {
        "bytes_of_a_parent": size,
        "anonymous_bytes_above_torch": above,
        "anonymous_bytes_allowed": allowed(PARENTS),
    }
    report("merge", rows, rounds=options.rounds, parents=PARENTS, merge_threads=threads, **facts)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
