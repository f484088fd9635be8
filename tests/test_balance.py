"""Rare classes: weights in the loss, rows that are drawn, and labels that are wrong on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BERT, make_trainer, text_info
from kt_hf_plugins.balance import Balance
from kt_hf_plugins.finetune import Finetune
from test_data import logged, prepared, write
from torch.nn import functional as F

from kt_hf import Data, Recipe, Train, run
from kt_hf.errors import RecipeError
from kt_hf.feed import Feed
from kt_hf.functional import balancing
from kt_hf.loader import Collate, Rows


def uneven(count: int = 40) -> dict[str, list[Any]]:
    """A class of four fifths, one of a fifth."""
    return {
        "text": [f"word{i} {i % 5}" for i in range(count)],
        "label": ["rare" if i % 5 == 0 else "usual" for i in range(count)],
    }


def test_weights_are_those_of_the_paper():
    counts = np.array([100, 10, 1, 0])
    effective = (1 - 0.9 ** counts[:3]) / (1 - 0.9)
    found = balancing.weights(counts, 0.9)
    np.testing.assert_allclose(found[:3] / found[0], effective[0] / effective)
    assert (found * counts).sum() / counts.sum() == pytest.approx(1)
    np.testing.assert_allclose(balancing.weights(counts, 1.0)[:3], 111 / 3 / counts[:3])
    np.testing.assert_allclose(balancing.weights(counts, 0.0), np.ones(4))
    np.testing.assert_allclose(balancing.weights(counts, 1 - 1e-9)[:3], balancing.weights(counts, 1.0)[:3], rtol=1e-5)


def test_the_loss_is_the_weighted_one_of_torch(tmp_path):
    """Torch divides by the sum of the weights, we by the number of rows: equal where a batch is the whole."""
    info = text_info(24)
    made = make_trainer(tmp_path, "text", {"finetune": {}, "balance": Balance()}, info=info, max_steps=1, task=None)
    made.shards = None
    made.prepare_model()
    rows = Rows(made.info, "train", made.task, made.loaded, train=True)
    batch = Collate(made.task, made.loaded)(rows.__getitems__([(0, i) for i in range(24)]))
    made.feed = Feed(made.run_facts, made.training, made.data, made.strategies, None, 1)
    made.bundle.eval()
    sizes = {"train": (24,)}
    position = made.position(0, 0, 1, made.count([{"train": batch}], [sizes]), sizes)
    terms = made.bundle("loss", batch, {}, position)
    assert list(terms) == ["task"]
    logits = made.task.forward(made.bundle.model, batch).logits
    weights = torch.from_numpy(balancing.weights(np.bincount(batch["labels"]), 1.0)).float()
    expected = F.cross_entropy(logits, batch["labels"], weight=weights)
    torch.testing.assert_close(terms["task"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["token-classification", "image-segmentation"])
def test_words_and_pixels_are_weighed_by_their_class(name: str, tmp_path: Path):
    """The mean of weighed losses against the weights of the counts, over the batch that is the whole."""
    from kt_hf.testing.bench import Bench

    bench = Bench(name, tmp_path)
    balance, rate = Balance(), {"max_steps": 1, "per_device_train_batch_size": 24}
    weighed = bench.train({"finetune": Finetune(), "balance": balance}, tmp_path / "a", **rate)
    loaded = bench.load(bench.saved("start"))
    rows = Rows(bench.info, "train", bench.task, loaded, train=True)
    batch = Collate(bench.task, loaded)(rows.__getitems__([(0, i) for i in range(24)]))
    with torch.no_grad():
        values, weight, _ = bench.task.loss(bench.task.forward(loaded.model.train(), batch), batch)
    labels = batch["labels"].flatten()
    given = labels  # masks are counted as they come, before they are resized
    if name == "image-segmentation":
        given = np.concatenate(
            [np.asarray(mask, dtype=np.int64).ravel() for mask in bench.info.splits["train"]["mask"]]
        )
        given = np.where(given == bench.task.ignore_index, -1, given)
    counts = np.bincount(given[given >= 0], minlength=len(loaded.labels))
    expected = torch.from_numpy(balancing.weights(counts, 1.0)).float()
    torch.testing.assert_close(balance.weights_C, expected)
    total = (values.flatten() * weight.flatten() * expected[labels.clamp(min=0)]).sum()
    assert counts.min() < counts.max()
    assert weighed.losses[0] == pytest.approx(float(total) / int((labels >= 0).sum()), rel=1e-4)


def test_drawing_makes_classes_even_and_follows_from_its_arguments():
    data = {"label": np.array([0] * 900 + [1] * 100)}
    strategy = Balance(by="sampling")
    assert strategy.batches is not None and Balance().batches is None
    batches = list(strategy.batches(data, 32, 5, 0))
    assert [len(b) for b in batches[:-1]] == [32] * 31 and sum(map(len, batches)) == 1000
    share = np.mean(data["label"][np.concatenate(batches)])
    assert 0.45 < share < 0.55
    again, other = list(strategy.batches(data, 32, 5, 0)), list(strategy.batches(data, 32, 5, 1))
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    assert not np.array_equal(np.concatenate(batches), np.concatenate(other))


@pytest.mark.parametrize("by", ["weights", "sampling"])
def test_a_rare_class_is_found_more_often(by, tmp_path):
    """Labels that follow from nothing: what remains to be learnt is how frequent they are."""
    random = np.random.default_rng(0)

    def rows(count: int) -> dict[str, list[Any]]:
        labels = ["rare" if random.random() < 0.15 else "usual" for _ in range(count)]
        return {"text": [" ".join(random.choice(["a", "b", "c"], 4)) for _ in range(count)], "label": labels}

    path = write(tmp_path / "d", train=rows(120), validation=rows(20), test=rows(60))
    training = {
        "max_steps": 40,
        "per_device_train_batch_size": 16,
        "report_to": "none",
        "num_threads": 1,
        "learning_rate": 5e-3,
    }
    stages = [Train("plain"), Train("even", strategies=["finetune", {"balance": {"by": by}}])]
    report = run(
        Recipe(
            data=Data(str(path)), model={"config": "bert", "config_overrides": BERT}, training=training, stages=stages
        ),
        tmp_path / "out",
    )
    import pyarrow.parquet as pq

    scores = {
        stage["name"]: pq.read_table(tmp_path / "out" / stage["name"] / "predictions.parquet")["scores"].to_pylist()
        for stage in report["stages"]
    }
    rare = {name: F.softmax(torch.tensor(found), -1)[:, 0].mean() for name, found in scores.items()}
    assert rare["plain"] < 0.3 < rare["even"], rare


def test_two_strategies_that_make_batches_are_refused(tmp_path):
    path = write(tmp_path / "d", train=uneven(), validation=uneven())
    recipe = Recipe(
        data=Data(str(path)),
        task="text-classification",
        model={"config": "bert"},
        training={"train_sampling_strategy": "group_by_length"},
        stages=[Train("one", strategies=[{"balance": {"by": "sampling"}}])],
    )
    with pytest.raises(
        RecipeError, match="'balance' and train_sampling_strategy=group_by_length both make the batches"
    ):
        run(recipe, tmp_path / "out")


def test_label_noise_is_drawn_once_for_training_rows_alone(tmp_path, caplog):
    rows = {"text": [f"t{i}" for i in range(200)], "label": [f"c{i % 4}" for i in range(200)]}
    path: Path = write(tmp_path, train=rows, validation=rows, test=rows)
    plain = prepared(path)
    with caplog.at_level("WARNING", logger="kt_hf"):
        noisy, again, other = (prepared(path, label_noise=0.25, seed=s) for s in (0, 0, 1))
    wrong = np.asarray(plain.splits["train"]["label"][:]) != np.asarray(noisy.splits["train"]["label"][:])
    assert wrong.sum() == 50 and set(noisy.splits["train"]["label"][:]) == {0, 1, 2, 3}
    assert noisy.splits["test"]["label"][:] == plain.splits["test"]["label"][:]
    assert noisy.fingerprint == again.fingerprint != plain.fingerprint and other.fingerprint != noisy.fingerprint
    assert "50 training labels were replaced" in logged(caplog)


def test_plain_finetuning_has_no_use_for_it():
    assert Finetune().batches is None
