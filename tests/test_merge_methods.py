"""Merge methods: each against a plain reference by its paper's equation, the identities, the edges, and whole recipes.

Shapes: M models, N elements.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import VIT
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from test_merging import FAST, shapes, summary

from kt_hf import Data, Merge, Model, Recipe, Train, merge_command, merging, registry, report, run
from kt_hf.errors import IntegrityError, RecipeError
from kt_hf.functional import spherical, task_vectors
from kt_hf.functional.magnitude import PART, Keep, magnitude_threshold, num_kept, ranks_of_rows

CLOSE = {"atol": 1e-6, "rtol": 1e-5}
BASED = ("task_arithmetic", "ties", "dare", "della", "breadcrumbs", "model_stock", "wise_ft")
ANY = (*BASED, "slerp", "karcher", "uniform_soup")


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def models(count: int = 3, *shape: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base and models that are a little way from it."""
    base = normal(0, *(shape or (7, 5)))
    return base, [base + 0.1 * (i + 1) * normal(i + 1, *(shape or (7, 5))) for i in range(count)]


def merged(name: str, tensors_M: list[torch.Tensor], base: torch.Tensor | None = None, **given: Any) -> torch.Tensor:
    method = registry.load("merge", name)(**given)
    method.check(len(tensors_M))
    return method.tensor("layer.weight", tensors_M, base, None)


def close(found: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected).float(), **CLOSE)


# --- references, as the papers have them, in numpy -------------------------------------------------------------------


def trimmed(vector: np.ndarray, density: float) -> np.ndarray:
    count = max(int(density * vector.size), 1)
    order = np.argsort(-np.abs(vector).ravel(), kind="stable")
    kept = np.zeros(vector.size)
    kept[order[:count]] = vector.ravel()[order[:count]]
    return kept.reshape(vector.shape)


def elected(vectors: list[np.ndarray], weights: list[float], by: str = "count") -> np.ndarray:
    weighted = [w * v for w, v in zip(weights, vectors, strict=True)]
    sign = np.where(sum(weighted) >= 0, 1, -1)
    agree = [np.sign(v) == sign for v in weighted]
    total = sum(np.where(a, v, 0) for a, v in zip(agree, weighted, strict=True))
    shares = [1.0] * len(weights) if by == "count" else weights
    parts = sum(a * w for a, w in zip(agree, shares, strict=True))
    return total / np.where(parts == 0, 1, parts)


def doubles(base: torch.Tensor, tensors_M: list[torch.Tensor]) -> tuple[np.ndarray, list[np.ndarray]]:
    return base.double().numpy(), [t.double().numpy() - base.double().numpy() for t in tensors_M]


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, -0.5]])
def test_task_arithmetic_by_its_equation(weights):
    base, tensors_M = models()
    start, vectors = doubles(base, tensors_M)
    total = sum(w * v for w, v in zip(weights or [1, 1, 1], vectors, strict=True))
    close(merged("task_arithmetic", tensors_M, base, weights=weights, scaling=0.3), start + 0.3 * total)


def test_negation_undoes_addition_and_analogies_add_up():
    base, (one, two) = models(2)
    close(merged("task_arithmetic", [one], base, weights=[-1.0]), 2 * base - one)
    close(merged("task_arithmetic", [one, two, one], base, weights=[1.0, 1.0, -1.0]), two)


@pytest.mark.parametrize("by", ["count", "weights"])
@pytest.mark.parametrize(("density", "weights"), [(0.2, None), (0.5, [1.0, 2.0, 0.5]), (1.0, None)])
def test_ties_by_its_equation(density, weights, by):
    base, tensors_M = models()
    start, vectors = doubles(base, tensors_M)
    expected = start + 0.7 * elected([trimmed(v, density) for v in vectors], weights or [1.0] * 3, by)
    found = merged("ties", tensors_M, base, density=density, weights=weights, scaling=0.7, divide_by=by)
    close(found, expected)


def test_ties_elects_the_positive_sign_where_the_sum_is_zero_and_leaves_zeros_out_of_the_mean():
    vectors = [torch.tensor([0.5, -0.5, 0.0, 2.0]), torch.tensor([-0.5, 0.5, -3.0, 0.0])]
    assert task_vectors.elected_mean(vectors, [1.0, 1.0]).tolist() == [0.5, 0.5, -3.0, 2.0]


def test_no_order_of_the_parents_turns_a_sign():
    """0.1 + 0.2 - 0.3 in float32 is above, at or below 0, as one adds up."""
    values = [torch.full((64,), v) for v in (0.1, 0.2, -(torch.tensor(0.1).double() + torch.tensor(0.2).double()))]
    found = [
        task_vectors.elected_mean([values[i].clone() for i in o], [1.0] * 3) for o in ((0, 1, 2), (2, 0, 1), (1, 2, 0))
    ]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("density", [0.2, 0.53, 0.9])
def test_ties_and_trimming_are_those_of_peft(density):
    _, tensors_M = models(3, 40, 30)
    weights = [1.0, 1.0, 1.0]
    zero = torch.zeros(40, 30)
    theirs = merge_utils.ties(tensors_M, torch.tensor(weights), density)
    torch.testing.assert_close(merged("ties", tensors_M, zero, density=density), theirs, atol=1e-5, rtol=1e-5)
    weights = [0.5, 2.0, 1.0]
    theirs = merge_utils.magnitude_prune(tensors_M, torch.tensor(weights), density)
    ours = task_vectors.by_parts(zero, tensors_M, [Keep(t, num_kept(density, 1200)) for t in tensors_M], weights)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_ties_breaks_ties_by_position_also_where_they_are_in_different_parts():
    n = PART + 10
    base, one = torch.zeros(n), torch.ones(n)
    found = merged("ties", [one, one], base, density=0.999)
    assert torch.equal(found, (torch.arange(n) < int(0.999 * n)).float())


@pytest.mark.parametrize("combine", ["linear", "ties"])
def test_dare_is_that_of_peft_with_the_same_draws(combine, monkeypatch):
    _, tensors_M = models(3, 40, 30)
    weights, draws = [1.0, 1.0, 1.0], [normal(9 + i, 40, 30) < 0.4 for i in range(3)]
    mine, theirs = iter(draws), iter(draws)
    given = lambda shape, source: torch.where(next(mine), 0.0, 1.0).view(*shape)  # noqa: E731
    monkeypatch.setattr(task_vectors, "draws", given)
    monkeypatch.setattr(torch, "bernoulli", lambda *a, **k: next(theirs).float())
    expected = getattr(merge_utils, f"dare_{combine}")(tensors_M, torch.tensor(weights), 0.6)
    found = merged("dare", tensors_M, torch.zeros(40, 30), density=0.6, combine=combine)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_draws_are_uniform_and_go_on():
    draws = task_vectors.draws((1000, 101), np.random.SFC64(3))
    counts = torch.histc(draws, 100, 0, 1)
    assert draws.min() >= 0 and draws.max() <= 1 and counts.sum() == 101_000
    assert ((counts - 1010) ** 2 / 1010).sum() < 150, "chi-square with 99 degrees of freedom: 99.9 % are below 148"
    neighbours = torch.corrcoef(torch.stack([draws.flatten()[:-1], draws.flatten()[1:]]))[0, 1]
    assert abs(neighbours) < 0.01
    source = np.random.SFC64(3)
    assert torch.equal(task_vectors.draws((1000, 101), source), draws)
    assert not torch.equal(task_vectors.draws((1000, 101), source), draws), "the next ones are others"


def test_dare_drops_by_its_density_and_keeps_the_mean():
    vector = normal(1, 400, 400).abs()
    generator = np.random.SFC64(0)
    found = task_vectors.drop(vector, 0.3, generator)
    assert (found != 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(found[found != 0], vector[found != 0] / 0.3)
    assert found.mean().item() == pytest.approx(vector.mean().item(), rel=0.02)

    def plainly() -> task_vectors.Sparse:
        return partial(task_vectors.drop, density=0.3, source=np.random.SFC64(1), rescale=False)

    l1 = task_vectors.keeping_l1(plainly, vector, torch.zeros_like(vector))(vector)
    torch.testing.assert_close(l1 != 0, plainly()(vector) != 0)
    assert l1.abs().sum().item() == pytest.approx(vector.abs().sum().item(), rel=1e-5)
    plain = task_vectors.drop(vector, 0.3, generator, rescale=False)
    assert set((plain[plain != 0] / vector[plain != 0]).tolist()) == {1.0}


@pytest.mark.parametrize("name", ["dare", "della"])
def test_the_sum_of_magnitudes_stays_over_all_parts(name):
    """Also where rows end elsewhere than parts, and though each part loses another share."""
    vector = normal(5, 3, PART // 2 + 1) * torch.linspace(0.1, 9, 3)[:, None]
    found = merged(name, [vector], torch.zeros_like(vector), density=0.4, rescale="l1", combine="linear")
    kept = found != 0
    assert kept.float().mean().item() == pytest.approx(0.4, abs=0.01)
    torch.testing.assert_close(found.abs().sum(), vector.abs().sum(), rtol=1e-5, atol=0)
    factors = found[kept] / vector[kept]
    torch.testing.assert_close(factors, factors[0].expand_as(factors))


def test_dare_rescaled_by_l1_with_nothing_left_is_the_base():
    base, tensors_M = models(1, 1)
    found = {merged("dare", tensors_M, base, density=0.5, rescale="l1", seed=s).item() for s in range(20)}
    assert len(found) == 2 and base.item() in found  # kept or dropped, and never NaN


@pytest.mark.parametrize("name", ["dare", "della"])
def test_draws_depend_on_seed_name_and_place_alone(name):
    base, tensors_M = models(2, 30, 20)
    cls = registry.load("merge", name)
    method, other = cls(), cls(seed=1)
    names = [f"layer.{i}" for i in range(8)]

    def of(n: str) -> torch.Tensor:
        return method.tensor(n, tensors_M, base, None)

    one = [of(n) for n in names]
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(a, b) for a, b in zip(one[::-1], pool.map(of, names[::-1]), strict=True))
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], other.tensor(names[0], tensors_M, base, None))
    kept = [of(n) for n in names]
    assert all(torch.equal(a, b) for a, b in zip(one, kept, strict=True))
    drawn = method.tensor("x", [tensors_M[0], tensors_M[0]], base, None) - base  # not the same draws for both
    assert not torch.allclose(drawn, 2 * (method.tensor("x", tensors_M[:1], base, None) - base), atol=1e-3)


def test_della_by_its_equation():
    """Each rank of a row is kept as often as its likelihood says, and rescaled by that."""
    vector = normal(3, 4000, 5)
    generator = np.random.SFC64(0)
    found = task_vectors.drop_by_rank(vector, 0.5, 0.4, generator)
    ranks = (-vector.abs()).argsort(1).argsort(1)
    for rank, likelihood in enumerate(0.7 - 0.4 * (np.arange(5) + 0.5) / 5):
        of = ranks == rank
        assert (found[of] != 0).float().mean().item() == pytest.approx(likelihood, abs=0.03)
        kept = of & (found != 0)
        torch.testing.assert_close(found[kept], vector[kept] / likelihood, rtol=1e-5, atol=1e-7)
    assert (found != 0).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_della_ranks_a_column_and_a_vector_as_one_row():
    for shape in ((500, 1), (500,), (500, 1, 1)):
        vector = torch.arange(1.0, 501.0).reshape(shape)
        kept = [task_vectors.drop_by_rank(vector, 0.5, 0.9, np.random.SFC64(s)) != 0 for s in range(20)]
        share = torch.stack(kept).float().mean(0).flatten()
        assert share[-100:].mean() > 0.75 > 0.25 > share[:100].mean()


def test_breadcrumbs_by_its_equation():
    base, tensors_M = models(2, 20, 10)
    start, vectors = doubles(base, tensors_M)
    total = np.zeros_like(start)
    for vector in vectors:
        ranks = np.argsort(np.argsort(-np.abs(vector).ravel())).reshape(vector.shape)
        total += np.where((ranks >= 10) & (ranks < 10 + 40), vector, 0)
    close(merged("breadcrumbs", tensors_M, base, density=0.2, outliers=0.05, scaling=0.6), start + 0.6 * total)


def test_model_stock_by_its_equation():
    base, tensors_M = models(3)
    shared = normal(8, 7, 5)
    tensors_M = [t + 0.3 * shared for t in tensors_M]
    start, vectors = doubles(base, tensors_M)
    flat = [v.ravel() / np.linalg.norm(v) for v in vectors]
    cosine = np.mean([flat[i] @ flat[j] for i in range(3) for j in range(i)])
    ratio = 3 * cosine / (1 + 2 * cosine)
    assert cosine > 0.2
    close(merged("model_stock", tensors_M, base), start + ratio * sum(vectors) / 3)


def test_model_stock_of_equal_task_vectors_is_that_model_and_of_opposite_ones_the_base():
    base, (one, _) = models(2)
    close(merged("model_stock", [one, one, one], base), one)
    close(merged("model_stock", [one, 2 * base - one], base), base)
    close(merged("model_stock", [base, base], base), base)


def test_wise_ft_is_a_straight_line():
    base, (one,) = models(1)
    close(merged("wise_ft", [one], base, alpha=0.3), 0.7 * base + 0.3 * one)
    assert torch.equal(merged("wise_ft", [one], base, alpha=0.0), base)
    assert torch.equal(merged("wise_ft", [one], base, alpha=1.0), one)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_slerp_by_its_equation(t):
    one, two = normal(1, 6, 4), normal(2, 6, 4)
    a, b = one.double().numpy().ravel(), two.double().numpy().ravel()
    angle = math.acos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    by_hand = (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)
    close(merged("slerp", [one, two], t=t), by_hand.reshape(6, 4))
    close(merged("slerp", [one, two], t=t), merged("slerp", [two, one], t=1 - t))
    unit, other = one / one.norm(), two / two.norm()
    assert merged("slerp", [unit, other], t=t).norm().item() == pytest.approx(1, abs=1e-6)
    interpolated = merged("slerp", [one, two], t=t, norms="interpolated").norm().item()
    assert interpolated == pytest.approx((1 - t) * one.norm().item() + t * two.norm().item(), rel=1e-6)


def test_the_ends_of_slerp_are_the_parents_exactly():
    one, two = normal(1, 6, 4), normal(2, 6, 4)
    assert torch.equal(merged("slerp", [one, two], t=0.0), one)
    assert torch.equal(merged("slerp", [one, two], t=1.0), two)


def test_slerp_goes_straight_where_there_is_no_great_circle_or_as_asked():
    one = normal(1, 6, 4)
    close(merged("slerp", [one, 3 * one]), 2 * one)
    close(merged("slerp", [one, -one], t=0.25), 0.5 * one)
    close(merged("slerp", [one, torch.zeros(6, 4)]), one / 2)
    near = one + 0.01 * normal(2, 6, 4)
    assert torch.equal(merged("slerp", [one, near], linear_above=0.9995), torch.lerp(one, near, 0.5))
    assert not torch.equal(merged("slerp", [one, near]), torch.lerp(one, near, 0.5))


def test_the_karcher_mean_of_two_is_the_middle_of_slerp():
    one, two = normal(1, 6, 4), 3 * normal(2, 6, 4)
    middle = merged("slerp", [one, two], norms="interpolated")
    for mean in ("karcher", "chordal"):
        close(merged("karcher", [one, two], mean=mean), middle)
    close(merged("karcher", [one, two], weights=[3.0, 1.0]), merged("slerp", [one, two], t=0.25, norms="interpolated"))


def test_the_karcher_mean_has_the_least_squared_angles():
    tensors_M, weights = [normal(i, 3, 2) for i in (1, 2, 5)], [1.0, 2.0, 1.5]
    units_M = [t.double().flatten() / t.double().norm() for t in tensors_M]
    found = merged("karcher", tensors_M, weights=weights).double().flatten()

    def cost(x: torch.Tensor) -> float:
        x = x / x.norm()
        return sum(w * math.acos(float((x @ u).clamp(-1, 1))) ** 2 for w, u in zip(weights, units_M, strict=True))

    nearby = [cost(found + 1e-2 * found.norm() * normal(i, 6).double()) for i in range(50)]
    assert cost(found) < min(nearby)
    norms = sum(w * float(t.norm()) for w, t in zip(weights, tensors_M, strict=True)) / sum(weights)
    assert float(found.norm()) == pytest.approx(norms, rel=1e-5)
    chordal = spherical.spherical_mean(tensors_M, weights, "chordal").double()
    total = sum(w * u for w, u in zip(weights, units_M, strict=True))
    torch.testing.assert_close(chordal.flatten() / chordal.norm(), total / total.norm(), atol=1e-6, rtol=1e-5)


# --- mergekit, where it is installed ---------------------------------------------------------------------------------

MERGEKIT: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], int]] = [
    ("ties", {"density": 0.4}, {"normalize": True}, {"density": 0.4, "divide_by": "weights"}, 3),
    ("task_arithmetic", {}, {}, {}, 3),
    ("breadcrumbs", {"density": 0.4, "gamma": 0.05}, {}, {"density": 0.4, "outliers": 0.05}, 3),
    ("slerp", {}, {"t": 0.3}, {"t": 0.3, "linear_above": 0.9995}, 2),
    ("karcher", {}, {}, {}, 3),
    ("model_stock", {}, {}, {}, 3),
]
"""(name, its settings of a parent, its settings of the whole, ours, number of parents)."""


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> dict[str, Path]:
    """A tiny Llama and three that are near it in about the same direction, as mergekit wants them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root, sizes = tmp_path_factory.mktemp("llamas"), {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4))
    base = {name: t.clone() for name, t in model.state_dict().items()}
    folders = {name: root / name for name in ("base", "0", "1", "2")}
    for i, folder in enumerate(folders.values()):
        shift = {n: 0.03 * normal(9, *t.shape) + 0.02 * normal(i, *t.shape) for n, t in base.items()} if i else {}
        model.load_state_dict({name: t + shift.get(name, 0) for name, t in base.items()})
        model.save_pretrained(folder)
    return folders


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mergekit-yaml") is None, reason="mergekit is not installed")
@pytest.mark.parametrize(("name", "of_parent", "of_all", "given", "count"), MERGEKIT, ids=[m[0] for m in MERGEKIT])
def test_results_are_those_of_mergekit(tmp_path, llamas, name, of_parent, of_all, given, count):
    based = registry.load("merge", name).needs_base
    weights = [1.0, 2.0, 0.5] if name in ("ties", "task_arithmetic") else [1.0] * count
    parents = [llamas[str(i)] for i in range(count)]
    own = {"model_stock": (), "slerp": (), "karcher": ()}.get(name, ("weight",))
    described = {
        "merge_method": name,
        "dtype": "float32",
        "models": [
            {"model": str(p), "parameters": {**of_parent, **({"weight": w} if own else {})}}
            for p, w in zip(parents, weights, strict=True)
        ],
        "parameters": of_all,
        **({"base_model": str(llamas["base"])} if based else {}),
        **({"base_model": str(parents[0])} if name == "slerp" else {}),
    }
    (tmp_path / "merge.yml").write_text(json.dumps(described))
    command = ["mergekit-yaml", str(tmp_path / "merge.yml"), str(tmp_path / "out")]
    subprocess.run(command, check=True, capture_output=True)
    start, *states = (load_file(str(f / "model.safetensors")) for f in (llamas["base"], *parents))
    theirs = {n: t for f in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(str(f)).items()}
    assert theirs.keys() == start.keys()
    ours = {**given, **({"weights": weights} if own and name != "breadcrumbs" else {})}
    for key, expected in theirs.items():
        found = merged(name, [s[key] for s in states], start[key], **ours)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


# --- identities ------------------------------------------------------------------------------------------------------


def own(name: str) -> dict[str, Any]:
    """Settings with which one model gives that model."""
    keeps_all = {"density": 1.0}
    return {"ties": keeps_all, "dare": keeps_all, "della": keeps_all, "wise_ft": {"alpha": 1.0}}.get(
        name, {"density": 1.0, "outliers": 0.0} if name == "breadcrumbs" else {}
    )


@pytest.mark.parametrize("name", [n for n in ANY if n not in ("model_stock", "slerp")])
def test_one_model_with_nothing_left_out_is_that_model(name):
    base, (one,) = models(1)
    torch.testing.assert_close(merged(name, [one], base, **own(name)), one, atol=1e-6, rtol=0)


@pytest.mark.parametrize("combine", ["linear", "ties"])
@pytest.mark.parametrize("name", ["dare", "della", "breadcrumbs"])
def test_with_nothing_left_out_they_are_task_arithmetic_and_ties(name, combine):
    base, tensors_M = models()
    plain = "task_arithmetic" if combine == "linear" else "ties"
    expected = merged(plain, tensors_M, base, **({"density": 1.0} if combine == "ties" else {}))
    close(merged(name, tensors_M, base, combine=combine, **own(name)), expected)


@pytest.mark.parametrize("name", [n for n in ANY if not registry.load("merge", n).order_matters])
def test_the_order_of_parents_does_not_matter(name):
    base, tensors_M = models(1 if name == "wise_ft" else 3, 30, 20)
    found = merged(name, tensors_M, base)
    torch.testing.assert_close(merged(name, tensors_M[::-1], base), found, **CLOSE)


SHAPES = [(), (0,), (0, 4), (1,), (1, 1), (9, 1), (1, 9), (9,), (3, 2, 2, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ANY)
def test_tensors_of_any_shape(name, shape):
    cls = registry.load("merge", name)
    base = normal(0, *shape)
    tensors_M = [base + 0.1 * normal(i + 1, *shape) for i in range(cls.max_parents or 3)]
    for start in (base, torch.zeros(shape)):
        found = merged(name, tensors_M, start)
        assert found.shape == shape and found.dtype == torch.float32 and bool(found.isfinite().all())
    copies = merged(name, [base.clone() for _ in tensors_M], base)
    torch.testing.assert_close(copies, base, **CLOSE)
    zeros = merged(name, [torch.zeros(shape) for _ in tensors_M], torch.zeros(shape))
    assert torch.equal(zeros, torch.zeros(shape))


@pytest.mark.parametrize("name", ANY)
def test_tensors_that_are_not_contiguous(name):
    cls = registry.load("merge", name)
    base = normal(0, 6, 8)
    tensors_M = [base + 0.1 * normal(i + 1, 6, 8) for i in range(cls.max_parents or 3)]
    found = merged(name, [t.t().contiguous().t() for t in tensors_M], base.t().contiguous().t())
    torch.testing.assert_close(found, merged(name, tensors_M, base))


@pytest.mark.parametrize("name", ANY)
def test_float64_stays_float64_and_gives_the_same(name):
    cls = registry.load("merge", name)
    base = normal(0, 6, 8)
    tensors_M = [base + 0.1 * normal(i + 1, 6, 8) for i in range(cls.max_parents or 3)]
    found = merged(name, [t.double() for t in tensors_M], base.double())
    if name != "uniform_soup":  # as it is
        assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), merged(name, tensors_M, base), **CLOSE)


# --- the threshold ---------------------------------------------------------------------------------------------------


def cases() -> dict[str, torch.Tensor]:
    wide = normal(1, 1000) * torch.logspace(-44, 38, 1000)
    few = torch.randint(-3, 4, (5000,), generator=torch.Generator().manual_seed(0)).float()
    large = normal(2, 300_000) * 1e-3
    odd = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 1.0, 1.0, -1.0, float("inf")])
    near = 1.0 + torch.arange(4000).float().flip(0) * 2**-23
    return {"wide": wide, "few": few, "large": large, "odd": odd, "near": near, "bf16": large.bfloat16().float()}


@pytest.mark.parametrize("name", cases())
def test_the_threshold_is_that_of_kthvalue(name):
    values = cases()[name]
    sizes, n = values.abs(), values.numel()
    for k in sorted({1, 2, 3, n // 7 + 1, n // 2, n - 1, n}):
        cut = magnitude_threshold(values, k)
        assert cut.magnitude == sizes.kthvalue(n - k + 1).values.item(), k
        assert cut.above == int((sizes > cut.magnitude).sum()) and cut.equal == int((sizes == cut.magnitude).sum())
        expected = torch.zeros(n)
        first = sizes.argsort(descending=True, stable=True)[:k]
        expected[first] = values[first]
        assert torch.equal(Keep(values, k)(values), expected), k
        assert torch.equal(Keep(values.double(), k)(values.double()), expected.double()), k


def test_the_ranks_of_rows_are_those_of_a_stable_sort():
    few = torch.randint(-3, 4, (7, 300), generator=torch.Generator().manual_seed(0)).float()
    for values in (few, normal(1, 5, 700), 1.0 + torch.arange(4000).float().view(4, 1000) * 2**-23):
        order = values.abs().argsort(dim=1, descending=True, stable=True)
        assert torch.equal(ranks_of_rows(values), order.argsort(1) + 0.5)


def test_the_ranks_of_long_rows_are_means_over_nearly_equal_magnitudes():
    scales = torch.tensor([1e-3, 1.0, 3e4])[:, None]  # rows of their own
    values = normal(1, 3, 5000) * scales
    ranks, exact = ranks_of_rows(values), values.abs().argsort(1, descending=True).argsort(1) + 0.5
    assert (ranks - exact).abs().max() < 0.02 * 5000
    torch.testing.assert_close(ranks.double().mean(1), torch.full((3,), 2500.0, dtype=torch.float64))
    for row, found in zip(values.abs(), ranks, strict=True):
        for rank in found.unique()[:-1]:  # the last one is that of all which are tiny
            equal = row[found == rank]
            assert equal.max() / equal.min() < 1 + 1 / 32
            between = (row >= equal.min()) & (row <= equal.max())
            assert torch.equal(between, found == rank)
            assert float(rank) == pytest.approx(float((row > equal.max()).sum()) + len(equal) / 2)
    few = torch.tensor([[4.0, 2.0, 2.0, 0.0] * 300])
    assert torch.equal(ranks_of_rows(few), torch.tensor([[150.0, 600.0, 600.0, 1050.0] * 300]))
    assert torch.equal(ranks_of_rows(torch.zeros(2, 1500)), torch.full((2, 1500), 750.0))


def test_a_density_keeps_one_element_at_least():
    assert [num_kept(d, n) for d, n in ((0.2, 10), (0.2, 3), (0.5, 1), (1.0, 4), (0.0, 4), (0.5, 0))] == [
        2, 1, 1, 4, 0, 0
    ]  # fmt: skip


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("ties", {"density": 0.0}, "ties.density"),
        ("ties", {"weights": [1.0, 1.0]}, "2 weights for 3 parents"),
        ("ties", {"weights": [0.0, 0.0, 0.0]}, "all are 0"),
        ("ties", {"weights": [1.0, -1.0, 0.0], "divide_by": "weights"}, "share of a mean"),
        ("dare", {"density": 1.5}, "dare.density"),
        ("dare", {"weights": [1.0]}, "1 weights for 3 parents"),
        ("della", {"density": 0.9, "epsilon": 0.4}, "outside of 0 to 1"),
        ("della", {"epsilon": -0.1}, "outside of 0 to 1"),
        ("breadcrumbs", {"density": 0.9, "outliers": 0.2}, "more than 1"),
        ("karcher", {"weights": [1.0, 1.0, -2.0]}, "share of a mean"),
        ("uniform_soup", {"weights": [1.0, 1.0, -2.0]}, "add up to 0"),
        ("task_arithmetic", {"weights": [0.0, 0.0, 0.0]}, "all are 0"),
        ("slerp", {"t": 1.5}, "from 0 to 1"),
        ("wise_ft", {"alpha": 2.0}, "from 0 to 1"),
        ("wise_ft", {"alpha": "best"}, "or 'fit'"),
        ("wise_ft", {"alpha": "fit", "curve": []}, "empty curve"),
    ],
)
def test_settings_that_are_refused(name, given, said):
    with pytest.raises(RecipeError, match=said):
        registry.load("merge", name)(**given).check(3)


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> dict[str, str]:
    """A base, three models that were trained from it, and one that has learnt the opposite."""
    root = tmp_path_factory.mktemp("family")
    base = Train("base", model=Model(config="vit", config_overrides=VIT), training={**FAST, "max_steps": 2})
    tuned = Train("tuned", model=Model("@base"), seeds=3, training={**FAST, "max_steps": 20})
    flipped = Data(shapes(root / "flipped", {"train": True}))
    wrong = Train("wrong", data=flipped, model=Model("@base"), training={**FAST, "max_steps": 20})
    run(Recipe([base, tuned, wrong], data=Data(shapes(root / "data", {}))), root / "out")
    folders = {name: root / "out" / name / "model" for name in ("base", "wrong")}
    folders["0"] = root / "out" / "tuned" / "model"
    folders |= {str(i): root / "out" / "tuned" / "seeds" / str(i) / "model" for i in (1, 2)}
    return {**{name: str(folder) for name, folder in folders.items()}, "data": str(root / "data")}


@pytest.mark.parametrize(
    ("method", "count", "based", "said"),
    [
        ("ties", 3, False, "stages.m: no base"),
        ("ties", 3, "0", "among the parents"),
        ("slerp", 3, False, "takes 2 at most"),
        ("slerp", 1, False, "needs 2"),
        ("wise_ft", 2, True, "takes 1 at most"),
        ({"dare": {"weights": [1.0, 1.0]}}, 3, True, "2 weights for 3 parents"),
    ],
)
def test_the_plan_refuses_what_a_method_cannot_merge(tmp_path, family, method, count, based, said):
    base = {True: "nowhere", False: None}.get(based, family.get(based))
    recipe = Recipe([Merge("m", method, models=[family[str(i)] for i in range(count)], base=base)], data=Data("none"))
    with pytest.raises(RecipeError, match=said):  # before the data and the base, neither of which exists
        run(recipe, tmp_path / "out")


def test_seeds_of_a_stage_count_as_parents(tmp_path):
    tuned = Train("tuned", model=Model(config="vit", config_overrides=VIT), seeds=3)
    with pytest.raises(RecipeError, match="3 parents, slerp takes 2 at most"):
        run(Recipe([tuned, Merge("m", "slerp", models=["@tuned"])], data=Data("none")), tmp_path / "out")


def test_a_base_with_other_tensors_or_nan_is_refused(tmp_path, family):
    weights = load_file(str(Path(family["base"]) / "model.safetensors"))
    name = "vit.layernorm.weight"

    def based(change: Callable[[dict[str, torch.Tensor]], Any], folder: Path) -> Recipe:
        changed = {k: t.clone() for k, t in weights.items()}
        change(changed)
        folder.mkdir()
        save_file(changed, str(folder / "model.safetensors"), {"format": "pt"})
        models = [family[str(i)] for i in range(3)]
        return Recipe([Merge("m", "ties", models=models, base=str(folder))], data=Data(family["data"]))

    for i, (change, kind, said) in enumerate(
        (
            (lambda w: w.pop(name), RecipeError, f"'base' differ in 1 tensors: {name}"),
            (lambda w: w.update({name: torch.zeros(5, 2)}), RecipeError, "in 'base'"),
            (lambda w: w[name].fill_(float("nan")), IntegrityError, "'base' has non-finite"),
        )
    ):
        with pytest.raises(kind, match=said):
            run(based(change, tmp_path / f"base{i}"), tmp_path / f"out{i}")


def test_what_the_base_lacks_of_the_head_is_the_parents_mean(tmp_path, family, caplog):
    """A pretrained backbone has no head, and other names."""
    models = [family[str(i)] for i in range(3)]
    whole = load_file(str(Path(family["base"]) / "model.safetensors"))
    (tmp_path / "bare").mkdir()
    bare = {n.removeprefix("vit."): t for n, t in whole.items() if n.startswith("vit.")}
    save_file(bare, str(tmp_path / "bare" / "model.safetensors"), {"format": "pt"})
    shutil.copy(Path(family["base"]) / "config.json", tmp_path / "bare")
    merge_command.merge("ties", models, tmp_path / "merged", base=str(tmp_path / "bare"), given={"density": 0.4})
    assert "has no such head: the parents' mean is taken of classifier.bias, classifier.weight" in caplog.text
    parents = [load_file(str(Path(m) / "model.safetensors")) for m in models]
    for name, found in load_file(str(tmp_path / "merged" / "model.safetensors")).items():
        given = [p[name] for p in parents]
        head = name.startswith("classifier")
        close(found, torch.stack(given).mean(0) if head else merged("ties", given, whole[name], density=0.4))


# --- whole recipes ---------------------------------------------------------------------------------------------------


def test_methods_over_three_fine_tuned_models_and_their_base(tmp_path, family):
    models = [family[str(i)] for i in range(3)]
    stages = [
        Merge("ties", {"ties": {"density": 0.4}}, models=models, base=family["base"]),
        Merge("dare", {"dare": {"density": 0.6, "scaling": 0.33}}, models=models, base=family["base"]),
    ]
    report = run(Recipe(stages, data=Data(family["data"])), tmp_path / "out")
    start, *tuned = (load_file(str(Path(f) / "model.safetensors")) for f in (family["base"], *models))
    for stage in report["stages"]:
        assert stage["lineage"]["base"] == family["base"] and stage["metrics"]["accuracy"]["value"] > 0.8
        written = load_file(str(tmp_path / "out" / stage["name"] / "model" / "model.safetensors"))
        assert written.keys() == start.keys()
    for key, found in load_file(str(tmp_path / "out" / "ties" / "model" / "model.safetensors")).items():
        close(found, merged("ties", [t[key] for t in tuned], start[key], density=0.4))


def test_wise_ft_follows_its_curve_on_validation_data(tmp_path, family):
    method = {"wise_ft": {"alpha": "fit", "curve": [0.0, 0.5, 1.0]}}
    recipe = Recipe([Merge("m", method, models=[family["0"]], base=family["wrong"])], data=Data(family["data"]))
    written = run(recipe, tmp_path / "out")
    found = summary(written, "m")
    scores = {point["alpha"]: point["score"] for point in found["curve"]}
    assert list(scores) == [0.0, 0.5, 1.0] and scores[1.0] > scores[0.0]
    assert scores[found["alpha"]] == max(scores.values())
    assert [s["weights"] for s in found["validation_scores"]] == [[0.0, 1.0], [0.5, 0.5], [1.0]]
    page = report.html(written)
    assert "Way along alpha" in page and f"chosen: {found['alpha']:g}" in page
    assert all(f"alpha {a:g}: {100 * score:.4g}" in page for a, score in scores.items())


def test_a_merge_with_seeds_of_its_own_takes_a_seed_for_each(tmp_path, family):
    recipe = Recipe(
        [
            Train("tuned", ["finetune"], seeds=2, training=FAST),
            Merge("way", {"wise_ft": {"alpha": 0.25}}, models=["@tuned"], base=family["base"], seeds=2),
        ],
        model=family["base"],
        data=Data(family["data"]),
    )
    report = run(recipe, tmp_path / "out")
    start = load_file(str(Path(family["base"]) / "model.safetensors"))
    for seed in ("", "seeds/1/"):
        tuned, way = (
            load_file(str(tmp_path / "out" / s / seed / "model" / "model.safetensors")) for s in ("tuned", "way")
        )
        for key in start:
            close(way[key], torch.lerp(start[key], tuned[key], 0.25))
    assert len(next(s for s in report["stages"] if s["name"] == "way")["metrics"]["accuracy"]["per_seed"]) == 2


def test_buffers_that_are_not_floating_point_and_bf16_come_through(tmp_path):
    base, tensors_M = models(3, 6, 4)
    folders = []
    for i, tensor in enumerate([base, *tensors_M]):
        folder = tmp_path / str(i)
        folder.mkdir()
        state = {"w": tensor.bfloat16(), "count": torch.tensor([i]), "mask": torch.tensor([True, False])}
        save_file(state, str(folder / "model.safetensors"), {"format": "pt"})
        folders.append(folder)
    with merging.Parents(folders[1:], ["a", "b", "c"]) as parents, merging.Parents(folders[:1], ["base"]) as start:
        merging.merge(registry.load("merge", "ties")(), parents, start, tmp_path / "merged")
    found = load_file(str(tmp_path / "merged" / "model.safetensors"))
    assert found["count"].item() == 1 and found["mask"].tolist() == [True, False]
    halves = [t.bfloat16().float() for t in (base, *tensors_M)]
    assert torch.equal(found["w"], merged("ties", halves[1:], halves[0]).bfloat16())
