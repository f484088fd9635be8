"""Merges that ask their parents something before the tensors are merged: what they measure, on what, and how often."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import measured_child
import pytest
import torch
from helpers import VIT
from kt_hf_plugins.fisher import Fisher
from kt_hf_plugins.greedy_soup import GreedySoup
from kt_hf_plugins.learned_soup import LearnedSoup
from kt_hf_plugins.regmean import RegMean
from kt_hf_plugins.text_classification import TextClassification
from safetensors.torch import load_file
from test_dual_encoder import FAMILIES
from test_merging import accuracy, shapes, summary
from test_timm import saved_by_timm
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, GPT2Config, GPT2LMHeadModel

from kt_hf import Data, Merge, Model, Recipe, Train, measuring, merging, run
from kt_hf.errors import NotMeaningful, RecipeError
from kt_hf.functional.measured import fisher_mean, gram_of_rows, regression_mean
from kt_hf.merge import MergeMethod
from kt_hf.merge_command import merge as merge_command
from kt_hf.task import Loaded
from kt_hf.tensor_files import open_model
from kt_hf.testing import asked
from kt_hf.testing.bench import LABELS, Bench, cpu_accelerator
from kt_hf.testing.merges import state, write

FAST = {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": "none", "eval_steps": 0}
NO_RUN: Any = None


def parent_of(bench: Bench, folder: Path | str, task: Any = None) -> measuring.Parent:
    loaded = bench.load(str(folder))
    return measuring.Parent("it", loaded, task or bench.task, bench.info, cpu_accelerator(), open_model(Path(folder)))


# --- Fisher ----------------------------------------------------------------------------------------------------------


def by_hand(parent: measuring.Parent, label: Any) -> dict[str, torch.Tensor]:
    """The mean of squared gradients of -log p(y | x), row by row; label: (logits, batch) -> y."""
    named = dict(parent.model.named_parameters())
    found, count = {name: torch.zeros_like(p) for name, p in named.items()}, 0
    for i in range(24):
        rows = parent.rows("train").__getitems__([(0, i)])
        batch = parent.task.collate(rows, parent.loaded)
        parent.model.zero_grad()
        logits = parent.model(batch["numbers"])
        (-logits.log_softmax(-1)[0, label(logits, batch)]).backward()
        for name, p in named.items():
            found[name] += p.grad**2
        count += 1
    parent.model.zero_grad()
    return {name: total / count for name, total in found.items()}


def test_fisher_information_is_that_of_single_rows():
    parent = asked.parent("a", state(1))
    found = Fisher(examples=100, labels="data").measure(parent, NO_RUN)
    expected = by_hand(parent, lambda logits, batch: batch["labels"][0])
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name])
    # what a batch's mean gradient would have given
    batch = next(iter(parent.sample("train", 24, 24)))
    loss = nn.functional.cross_entropy(parent.model(batch["numbers"]), batch["labels"])
    gradient = torch.autograd.grad(loss, parent.model.head.weight)[0]
    assert not torch.allclose(gradient**2, expected["head.weight"], rtol=0.2)


def test_fisher_draws_labels_from_what_the_model_says():
    certain = state(1)
    certain["head.weight"] = certain["head.weight"] * 500  # it answers with probability 1, and is mostly wrong
    parent = asked.parent("a", certain)
    own = Fisher(examples=100).measure(parent, NO_RUN)
    theirs = Fisher(examples=100, labels="data").measure(parent, NO_RUN)
    expected = by_hand(parent, lambda logits, batch: logits[0].argmax())
    torch.testing.assert_close(own["layer.0.weight"], expected["layer.0.weight"], atol=1e-3, rtol=1e-3)
    assert theirs["layer.0.weight"].sum() > 100 * own["layer.0.weight"].sum()


def test_the_fisher_mean_is_its_formula():
    tensors, fishers = [torch.randn(4, 3) for _ in range(3)], [torch.rand(4, 3) for _ in range(3)]
    fishers[0][0] = fishers[1][0] = fishers[2][0] = 0.0
    weights = [1.0, 2.0, 0.5]
    found = fisher_mean(tensors, fishers, weights)
    top = sum(w * f * t for w, f, t in zip(weights, fishers, tensors, strict=True))
    bottom = sum(w * f for w, f in zip(weights, fishers, strict=True))
    torch.testing.assert_close(found[1:], (top / bottom)[1:])
    plain = sum(w * t for w, t in zip(weights, tensors, strict=True)) / 3.5
    torch.testing.assert_close(found[0], plain[0])
    torch.testing.assert_close(fisher_mean(tensors, [None] * 3, weights), plain)
    torch.testing.assert_close(fisher_mean(tensors, fishers, weights, epsilon=1e6), plain, atol=1e-4, rtol=1e-4)


def test_normalized_fisher_information_has_norm_one():
    found = Fisher(normalize=True, examples=5).measure(asked.parent("a", state(1)), NO_RUN)
    assert sum(float(f.square().sum()) for f in found.values()) == pytest.approx(1)


# --- RegMean ---------------------------------------------------------------------------------------------------------


def test_regmean_of_linear_models_is_least_squares_on_all_of_their_data():
    inputs = [torch.randn(40, 5, dtype=torch.float64) * (i + 1) for i in range(3)]
    answers = [torch.randn(40, 2, dtype=torch.float64) for _ in range(3)]
    each = [torch.linalg.lstsq(x, y).solution.T for x, y in zip(inputs, answers, strict=True)]
    whole = torch.linalg.lstsq(torch.cat(inputs), torch.cat(answers)).solution.T
    found = regression_mean(each, [gram_of_rows(x) for x in inputs], alpha=1.0)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sum(each) / 3, whole, atol=1e-2)


def test_regmean_with_equal_inputs_is_the_mean_and_of_copies_the_model():
    weights, grams = [torch.randn(4, 6) for _ in range(3)], [gram_of_rows(torch.randn(30, 6)) for _ in range(3)]
    torch.testing.assert_close(regression_mean(weights, grams[:1] * 3, 0.9), sum(weights) / 3)
    assert torch.equal(regression_mean(weights[:1] * 3, grams, 0.9), weights[0])
    grams[0][2], grams[0][:, 2] = 0.0, 0.0  # an input that the first never has
    found = regression_mean(weights, [g.clone() for g in grams], 0.0)
    sizes = torch.stack([g.diagonal() for g in grams])
    torch.testing.assert_close(found, (torch.stack(weights) * sizes[:, None]).sum(0) / sizes.sum(0))
    for gram in grams:
        gram[2], gram[:, 2] = 0.0, 0.0  # nobody has
    torch.testing.assert_close(regression_mean(weights, grams, 0.9)[:, 2], (sum(weights) / 3)[:, 2])


def test_regmean_says_that_there_is_no_solution():
    grams = [gram_of_rows(torch.randn(3, 8)) for _ in range(2)]
    weights = [torch.randn(4, 8) for _ in range(2)]
    with pytest.raises(RecipeError, match=r"the inputs of layer.weight depend on each other, so that alpha=1"):
        RegMean(alpha=1.0).tensor("layer.weight", weights, None, grams)
    assert RegMean().tensor("layer.weight", weights, None, grams).isfinite().all()


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Bench:
    return Bench("text-classification", tmp_path_factory.mktemp("texts"))


def test_padding_does_not_count(texts):
    parent = parent_of(texts, texts.saved("start"))
    found = RegMean(examples=100).measure(parent, NO_RUN)
    layer, inputs = parent.model.bert.encoder.layer[1].output.dense, []
    batch = next(iter(parent.sample("train", 100, 100)))
    with layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0])), torch.no_grad():
        parent.forward(batch)
    real = batch["attention_mask"].bool()
    assert not real.all()
    name = "bert.encoder.layer.1.output.dense.weight"
    torch.testing.assert_close(found[name], gram_of_rows(inputs[0][real]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[name], gram_of_rows(inputs[0].flatten(0, 1)), rtol=1e-2)


class AllOfTwelve(TextClassification):
    """As the processors of some models do: every row is padded to one length."""

    def collate(self, rows: Any, loaded: Loaded) -> Any:
        batch = super().collate(rows, loaded)
        more = 12 - batch["input_ids"].shape[1]
        padded = {k: nn.functional.pad(v, (0, more)) for k, v in batch.items() if v.dim() == 2}
        return {**batch, **padded}


def test_padding_to_one_length_does_not_count_either(texts):
    folder = texts.saved("start")
    plain, padded = parent_of(texts, folder), parent_of(texts, folder, AllOfTwelve())
    found, other = (RegMean(examples=5).measure(p, NO_RUN) for p in (plain, padded))
    for name in found:
        torch.testing.assert_close(found[name], other[name], rtol=1e-3, atol=1e-4)


def test_layers_that_keep_their_weights_turned_round(tmp_path):
    """GPT-2's, of which square ones look the same either way; its head is tied to the embeddings."""
    bench = Bench("text-generation", tmp_path)
    vocabulary = bench.load(bench.saved("start")).model.config.vocab_size
    folders = []
    for i in range(2):
        torch.manual_seed(i)
        config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=vocabulary, bos_token_id=0, eos_token_id=0)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / str(i))
        bench.load(bench.saved("start")).processor.save_pretrained(tmp_path / str(i))
        folders.append(tmp_path / str(i))
    run_, method = ask(bench, folders), RegMean(examples=6)
    stats = measuring.measured(method, folders, tmp_path / "measured", run_, cpu_accelerator())
    assert {"transformer.wte.weight", "lm_head.weight"}.isdisjoint(stats[0])
    with merging.Parents(folders, ["a", "b"]) as parents:
        merging.merge(method, parents, None, tmp_path / "merged", stats=stats)
    merged, states = load_file(tmp_path / "merged" / "model.safetensors"), [open_model(f) for f in folders]
    for name, gram_shape in (("transformer.h.0.attn.c_proj.weight", 8), ("transformer.h.0.mlp.c_proj.weight", 32)):
        grams = [s[name] for s in stats]
        assert grams[0].shape == (1, gram_shape, gram_shape)
        expected = regression_mean([s[name].T for s in states], [g[0] for g in grams], 0.9).T
        torch.testing.assert_close(merged[name], expected)
        assert not torch.allclose(merged[name], (states[0][name] + states[1][name]) / 2, atol=1e-4)
    mean = (states[0]["transformer.wte.weight"] + states[1]["transformer.wte.weight"]) / 2
    torch.testing.assert_close(merged["transformer.wte.weight"], mean)


def ask(bench: Bench, folders: list[Path]) -> merging.MergeRun:
    names = [f.name for f in folders]
    return merging.MergeRun(len(folders), names, True, lambda w: 0.0, lambda i: parent_of(bench, folders[i]))


# --- names -----------------------------------------------------------------------------------------------------------


def check_names(parent: measuring.Parent) -> None:
    """Every parameter is found in the files, under a name that holds its numbers."""
    named = dict(parent.model.named_parameters())
    assert parent.names.keys() == named.keys()
    for name, places in parent.names.items():
        for place in places:
            torch.testing.assert_close(parent.tensors[place].to(named[name].dtype), named[name].detach())
    found = parent.in_files({name: torch.full((1,), float(i)) for i, name in enumerate(named)})
    assert found.keys() <= parent.tensors.keys() and len(found) >= len(named)


def test_names_in_the_files_of_transformers(texts, tmp_path):
    check_names(parent_of(texts, texts.saved("start")))
    images = Bench("image-classification", tmp_path)  # transformers renames ViT's when it loads them
    vit = parent_of(images, images.saved("start"))
    check_names(vit)
    assert vit.names["vit.layers.0.attention.q_proj.weight"] == ["vit.encoder.layer.0.attention.attention.query.weight"]


def test_names_of_a_bare_model_and_of_one_with_a_head(tmp_path):
    bench = Bench("feature-extraction", tmp_path)
    bare = bench.saved("start")
    check_names(parent_of(bench, bare))
    masked = AutoModelForMaskedLM.from_config(AutoModel.from_pretrained(bare).config)
    masked.save_pretrained(tmp_path / "masked")
    bench.load(bare).processor.save_pretrained(tmp_path / "masked")
    parent = parent_of(bench, tmp_path / "masked")
    check_names(parent)
    assert parent.names["embeddings.LayerNorm.weight"] == ["bert.embeddings.LayerNorm.weight"]


def test_names_in_the_files_of_timm(tmp_path):
    bench = Bench("image-classification", tmp_path / "bench")
    saved_by_timm(tmp_path / "timm", list(LABELS))
    parent = parent_of(bench, tmp_path / "timm")
    check_names(parent)
    assert parent.names["timm_model.fc.weight"] == ["fc.weight"]


def test_names_in_the_files_of_open_clip(tmp_path):
    bench = Bench("zero-shot-image-classification", tmp_path / "bench")
    loaded = bench.task.load(FAMILIES["open_clip"], bench.info)
    bench.task.save(loaded, tmp_path / "model")
    parent = parent_of(bench, tmp_path / "model")
    check_names(parent)
    found = parent.in_files(RegMean(examples=2).measure(parent, NO_RUN))
    assert "transformer.resblocks.0.mlp.c_fc.weight" in found
    with pytest.raises(RecipeError, match="has no loss of its own"):
        Fisher(examples=2).measure(parent, NO_RUN)


def test_what_belongs_to_no_tensor_is_an_error(texts):
    parent = parent_of(texts, texts.saved("start"))
    with pytest.raises(RecipeError, match=r"'layer.7.weight' was measured, and .* no such parameter"):
        parent.in_files({"layer.7.weight": torch.ones(1)})
    other = parent_of(texts, texts.saved("start"))
    other.tensors = {name: torch.zeros_like(tensor) for name, tensor in parent.tensors.items()}  # other numbers
    with pytest.raises(RecipeError, match="belongs to a tensor in its files"):
        other.in_files({"classifier.weight": torch.ones(1)})


def test_what_files_hold_in_another_form_gets_the_plain_mean(tmp_path, caplog):
    """Experts of a mixture lie one by one in the files, and joined in the model."""
    bench = Bench("text-generation", tmp_path)
    sizes = {"num_local_experts": 2, "num_key_value_heads": 2, "hidden_size": 16, "intermediate_size": 24}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    loaded = bench.task.load(Model(config="mixtral", config_overrides={**sizes, **layers}), bench.info)
    bench.task.save(loaded, tmp_path / "mixture")
    parent = parent_of(bench, tmp_path / "mixture")
    found = parent.in_files(Fisher(examples=2).measure(parent, NO_RUN))
    assert "hold 2 weights in another form" in caplog.text and "experts.gate_up_proj" in caplog.text
    assert found.keys() == {name for name in parent.tensors if ".experts." not in name}


# --- learned soup, greedy soup ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, str]:
    """A model that is right about brightness, and one that is wrong about it."""
    root, found = tmp_path_factory.mktemp("parents"), {}
    for name, flip in (("right", {}), ("wrong", {"train": True})):
        vit = Model(config="vit", config_overrides=VIT)
        data = Data(shapes(root / f"data-{name}", flip))
        run(Recipe([Train("m", data=data, model=vit, training=FAST)]), root / name)
        found[name] = str(root / name / "m" / "model")
    return found


@pytest.mark.parametrize("by", ["model", "layer"])
def test_the_learned_soup_finds_the_better_parent_and_never_sees_test_data(by, tmp_path, trained):
    data = Data(shapes(tmp_path / "data", {"test": True}))  # on the test split the wrong model is right
    given = {"by": by, "steps": 20, "learning_rate": 0.5}
    stages = [Merge("soup", {"learned_soup": given}, models=[trained["wrong"], trained["right"]])]
    report = run(Recipe(stages, data=data), tmp_path / "out")
    found = summary(report, "soup")
    rows = found["coefficients"] if by == "layer" else [found["coefficients"]]
    assert all(sum(row) == pytest.approx(1) for row in rows) and rows[-1][1] > 0.9
    assert len(rows) == (1 if by == "model" else 5)
    assert found["validation_loss"]["last"] < found["validation_loss"]["first"]
    assert accuracy(report, "soup") < 0.3  # honest about the test data all the same


def test_the_learned_soup_is_the_mean_with_its_coefficients():
    """Of every layer with its own: the gradient of the loss by each is that of a step."""
    states = [state(i) for i in range(2)]
    method = LearnedSoup(by="layer", steps=1, batch_size=16, learning_rate=0.1)
    method.fit(merging.MergeRun(2, ["a", "b"], True, sum, lambda i: asked.parent("p", states[i])))
    parent, groups = asked.parent("p", states[0]), {"embeddings.weight": 0, "head.weight": 2}
    batch = next(iter(parent.steps("validation", 1, 16)))[0]

    def loss(logits: torch.Tensor) -> torch.Tensor:
        mixed = {
            n: (logits[groups.get(n, 1)].softmax(0) @ torch.stack([s[n].flatten() for s in states])) for n in state(0)
        }
        outputs = parent.forward(batch, {n: t.view(states[0][n].shape) for n, t in mixed.items()})
        return parent.task.loss(outputs, batch)[0].mean()

    logits, step = torch.zeros(3, 2), 1e-3
    for group in range(3):
        up, down = logits.clone(), logits.clone()
        up[group, 0], down[group, 0] = step, -step
        slope = float(loss(up) - loss(down))
        moved = method.coefficients_GM[group]
        assert (moved[0] < moved[1]) == (slope > 0)
        assert moved == pytest.approx(
            torch.tensor([0.1, -0.1]).softmax(0).tolist()[:: 1 if slope < 0 else -1], abs=1e-3
        )
    merged = method.tensor("head.weight", [s["head.weight"] for s in states], None, None)
    shares = method.coefficients_GM[2]
    torch.testing.assert_close(merged, shares[0] * states[0]["head.weight"] + shares[1] * states[1]["head.weight"])


def test_the_greedy_soup_takes_the_scores_that_trainings_have_measured(tmp_path):
    data, training = Data(shapes(tmp_path / "data", {})), {**FAST, "max_steps": 6, "eval_steps": 3}
    vit = Model(config="vit", config_overrides=VIT)
    train = Train("m", training=training, model=vit, seeds=3)
    greedy = [
        Merge("greedy", "greedy_soup", models=["@m"]),
        Merge("given", {"greedy_soup": {"order": "given"}}, models=["@m"]),
    ]
    report = run(Recipe([train, *greedy], data=data), tmp_path / "out")
    found = summary(report, "greedy")
    assert len(found["validation_scores"]) == 2 and len(found["alone"]) == 3  # K - 1 soups
    copies = [str(tmp_path / "out" / place / "model") for place in ("m", "m/seeds/1", "m/seeds/2")]
    again = run(Recipe([Merge("greedy", "greedy_soup", models=copies)], data=data), tmp_path / "again")
    other = summary(again, "greedy")
    assert list(found["alone"].values()) == list(other["alone"].values())  # measured anew, they are the same
    assert len(other["validation_scores"]) == 5
    assert [s["score"] for s in found["steps"]] == [s["score"] for s in other["steps"]]
    assert len(summary(report, "given")["validation_scores"]) == 2 and len(summary(report, "given")["alone"]) == 1


def test_the_greedy_soup_in_the_order_given_scores_as_many_models_as_there_are():
    calls: list[Any] = []
    method = GreedySoup(order="given")
    method.fit(merging.MergeRun(4, list("abcd"), True, lambda w: calls.append(w) or len(calls)))
    assert len(calls) == 4 and method.chosen == list("abcd") and method.order_matters


# --- what is kept ----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_a_merge_that_was_killed_does_not_ask_again(method, tmp_path, trained, monkeypatch):
    data, cls = Data(shapes(tmp_path / "data", {})), {"fisher": Fisher, "regmean": RegMean}[method]
    asked_for: list[str] = []
    original = cls.measure

    def watched(self: MergeMethod, parent: Any, run: Any) -> Any:
        asked_for.append(parent.label)
        return original(self, parent, run)

    def killed(*args: Any, **kwargs: Any) -> int:
        raise Killed

    def merge(folder: str, examples: int = 6, **changed: Any) -> bytes:
        stages = [Merge("s", {method: {"examples": examples}}, models=list(trained.values()))]
        run(Recipe(stages, data=data), tmp_path / folder, **changed)
        return (tmp_path / folder / "s" / "model" / "model.safetensors").read_bytes()

    monkeypatch.setattr(cls, "measure", watched)
    whole = merge("whole")
    assert asked_for == list(trained.values())
    for folder in ("killed", "stale", "torn"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(merging, "merge", killed)
            merge(folder)
        assert len(list((tmp_path / folder / "s" / "measured").glob("*.safetensors"))) == 2
    asked_for.clear()
    assert merge("killed") == whole and asked_for == []
    assert not (tmp_path / "killed" / "s" / "measured").exists()
    assert merge("stale", 5, allow_changed=["stages"]) != whole and len(asked_for) == 2
    asked_for.clear()
    torn = next((tmp_path / "torn" / "s" / "measured").glob("1-*.safetensors"))
    torn.write_bytes(torn.read_bytes()[:-1])
    assert merge("torn") == whole and asked_for == [trained["wrong"]]


def test_other_weights_rows_and_settings_are_asked_again(tmp_path):
    folders = [write(state(i), tmp_path / str(i)) for i in range(2)]

    def key(method: MergeMethod, i: int = 0, **data: Any) -> str:
        parent = asked.parent("p", state(i))
        for name, value in data.items():
            setattr(parent.info, name, value)
        return measuring._key(method, parent, folders[i])

    first = key(Fisher())
    assert first == key(Fisher(epsilon=1e-3, weights=[1.0, 2.0]))
    others = [key(Fisher(examples=3)), key(Fisher(labels="data")), key(Fisher(normalize=True)), key(RegMean())]
    assert first not in [*others, key(Fisher(), 1), key(Fisher(), fingerprint="other")]


def test_two_processes_measure_and_learn_as_one(tmp_path):
    measured_child.merge_all(tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    child = [str(Path(__file__).parent / "measured_child.py"), str(tmp_path / "two")]
    done = subprocess.run([*command, *child], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in measured_child.METHODS:
        one, two = (load_file(tmp_path / where / name / "model.safetensors") for where in ("one", "two"))
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-4, atol=1e-6)
        mean = torch.stack([state(i)["layer.0.weight"] for i in range(3)]).mean(0)
        assert not torch.allclose(one["layer.0.weight"], mean, atol=1e-3), name


def test_the_same_bits_on_several_threads(tmp_path):
    folders = [write(state(i), tmp_path / str(i)) for i in range(3)]
    run_ = merging.MergeRun(3, list("abc"), True, sum, lambda i: asked.parent("p", state(i)))
    for method in (Fisher(), RegMean()):
        stats = measuring.measured(method, folders, tmp_path / "measured", run_, cpu_accelerator())
        found = []
        for threads in (1, 3):
            with merging.Parents(folders, list("abc")) as parents:
                merging.merge(method, parents, None, tmp_path / "out", threads=threads, stats=stats)
            found.append((tmp_path / "out" / "model.safetensors").read_bytes())
        assert found[0] == found[1]


# --- parents of other data, refusals ---------------------------------------------------------------------------------


def test_parents_of_stages_are_asked_on_their_own_data(tmp_path, trained, monkeypatch):
    """Each knows its own rows alone."""
    seen: dict[str, str] = {}
    monkeypatch.setattr(Fisher, "measure", lambda self, parent, run: note(parent))

    def note(parent: measuring.Parent) -> dict[str, torch.Tensor]:
        seen[parent.label] = parent.info.path
        return {"classifier.bias": torch.ones(2)}

    own, other = (Data(shapes(tmp_path / name, {}, seed)) for seed, name in enumerate(("own", "other")))
    training = {**FAST, "max_steps": 1}
    stages = [
        Train("a", model={"path": trained["right"]}, data=own, training=training),
        Train("b", model={"path": trained["right"]}, data=other, training=training),
        Merge("s", "fisher", models=["@a", "@b", trained["right"]], data=own),
    ]
    run(Recipe(stages), tmp_path / "out")
    assert [Path(path).name for path in seen.values()] == ["own", "other", "own"]


@pytest.mark.parametrize(
    ("method", "missing", "said"),
    [
        ("fisher", "train", "stages.s: fisher asks its parents on training data, and there are none"),
        ("regmean", "train", "stages.s: regmean asks its parents on training data, and there are none"),
        ("learned_soup", "train validation", "stages.s: learned_soup selects on validation data, and there are none"),
        ("greedy_soup", "train validation", "stages.s: greedy_soup selects on validation data, and there are none"),
    ],
)
def test_the_plan_refuses_data_that_lack_what_is_asked(method, missing, said, tmp_path, trained):
    folder = Path(shapes(tmp_path / "data", {}))
    for split in missing.split():  # of training rows some would be held out for validation
        (folder / f"{split}.parquet").unlink()
    stages = [Merge("s", method, models=list(trained.values()))]
    with pytest.raises(RecipeError, match=said):
        run(Recipe(stages, data=Data(str(folder))), tmp_path / "out")
    assert not (tmp_path / "out" / "s").exists()


def test_tasks_without_a_loss_are_refused(tmp_path):
    bench = Bench("zero-shot-image-classification", tmp_path)
    with pytest.raises(NotMeaningful, match="learned_soup takes the task's loss"):
        measuring.refuse_lacking_loss("stages.s", "learned_soup", bench.task, bench.info, "validation")
    with pytest.raises(NotMeaningful, match="fisher takes the task's loss"):  # nor has it scores to draw answers by
        measuring.refuse_lacking_data("stages.s", "fisher", Fisher(), [(bench.task, bench.info)])
    words = Bench("text-classification", tmp_path / "words")
    measuring.refuse_lacking_data("stages.s", "fisher", Fisher(), [(words.task, words.info)])


@pytest.mark.parametrize(
    ("method", "data"), [("fisher", "training"), ("regmean", "training"), ("learned_soup", "validation")]
)
def test_the_command_refuses_what_needs_data(method, data, tmp_path, trained):
    with pytest.raises(RecipeError, match=f"{method} needs {data} data, which `kt-hf merge` has not"):
        merge_command(method, list(trained.values()), tmp_path / "out")


def test_a_parent_without_a_trained_head_is_refused(tmp_path, texts):
    bare = AutoModel.from_pretrained(texts.saved("start"))
    bare.save_pretrained(tmp_path / "bare")
    texts.load(texts.saved("start")).processor.save_pretrained(tmp_path / "bare")
    with pytest.raises(RecipeError, match="has nothing trained for this task"):
        parent_of(texts, tmp_path / "bare")


def test_settings_that_are_refused():
    with pytest.raises(RecipeError, match="2 weights for 3 parents"):
        Fisher(weights=[1.0, 2.0]).check(3)
    with pytest.raises(RecipeError, match="as a share of a mean"):
        Fisher(weights=[1.0, -1.0]).check(2)
