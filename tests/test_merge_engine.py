"""The merge engine on files: bits, memory, kills, layouts; and `kt-hf merge`."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from kt_hf import MergeMethod, checkpoint, merging, registry
from kt_hf.cli import main
from kt_hf.errors import IntegrityError, RecipeError, ResourceError
from kt_hf.functional.averaging import weighted_mean
from kt_hf.merging import Parents, WeightedMean, merge
from kt_hf.tensor_files import read_size

State = dict[str, torch.Tensor]


def state(seed: int, dtype: torch.dtype = torch.float32, rows: int = 300) -> State:
    """More than one piece in the largest tensor, odd sizes, a scalar, an empty tensor and buffers of whole numbers."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (rows, 601), "layer.weight": (7, 5, 3), "layer.bias": (7,), "scale": (), "none": (0, 4)}
    found = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    return {**found, "position_ids": torch.arange(9)[None], "mask": torch.tensor([True, False, True])}


def folder(path: Path, tensors: State, shards: int = 1, **config: object) -> Path:
    """A model directory; several shards hold the tensors in turn, so that their order in the files is another."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": "toy", **config}))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        save_file({n: tensors[n] for n in names[i::shards]}, path / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: files[i % shards] for i, n in enumerate(names)}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def load(path: Path) -> State:
    """As a reader that knows nothing of kt_hf does."""
    index = path / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    found = {name: tensor for file in files for name, tensor in load_file(path / file).items()}
    assert {p.name for p in path.glob("*.safetensors")} == files
    return found


def merged(method: MergeMethod, folders: list[Path], output: Path, base: Path | None = None, **how) -> State:
    with Parents(folders, [f.name for f in folders]) as parents:
        merge(method, parents, Parents([base], ["base"]) if base else None, output, **how)
    return load(output)


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


class Trimmed(MergeMethod):
    """Needs whole tensors and the base: task vectors over their own mean size, summed with products in between."""

    def tensor(self, name, tensors_M, base, stats):
        vectors = [t - base for t in tensors_M]
        kept = [v * (v.abs() > v.abs().mean()) for v in vectors]
        return base + sum(kept) / (1 + sum(v.norm() for v in vectors))


WEIGHTS = [0.7, 0.2, 0.4]


@pytest.mark.parametrize("method", [WeightedMean(WEIGHTS), Trimmed()], ids=["pieces", "whole"])
def test_the_same_bits_for_any_number_of_threads_and_any_shards(tmp_path, method, monkeypatch):
    monkeypatch.setattr("kt_hf.merge_engine.UNIT", 2**17)  # several units in the largest tensor
    states = [state(i) for i in range(4)]
    plain = [folder(tmp_path / f"p{i}", s) for i, s in enumerate(states)]
    mixed = [folder(tmp_path / f"m{i}", s, shards=i + 1) for i, s in enumerate(states)]
    expected = merged(method, plain[:3], tmp_path / "one", plain[3], threads=1)
    for i, (threads, size) in enumerate([(2, None), (4, None), (1, 100), (3, 1000), (4, 400_000)]):
        parents = plain if i % 2 else mixed
        found = merged(method, parents[:3], tmp_path / f"o{i}", parents[3], threads=threads, shard_bytes=size)
        assert same(found, expected), (threads, size)
    assert len(list((tmp_path / "o2").glob("*.safetensors"))) > 3
    if isinstance(method, WeightedMean):
        want = weighted_mean([s["embed.weight"] for s in states[:3]], WEIGHTS)
        torch.testing.assert_close(expected["embed.weight"], want, rtol=1e-6, atol=1e-7)
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize("name", registry.names("merge"))
def test_every_merge_gives_the_same_bits_on_several_threads(tmp_path, name):
    folders = [folder(tmp_path / f"p{i}", state(i)) for i in range(4)]

    def merge_with(threads: int, **how) -> State:
        method = registry.load("merge", name)()
        parents = folders[: min(method.max_parents or 3, 3)]
        if name == "learned_soup":
            method.coefficients_GM = [[0.5, 0.3, 0.2]]  # learnt on data, which are not here
        else:
            method.fit(merging.MergeRun(len(parents), [p.name for p in parents], True, sum))
        return merged(method, parents, tmp_path / str(threads), folders[3], threads=threads, **how)

    one = merge_with(1)
    assert same(merge_with(4, shard_bytes=1000), one)
    assert not torch.equal(one["embed.weight"], state(0)["embed.weight"])


def test_torch_uses_one_thread_within_each_of_ours(tmp_path):
    """Else sums, and so bits, would depend on how many it takes."""
    seen, before = [], torch.get_num_threads()

    class Looks(MergeMethod):
        def tensor(self, name, tensors_M, base, stats):
            seen.append(torch.get_num_threads())
            return tensors_M[0]

    torch.set_num_threads(2)
    try:
        first = folder(tmp_path / "a", state(0))
        merged(Looks(), [first, first], tmp_path / "out", threads=2)
        assert set(seen) == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_shards_first_then_one_file_and_back(tmp_path):
    """The result is laid out as the first parent, if nothing else is said."""
    one, three = folder(tmp_path / "one", state(0)), folder(tmp_path / "three", state(1), shards=3)
    merged(WeightedMean([1, 1]), [one, three], tmp_path / "a")
    assert (tmp_path / "a" / "model.safetensors").is_file()
    merged(WeightedMean([1, 1]), [three, one], tmp_path / "b", shard_bytes=1000)
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    total = sum(t.numel() * t.element_size() for t in state(0).values())
    assert index["metadata"]["total_size"] == total and set(index["weight_map"]) == set(state(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_merged_in_float32_and_rounded_once(tmp_path, dtype):
    states = [state(i, dtype) for i in range(3)]
    folders = [folder(tmp_path / f"p{i}", s) for i, s in enumerate(states)]
    found = merged(WeightedMean(WEIGHTS), folders, tmp_path / "out")
    wide = merged(WeightedMean(WEIGHTS), folders, tmp_path / "wide", out_dtype=torch.float32)
    double = merged(WeightedMean(WEIGHTS), folders, tmp_path / "double", out_dtype=torch.float64, compute=torch.float64)
    for name in ("embed.weight", "layer.weight", "layer.bias", "scale"):
        assert found[name].dtype == dtype and wide[name].dtype == torch.float32
        assert torch.equal(wide[name].to(dtype), found[name])
        exact = sum(w * s[name].double() for w, s in zip(WEIGHTS, states, strict=True)) / sum(WEIGHTS)
        torch.testing.assert_close(double[name], exact, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(wide[name], exact.float(), rtol=1e-6, atol=1e-6)
    assert wide["position_ids"].dtype == torch.int64


def test_the_configuration_tells_the_dtype_that_was_asked_for(tmp_path):
    first = folder(tmp_path / "a", state(0), dtype="float32", text_config={"torch_dtype": "float32", "dtype": None})
    merged(WeightedMean([1, 1]), [first, first], tmp_path / "out", out_dtype=torch.bfloat16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["torch_dtype"] == "bfloat16"
    assert config["text_config"]["dtype"] is None


def test_parents_of_several_precisions(tmp_path):
    parents = [folder(tmp_path / "a", state(0, torch.bfloat16)), folder(tmp_path / "b", state(1))]
    found = merged(WeightedMean([1, 1]), parents, tmp_path / "out")
    want = (state(0, torch.bfloat16)["layer.bias"].float() + state(1)["layer.bias"]) / 2
    torch.testing.assert_close(found["layer.bias"], want.bfloat16())


def test_buffers_of_whole_numbers_are_the_first_parents_and_differences_are_told(tmp_path, caplog):
    first, second = state(0), {**state(1), "position_ids": torch.arange(9)[None] + 1}
    folders = [folder(tmp_path / "a", first), folder(tmp_path / "b", second)]
    with caplog.at_level(logging.WARNING):
        found = merged(WeightedMean([1, 1]), folders, tmp_path / "out")
    assert torch.equal(found["position_ids"], first["position_ids"]) and torch.equal(found["mask"], first["mask"])
    assert "position_ids" in caplog.text and "mask" not in caplog.text


def test_weights_that_are_quantised_are_refused(tmp_path):
    plain = state(0)
    codes = [{**plain, "q": torch.full((4, 4), i, dtype=torch.int8)} for i in range(2)]
    folders = [folder(tmp_path / f"p{i}", s) for i, s in enumerate(codes)]
    with pytest.raises(RecipeError, match="quantised"):
        merged(WeightedMean([1, 1]), folders, tmp_path / "out")
    told = folder(tmp_path / "told", plain, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(RecipeError, match="quantised"):
        merged(WeightedMean([1, 1]), [told, told], tmp_path / "out")
    eight = folder(tmp_path / "eight", {"w": torch.randn(4, 4).to(torch.float8_e4m3fn)})
    with pytest.raises(RecipeError, match="F8_E4M3"):
        merged(WeightedMean([1, 1]), [eight, eight], tmp_path / "out")
    assert not list(tmp_path.glob("*out*")) + list(tmp_path.glob(".*"))


def test_all_differences_are_told_before_a_byte_is_written(tmp_path):
    first = folder(tmp_path / "a", state(0))
    other = {k: v for k, v in state(1, rows=200).items() if k != "scale"} | {"extra": torch.ones(2)}
    with pytest.raises(RecipeError) as error:
        merged(WeightedMean([1, 1]), [first, folder(tmp_path / "b", other)], tmp_path / "out")
    for text in ("differ in 3", "scale is not in 'b'", "extra is not in 'a'", "[300, 601]", "[200, 601]"):
        assert text in error.value.cause
    whole = {**state(1), "scale": torch.tensor(3)}
    with pytest.raises(RecipeError, match=r"scale is torch.float32 in 'a' and torch.int64 in 'c'"):
        merged(WeightedMean([1, 1]), [first, folder(tmp_path / "c", whole)], tmp_path / "out")
    lacking = {k: v for k, v in state(1).items() if k != "scale"}
    with pytest.raises(RecipeError, match="scale is not in 'base'"):
        merged(Trimmed(), [first, first], tmp_path / "out", folder(tmp_path / "d", lacking))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fault", ["torn", "empty", "shard", "index", "lacks", "outside"])
def test_torn_and_missing_files_are_named(tmp_path, fault):
    whole, sick = folder(tmp_path / "a", state(0)), folder(tmp_path / "b", state(1), shards=2)
    index, shard = sick / "model.safetensors.index.json", sick / "model-00002-of-00002.safetensors"
    if fault == "torn":
        shard.write_bytes(shard.read_bytes()[:-5])
    elif fault == "empty":
        shard.write_bytes(b"")
    elif fault == "shard":
        shard.unlink()
    elif fault == "index":
        index.write_text("{")
    else:
        found = json.loads(index.read_text())
        found["weight_map"]["absent" if fault == "lacks" else "scale"] = (
            shard.name if fault == "lacks" else "../a/model.safetensors"
        )
        index.write_text(json.dumps(found))
    with pytest.raises(IntegrityError, match={"index": "index.json", "lacks": "absent"}.get(fault, "b[:/]")):
        merged(WeightedMean([1, 1]), [whole, sick], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_numbers_that_are_none_are_blamed_on_whose_they_are(tmp_path):
    sick = state(1)
    sick["embed.weight"][250, 3] = float("nan")
    folders = [folder(tmp_path / "well", state(0)), folder(tmp_path / "sick", sick)]
    with pytest.raises(IntegrityError, match=r"'sick' has non-finite values in embed\.weight"):
        merged(WeightedMean([1, 1]), folders, tmp_path / "out")
    with pytest.raises(IntegrityError, match="'sick'"), Parents(folders, ["well", "sick"]) as parents:
        parents.check_finite()

    class Divides(MergeMethod):
        def tensor(self, name, tensors_M, base, stats):
            return tensors_M[0] / 0

    with pytest.raises(RecipeError, match="Divides gives non-finite values"):
        merged(Divides(), [folders[0]] * 2, tmp_path / "out")
    large = folder(tmp_path / "large", {n: t * 1e6 if t.is_floating_point() else t for n, t in state(2).items()})
    with pytest.raises(RecipeError, match="float16 cannot hold"):
        merged(WeightedMean([1, 1]), [large, large], tmp_path / "out", out_dtype=torch.float16)
    assert {p.name for p in tmp_path.iterdir()} == {"well", "sick", "large"}


def test_float64_is_refused_where_the_method_does_not_compute_in_it(tmp_path):
    class Narrow(MergeMethod):
        def tensor(self, name, tensors_M, base, stats):
            return tensors_M[0].float()

    first = folder(tmp_path / "a", state(0))
    with pytest.raises(RecipeError, match="Narrow computes in float32"):
        merged(Narrow(), [first, first], tmp_path / "out", compute=torch.float64)


def test_a_method_that_writes_into_its_inputs_harms_nobody(tmp_path):
    class Careless(MergeMethod):
        def tensor(self, name, tensors_M, base, stats):
            return tensors_M[0].add_(1)

    first = folder(tmp_path / "a", state(0))
    for pieces in (True, False):
        Careless.elementwise = pieces
        found = merged(Careless(), [first, first], tmp_path / f"out{pieces}")
        assert torch.equal(found["layer.bias"], state(0)["layer.bias"] + 1) and same(load(first), state(0))


def test_every_tensor_lies_at_a_multiple_of_its_item_size(tmp_path):
    """As the format's own writer has it: readers that map a file may refuse others."""
    odd = {
        "a": torch.ones(3, dtype=torch.bfloat16),
        "b": torch.tensor([True]),
        "c": torch.arange(3),
        "d": torch.ones(5),
    }
    first = folder(tmp_path / "a", odd, shards=2)
    merged(WeightedMean([1, 1]), [first, first], tmp_path / "out", shard_bytes=10**6)
    with safe_open(str(tmp_path / "out" / "model.safetensors"), framework="pt") as file:
        assert all(torch.equal(file.get_tensor(n), odd[n]) for n in odd) and file.metadata() == {"format": "pt"}
    with open(tmp_path / "out" / "model.safetensors", "rb") as raw:
        head = json.loads(raw.read(int.from_bytes(raw.read(8), "little")))
    assert not any(head[n]["data_offsets"][0] % odd[n].element_size() for n in odd)


# --- tied weights ----------------------------------------------------------------------------------------------------


def llama(path: Path, seed: int, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=tied, **size)).to(torch.bfloat16)
    model.save_pretrained(path)
    return model


def test_tied_weights_load_in_plain_transformers(tmp_path):
    models = [llama(tmp_path / f"p{i}", i) for i in range(2)]
    merged(WeightedMean([1, 1]), [tmp_path / "p0", tmp_path / "p1"], tmp_path / "out", shard_bytes=4000)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert found.dtype == torch.bfloat16 and found.lm_head.weight is found.model.embed_tokens.weight
    for (name, a), b, c in zip(found.named_parameters(), *(m.parameters() for m in models), strict=True):
        assert torch.equal(a, ((b.float() + c.float()) / 2).bfloat16()), name
    assert found(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


class ByName(MergeMethod):
    """Draws at random, from the name."""

    def tensor(self, name, tensors_M, base, stats):
        draw = torch.Generator().manual_seed(sum(name.encode()))
        return tensors_M[0] * torch.rand(tensors_M[0].shape, generator=draw)


def test_a_tied_copy_that_is_in_the_file_stays_a_copy(tmp_path):
    for i in range(2):
        llama(tmp_path / f"p{i}", i)
        file = tmp_path / f"p{i}" / "model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    llama(tmp_path / "without", 2)
    found = merged(ByName(), [tmp_path / "p0", tmp_path / "p1"], tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    mixed = merged(WeightedMean([1, 1]), [tmp_path / "p0", tmp_path / "without"], tmp_path / "mixed")
    assert "lm_head.weight" not in mixed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "mixed").lm_head.weight.isfinite().all()


def test_a_copy_is_missed_where_weights_are_not_tied(tmp_path):
    llama(tmp_path / "a", 0, tied=False)
    llama(tmp_path / "b", 1, tied=True)
    file = tmp_path / "a" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    with pytest.raises(RecipeError, match=r"lm_head\.weight is not in 'b'"):
        merged(WeightedMean([1, 1]), [tmp_path / "a", tmp_path / "b"], tmp_path / "out")


# --- as a whole or not at all ----------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
from kt_hf.merging import Parents, WeightedMean, merge
class Slow(WeightedMean):
    elementwise = False
    def tensor(self, name, *rest):
        found = super().tensor(name, *rest)
        if name != "embed.weight":
            print("going", flush=True)
            time.sleep(60)
        return found
folders = [Path(p) for p in sys.argv[2:]]
with Parents(folders, ["a", "b"]) as parents:
    merge(Slow([1, 1]), parents, None, Path(sys.argv[1]), threads=1)
"""


def test_a_killed_merge_leaves_no_output_and_can_be_repeated(tmp_path):
    folders = [folder(tmp_path / f"p{i}", state(i)) for i in range(2)]
    output = tmp_path / "out"
    for sent in (signal.SIGKILL, signal.SIGINT):
        child = subprocess.Popen(
            [sys.executable, "-c", SLOW, str(output), *map(str, folders)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert child.stdout is not None and child.stdout.readline() == b"going\n"
        assert (tmp_path / ".out.partial").exists() and not output.exists()
        with pytest.raises(RecipeError, match="another merge"):
            merged(WeightedMean([1, 1]), folders, output)
        child.send_signal(sent)
        if sent == signal.SIGINT:
            time.sleep(0.3)
            child.kill()  # its thread sleeps on
        child.communicate()
        assert not output.exists()
    (tmp_path / ".out.partial" / "old.safetensors").write_bytes(b"left")
    found = merged(WeightedMean([1, 1]), folders, output)
    assert same(found, merged(WeightedMean([1, 1]), folders, tmp_path / "again"))
    assert not list(tmp_path.glob(".*")) and {p.name for p in output.iterdir()} == {"config.json", "model.safetensors"}


def test_a_failure_leaves_what_was_there(tmp_path):
    first = folder(tmp_path / "a", state(0))
    before = merged(WeightedMean([1]), [first], tmp_path / "out")

    class Fails(WeightedMean):
        def tensor(self, name, *rest):
            if name == "scale":
                raise KeyError("planned")
            return super().tensor(name, *rest)

    with pytest.raises(KeyError, match="planned"):
        merged(Fails([1]), [first], tmp_path / "out")
    assert same(load(tmp_path / "out"), before) and not list(tmp_path.glob(".*"))


def test_a_full_disk_is_found_out_before_anything_is_computed(tmp_path, monkeypatch):
    first = folder(tmp_path / "a", state(0))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match="full"):
        merged(WeightedMean([1]), [first], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_what_was_written_is_looked_at_before_it_is_renamed(tmp_path, monkeypatch):
    first = folder(tmp_path / "a", state(0))
    index = merging.Writer.finish

    def torn(writer):
        os.truncate(writer.folder / writer.files[0], 1000)
        index(writer)

    monkeypatch.setattr(merging.Writer, "finish", torn)
    with pytest.raises(IntegrityError, match="no intact safetensors"):
        merged(WeightedMean([1]), [first], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_whole_tensors_wait_for_memory(tmp_path, monkeypatch):
    """Threads do not hold more whole tensors between them than the largest needs, or `SLACK`."""
    monkeypatch.setattr("kt_hf.merge_engine.SLACK", 1)
    lock, held, most = threading.Lock(), [0], [0]

    class Counts(MergeMethod):
        def tensor(self, name, tensors_M, base, stats):
            with lock:
                held[0] += tensors_M[0].numel()
                most[0] = max(most[0], held[0])
            time.sleep(0.02)
            with lock:
                held[0] -= tensors_M[0].numel()
            return tensors_M[0]

    first = folder(tmp_path / "a", {f"w{i}": torch.ones(100) for i in range(12)})
    merged(Counts(), [first, first], tmp_path / "out", threads=4)
    assert most[0] == 100


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from kt_hf.merging import Parents, WeightedMean, merge
used = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData"))) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 220_000_000,) * 2)
try:
    torch.ones(300_000_000, dtype=torch.uint8)
except RuntimeError:
    print("limited", flush=True)
folders = [Path(p) for p in sys.argv[2:]]
with Parents(folders, ["a", "b", "c"]) as parents:
    parents.check_finite()
    merge(WeightedMean([1, 1, 1]), parents, None, Path(sys.argv[1]), threads=2)
"""


@pytest.mark.slow
def test_models_larger_than_memory(tmp_path):
    """Three of 400 MB, one tensor of 300 MB in each, where 220 MB may be had."""
    for i in range(3):
        big = torch.full((150_000, 1000), float(i), dtype=torch.bfloat16)
        folder(
            tmp_path / f"p{i}", {"embed.weight": big, "w": torch.full((50_000, 1000), i + 0.5, dtype=torch.bfloat16)}
        )
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "out"), *(str(tmp_path / f"p{i}") for i in range(3))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "limited\n", done.stderr
    found = load(tmp_path / "out")
    assert bool((found["embed.weight"] == 1).all()) and bool((found["w"] == 1.5).all())
    shutil.rmtree(tmp_path)


# --- the command -----------------------------------------------------------------------------------------------------


def bert(path: Path, seed: int, **changes: object) -> Path:
    torch.manual_seed(seed)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    BertForSequenceClassification(BertConfig(**{"vocab_size": 30, **size, **labels, **changes})).save_pretrained(path)
    (path / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    (path / "training_args.bin").write_bytes(b"old")
    (path / "README.md").write_text("the parent's card")
    return path


def command(*words: object) -> int:
    try:
        return main([str(w) for w in words])
    except SystemExit as stopped:
        return int(stopped.code or 0)


def test_the_command_merges_without_a_recipe(tmp_path, capsys):
    a, b = bert(tmp_path / "a", 0), bert(tmp_path / "b", 1)
    out = tmp_path / "out"
    assert command("merge", "uniform_soup", "--models", a, b, "weights=[3,1]", "--output", out, "--threads", 2) == 0
    assert "merged 2 models by uniform_soup" in capsys.readouterr().out
    found, first, second = load(out), load(a), load(b)
    for name in found:
        torch.testing.assert_close(found[name], 0.75 * first[name] + 0.25 * second[name])
    assert {p.name for p in out.iterdir()} == {"config.json", "model.safetensors", "vocab.txt", "README.md"}
    card = (out / "README.md").read_text()
    assert all(text in card for text in ("by uniform_soup", "- parent: `a`", "- parent: `b`", "weights:", "- 3\n"))
    assert str(tmp_path) not in card and "the parent's card" not in card
    model = BertForSequenceClassification.from_pretrained(out)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert command(
        "merge", "uniform_soup", "weights=[3,1]", "--models", a, b, "--output", tmp_path / "half",
        "--dtype", "bfloat16", "--max-shard-size", "1KB", "--compute", "float64",
    ) == 0  # fmt: skip
    assert BertForSequenceClassification.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 3


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["uniform_soup", "--models", "a", "b", "--output", "a"], 2, "exists"),
        (["uniform_soop", "--models", "a", "b", "--output", "o"], 2, "did you mean 'uniform_soup'"),
        (["greedy_soup", "--models", "a", "b", "--output", "o"], 2, "validation data"),
        (["uniform_soup", "wieghts=[1,2]", "--models", "a", "b", "--output", "o"], 2, "weights"),
        (["uniform_soup", "--models", "a", "b", "--output", "o", "weights=[1]"], 2, "1 weights for 2 parents"),
        (["uniform_soup", "--models", "a", "b", "--output", "o", "weights=[1,-1]"], 2, "add up to 0"),
        (["uniform_soup", "--models", "a", "b", "--output", "o", "--dtype", "bf16"], 2, "did you mean 'bfloat16'"),
        (["uniform_soup", "--models", "a", "b", "--output", "o", "--max-shard-size", "big"], 2, "5GB"),
        (["uniform_soup", "--models", "a", "b", "--output", "o", "--threads", "0"], 2, "--threads"),
        (["ties", "--models", "a", "b", "--output", "o"], 2, "base"),
        (["ties", "--models", "a", "b", "--base", "wide", "--output", "o"], 2, "'wide'"),
        (["ties", "--models", "a", "b", "--base", "labels", "--output", "o"], 0, "merged 2 models by ties"),
        (["wise_ft", "curve=[0.1]", "--models", "a", "--base", "b", "--output", "o"], 2, "validation data"),
        (["uniform_soup", "--models", "a", "labels", "--output", "o"], 2, "differ in their labels"),
        (["uniform_soup", "--models", "a", "kind", "--output", "o"], 2, "differ in their model type"),
        (["uniform_soup", "--models", "a", "wide", "--output", "o"], 2, "[31, 16]"),
        (["uniform_soup", "--models", "a", "torn", "--output", "o"], 4, "no intact safetensors"),
        (["uniform_soup", "--models", "a", "bare", "--output", "o"], 4, "no safetensors weights"),
        (["uniform_soup", "--models", "a", "stage", "--output", "o"], 4, "did you mean stage/model"),
        (["uniform_soup", "--models", "a", "words1", "--output", "o"], 0, "merged"),
        (["uniform_soup", "--models", "words1", "words2", "--output", "o"], 2, "differ in their vocabulary"),
        (["uniform_soup", "--models", "a", "nobody/nothing", "--output", "o"], 5, "nobody/nothing"),
    ],
)
def test_what_the_command_refuses(tmp_path, monkeypatch, capsys, parents, words, code, told):
    monkeypatch.chdir(parents)
    assert command("merge", *words) == code
    said = capsys.readouterr()
    assert told in said.err + said.out and "Traceback" not in said.err
    assert code == 0 or not Path("o").exists()
    shutil.rmtree("o", ignore_errors=True)
    assert not list(Path().glob(".*"))


@pytest.fixture(scope="module")
def parents(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("parents")
    for name in ("a", "b", "torn", "bare", "kind", "words1", "words2"):
        bert(root / name, len(name))
    bert(root / "labels", 3, id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1})
    bert(root / "wide", 3, vocab_size=31)
    file = root / "torn" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    (root / "bare" / "model.safetensors").unlink()
    bert(root / "stage" / "model", 4)
    config = json.loads((root / "kind" / "config.json").read_text())
    (root / "kind" / "config.json").write_text(json.dumps({**config, "model_type": "roberta"}))
    for i in (1, 2):
        words = {"model": {"vocab": {"[PAD]": 0, f"word{i}": 1}}, "added_tokens": [{"content": "[PAD]", "id": 0}]}
        (root / f"words{i}" / "tokenizer.json").write_text(json.dumps(words))
    return root


def test_sizes_are_read(tmp_path):
    assert [read_size(t) for t in ("5GB", "500 mb", "2GiB", "1.5KB", 77)] == [5 * 10**9, 5 * 10**8, 2**31, 1500, 77]
    for text in ("big", "0", "-5GB", "5 parsecs"):
        with pytest.raises(RecipeError, match="5GB"):
            read_size(text)


def test_the_writer_and_checkpoints_have_one_format(tmp_path):
    """A merge of one model is that model, as `checkpoint` would write it."""
    tensors = {"a": torch.randn(4, 3), "b": torch.randn(5)}
    first = folder(tmp_path / "a", tensors)
    merged(WeightedMean([1]), [first], tmp_path / "out")
    checkpoint.write(tmp_path / "file", checkpoint.tensor_chunks(tensors, {"format": "pt"}))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "file").read_bytes()
