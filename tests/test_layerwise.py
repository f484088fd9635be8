"""Settings of merges that vary over a model: by depth, by names, in recipes and on the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_merging import shapes, trained  # noqa: F401  a fixture

from kt_hf import Data, Merge, MergeMethod, Recipe, layerwise, merging, registry, run
from kt_hf.blocks import Block, blocks, depths
from kt_hf.cli import main
from kt_hf.errors import Collector, RecipeError
from kt_hf.recipe import from_yaml

State = dict[str, torch.Tensor]
NAMES = (
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(5) for part in ("mlp.up_proj", "self_attn.q_proj", "norm")),
    "model.norm.weight",
    "lm_head.weight",
)


def state(seed: int) -> State:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(6 if "norm" in name else (6, 6), generator=draw) for name in NAMES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("toys")
    base = state(0)
    found = {}
    for i, name in enumerate(("base", "a", "b")):
        found[name] = root / name
        found[name].mkdir()
        moved = {n: t + 0.1 * i * d for (n, t), d in zip(base.items(), state(i).values(), strict=True)}
        save_file(moved, found[name] / "model.safetensors", {"format": "pt"})
        (found[name] / "config.json").write_text(json.dumps({"model_type": "toy"}))
    return found


def merge(folders: dict[str, Path], output: Path, name: str, given: dict[str, Any], parents=("a", "b")) -> State:
    collect = Collector()
    cls: Any = registry.load("merge", name)
    valid = layerwise.validate(cls, given, name, collect)
    collect.raise_if_any()
    method = layerwise.build(name, cls, valid)
    method.check(len(parents))
    with merging.Parents([folders[p] for p in parents], list(parents)) as opened:
        method.fit(merging.MergeRun(len(parents), list(parents), True, sum))
        merging.merge(method, opened, merging.Parents([folders["base"]], ["base"]), output, sync=False)
    return load_file(output / "model.safetensors")


# --- depth -----------------------------------------------------------------------------------------------------------


def test_depth_goes_from_the_first_block_to_the_last():
    found = depths(NAMES)
    assert [found[f"model.layers.{i}.norm.weight"] for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert found["model.embed_tokens.weight"] == 0
    assert found["model.norm.weight"] == found["lm_head.weight"] == 1


def test_encoder_and_decoder_are_apart_and_layers_within_a_block_are_none():
    layers = [f"{i}.layer.{j}.{what}" for i in range(3) for j, what in enumerate(("SelfAttention.q", "Dense.wi"))]
    names = ["shared.weight", *(f"{side}.block.{rest}.weight" for side in ("encoder", "decoder") for rest in layers)]
    found = blocks(names)
    assert found["encoder.block.2.layer.1.Dense.wi.weight"] == Block("encoder.block", 2, 3)
    assert found["decoder.block.1.layer.0.SelfAttention.q.weight"] == Block("decoder.block", 1, 3)
    assert depths(names)["shared.weight"] == 0


def test_blocks_within_stages_are_one_stack_and_experts_are_not():
    names = [f"net.stages.{i}.layers.{j}.conv.weight" for i in range(3) for j in range(i + 1)]
    names += ["net.embedder.conv.weight", "classifier.1.weight"]
    found = blocks(names)
    assert [found[n].index for n in names[:6]] == [0, 1, 2, 3, 4, 5] and found[names[5]].count == 6
    assert [depths(names)[n] for n in names[6:]] == [0, 1]
    moe = [f"model.layers.{i}.mlp.experts.{j}.w1.weight" for i in range(2) for j in range(4)]
    assert {b.index for b in blocks(moe).values()} == {0, 1}


def test_one_block_alone_is_found():
    names = ["embeddings.weight", "encoder.layer.0.dense.weight", "encoder.layer.0.norm.weight", "head.0.weight"]
    assert depths(names) == dict(zip(names, (0, 1, 1, 1), strict=True))


def test_gradients_are_straight_between_their_values():
    at = [layerwise.gradient([0.0, 1.0, 0.0], d) for d in (0, 0.25, 0.5, 0.75, 1)]
    assert at == [0, 0.5, 1, 0.5, 0]
    assert layerwise.gradient([0.1], 0.7) == 0.1
    assert {layerwise.gradient([0.3, 0.3, 0.3], d / 7) for d in range(8)} == {0.3}  # exactly


# --- every method ----------------------------------------------------------------------------------------------------

PLAIN: dict[str, dict[str, Any]] = {
    "uniform_soup": {"weights": [1.0, 3.0]},
    "slerp": {"t": 0.3, "norms": "interpolated"},
    "karcher": {"weights": [1.0, 2.0], "mean": "chordal"},
    "task_arithmetic": {"weights": [1.0, -0.5], "scaling": 0.4},
    "ties": {"density": 0.4, "weights": [1.0, 2.0], "scaling": 0.7, "divide_by": "weights"},
    "dare": {"density": 0.4, "rescale": "l1", "combine": "ties", "seed": 3},
    "della": {"density": 0.4, "epsilon": 0.1, "seed": 3},
    "breadcrumbs": {"density": 0.4, "outliers": 0.1, "combine": "ties"},
    "wise_ft": {"alpha": 0.3},
}
OTHER: dict[str, dict[str, Any]] = {
    "uniform_soup": {"weights": [1.0, 0.0]},
    "slerp": {"t": 0.9},
    "karcher": {"weights": [2.0, 1.0]},
    "task_arithmetic": {"scaling": 1.0},
    "ties": {"density": 0.9},
    "dare": {"density": 0.9},
    "della": {"density": 0.8},
    "breadcrumbs": {"density": 0.6},
    "wise_ft": {"alpha": 0.9},
}


def spread(value: Any) -> Any:
    """The same value as a gradient or as patterns."""
    if isinstance(value, list):
        return [spread(v) for v in value]
    if isinstance(value, float):
        return {"names": {"*mlp*": {"depth": [value, value]}, "*": {"depth": [value, value, value]}}}
    return {"names": {"*norm*": value, "*": value}}


@pytest.mark.parametrize("name", PLAIN)
def test_settings_that_vary_between_equal_values_are_those_values(tmp_path, folders, name):
    parents = ("a",) if name == "wise_ft" else ("a", "b")
    plain = merge(folders, tmp_path / "plain", name, PLAIN[name], parents)
    varied = merge(folders, tmp_path / "varied", name, {k: spread(v) for k, v in PLAIN[name].items()}, parents)
    assert all(torch.equal(plain[n], varied[n]) for n in plain)


@pytest.mark.parametrize("name", PLAIN)
def test_each_tensor_has_what_a_merge_with_its_settings_gives(tmp_path, folders, name):
    parents = ("a",) if name == "wise_ft" else ("a", "b")
    one, two = PLAIN[name], PLAIN[name] | OTHER[name]
    given = {**one, **{k: {"names": {"*.mlp.*": two[k], "*": one.get(k)}} for k in OTHER[name]}}
    if name == "task_arithmetic":
        given["scaling"] = {"names": {"*.mlp.*": 1.0, "*": 0.4}}
    found = merge(folders, tmp_path / "varied", name, given, parents)
    first = merge(folders, tmp_path / "one", name, one, parents)
    second = merge(folders, tmp_path / "two", name, two, parents)
    for tensor in found:
        assert torch.equal(found[tensor], (second if ".mlp." in tensor else first)[tensor]), tensor
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], second["model.layers.0.mlp.up_proj.weight"])


def test_every_merge_that_takes_numbers_is_here():
    from kt_hf.settings import parameters

    for name in registry.names("merge"):
        cls: Any = registry.load("merge", name)
        if not layerwise._measures(cls) and cls.needs_validation is not True and parameters(cls):
            if name in ("uniform_soup", "wise_ft") or name in PLAIN:
                continue
            pytest.fail(f"{name} takes settings and is not tried")


def test_weights_by_depth_go_from_one_parent_to_the_other(tmp_path, folders):
    weights = [{"depth": [1, 0]}, {"depth": [0, 1]}]
    found = merge(folders, tmp_path / "out", "uniform_soup", {"weights": weights})
    a, b = (load_file(folders[p] / "model.safetensors") for p in "ab")
    for name, depth in depths(NAMES).items():
        torch.testing.assert_close(found[name], (1 - depth) * a[name] + depth * b[name])
    assert torch.equal(found["model.embed_tokens.weight"], a["model.embed_tokens.weight"])


def test_a_methods_instances_are_as_many_as_there_are_settings():
    cls: Any = registry.load("merge", "slerp")
    method = layerwise.build("slerp", cls, {"t": {"names": {"*mlp*": 0.2, "*": {"depth": [0, 1]}}}})
    found = method.for_tensors(NAMES)
    assert len({id(m) for m in found.values()}) == 6
    assert isinstance(method, MergeMethod) and method.max_parents == 2 and method.order_matters
    assert found["model.layers.3.mlp.up_proj.weight"].t == 0.2  # type: ignore[attr-defined]
    assert found["model.layers.3.norm.weight"].t == 0.75  # type: ignore[attr-defined]


def test_what_is_tied_is_merged_alike(tmp_path, folders):
    """A copy of the embeddings in the head has another depth."""
    tied = {}
    for name, folder in folders.items():
        tensors = load_file(folder / "model.safetensors")
        tied[name] = tmp_path / name
        tied[name].mkdir()
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tied[name] / "model.safetensors", {"format": "pt"})
    found = merge(tied, tmp_path / "out", "slerp", {"t": {"depth": [0.2, 0.8]}})
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])


# --- refusals --------------------------------------------------------------------------------------------------------

GRADIENT = {"depth": [0.2, 0.8]}


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("ties", {"density": {"depth": [0.2, 1.5]}}, "ties.density: got 1.5 (at depth 1)"),
        ("ties", {"density": {"depth": []}}, "ties.density.depth: got []"),
        ("ties", {"density": {"depth": 0.2}}, "ties.density.depth: got 0.2"),
        ("ties", {"density": {"depth": ["low", "high"]}}, "a list of numbers"),
        ("ties", {"density": {**GRADIENT, "names": {"*": 1}}}, "depth and names stand beside each other"),
        ("ties", {"density": {"names": {}}}, "ties.density.names: got {}"),
        ("ties", {"density": {"names": {"*mlp*": "much", "*": 0.2}}}, "ties.density: got 'much'"),
        ("ties", {"density": {"names": {"*": 0.2, "*mlp*": "much"}}}, "got 'much' (for '*mlp*')"),
        ("ties", {"divide_by": {"names": {"*": "cuont"}}}, "did you mean 'count'?"),
        ("ties", {"divide_by": {"depth": [0, 1]}}, "ties.divide_by: got 0"),
        ("dare", {"seed": {"depth": [0, 1]}}, "dare.seed: got 0.5 (at depth 0.5)"),
        ("ties", {"weights": [1.0, {"names": {"*mlp*": "two", "*": 2.0}}]}, "got 'two'"),
        ("ties", {"densty": GRADIENT}, "did you mean 'density'?"),
        ("breadcrumbs", {"density": {"depth": [0.2, 0.8]}, "outliers": 0.3}, "add up to more than 1"),
        ("greedy_soup", {"anything": GRADIENT}, "unknown setting"),
        ("wise_ft", {"alpha": GRADIENT, "curve": [0.0, 1.0]}, "chooses on validation data once for all of it"),
        ("wise_ft", {"alpha": {"names": {"*mlp*": 0.3, "*": "fit"}}}, "chooses on validation data once for all of it"),
    ],
)
def test_what_can_be_known_before_the_models_is_refused_then(name, given, told):
    collect = Collector()
    cls: Any = registry.load("merge", name)
    with pytest.raises(RecipeError) as error:
        valid = layerwise.validate(cls, given, name, collect)
        collect.raise_if_any()
        layerwise.build(name, cls, valid)
    assert told in str(error.value)
    assert len(collect.mistakes) <= 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"density": {"names": {"*mlp*": 0.2}}}, "no pattern fits lm_head.weight and 12 more"),
        ({"density": {"names": {"*mlp*": 0.2}}}, "add a last pattern '*' (ties's default is 0.2)"),
        ({"density": {"names": {"*mpl*": 0.2, "*": 0.4}}}, "the pattern '*mpl*' fits no tensor"),
        ({"density": {"names": {"*": 0.2, "*mlp*": 0.4}}}, "or only such as fit one before it"),
        ({"weights": [{"names": {"*mlp*": 0, "*": 1}}, {"names": {"*q_proj*": 1, "*": 0}}]}, "all are 0 (for model"),
    ],
)
def test_what_only_the_names_tell_is_refused_before_anything_is_written(tmp_path, folders, given, told):
    with pytest.raises(RecipeError) as error:
        merge(folders, tmp_path / "out", "ties", given)
    assert told in str(error.value)
    assert not list(tmp_path.iterdir())


# --- recipes and commands --------------------------------------------------------------------------------------------


def test_a_recipe_varies_its_settings_also_from_yaml_and_from_outside(tmp_path, trained):  # noqa: F811
    data = Data(shapes(tmp_path / "data", {}))
    parents = [trained["right"], trained["wrong"]]
    text = """
stages:
  - merge: soup
    method: {uniform_soup: {weights: [{depth: [1, 0]}, {names: {"*bias": 1, "*": {depth: [0, 1]}}}]}}
    models: [%s, %s]
data: %s
""" % (*parents, data.path)  # noqa: UP031
    (tmp_path / "recipe.yaml").write_text(text)
    run(from_yaml(str(tmp_path / "recipe.yaml")), tmp_path / "yaml")
    weights: list[Any] = [{"depth": [1, 0]}, {"names": {"*bias": 1, "*": {"depth": [0, 1]}}}]
    soup = Merge("soup", {"uniform_soup": {"weights": weights}}, models=parents)
    run(Recipe([soup], data=data), tmp_path / "python")
    one, two = (load_file(tmp_path / p / "soup" / "model" / "model.safetensors") for p in ("yaml", "python"))
    first, second = (load_file(Path(p) / "model.safetensors") for p in parents)
    for name, depth in depths(list(one)).items():
        share = 1 / (2 - depth) if name.endswith("bias") else depth
        torch.testing.assert_close(one[name], torch.lerp(first[name], second[name], share), atol=1e-6, rtol=1e-5)
        assert torch.equal(one[name], two[name])
    assert "depth:" in (tmp_path / "yaml" / "recipe.yaml").read_text()


def test_a_recipe_with_a_wrong_gradient_is_refused_by_its_place(tmp_path, trained):  # noqa: F811
    soup = Merge("soup", {"ties": {"density": {"depth": [0.1, 2]}}}, models=[trained["right"]], base=trained["wrong"])
    with pytest.raises(RecipeError, match=r"ties.density: got 2.0 \(at depth 1\)"):
        run(Recipe([soup], data=Data(shapes(tmp_path / "data", {}))), tmp_path / "out")


def test_the_command_takes_gradients_and_patterns(tmp_path, folders, capsys):
    words = ["merge", "ties", "--models", folders["a"], folders["b"], "--base", folders["base"], "--output"]
    settings = ["density={depth: [0.2, 0.8]}", 'scaling={names: {"*mlp*": 0.3, "*": 1.0}}']
    assert main([str(w) for w in (*words, tmp_path / "out", *settings)]) == 0
    given = {"density": {"depth": [0.2, 0.8]}, "scaling": {"names": {"*mlp*": 0.3, "*": 1.0}}}
    expected = merge(folders, tmp_path / "expected", "ties", given)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    assert "depth" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(SystemExit) as ended:
        main([str(w) for w in (*words, tmp_path / "bad", "density={names: {'*mpl*': 0.2, '*': 0.3}}")])
    assert ended.value.code == 2 and "fits no tensor" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mergekit-yaml") is None, reason="mergekit is not installed")
def test_gradients_are_those_of_mergekit(tmp_path, folders):
    """Within the blocks: mergekit takes the depth 0 for what follows them, too."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    for i, name in enumerate(("a", "b")):
        torch.manual_seed(i)
        LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=5)).save_pretrained(tmp_path / name)
    t = [0.1, 0.9, 0.3]
    described = {
        "merge_method": "slerp",
        "dtype": "float32",
        "base_model": str(tmp_path / "a"),
        "models": [{"model": str(tmp_path / p)} for p in "ab"],
        "parameters": {"t": [{"filter": "mlp", "value": t}, {"value": 0.5}]},
    }
    (tmp_path / "merge.yml").write_text(json.dumps(described))
    command = ["mergekit-yaml", str(tmp_path / "merge.yml"), str(tmp_path / "theirs")]
    subprocess.run(command, check=True, capture_output=True)
    given = {"t": {"names": {"*mlp*": {"depth": t}, "*": 0.5}}, "linear_above": 0.9995}
    ours = merge({"base": tmp_path / "a", "a": tmp_path / "a", "b": tmp_path / "b"}, tmp_path / "ours", "slerp", given)
    theirs = {n: x for f in (tmp_path / "theirs").glob("*.safetensors") for n, x in load_file(f).items()}
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)
