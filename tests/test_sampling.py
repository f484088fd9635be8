"""The order of training rows: permutations, the rows' own order, rows grouped by length."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import identical, make_trainer, train, weights
from test_resume import Stop, Stopped

from kt_hf.errors import RecipeError
from kt_hf.loader import Plan, Windows, by_length
from kt_hf.trainer import check_stack

LENGTHS = np.random.default_rng(0).lognormal(4.0, 0.8, 5003).astype(int).clip(2, 512)
"""Tokens of texts, cut at 512 as a task would."""


def useful(batches: list[np.ndarray]) -> float:
    """Share of the elements of padded batches that are not padding."""
    return LENGTHS.sum() / sum(len(rows) * LENGTHS[rows].max() for rows in batches)


def test_grouped_rows_are_all_there_and_hardly_padded():
    batches = by_length(LENGTHS, 32, seed=1, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(5003)) and len(batches) == 157
    assert sorted(map(len, batches)) == [11, *[32] * 156]
    at_random = np.split(np.random.default_rng(0).permutation(5003), range(32, 5003, 32))
    assert useful(batches) >= 0.97 and useful(at_random) < 0.5


def test_groups_are_a_pure_function_and_differ_between_epochs():
    one, again, other = (by_length(LENGTHS, 32, 1, epoch) for epoch in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(one, again, strict=True))
    same = {frozenset(rows) for rows in one} & {frozenset(rows) for rows in other}
    assert len(same) < 10, "which rows meet differs from epoch to epoch"
    longest = [LENGTHS[rows].max() for rows in one]
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3, "long batches must not all come first"
    assert all(len(rows) == 32 for rows in by_length(LENGTHS, 32, 1, 0, drop_last=True))
    assert [len(rows) for rows in by_length(LENGTHS[:3], 32, 1, 0)] == [3]


@pytest.mark.parametrize("order", ["random", "sequential", "group_by_length"])
def test_global_batches_do_not_depend_on_the_ranks(order):
    lengths = LENGTHS[:50] if order == "group_by_length" else None
    plan = Plan(50, 8, 3, order=order, lengths=lengths)
    alone = [[i for _, i in rows] for rows in Windows(plan, 0, 14, 1, 0, 1)]
    parts = [list(Windows(plan, 0, 14, 2, rank, 2)) for rank in (0, 1)]
    for step, rows in enumerate(alone):
        shared = [i for rank in (0, 1) for micro in parts[rank][2 * step : 2 * step + 2] for _, i in micro]
        assert shared[: len(rows)] == rows or len(rows) < 8
    assert (alone[0] == list(range(8))) == (order == "sequential")


def test_grouped_training_pads_less_and_learns_the_same_rows(tmp_path):
    seen: dict[str, list[tuple[int, int]]] = {}
    for order in ("random", "group_by_length"):
        trainer = make_trainer(tmp_path / order, "text", max_steps=7, train_sampling_strategy=order)
        step, shapes = trainer.step, seen.setdefault(order, [])

        def note(number, window, sizes, step=step, shapes=shapes):
            shapes.append(tuple(window[0]["train"]["input_ids"].shape))
            step(number, window, sizes)

        trainer.step = note
        trainer.run()
    area = {order: sum(rows * length for rows, length in shapes) for order, shapes in seen.items()}
    assert sum(rows for rows, _ in seen["group_by_length"]) == 26 and area["group_by_length"] < area["random"]


def test_grouped_training_resumes(tmp_path):
    def build(folder, extra=None):
        strategies = {"finetune": {}, **(extra or {})}
        settings = {"train_sampling_strategy": "group_by_length", "max_steps": 11, "save_steps": 3}
        return make_trainer(tmp_path / folder, "text", strategies, **settings)

    with pytest.raises(Stopped):
        build("b", {"stop": Stop(8)}).run()
    a, b = build("a").run(), build("b").run()
    assert identical(weights(a), weights(b)) and a.curve == b.curve


def test_images_have_no_lengths(tmp_path):
    with pytest.raises(RecipeError, match="ImageClassification have no lengths"):
        train(tmp_path, "image", train_sampling_strategy="group_by_length")


def test_a_strategy_that_makes_batches_excludes_an_order(tmp_path):
    trainer = make_trainer(tmp_path, "text", train_sampling_strategy="sequential")
    trainer.strategies["finetune"].batches = lambda *a: []
    with pytest.raises(RecipeError, match="'finetune' and train_sampling_strategy=sequential"):
        check_stack(trainer.strategies, trainer.training, trainer.task, "stages.a")
