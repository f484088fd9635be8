"""Merges described in mergekit's YAML: read, refused by name, and with mergekit's numbers where it is installed."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_vocabularies import OTHERS, SENTENCES, bpe, llama
from transformers import AutoTokenizer, LlamaForCausalLM

from kt_hf import mergekit_merge, mergekit_yaml
from kt_hf.cli import main
from kt_hf.errors import IntegrityError, RecipeError

State = dict[str, torch.Tensor]
LAYERS = {"base": 4, "a": 4, "b": 4, "deep": 6}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with tiny Llamas: a base, two that come from it, and a deeper one."""
    from transformers import LlamaConfig

    root = tmp_path_factory.mktemp("models")
    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    start: State = {}
    for i, (name, count) in enumerate(LAYERS.items()):
        torch.manual_seed(i)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=count, tie_word_embeddings=False))
        if name == "base":
            start = {n: t.clone() for n, t in model.state_dict().items()}
        elif name != "deep":
            draw = torch.Generator().manual_seed(i)
            shared = torch.Generator().manual_seed(99)
            moved = {
                n: t + 0.03 * torch.randn(t.shape, generator=shared) + 0.02 * torch.randn(t.shape, generator=draw)
                for n, t in start.items()
            }
            model.load_state_dict(moved)
        model.save_pretrained(root / name)
    for i, (name, added) in enumerate(
        {"plain": (), "chat": ("<|user|>", "catdog"), "code": ("<|fim|>", "<|user|>")}.items()
    ):
        llama(root / name, bpe(SENTENCES, *added), i, tie_word_embeddings=False)
    llama(root / "german", bpe(OTHERS), 8, tie_word_embeddings=False)
    return root


def load(folder: Path) -> State:
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def write(folder: Path, described: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "merge.yml").write_text(yaml.safe_dump(described, sort_keys=False))
    return folder / "merge.yml"


def merge(tmp_path: Path, described: dict[str, Any], **how: Any) -> State:
    mergekit_merge.merge(write(tmp_path, described), tmp_path / "ours", **how)
    return load(tmp_path / "ours")


def both(*parameters: dict[str, Any], names: tuple[str, ...] = ("a", "b")) -> list[dict[str, Any]]:
    found = [{"model": f"./{name}"} for name in names]
    return [{**m, "parameters": p} if p else m for m, p in zip(found, parameters or ({}, {}), strict=True)]


def part(*sources: tuple[str, int, int], **more: Any) -> dict[str, Any]:
    return {"sources": [{"model": f"./{m}", "layer_range": [i, j]} for m, i, j in sources], **more}


GRADIENT = [0.1, 0.9, 0.4]
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": both({"weight": 1.0}, {"weight": 0.4})},
    "linear with filters, gradients and a sum": {
        "merge_method": "linear",
        "models": both(
            {"weight": [{"filter": "mlp", "value": GRADIENT}, {"value": 0.5}]}, {"weight": [0.0, 1.0]}
        ),
        "parameters": {"normalize": False},
    },
    "linear with a base, which counts as a model": {
        "merge_method": "linear",
        "base_model": "./base",
        "models": both({"weight": 2.0}, {}),
        "parameters": {"weight": 1},
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "./a",
        "slices": [part(("a", 0, 4), ("deep", 1, 5))],
        "parameters": {
            "t": [{"filter": "self_attn", "value": GRADIENT}, {"filter": "mlp", "value": [1, 0]}, {"value": 0.5}]
        },
    },
    "nuslerp": {"merge_method": "nuslerp", "models": both({"weight": 1.0}, {"weight": 3})},
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "./base",
        "models": both({"weight": 0.7}, {"weight": -0.3}),
        "parameters": {"lambda": 1.5, "normalize": True},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "./base",
        "models": both({"density": GRADIENT, "weight": 1.0}, {"density": 0.3, "weight": [0.2, {"value": 1}][:1]}),
        "parameters": {"normalize": True, "int8_mask": True},
    },
    "ties without normalize, with lambda and rescale": {
        "merge_method": "ties",
        "base_model": "./base",
        "models": [{"model": "./base"}, *both({"density": 0.4, "weight": 0.5}, {"density": 0.4, "weight": 0.6})],
        "parameters": {"normalize": False, "lambda": 0.8, "rescale": True},
    },
    "ties by slices": {
        "merge_method": "ties",
        "base_model": "./base",
        "slices": [
            part(("base", 0, 2), ("a", 0, 2), ("b", 0, 2), parameters={"density": 0.5}),
            part(("base", 2, 4), ("a", 2, 4), ("b", 1, 3), parameters={"density": [0.2, 0.7]}),
        ],
        "parameters": {"weight": 0.5, "density": 1.0},
    },
    "dare_ties with nothing dropped": {
        "merge_method": "dare_ties", "base_model": "./base", "models": both({"weight": 0.5}, {"weight": 0.3}),
    },
    "della_linear with nothing dropped": {
        "merge_method": "della_linear", "base_model": "./base", "models": both({"weight": 0.5}, {"weight": 0.3}),
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "base_model": "./base",
        "models": both({"density": 0.5, "gamma": 0.05, "weight": 1}, {"density": 0.02, "gamma": 0.6, "weight": 0.5}),
    },
    "breadcrumbs_ties": {
        "merge_method": "breadcrumbs_ties",
        "base_model": "./base",
        "models": both({"density": 0.9, "gamma": 0.3, "weight": 1}, {"density": 0.6, "weight": 0.5}),
    },
    "model_stock": {"merge_method": "model_stock", "base_model": "./base", "models": both()},
    "karcher": {"merge_method": "karcher", "models": both(), "parameters": {"max_iter": 50}},
    "passthrough": {
        "merge_method": "passthrough",
        "slices": [
            part(("a", 0, 3)),
            part(
                ("deep", 2, 6),
                parameters={
                    "scale": [
                        {"filter": "o_proj", "value": 0.5},
                        {"filter": "layers.5.mlp", "value": 2},
                        {"value": 1.0},
                    ]
                },
            ),
            part(("a", 1, 4)),
        ],
    },
    "passthrough of one layer again, scaled by depth": {
        "merge_method": "passthrough",
        "slices": [part(("a", 0, 4)), part(("a", 3, 4), parameters={"scale": [0.25, 0.75]})],
        "out_dtype": "bfloat16",
    },
}  # fmt: skip
CONFIGS["ties"]["models"][1]["parameters"]["weight"] = [0.2, 1.0]


VOCABULARIES: dict[str, dict[str, Any]] = {
    "a union, averaged": {
        "merge_method": "linear",
        "models": both({"weight": 1}, {"weight": 1}, names=("chat", "code")),
        "tokenizer_source": "union",
    },
    "a union with a base": {
        "merge_method": "task_arithmetic",
        "base_model": "./plain",
        "models": both({"weight": 0.5}, {"weight": 0.25}, names=("chat", "code")),
        "tokenizer": {"source": "union", "pad_to_multiple_of": 16},
    },
    "the base's": {
        "merge_method": "ties",
        "base_model": "./chat",
        "models": both({"weight": 0.5}, {"weight": 0.25}, names=("plain", "code")),
        "parameters": {"density": 0.5},
        "tokenizer_source": "base",
    },
    "that of a model": {
        "merge_method": "linear",
        "models": both({"weight": 1}, {"weight": 3}, names=("plain", "german")),
        "tokenizer_source": "./german",
    },
}


# --- what is to come out, also where mergekit is not installed -------------------------------------------------------


@pytest.fixture
def here(models, monkeypatch) -> Path:
    monkeypatch.chdir(models)
    return models


def test_linear_by_filters_and_gradients(tmp_path, here):
    """Of mergekit's rules: a filter is a part of a name, the depth is 0 outside of the layers."""
    found = merge(tmp_path, {"dtype": "float32", **CONFIGS["linear with filters, gradients and a sum"]})
    a, b = load(here / "a"), load(here / "b")
    weights = {"model.layers.0": (0.1, 0), "model.layers.1": (0.1 + 0.8 * 2 / 3, 1 / 3), "model.layers.3": (0.4, 1)}
    for layer, (of_a, of_b) in weights.items():
        mlp, norm = f"{layer}.mlp.up_proj.weight", f"{layer}.input_layernorm.weight"
        torch.testing.assert_close(found[mlp], of_a * a[mlp] + of_b * b[mlp])
        torch.testing.assert_close(found[norm], 0.5 * a[norm] + of_b * b[norm])
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        torch.testing.assert_close(found[name], 0.5 * a[name])


def test_a_parameter_is_taken_from_the_nearest_place_that_has_one(tmp_path, here):
    described = {
        "merge_method": "linear",
        "slices": [
            {
                "sources": [
                    {"model": "./a", "layer_range": [0, 2], "parameters": {"weight": {"filter": "mlp", "value": 3}}},
                    {"model": "./b", "layer_range": [0, 2]},
                ],
                "parameters": {"weight": [{"filter": "q_proj", "value": 0}, {"filter": "mlp", "value": 1}]},
            },
            part(("a", 2, 4), ("b", 2, 4)),
        ],
        "parameters": {"weight": 1, "normalize": False},
    }
    found, a, b = merge(tmp_path, described), load(here / "a"), load(here / "b")
    for name, of_a, of_b in (
        ("model.layers.1.mlp.up_proj.weight", 3, 1),
        ("model.layers.1.self_attn.q_proj.weight", 0, 0),
        ("model.layers.1.self_attn.v_proj.weight", 1, 1),
        ("model.layers.2.mlp.up_proj.weight", 1, 1),
        ("model.embed_tokens.weight", 1, 1),
    ):
        torch.testing.assert_close(found[name], of_a * a[name] + of_b * b[name])


def test_slices_are_renumbered_and_keep_what_stands_around_them(tmp_path, here):
    found = merge(tmp_path, CONFIGS["passthrough"])
    a, deep = load(here / "a"), load(here / "deep")
    origin = [(a, 0), (a, 1), (a, 2), (deep, 2), (deep, 3), (deep, 4), (deep, 5), (a, 1), (a, 2), (a, 3)]
    for i, (model, layer) in enumerate(origin):
        for name in ("mlp.up_proj", "self_attn.o_proj"):
            scale = 0.5 if model is deep and name.endswith("o_proj") else 1
            scale = 2 if model is deep and name.startswith("mlp") and layer == 5 else scale  # as it is called there
            there = model[f"model.layers.{layer}.{name}.weight"]
            assert torch.equal(found[f"model.layers.{i}.{name}.weight"], scale * there)
    assert torch.equal(found["lm_head.weight"], a["lm_head.weight"])
    assert len(found) == 3 + 9 * len(origin)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.config.num_hidden_layers == 10
    assert model(torch.arange(8)[None]).logits.isfinite().all()


def test_first_and_last_come_from_the_first_and_the_last_slice(tmp_path, here):
    found = merge(tmp_path, {"merge_method": "passthrough", "slices": [part(("a", 0, 2)), part(("deep", 3, 6))]})
    a, deep = load(here / "a"), load(here / "deep")
    assert torch.equal(found["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], deep["lm_head.weight"])
    assert torch.equal(found["model.norm.weight"], deep["model.norm.weight"])


def test_lists_by_layer_in_the_configuration_follow_the_layers(tmp_path, here):
    for name in ("a", "deep"):
        shutil.copytree(here / name, tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        kinds = [f"{name} {i}" for i in range(LAYERS[name])]
        mlp = [1, 3] if name == "a" else [0, 5]
        config |= {"layer_types": kinds, "mlp_only_layers": mlp, "eos_token_id": [2, 1]}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    described = {"merge_method": "passthrough", "slices": [part(("a", 1, 4)), part(("deep", 4, 6)), part(("a", 3, 4))]}
    text = json.dumps(described).replace("./", f"{tmp_path}/")
    with pytest.raises(IntegrityError, match=r"the merged model cannot be loaded: .*layer_types"):
        merge(tmp_path, json.loads(text))  # no kinds of layers that transformers knows
    merge(tmp_path, json.loads(text), check=False)
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == ["a 1", "a 2", "a 3", "deep 4", "deep 5", "a 3"]
    assert config["mlp_only_layers"] == [0, 2, 4, 5] and config["eos_token_id"] == [2, 1]


def test_task_vectors_have_a_density_each(tmp_path, here):
    found = merge(tmp_path, CONFIGS["breadcrumbs"])
    base, a, b = (load(here / m) for m in ("base", "a", "b"))
    name = "model.layers.1.mlp.up_proj.weight"
    total = torch.zeros(base[name].numel())
    for model, density, gamma, weight in ((a, 0.5, 0.05, 1.0), (b, 0.02, 0.6, 0.5)):
        vector = (model[name] - base[name]).flatten()
        order, count = vector.abs().argsort(), vector.numel()
        keep = order[count - int(density * count) - int(gamma * count) : count - int(gamma * count)]
        total[keep] += weight * vector[keep]
    torch.testing.assert_close(found[name], base[name] + total.view_as(base[name]))


def test_what_is_dropped_at_random_is_rescaled_to_the_same_sum_of_magnitudes(tmp_path, here):
    models = both({"weight": 1.0, "density": 0.3}, {"weight": 0.0, "density": 0.5})
    for method, epsilon in (("dare_linear", {}), ("dare_ties", {}), ("della_linear", {"epsilon": 0.1})):
        described = {"merge_method": method, "base_model": "./base", "models": models, "parameters": epsilon}
        found, base, a = merge(tmp_path / method, described), load(here / "base"), load(here / "a")
        for name in ("model.layers.1.mlp.up_proj.weight", "lm_head.weight"):
            kept = found[name] - base[name]
            torch.testing.assert_close(kept.abs().sum(), (a[name] - base[name]).abs().sum(), rtol=1e-4, atol=0)
            assert 0.2 < (kept.abs() > 1e-6).float().mean() < 0.4


def test_a_base_that_is_alone_is_copied(tmp_path, here):
    described = {"merge_method": "ties", "base_model": "./base", "models": [{"model": "./base"}]}
    found, base = merge(tmp_path, described), load(here / "base")
    assert all(torch.equal(found[n], base[n]) for n in base)


@pytest.mark.parametrize(
    ("said", "stored"), [({"dtype": "float16"}, torch.float16), ({"dtype": "float64", "out_dtype": "bfloat16"}, None)]
)
def test_dtypes_are_written_and_told(tmp_path, here, said, stored):
    found = merge(tmp_path, {"merge_method": "karcher", "models": both(), **said})
    assert {t.dtype for t in found.values()} == {stored or torch.bfloat16}
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["dtype"] == str(stored or torch.bfloat16).removeprefix("torch.")


@pytest.mark.parametrize(
    "named", ["./a+./lora", {"model": "./a", "lora": "./lora"}, {"model": {"path": "./a"}, "lora": {"path": "./lora"}}]
)
def test_an_adapter_is_folded_into_its_model_first(tmp_path, here, named):
    """Into the model that is named, not into that on which it was trained."""
    tuned = get_peft_model(
        LlamaForCausalLM.from_pretrained("base"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    tuned.save_pretrained("lora")
    merged = merge(
        tmp_path,
        {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in (named, "./b")]},
    )
    shutil.rmtree("lora")
    change = {
        n.replace("base_model.model.", ""): m.get_delta_weight("default")
        for n, m in tuned.named_modules()
        if hasattr(m, "get_delta_weight")
    }
    assert len(change) == LAYERS["base"]
    a, b = load(here / "a"), load(here / "b")
    for name in a:
        added = change.get(name.removesuffix(".weight"), torch.zeros(1))
        assert torch.allclose(merged[name], (a[name] + added + b[name]) / 2, atol=1e-6), name
    assert not list(tmp_path.glob(".*"))


def test_strangers_are_told_and_a_dry_run_writes_nothing(tmp_path, here, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("kt_hf"), "propagate", True)
    model = LlamaForCausalLM.from_pretrained("a")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "kin")
    LlamaForCausalLM(model.config).save_pretrained(tmp_path / "stranger")
    for name in ("stranger", "kin"):
        models = [{"model": m, "parameters": {"weight": 1}} for m in ("./a", str(tmp_path / name))]
        file = write(tmp_path, {"merge_method": "linear", "models": models})
        caplog.clear()
        shown = mergekit_merge.merge(file, tmp_path / "ours", dry_run=True)
        assert "model.layers.3" in shown and "nothing was written" in shown and not (tmp_path / "ours").exists()
        assert ("do not seem to come from one model" in caplog.text) == (name == "stranger")
    assert main(["merge", "--config", str(file), "--output", str(tmp_path / "ours"), "--dry-run"]) == 0
    assert not (tmp_path / "ours").exists()
    mergekit_merge.merge(file, tmp_path / "ours")
    assert "Kinship of the parents" in (tmp_path / "ours" / "README.md").read_text()


def test_the_result_is_tried_before_it_gets_its_name(tmp_path, models, monkeypatch):
    """Finite weights whose logits are not."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "a", "loud")
    weights = load(Path("loud"))
    for name in weights:
        if name.endswith("proj.weight") or name == "lm_head.weight":
            weights[name] = weights[name] * 1e30
    save_file(weights, "loud/model.safetensors", {"format": "pt"})
    described = {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 1}} for m in ("./loud",)]}
    with pytest.raises(IntegrityError, match="logits are not finite"):
        merge(tmp_path, described)
    assert not Path("ours").exists() and not list(Path().glob(".*"))
    assert merge(tmp_path, described, check=False).keys() == weights.keys()


def test_vocabularies_are_brought_together_as_the_file_says(tmp_path, here):
    described = {**VOCABULARIES["a union with a base"], "chat_template": "{{ messages[0]['content'] }}"}
    found = merge(tmp_path, described)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    ids, plain = tokenizer.get_vocab(), AutoTokenizer.from_pretrained(here / "plain")
    assert ids.keys() == plain.get_vocab().keys() | {"<|user|>", "catdog", "<|fim|>"}
    assert len(found["lm_head.weight"]) == -(-len(ids) // 16) * 16
    assert tokenizer(SENTENCES[0])["input_ids"] == plain(SENTENCES[0])["input_ids"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    with pytest.raises(RecipeError, match="tokenizer_source: union, base, or one of the models"):
        merge(tmp_path / "other", {k: v for k, v in described.items() if k != "tokenizer"})


@pytest.mark.parametrize(
    ("own", "expected"), [(("one", "two", "one"), "one"), ((None, "two", None), "two"), ((), None)]
)
def test_auto_is_the_chat_template_of_most_models(tmp_path, here, own, expected):
    names = ("x", "y", "z")
    for name, template in zip(names, own or (None,) * 3, strict=True):
        shutil.copytree(here / "plain", tmp_path / name)
        if template:
            (tmp_path / name / "chat_template.jinja").write_text(template)
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in names]
    merge(tmp_path, {"merge_method": "linear", "models": models, "chat_template": "auto"})
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").chat_template == expected


def test_the_command_merges_by_a_file(tmp_path, here, capsys):
    path = write(tmp_path, CONFIGS["ties"])
    assert main(["merge", "--config", str(path), "--output", str(tmp_path / "out"), "--threads", "1"]) == 0
    assert "by ties into" in capsys.readouterr().out
    assert (tmp_path / "out" / "mergekit_config.yml").read_text() == path.read_text()
    assert all(torch.equal(t, load(tmp_path / "out")[n]) for n, t in merge(tmp_path, CONFIGS["ties"]).items())


# --- refusals --------------------------------------------------------------------------------------------------------

LINEAR: dict[str, Any] = {"merge_method": "linear", "models": both({"weight": 1}, {"weight": 1})}
TIES: dict[str, Any] = {"merge_method": "ties", "base_model": "./base", "models": LINEAR["models"]}


def with_source(**more: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": "./a", "parameters": {"weight": 1}, **more}]}


@pytest.mark.parametrize(
    ("described", "told"),
    [
        ({**LINEAR, "merge_method": "nearswap"}, "merge_method: nearswap is none of ours"),
        ({**LINEAR, "merge_method": "tie"}, "did you mean 'ties'?"),
        ({**LINEAR, "merge_methd": "ties"}, "merge_methd: unknown setting"),
        ({**LINEAR, "slices": [part(("a", 0, 1))]}, "models and slices given"),
        ({"merge_method": "linear"}, "neither models nor slices given"),
        ({**LINEAR, "modules": {"text": {}}}, "modules: parts of a model cannot be merged apart"),
        (with_source(model={"model": "./a", "lora": 7}), "models.0.model.lora: got 7"),
        (with_source(model=7), "models.0.model: got 7"),
        (with_source(wieght=1), "models.0.wieght: unknown setting"),
        (with_source(parameters={"weigth": 1, "weight": 1}), "models.0.parameters.weigth: unknown parameter"),
        (with_source(parameters={"weight": "much"}), "models.0.parameters.weight: got 'much'"),
        (with_source(parameters={"weight": True}), "models.0.parameters.weight: got True"),
        (with_source(parameters={"weight": []}), "models.0.parameters.weight: got []"),
        (with_source(parameters={"weight": [{"filter": "mlp"}]}), "models.0.parameters.weight.0: got"),
        (with_source(parameters={"weight": [{"filtre": "mlp", "value": 1}]}), "weight.0.filtre: unknown setting"),
        (with_source(parameters={}), "models: linear needs the parameter weight of './a'"),
        ({**LINEAR, "models": both({"weight": 1}, {"weight": 1}, names=("a", "a"))}, "'./a' stands there twice"),
        ({**LINEAR, "base_model": "./base"}, "linear needs the parameter weight of './base'"),
        ({**LINEAR, "parameters": {"normalize": "perhaps"}}, "parameters.normalize: got 'perhaps'"),
        ({**LINEAR, "dtype": "int8"}, "dtype: got 'int8'"),
        ({**LINEAR, "tokenizer_source": "./c"}, "tokenizer_source: './c' is none of the models"),
        ({**LINEAR, "tokenizer": {"tokens": {"<x>": {"source": "./a"}}}}, "tokenizer.tokens: rows of single tokens"),
        ({**LINEAR, "tokenizer": {}, "tokenizer_source": "base"}, "exclude each other"),
        ({**LINEAR, "tokenizer": {"pad_to_multiple_of": 0}}, "tokenizer.pad_to_multiple_of: got 0"),
        ({**LINEAR, "chat_template": "chatml"}, "chat_template: got 'chatml'"),
        ({"merge_method": "ties", "models": LINEAR["models"]}, "models: ties needs a base"),
        ({**TIES, "slices": [part(("a", 0, 1))], "models": None}, "and list it among the sources"),
        ({**TIES, "merge_method": "slerp", "parameters": {"t": 0.5}}, "slerp takes the base and one more model, not 2"),
        ({"merge_method": "slerp", "base_model": "./a", "models": both()}, "slerp needs the parameter t"),
        ({**TIES, "merge_method": "model_stock", "models": both()[:1]}, "two models beside the base"),
        ({**TIES, "merge_method": "model_stock", "parameters": {"filter_wise": True}}, "filter_wise: true is not done"),
        ({"merge_method": "passthrough", "models": both()}, "passthrough takes one model, not './a' and './b'"),
        (
            {"merge_method": "karcher", "models": both(), "parameters": {"max_iter": 1}},
            "max_iter: 1.0 is not done here",
        ),
        ({**LINEAR, "merge_method": "nuslerp", "base_model": "./base"}, "nuslerp is done here for two models without"),
        ({"merge_method": "passthrough", "slices": [part(("a", 2, 2))]}, "slices.0.sources.0.layer_range: got [2, 2]"),
        (
            {"merge_method": "linear", "slices": [part(("a", 0, 2), ("b", 0, 3), parameters={"weight": 1})]},
            "layer_ranges of 2 and 3 layers",
        ),
        ({"merge_method": "passthrough", "slices": [part(("a", 0, 1), residual_weight=0.5)]}, "residual_weight"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name_before_anything_is_read(tmp_path, described, told):
    described = {key: value for key, value in described.items() if value is not None}
    with pytest.raises(RecipeError) as error:
        mergekit_yaml.read(write(tmp_path, described))  # no such models are here
    assert told in str(error.value)


def test_all_mistakes_of_a_file_are_told_together(tmp_path):
    described = {**LINEAR, "merge_methd": 1, "dtype": "int8", "models": both({"weight": "x"}, {"weight": 1})}
    with pytest.raises(RecipeError) as error:
        mergekit_yaml.read(write(tmp_path, described))
    assert all(
        word in str(error.value) for word in ("3 mistakes", "merge_methd", "dtype", "models.0.parameters.weight")
    )


@pytest.mark.parametrize(
    ("described", "told"),
    [
        ({"merge_method": "passthrough", "slices": [part(("a", 2, 5))]}, "[2, 5], and './a' has 4 layers"),
        ({**LINEAR, "models": both({"weight": 1}, {"weight": 1}, names=("a", "deep"))}, "differ in 18 tensors"),
        ({**LINEAR, "models": both({"weight": 1}, {"weight": -1})}, "the weights add up to 0"),
        (
            {**LINEAR, "models": both({"weight": 1}, {"weight": {"filter": "mlp", "value": 1}})},
            "no filter of weight of './b' fits lm_head.weight",
        ),
        ({**TIES, "models": both({"weight": 1}, {"weight": -0.5})}, "divides by the sum of weights"),
        ({**TIES, "merge_method": "della", "parameters": {"density": 0.1}}, "likelihoods outside of 0 to 1"),
    ],
)
def test_what_only_the_models_tell_is_refused_before_anything_is_written(tmp_path, here, described, told):
    with pytest.raises(RecipeError) as error:
        merge(tmp_path, described)
    assert told in str(error.value)
    assert not (tmp_path / "ours").exists() and not list(tmp_path.glob(".*"))


def test_parameters_that_mergekit_leaves_out_are_left_out_and_told(tmp_path, caplog):
    described = {**LINEAR, "parameters": {"density": 0.5, "int8_mask": True, "normalize": "yes"}}
    config = mergekit_yaml.read(write(tmp_path, described))
    assert config.parameters == {"normalize": True}
    assert [r.getMessage() for r in caplog.records] == [
        "parameters.density has no effect there: left out, as mergekit does"
    ]


def test_a_file_that_asks_for_python_objects_is_not_read(tmp_path):
    (tmp_path / "merge.yml").write_text("merge_method: !!python/object/apply:os.system [ls]")
    with pytest.raises(IntegrityError, match="Python objects"):
        mergekit_yaml.read(tmp_path / "merge.yml")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ties", "--config", "x.yml"], "METHOD beside --config"),
        (["--config", "x.yml", "--base", "b", "--dtype", "float32"], "--base and --dtype beside --config"),
        (["--config", "x.yml", "--fold", "--head", "a"], "--head and --fold beside --config"),
        (["--config", "nothing.yml"], "cannot read nothing.yml"),
        (["ties"], "no models to merge"),
        ([], "no method to merge"),
    ],
)
def test_the_command_takes_a_file_or_a_method(tmp_path, capsys, words, told):
    with pytest.raises(SystemExit) as ended:
        main(["merge", *words, "--output", str(tmp_path / "out")])
    assert ended.value.code == 2 and told in capsys.readouterr().err


# --- mergekit, where it is installed ---------------------------------------------------------------------------------


def by_token(folder: Path) -> State:
    """Rows of the tables under their tokens' texts, and the other tensors."""
    found, ids = load(folder), AutoTokenizer.from_pretrained(folder).get_vocab()
    tables = {n: found.pop(n) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    return found | {f"{n} of {text}": rows[i] for n, rows in tables.items() for text, i in ids.items()}


RUN = """
import sys
from mergekit.scripts.run_yaml import main

for folder in sys.argv[1:]:
    main([folder + "/merge.yml", folder + "/theirs"], standalone_mode=False)
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mergekit-yaml") is None, reason="mergekit is not installed")
def test_results_are_those_of_mergekit(tmp_path, models, monkeypatch):
    """Its command line, in one process for all, because that takes long to start."""
    monkeypatch.chdir(models)
    folders = {name: tmp_path / str(i) for i, name in enumerate(CONFIGS)}
    folders |= {name: tmp_path / f"v{i}" for i, name in enumerate(VOCABULARIES)}
    for name, described in (CONFIGS | VOCABULARIES).items():
        merge(folders[name], {"dtype": "float32", **described})
    python = Path(str(shutil.which("mergekit-yaml"))).read_text().splitlines()[0].removeprefix("#!")
    subprocess.run([python, "-c", RUN, *map(str, folders.values())], check=True, capture_output=True)
    for name, folder in folders.items():
        read = load if name in CONFIGS else by_token
        theirs, mine = read(folder / "theirs"), read(folder / "ours")
        assert mine.keys() == theirs.keys(), name
        for key in theirs:
            assert mine[key].dtype == theirs[key].dtype, (name, key)
            assert torch.allclose(mine[key], theirs[key], atol=1e-5, rtol=1e-5), (name, key)
        configs = [json.loads((folder / p / "config.json").read_text()) for p in ("ours", "theirs")]
        for key in ("num_hidden_layers", "vocab_size"):
            assert configs[0][key] == configs[1][key], name
