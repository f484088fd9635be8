"""Adapters: merged as adapters, folded into their base, extracted from a full fine-tuning.

What is expected is computed densely: of each adapter the change that it makes to the base's weights, as peft itself
loads and merges it, and of these changes what the method says.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from kt_hf import Data, Merge, Model, Recipe, Train, registry, run
from kt_hf.adapters import Pair, open_adapter, write_adapter
from kt_hf.cli import main
from kt_hf.functional import low_rank
from kt_hf.tiny import ENCODER, VIT

pytestmark = pytest.mark.filterwarnings("ignore")
State = dict[str, torch.Tensor]
SIZES = {**ENCODER, "num_labels": 3}
MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (BertForSequenceClassification, BertConfig(**SIZES, vocab_size=30, max_position_embeddings=16)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=16, n_inner=16)),
    "vit": (ViTForImageClassification, ViTConfig(**SIZES, image_size=8, patch_size=4)),
    "resnet": (
        ResNetForImageClassification,
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3),
    ),
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=30,
            tie_word_embeddings=True,
        ),
    ),
}  # fmt: skip
TARGETS: dict[str, Any] = {
    "bert": ["query", "dense", "word_embeddings"],
    "gpt2": ["c_attn", "c_proj", "wpe"],
    "vit": ["q_proj", "query", "patch_embeddings.projection"],
    "resnet": ["convolution"],
    "llama": ["q_proj", "down_proj"],
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    for i, (kind, (cls, config)) in enumerate(MODELS.items()):
        torch.manual_seed(i)
        cls(config).save_pretrained(root / kind)
    return root


@pytest.fixture
def here(bases, tmp_path, monkeypatch) -> Path:
    """An empty working folder with the bases in it."""
    for kind in MODELS:
        (tmp_path / kind).symlink_to(bases / kind)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words: object) -> int:
    try:
        return main([str(w) for w in words])
    except SystemExit as stopped:
        return int(stopped.code or 0)


def load(kind: str, folder: str | Path | None = None) -> Any:
    return MODELS[kind][0].from_pretrained(folder or kind).eval()


def adapter(name: str, seed: int, kind: str = "bert", **config: Any) -> str:
    """A LoRA folder as peft writes it, with both factors far from zero."""
    given = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[kind], **config}
    model = get_peft_model(load(kind), LoraConfig(**given))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(name)
    return name


def tensors(model: nn.Module) -> State:
    return {n: t.detach().clone() for n, t in model.state_dict().items() if t.is_floating_point()}


def change(folder: str | Path, kind: str = "bert") -> State:
    """What an adapter makes of its base, less the base: by peft."""
    base = load(kind)
    before = tensors(base)
    after = tensors(PeftModel.from_pretrained(base, folder).merge_and_unload())
    return {n: after[n] - before[n] for n in before}


def off(found: State, wanted: State) -> float:
    """The largest difference, as a share of the largest value of the same tensor."""
    return max(float((found[n] - wanted[n]).abs().max() / (wanted[n].abs().max() + 1e-3)) for n in wanted)


def summed(weights: list[float], *changes: State) -> State:
    return {n: sum(w * c[n] for w, c in zip(weights, changes, strict=True)) for n in changes[0]}


# --- the mathematics -------------------------------------------------------------------------------------------------


def matrix(outputs: int, inputs: int, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    rank = rank or min(outputs, inputs)
    return torch.randn(outputs, rank, generator=draw) @ torch.randn(rank, inputs, generator=draw)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 9), (1, 7)])
def test_the_nearest_matrix_of_a_rank_is_that_of_the_svd(shape):
    delta = matrix(*shape)
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    for rank in (1, 4, 100):
        found = low_rank.factored(delta, rank)
        kept = min(rank, *shape)
        torch.testing.assert_close(found.b_OR @ found.a_RI, u[:, :kept] * s[:kept] @ vh[:kept], rtol=1e-5, atol=1e-5)
        assert found.rank == kept
        assert found.lost == pytest.approx(float((s[kept:] ** 2).sum()), rel=1e-6, abs=1e-9)
        assert found.total == pytest.approx(float((s**2).sum()))
        left, right = found.b_OR.norm(dim=0), found.a_RI.norm(dim=1)
        torch.testing.assert_close(left, right)  # neither factor is larger than the other


def test_the_smallest_rank_within_an_error_is_found():
    delta = matrix(20, 15)
    squares = torch.linalg.svdvals(delta.double()) ** 2
    for error in (0.05, 0.3, 0.9):
        found = low_rank.factored(delta, error=error)
        lost = float((delta - found.b_OR @ found.a_RI).norm() / delta.norm())
        assert lost <= error and lost**2 == pytest.approx(found.lost / found.total, rel=1e-5)
        assert float(squares[found.rank - 1 :].sum() / squares.sum()) > error**2, "one less would not do"
    assert low_rank.factored(delta, rank=2, error=0.05).rank == 2
    assert low_rank.factored(matrix(20, 15, rank=3)).rank == 3
    assert low_rank.factored(torch.zeros(4, 5)).rank == 0


def test_sums_of_products_are_exact_and_reduced_without_being_formed():
    b_M, a_M = [matrix(11, r, seed=r) for r in (2, 3, 4)], [matrix(r, 8, seed=9 + r) for r in (2, 3, 4)]
    weights = [0.7, -1.3, 0.0]
    wanted = sum(w * (b @ a).double() for w, b, a in zip(weights, b_M, a_M, strict=True))
    b, a = low_rank.added(b_M, a_M, weights)
    assert b.shape == (11, 5)
    torch.testing.assert_close(b @ a, wanted, rtol=1e-6, atol=1e-6)
    found, same = low_rank.reduced(b, a, rank=2), low_rank.factored(wanted, rank=2)
    torch.testing.assert_close(found.b_OR @ found.a_RI, same.b_OR @ same.a_RI, rtol=1e-6, atol=1e-6)
    assert found.lost == pytest.approx(same.lost) and found.total == pytest.approx(same.total)
    assert low_rank.reduced(b, a).rank == 5


def test_a_sketch_is_nearly_the_best_and_knows_its_error():
    delta = matrix(300, 200, seed=1) * 0.01 + matrix(300, 200, rank=5, seed=2)
    best, found = low_rank.factored(delta, 8), low_rank.sketched(delta, 8)
    assert found.lost == pytest.approx(float((delta - found.b_OR @ found.a_RI).double().norm() ** 2), rel=1e-3)
    assert best.lost <= found.lost < 1.01 * best.lost
    again = low_rank.sketched(delta, 8)
    assert torch.equal(found.a_RI, again.a_RI)


# --- adapters into one -----------------------------------------------------------------------------------------------

OTHER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "ranks": ({"r": 2}, {"r": 5}),
    "alphas": ({"lora_alpha": 1}, {}),
    "rank pattern": ({"rank_pattern": {"layer.0.attention.self.query": 7}, "alpha_pattern": {"query": 3}}, {}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True, "r": 2}),
    "rslora and not": ({}, {"use_rslora": True}),
    "added biases": ({"lora_bias": True, "target_modules": ["query", "dense"]}, {"target_modules": ["query", "value"]}),
    "other modules": ({"target_modules": ["query"]}, {"target_modules": r".*(value|word_embeddings)"}),
    "some layers": (
        {"layers_to_transform": [0], "layers_pattern": "layer"},
        {"layers_to_transform": [1], "layers_pattern": "layer"},
    ),
    "left out": ({"exclude_modules": ["bert.encoder.layer.0.attention.self.query"]}, {}),
    "biases": ({"bias": "all"}, {"bias": "lora_only"}),
    "head": ({"task_type": "SEQ_CLS"}, {"modules_to_save": ["classifier"]}),
}


@pytest.mark.parametrize("case", OTHER)
def test_weighted_sums_of_adapters_are_those_of_their_changes(here, case, capsys):
    first, second = OTHER[case]
    adapter("a", 1, **first), adapter("b", 2, **second)
    changes = change("a"), change("b")
    assert command("merge", "task_arithmetic", "weights=[0.7,-1.5]", "--models", "a", "b", "--output", "sum") == 0
    assert "all of the merged change" in capsys.readouterr().out
    assert off(change("sum"), summed([0.7, -1.5], *changes)) < 1e-5
    assert command("merge", "uniform_soup", "--models", "a", "b", "--output", "mean", "--error", "0.000001") == 0
    assert off(change("mean"), summed([0.5, 0.5], *changes)) < 1e-4
    config = json.loads(Path("sum/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] and config["rank_pattern"] == config["alpha_pattern"]
    assert not config.get("use_rslora")


def test_a_pattern_means_one_module_alone(tmp_path):
    """peft matches patterns at the end of names, and one module's name may be the end of another's."""
    pairs = {n: Pair(torch.randn(r, 4), torch.randn(4, r), 1.0) for n, r in (("q", 3), ("deep.q", 2), ("k", 2))}
    write_adapter(tmp_path, {"base_model_name_or_path": "x"}, pairs, {})
    found = open_adapter(tmp_path, "a").pairs
    assert {n: (p.rank, p.scaling) for n, p in found.items()} == {"q": (3, 1.0), "deep.q": (2, 1.0), "k": (2, 1.0)}


@pytest.mark.parametrize("kind", ["gpt2", "vit", "resnet", "llama"])
def test_adapters_of_any_layer_are_merged(here, kind):
    adapter("a", 1, kind), adapter("b", 2, kind, r=2)
    changes = change("a", kind), change("b", kind)
    assert command("merge", "task_arithmetic", "weights=[1,-0.5]", "--models", "a", "b", "--output", "sum") == 0
    assert off(change("sum", kind), summed([1, -0.5], *changes)) < 1e-5
    assert command("merge", "ties", "density=0.5", "--models", "a", "b", "--output", "ties", "--rank", "99") == 0
    cls = registry.load("merge", "ties")
    wanted = {
        n: cls(density=0.5).tensor(n, [c[n] for c in changes], torch.zeros_like(t), None) for n, t in changes[0].items()
    }
    assert off(change("ties", kind), wanted) < 1e-4


ASK = ("greedy_soup", "learned_soup", "fisher", "regmean")  # data, which adapters come without
METHODS = [n for n in registry.names("merge") if n not in (*ASK, "wise_ft")]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_merges_changes_as_it_merges_models_less_their_base(here, name, capsys):
    adapter("a", 1)
    shutil.copytree("a", "b")  # a relative of the first, so that what goes by angles has something to do
    held = load_file("b/adapter_model.safetensors")
    held = {n: t + 0.1 * torch.randn_like(t) for n, t in held.items() if "layer.1.output" not in n}
    save_file(held, "b/adapter_model.safetensors", {"format": "pt"})
    changes = change("a"), change("b")
    assert command("merge", name, "--models", "a", "b", "--output", "out", "--rank", "99") == 0
    method = registry.load("merge", name)()
    wanted = {}
    for n, first in changes[0].items():
        zeros = torch.zeros_like(first)
        wanted[n] = method.tensor(n, [c[n].clone() for c in changes], zeros if method.needs_base else None, None)
    assert off(change("out"), wanted) < 1e-4
    shutil.rmtree("out")
    assert command("merge", name, "--models", "a", "b", "--output", "out", "--rank", "3") == 0
    assert "% of its squared norm kept" in capsys.readouterr().out
    ranks = {p.rank for p in open_adapter(Path("out"), "out").pairs.values()}
    assert max(ranks) <= 3


def test_a_merge_to_a_rank_keeps_as_much_as_it_says(here, capsys):
    adapter("a", 1), adapter("b", 2)
    wanted = summed([0.5, 0.5], change("a"), change("b"))
    assert command("merge", "uniform_soup", "--models", "a", "b", "--output", "out", "--rank", "3") == 0
    found = change("out")
    total, lost = (sum(float((t**2).sum()) for t in s.values()) for s in (wanted, summed([1, -1], wanted, found)))
    assert f"{1 - lost / total:.2%} of its squared norm kept" in capsys.readouterr().out


def test_factors_apart_are_what_peft_calls_linear_and_say_how_far_they_are_off(here, capsys):
    adapter("a", 1, target_modules=["query"]), adapter("b", 2, target_modules=["query"])
    words = ["--models", "a", "b", "--combine", "factors"]
    assert command("merge", "task_arithmetic", "weights=[0.7,-1.5]", *words, "--output", "out") == 0
    model = PeftModel.from_pretrained(load("bert"), "a", adapter_name="a")
    model.load_adapter("b", "b")
    model.add_weighted_adapter(["a", "b"], [0.7, -1.5], "theirs", combination_type="linear")
    theirs = _deltas(model, "theirs")
    found = change("out")
    assert off({n: found[n] for n in theirs}, theirs) < 1e-5
    wanted = summed([0.7, -1.5], change("a"), change("b"))
    total, lost = (sum(float((t**2).sum()) for t in s.values()) for s in (wanted, summed([1, -1], wanted, found)))
    assert f"off by {(lost / total) ** 0.5:.3g} of" in capsys.readouterr().out
    assert lost / total > 0.1, "an approximation that is no good, as its name says"
    assert command("merge", "ties", *words, "--output", "o") == 2 and "no weighted sum" in capsys.readouterr().err
    adapter("c", 3, target_modules=["query"], r=2)
    words[2] = "c"
    assert command("merge", "task_arithmetic", *words, "--output", "o") == 2 and "ranks" in capsys.readouterr().err


def _deltas(model: Any, name: str) -> State:
    """What a peft model says that one of its adapters adds."""
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight") and name in m.scaling}
    return {
        f"{n.removeprefix('base_model.model.')}.weight": m.get_delta_weight(name).detach() for n, m in layers.items()
    }


PEFT = {
    "plain": True,
    "ranks": True,
    "rank pattern": True,
    "rslora and not": True,
    "rslora": False,
    "added biases": False,
    "some layers": False,
    "left out": False,
}
"""Whether peft 0.21.2 adds up adapters of these kinds rightly; where it does not, it says nothing."""


@pytest.mark.parametrize("case", PEFT)
def test_against_peft(here, case):
    """Ours is the sum of the changes, as a test above says; theirs, too, or not."""
    first, second = OTHER[case]
    adapter("a", 1, **first), adapter("b", 2, **second)
    wanted = summed([0.7, -1.5], change("a"), change("b"))
    model = PeftModel.from_pretrained(load("bert"), "a", adapter_name="a")
    model.load_adapter("b", "b")
    for combination in ("cat", "svd"):
        model.add_weighted_adapter(["a", "b"], [0.7, -1.5], combination, combination_type=combination, svd_rank=16)
        model.save_pretrained(".", selected_adapters=[combination])
        error = off(change(combination), wanted)
        if PEFT[case]:
            assert error < 1e-5
        elif peft.__version__ == "0.21.2":  # another may have learnt it
            assert error > 0.1


def test_heads_are_merged_by_the_method_onto_the_base_or_as_is_said(here, capsys):
    adapter("a", 1, modules_to_save=["classifier"]), adapter("b", 2, modules_to_save=["classifier"])
    changes, base = (change("a"), change("b")), tensors(load("bert"))
    for name, given, wanted in (
        ("task_arithmetic", [], summed([1, 1], *changes)),
        ("task_arithmetic", ["--in-full", "mean"], summed([0.5, 0.5], *changes)),
        ("uniform_soup", ["--in-full", "first"], changes[0]),
    ):
        shutil.rmtree("out", ignore_errors=True)
        assert command("merge", name, "--models", "a", "b", "--output", "out", *given) == 0
        for n in ("classifier.weight", "classifier.bias"):
            torch.testing.assert_close(change("out")[n], wanted[n], rtol=1e-5, atol=1e-5)
    del base["classifier.weight"], base["classifier.bias"]  # as of a backbone: what the heads were before, nobody knows
    config = Path("bert/config.json").read_text()
    Path("bert").unlink()
    Path("bert").mkdir()
    Path("bert/config.json").write_text(config)
    save_file(base, "bert/model.safetensors", {"format": "pt"})
    assert command("merge", "ties", "--models", "a", "b", "--output", "none") == 2
    said = capsys.readouterr().err
    assert "classifier" in said and "--in-full mean" in said and not Path("none").exists()
    assert command("merge", "ties", "--models", "a", "b", "--output", "none", "--in-full", "mean") == 0


def test_files_beside_go_along_and_the_card_names_the_adapters(here):
    adapter("a", 1), adapter("b", 2)
    Path("a/kt_hf.json").write_text(json.dumps({"labels": ["x", "y", "z"]}))
    Path("a/tokenizer.json").write_text("{}")
    assert command("merge", "uniform_soup", "--models", "a", "b", "--output", "out", "--dtype", "bfloat16") == 0
    names = {"adapter_config.json", "adapter_model.safetensors", "README.md", "kt_hf.json", "tokenizer.json"}
    assert {p.name for p in Path("out").iterdir()} == names
    assert "A merge of 2 adapters by uniform_soup" in Path("out/README.md").read_text()
    assert {t.dtype for t in load_file("out/adapter_model.safetensors").values()} == {torch.bfloat16}
    assert not list(Path().glob(".*"))


def test_the_same_bits_for_any_number_of_threads(here):
    adapter("a", 1), adapter("b", 2)
    for threads in (1, 3):
        words = ["--models", "a", "b", "--threads", threads, "--rank", 3]
        assert command("merge", "dare", *words, "--output", f"o{threads}") == 0
    one, three = (load_file(f"o{n}/adapter_model.safetensors") for n in (1, 3))
    assert one.keys() == three.keys() and all(torch.equal(one[n], three[n]) for n in one)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "replicated": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "parameters": ({"target_parameters": ["x"]}, "target_parameters"),
    "unheard of": ({"use_nonsense": True}, "use_nonsense"),
    "another kind": ({"peft_type": "IA3"}, "IA3"),
    "another base": ({"base_model_name_or_path": "llama"}, "'b' llama"),
    "another rank": ({"r": 3}, "rank 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_adapter_is_refused_by_name(here, case, capsys):
    given, told = REFUSED[case]
    adapter("a", 1), adapter("b", 2, **({"use_dora": True, "target_modules": ["query"]} if case == "dora" else {}))
    path = Path("b/adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **given}))
    code = command("merge", "uniform_soup", "--models", "a", "b", "--output", "out")
    said = capsys.readouterr().err
    assert code == (4 if case == "another rank" else 2) and told in said and "Traceback" not in said
    assert not Path("out").exists() and not list(Path().glob(".*"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["uniform_soup", "--models", "a", "bert", "--rank", "3"], "of adapters alone"),
        (["uniform_soup", "--models", "a", "a", "--rank", "0"], "--rank 0"),
        (["uniform_soup", "--models", "a", "a", "--error", "2"], "--error 2"),
        (["uniform_soup", "--models", "a", "a", "--combine", "factor"], "did you mean 'factors'"),
        (["uniform_soup", "--models", "a", "labels"], "differ in their labels"),
        (["uniform_soup", "--models", "a", "wide"], "query is [16, 16] in 'a' and [16, 17] in 'wide'"),
        (["task_arithmetic", "weights=[1,-1]", "--models", "a", "a"], "nothing is left"),
        (["ties", "--models", "a", "bert"], "no base"),
    ],
)  # fmt: skip
def test_other_mistakes_are_told(here, words, told, capsys):
    adapter("a", 1)
    shutil.copytree("a", "labels")
    for name, labels in (("a", ["x", "y"]), ("labels", ["y", "x"])):
        Path(name, "kt_hf.json").write_text(json.dumps({"labels": labels}))
    shutil.copytree("a", "wide")
    held = load_file("wide/adapter_model.safetensors")
    save_file({n: torch.ones(4, 17) if n.endswith("query.lora_A.weight") else t for n, t in held.items()},
              "wide/adapter_model.safetensors")  # fmt: skip
    assert command("merge", *words, "--output", "out") == 2
    assert told in capsys.readouterr().err and not Path("out").exists() and not list(Path().glob(".*"))


# --- folded into the base --------------------------------------------------------------------------------------------

FOLDED: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"bert {case}": ("bert", OTHER[case][0])
        for case in ("rank pattern", "rslora", "added biases", "biases", "head")
    },
    "bert dora": ("bert", {"use_dora": True, "target_modules": ["query", "dense"]}),
    "gpt2 dora": ("gpt2", {"use_dora": True, "target_modules": ["c_attn", "c_proj"]}),
    **{kind: (kind, {}) for kind in ("gpt2", "vit", "resnet", "llama")},
}


@pytest.mark.parametrize("case", FOLDED)
def test_an_adapter_folds_into_its_base_as_peft_merges_it(here, case):
    kind, given = FOLDED[case]
    adapter("a", 1, kind, **given)
    assert command("merge", "uniform_soup", "--models", "a", "--fold", "--output", "out") == 0
    wanted = tensors(PeftModel.from_pretrained(load(kind), "a").merge_and_unload())
    assert off(tensors(load(kind, "out")), wanted) < 1e-5
    assert not [p.name for p in Path("out").iterdir() if "adapter" in p.name] and not list(Path().glob(".*"))
    assert not hasattr(load(kind, "out"), "peft_config") or not load(kind, "out").peft_config


def test_models_and_adapters_merge_into_a_model(here):
    adapter("a", 1, modules_to_save=["classifier"])
    torch.manual_seed(7)
    BertForSequenceClassification(MODELS["bert"][1]).save_pretrained("full")
    assert command("merge", "uniform_soup", "weights=[3,1]", "--models", "a", "full", "--output", "out") == 0
    folded = tensors(PeftModel.from_pretrained(load("bert"), "a").merge_and_unload())
    assert off(tensors(load("bert", "out")), summed([0.75, 0.25], folded, tensors(load("bert", "full")))) < 1e-5
    assert command("merge", "task_arithmetic", "--models", "a", "full", "--base", "bert", "--output", "sum") == 0
    base = tensors(load("bert"))
    assert off(tensors(load("bert", "sum")), summed([1, 1, -1], folded, tensors(load("bert", "full")), base)) < 1e-5


def test_an_adapter_of_a_classifier_folds_into_a_backbone(here):
    """Whose tensors are called otherwise, and which has no head."""
    backbone = BertModel(MODELS["bert"][1], add_pooling_layer=True)
    backbone.save_pretrained("backbone")
    model = get_peft_model(
        BertForSequenceClassification.from_pretrained("backbone"),
        LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False),
    ).eval()
    model.save_pretrained("a")
    ids = torch.arange(12).reshape(2, 6)
    assert command("merge", "uniform_soup", "--models", "a", "--fold", "--output", "out") == 0
    folded = BertForSequenceClassification.from_pretrained("out").eval()
    assert folded.config.num_labels == 3
    torch.testing.assert_close(folded(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    "given",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=["head", "embedding", "both", "head in full", "both in full"],
)
def test_tied_weights_part_where_an_adapter_parts_them(here, given):
    """Row 30: the logits are those before, and the configuration says whether weights are still tied."""
    adapter("a", 1, "llama", task_type="CAUSAL_LM", **given)
    ids = torch.arange(12).reshape(2, 6)
    wanted = PeftModel.from_pretrained(load("llama"), "a").eval()(ids).logits
    assert command("merge", "uniform_soup", "--models", "a", "--fold", "--output", "out") == 0
    folded = AutoModelForCausalLM.from_pretrained("out")
    torch.testing.assert_close(folded(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    still = "modules_to_save" in given and "ensure_weight_tying" in given
    assert folded.config.tie_word_embeddings is still
    assert ("lm_head.weight" in load_file("out/model.safetensors")) is not still
    # as the strategy exports, and as an adapter's folder is loaded
    from kt_hf.loading import merged

    model = merged(PeftModel.from_pretrained(load("llama"), "a"))
    torch.testing.assert_close(model.eval()(ids).logits, wanted, rtol=1e-4, atol=1e-4)
    model.save_pretrained("plain")
    torch.testing.assert_close(load("llama", "plain")(ids).logits, wanted, rtol=1e-4, atol=1e-4)


def test_a_base_elsewhere_is_named(here, capsys):
    adapter("a", 1)
    path = Path("a/adapter_config.json")
    path.write_text(path.read_text().replace('"bert"', '"gone/away"'))
    assert command("merge", "uniform_soup", "--models", "a", "--fold", "--output", "out") == 2
    assert "--base" in capsys.readouterr().err
    assert command("merge", "uniform_soup", "--models", "a", "--fold", "--base", "bert", "--output", "out") == 0
    assert command("merge", "uniform_soup", "--models", "a", "--fold", "--base", "llama", "--output", "o") == 2


def test_a_stage_merges_what_stages_kept_as_adapters(tmp_path):
    lora = {"lora": {"r": 2, "save": "adapter"}}
    training = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": "none"}
    recipe = Recipe(
        [
            Train("start", strategies=["finetune"], data=Data("digits", "source"), model=Model(**VIT)),
            Train("student", strategies=[lora], data=Data("digits", "target"), model=Model("@start"), seeds=2),
            Merge("soup", "uniform_soup", models=["@student"], data=Data("digits", "target")),
            Merge("mixed", "task_arithmetic", models=["@student"], base="@start", data=Data("digits", "target")),
        ],
        training=training,
    )
    report = run(recipe, tmp_path / "out")
    assert [s["name"] for s in report["stages"]] == ["start", "student", "soup", "mixed"]
    students = [tmp_path / "out" / "student" / "model", tmp_path / "out" / "student" / "seeds" / "1" / "model"]
    assert all((folder / "adapter_config.json").is_file() for folder in students)
    base = load("vit", tmp_path / "out" / "start" / "model")
    before, changes = tensors(base), []
    for folder in students:
        model = load("vit", tmp_path / "out" / "start" / "model")
        changes.append(summed([1, -1], tensors(PeftModel.from_pretrained(model, folder).merge_and_unload()), before))
    for name, weight in (("soup", 0.5), ("mixed", 1.0)):
        folder = tmp_path / "out" / name / "model"
        assert off(tensors(load("vit", folder)), summed([1, weight, weight], before, *changes)) < 1e-5
        assert not [p.name for p in folder.iterdir() if "adapter" in p.name]
        assert not (tmp_path / "out" / name / ".folded").exists()


# --- extracted -------------------------------------------------------------------------------------------------------


def tuned(kind: str, name: str = "tuned", changed: Any = None) -> Any:
    """A model of which everything has moved a little, or what `changed` says."""
    model = load(kind)
    torch.manual_seed(5)
    for n, p in model.named_parameters():
        if changed is None or changed(n):
            p.data += 0.1 * torch.randn_like(p)
    for n, b in model.named_buffers():
        if b.is_floating_point() and "running" in n:
            b.data += 0.1
    model.save_pretrained(name)
    return model


def logits(model: Any, kind: str) -> torch.Tensor:
    if kind in ("vit", "resnet"):
        return model(torch.arange(2 * 3 * 8 * 8).reshape(2, 3, 8, 8) / 200).logits
    return model(torch.arange(12).reshape(2, 6)).logits


@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_of_full_rank_is_the_model(here, kind, capsys):
    model = tuned(kind)
    assert command("extract-lora", "tuned", "--base", kind, "--rank", 1000, "--output", "a") == 0
    assert "100.00% of the change's squared norm kept" in capsys.readouterr().out
    loaded = PeftModel.from_pretrained(load(kind), "a").eval()
    torch.testing.assert_close(logits(loaded, kind), logits(model, kind), rtol=1e-4, atol=2e-5)
    assert command("merge", "uniform_soup", "--models", "a", "--fold", "--output", "out") == 0
    torch.testing.assert_close(logits(load(kind, "out"), kind), logits(model, kind), rtol=1e-4, atol=2e-5)


def test_rank_and_error_are_kept_and_told(here, capsys):
    after, before = tensors(tuned("bert")), tensors(load("bert"))
    assert command("extract-lora", "tuned", "--base", "bert", "--rank", 3, "--output", "three") == 0
    said = capsys.readouterr().out
    found = open_adapter(Path("three"), "three")
    lost = total = 0.0
    for module, pair in found.pairs.items():
        delta = after[f"{module}.weight"] - before[f"{module}.weight"]
        best = torch.linalg.svdvals(delta)[3:].norm()
        assert pair.rank == min(3, *delta.shape)
        assert float((delta - pair.delta(torch.float32)).norm()) == pytest.approx(float(best), rel=1e-3, abs=1e-5)
        lost += float(best**2)
    total = sum(float(((after[n] - before[n]) ** 2).sum()) for n in after)
    assert f"{1 - lost / total:.2%} of the change" in said and "ranks 2 to 3" in said
    assert command("extract-lora", "tuned", "--base", "bert", "--error", 0.3, "--output", "near") == 0
    for module, pair in open_adapter(Path("near"), "near").pairs.items():
        delta = after[f"{module}.weight"] - before[f"{module}.weight"]
        assert float((delta - pair.delta(torch.float32)).norm() / delta.norm()) <= 0.3 + 1e-6


def test_what_has_not_changed_is_left_out_and_what_is_no_matrix_is_kept_or_named(here, capsys, caplog):
    tuned("bert", changed=lambda n: "layer.0.attention.self.query" in n or "LayerNorm" in n)
    assert command("extract-lora", "tuned", "--base", "bert", "--rank", 4, "--output", "a") == 0
    found = open_adapter(Path("a"), "a")
    assert list(found.pairs) == ["bert.encoder.layer.0.attention.self.query"]
    assert "bert.encoder.layer.0.attention.self.query.bias" in found.full
    assert found.config["bias"] == "lora_only" and "classifier.weight" in found.full
    assert sum("LayerNorm.weight" in n for n in found.full) == 5
    assert command("extract-lora", "tuned", "--base", "bert", "--rank", 4, "--output", "b", "--only-low-rank") == 0
    bare = open_adapter(Path("b"), "b")
    assert set(bare.full) == {"classifier.weight", "classifier.bias"} and bare.config["bias"] == "none"
    assert "left out, with 0." in caplog.text and "LayerNorm" in caplog.text


def test_a_backbone_is_a_base_and_the_head_goes_along(here):
    MODELS["bert"][0](MODELS["bert"][1]).bert.save_pretrained("backbone")
    model = BertForSequenceClassification.from_pretrained("backbone").eval()
    for p in model.parameters():
        p.data += 0.05
    model.config.id2label = {0: "x", 1: "y", 2: "z"}
    model.save_pretrained("tuned")
    assert command("extract-lora", "tuned", "--base", "backbone", "--rank", 16, "--output", "a") == 0
    assert json.loads(Path("a/kt_hf.json").read_text())["labels"] == ["x", "y", "z"]
    loaded = PeftModel.from_pretrained(BertForSequenceClassification.from_pretrained("backbone"), "a").eval()
    torch.testing.assert_close(logits(loaded, "bert"), logits(model, "bert"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["tuned", "--base", "bert"], 2, "neither --rank nor --error"),
        (["bert", "--base", "bert", "--rank", "2"], 2, "do not differ"),
        (["tuned", "--base", "llama", "--rank", "2"], 2, "no tensor in common"),
        (["tuned", "--base", "nowhere", "--rank", "2"], 5, "nowhere"),
        (["tuned", "--base", "bert", "--rank", "-2"], 2, "--rank -2"),
        (["tuned", "--base", "wide", "--rank", "2"], 2, "word_embeddings.weight is [30, 16]"),
    ],
)
def test_what_extraction_refuses(here, words, code, told, capsys):
    tuned("bert")
    config = BertConfig(**SIZES, vocab_size=31, max_position_embeddings=16)
    BertForSequenceClassification(config).save_pretrained("wide")
    assert command("extract-lora", *words, "--output", "out") == code
    said = capsys.readouterr().err
    assert told in said and "Traceback" not in said and not Path("out").exists()
