"""Several rows in one, without one seeing another (fault 21)."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from helpers import accelerator, identical, make_trainer, weights
from test_resume import Stop, Stopped

from kt_hf import Model, packing, registry
from kt_hf.data import DataInfo
from kt_hf.errors import RecipeError
from kt_hf.feed import training_rows
from kt_hf.loader import Collate
from kt_hf.recipe import Training
from kt_hf.trainer import check_stack

TextGeneration = registry.load("task", "text-generation")
SIZES = {
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
}


def texts(count: int = 40, seed: int = 0) -> DataInfo:
    random = np.random.default_rng(seed)
    lengths = np.maximum(random.lognormal(2.0, 0.7, count).astype(int), 1)
    rows = [" ".join(random.choice(list("abcdefghij"), n)) for n in lengths]
    split = datasets.Dataset.from_dict({"text": rows, "index": range(count)})
    held_out = split.select(range(8))
    return DataInfo(
        "texts", {"train": split, "validation": held_out, "test": held_out}, {"text": "text"}, None, f"t{seed}"
    )


def model(kind: str, **rest) -> Model:
    return Model(config=kind, config_overrides=SIZES[kind], **rest)


def trainer(folder, kind="gpt2", strategies=None, max_length=48, count=40, **training):
    settings = {"packing": True, "per_device_train_batch_size": 2, "max_steps": 7, **training}
    info, task = texts(count), TextGeneration(max_length=max_length)
    return make_trainer(folder, "text-generation", strategies, model=model(kind), task=task, info=info, **settings)


def test_bins_hold_every_row_once_and_are_nearly_full():
    lengths = np.random.default_rng(0).lognormal(4.0, 0.8, 5003).astype(int).clip(2, 512)
    bins = packing.bins(lengths, 512)
    assert sorted(np.concatenate(bins)) == list(range(5003))
    filled = [lengths[rows].sum() for rows in bins]
    assert max(filled) <= 512 and sum(filled) / (512 * len(bins)) >= 0.99
    assert [list(rows) for rows in packing.bins(np.array([3, 1, 2, 4]), 4)] == [[3], [0, 1], [2]]
    with pytest.raises(ValueError, match="a row of 5 tokens does not fit into 4"):
        packing.bins(np.array([5]), 4)


def test_batches_of_bins_are_useful(tmp_path):
    """The share of tokens that are no padding, in the batches that a training sees."""
    made = trainer(tmp_path, max_steps=20, count=400)
    made.run()
    masks = [window[0]["train"]["attention_mask"] for window, _ in made.feed.steps(0)]
    assert sum(mask.sum() for mask in masks) / sum(mask.numel() for mask in masks) >= 0.97


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_packed_rows_have_the_scores_of_rows_alone(kind, attention):
    info, task = texts(), TextGeneration(max_length=48)
    torch.manual_seed(0)
    loaded = task.load(model(kind, attn_implementation=attention), info)
    for parameter in loaded.model.parameters():  # far from the start, where all rows look alike
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    rows = training_rows(accelerator(), task, loaded, info, Training(packing=True), None, 0)
    assert max(len(b) for b in rows.bins) > 2 and len(rows) < len(rows.rows) / 2
    collate, net = Collate(task, loaded), loaded.model.eval()
    seen = 0
    for start in range(0, len(rows), 3):
        numbers = range(start, min(start + 3, len(rows)))
        batch = collate(rows.__getitems__([(0, i) for i in numbers]))
        packed = packing.counted(task, net, batch)
        own = [collate(rows.rows.__getitems__([(0, int(i))])) for number in numbers for i in rows.bins[number]]
        alone = torch.cat([packing.counted(task, net, one) for one in own])
        assert packed.shape == alone.shape and alone.std() > 0.1
        assert torch.allclose(packed, alone, atol=1e-5), (packed - alone).abs().max()
        seen += len(alone)
        units = task.units(batch)
        assert units["token"] == len(alone) == sum(int(task.units(one)["token"]) for one in own)
    assert seen == sum(rows.lengths_N) - len(rows.rows)
    packing.check(net, task, rows, torch.device("cpu"))


def test_what_reaches_over_the_ends_of_rows_is_refused(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="MambaForCausalLM does not run on packed rows"):
        trainer(tmp_path / "mamba", "mamba").run()
    monkeypatch.setattr(packing, "arguments", lambda *a, **k: {})  # attention that does not heed the mask
    with pytest.raises(RecipeError, match="gives packed rows scores that are off"):
        trainer(tmp_path / "gpt2").run()


@pytest.mark.slow
def test_attention_without_such_masks_is_refused(tmp_path):
    made = trainer(tmp_path, "llama")
    made.loaded.model.config._attn_implementation = "flex_attention"
    with pytest.raises(RecipeError, match="attention by 'flex_attention' takes no mask"):
        made.run()


def test_one_step_is_that_of_the_same_rows_apart(tmp_path):
    """A step over bins changes the weights as one over their rows does: the mean is one over tokens."""
    whole = {"max_steps": 1, "per_device_train_batch_size": 64, "optim": "sgd"}
    packed = trainer(tmp_path / "packed", "llama", **whole)
    apart = trainer(tmp_path / "apart", "llama", packing=False, **whole)
    a, b = weights(packed.run()), weights(apart.run())
    start = weights(trainer(tmp_path / "start", "llama", max_steps=1, learning_rate=0.0).run())
    assert max((a[k] - start[k]).abs().max() for k in a) > 1e-4
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def test_a_packed_training_resumes(tmp_path):
    def build(folder, extra=None):
        stack = {"lora": {}, "ema": {}, **(extra or {})}
        return trainer(tmp_path / folder, "gpt2", stack, save_steps=3, max_steps=11, gradient_accumulation_steps=2)

    with pytest.raises(Stopped):
        build("b", {"stop": Stop(8)}).run()
    a, b = build("a").run(), build("b").run()
    assert identical(weights(a), weights(b)) and a.curve == b.curve


def test_steps_are_counted_in_bins_and_messages_name_rows(tmp_path):
    made = trainer(tmp_path)
    made.run()
    rows = made.feed.sources["train"].rows
    assert made.feed.sources["train"].plan.steps_per_epoch == -(-len(rows) // 2)
    first = made.feed.sources["train"].plan.epoch(0)[0]
    assert sorted(made.feed.index(0)) == sorted(np.concatenate([rows.bins[i] for i in first]))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "is about rows, not bins"),
        ({"cache_frozen": True}, "cache_frozen keeps outputs by row"),
    ],
)
def test_what_would_see_bins_for_rows_is_refused(settings, reason):
    with pytest.raises(RecipeError, match=reason):
        check_stack({}, Training(packing=True, **settings), TextGeneration(), "stages.a")


def test_tasks_that_do_not_pack_and_strategies_about_rows(tmp_path):
    image = make_trainer(tmp_path, "image")
    with pytest.raises(RecipeError, match="ImageClassification does not pack rows"):
        check_stack(image.strategies, Training(packing=True), image.task, "stages.a")
    image.strategies["finetune"].scope = "batch"
    with pytest.raises(RecipeError, match="the loss of 'finetune' is about the rows of a batch"):
        check_stack(image.strategies, Training(packing=True), TextGeneration(), "stages.a")
