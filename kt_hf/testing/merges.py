"""Rules for merges: on small tensors through the real engine.

Shapes: M parents.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from kt_hf import measuring, merging
from kt_hf.merge import MergeMethod
from kt_hf.testing import asked
from kt_hf.testing.bench import cpu_accelerator, differing
from kt_hf.testing.plugin import Case
from kt_hf.testing.rules import NotApplicable, demand, rule
from kt_hf.testing.strategies import some

State = dict[str, torch.Tensor]
SHAPES = {"embeddings.weight": (12, 6), "layer.0.weight": (6, 6), "layer.0.bias": (6,), "head.weight": (3, 6)}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


class MergeCase(Case):
    """A merge method with small parents and a base that they come from."""

    def __init__(self, name: str, cls: type, given: dict[str, Any], folder: Path):
        super().__init__("merge", name, cls, given, folder)
        least, most = cls.min_parents, cls.max_parents  # type: ignore[attr-defined]
        self.count = max(3, least) if most is None else min(max(3, least), most)
        self.base = state(0)
        # distinct sizes, so that methods which rank by magnitude or score have no ties
        self.parents = [
            {k: t + 0.1 * (i + 1) * d for (k, t), d in zip(self.base.items(), state(i + 1).values(), strict=True)}
            for i in range(self.count)
        ]

    def merge(self, parents: list[State], base: State | None, where: str) -> State:
        """Through files and the engine, as a stage does it."""
        folders = [write(s, self.folder / where / f"parent{i}") for i, s in enumerate(parents)]
        names = [f"parent{i}" for i in range(len(parents))]
        method, into = self.built(), self.folder / where / "merged"
        with merging.Parents(folders, names) as opened:
            run = self.run(parents, base)
            stats = self.measured(method, folders, run, self.folder / where)
            method.fit(run)
            if base is None:
                merging.merge(method, opened, None, into, stats=stats)
            else:
                with merging.Parents([write(base, self.folder / where / "base")], ["base"]) as opened_base:
                    merging.merge(method, opened, opened_base, into, stats=stats)
        return load_file(into / "model.safetensors")

    def run(self, parents: list[State], base: State | None) -> merging.MergeRun:
        """What a merge may ask: a score of weights, and the parents themselves as models with rows."""
        names = [f"parent{i}" for i in range(len(parents))]
        models = [*parents, base or parents[0]]
        return merging.MergeRun(
            len(parents), names, True, lambda w: score(models, w), lambda i: asked.parent(names[i], parents[i])
        )

    def measured(self, method: MergeMethod, folders: list[Path], run: merging.MergeRun, where: Path) -> list[Any]:
        if method.measures_on is None:
            return []
        return measuring.measured(method, folders, where / "measured", run, cpu_accelerator())

    @functools.cached_property
    def merged(self) -> State:
        return self.merge(self.parents, self.base, "whole")

    def built(self) -> MergeMethod:
        """With settings that fit the parents, as the plan makes sure."""
        method: MergeMethod = self.build()
        method.check(self.count)
        return method

    def fitted(self) -> MergeMethod:
        method = self.built()
        method.fit(self.run(self.parents, self.base))
        return method

    @functools.cached_property
    def stats(self) -> list[Any]:
        """What was measured of the parents."""
        folders = [write(s, self.folder / "asked" / f"parent{i}") for i, s in enumerate(self.parents)]
        return self.measured(self.built(), folders, self.run(self.parents, self.base), self.folder / "asked")

    def tensor(self, method: MergeMethod, name: str, parents: list[State], base: State) -> torch.Tensor:
        """`method.tensor` with what was measured, as the engine calls it."""
        stats = [found.get(name) for found in self.stats] or None
        return method.tensor(name, [p[name] for p in parents], base[name], stats)


def state(seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write(tensors: State, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def score(parents: list[State], weights_M: list[float]) -> float:
    """A validation metric that is a property of the merged weights, whatever the order of the parents; of as many as
    there are weights, of which the base's is the last."""
    parents = parents[: len(weights_M)]
    total = sum(weights_M) or 1.0
    shares = [w / total for w in weights_M]
    mean = {n: torch.stack([w * p[n].double() for p, w in zip(parents, shares, strict=True)]).sum(0) for n in SHAPES}
    return -round(float(torch.stack([((t - 0.05) ** 2).sum() for t in mean.values()]).sum()), 9)


@rule("merge", "merges-finitely", needs=("builds",))
def merges_finitely(case: MergeCase) -> None:
    """The merged model has the parents' tensors, all finite."""
    merged = case.merged
    demand(
        {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in case.base.items()},
        "other names or shapes than the parents",
    )
    demand(not (bad := [n for n, t in merged.items() if not t.isfinite().all()]), f"not finite: {some(bad)}")


@rule("merge", "copies-give-the-model", needs=("merges-finitely",))
def copies_give_the_model(case: MergeCase) -> None:
    """Merging copies of one model, onto itself where a base is used, gives that model."""
    model = case.parents[0]
    merged = case.merge([model] * case.count, model, "copies")
    demand(not (names := differing(merged, model, **CLOSE)), f"{case.count} copies give other weights: {some(names)}")


@rule("merge", "order-does-not-matter", needs=("merges-finitely",))
def order_does_not_matter(case: MergeCase) -> None:
    """Parents in another order give the same model, unless the class says `order_matters = True`."""
    if case.built().order_matters:
        raise NotApplicable("it says that the order matters")
    if case.count == 1:
        raise NotApplicable("it takes one parent")
    merged = case.merge(case.parents[::-1], case.base, "reversed")
    demand(not (names := differing(merged, case.merged, **CLOSE)), f"other weights in another order: {some(names)}")


@rule("merge", "does-without-a-base", needs=("merges-finitely",))
def does_without_a_base(case: MergeCase) -> None:
    """It merges without a base, unless the class says `needs_base = True`."""
    if getattr(case.cls, "needs_base", False):
        raise NotApplicable("it says that it needs a base")
    merged = case.merge(case.parents, None, "alone")
    demand(not (bad := [n for n, t in merged.items() if not t.isfinite().all()]), f"not finite: {some(bad)}")


@rule("merge", "keeps-the-dtype", needs=("merges-finitely",))
def keeps_the_dtype(case: MergeCase) -> None:
    """Parents in bfloat16 give a model in bfloat16; the arithmetic is done in float32."""
    half = [{n: t.bfloat16() for n, t in s.items()} for s in (case.base, *case.parents)]
    merged = case.merge(half[1:], half[0], "half")
    demand(not (bad := [n for n, t in merged.items() if t.dtype != torch.bfloat16]), f"not bfloat16: {some(bad)}")
    method = case.fitted()
    for name in SHAPES:
        found = case.tensor(method, name, case.parents, case.base)
        demand(found.dtype == torch.float32, f"`tensor` gave {found.dtype} for float32")


@rule("merge", "tensor-by-tensor", needs=("merges-finitely",))
def tensor_by_tensor(case: MergeCase) -> None:
    """A tensor's result depends neither on the order of the names nor on what was merged before, bit for bit."""
    method = case.fitted()
    found = {n: case.tensor(method, n, case.parents, case.base) for n in reversed(SHAPES)}
    again = {n: case.tensor(case.fitted(), n, case.parents, case.base) for n in SHAPES}
    demand(not (names := differing(found, again)), f"another result in another order of names: {some(names)}")
    demand(not (names := differing(again, case.merged)), f"another result than through the engine: {some(names)}")


@rule("merge", "leaves-the-parents", needs=("merges-finitely",))
def leaves_the_parents(case: MergeCase) -> None:
    """`tensor` does not write into what it is given."""
    method, copies = case.fitted(), [{n: t.clone() for n, t in p.items()} for p in (case.base, *case.parents)]
    for name in SHAPES:
        case.tensor(method, name, copies[1:], copies[0])
    for before, after in zip((case.base, *case.parents), copies, strict=True):
        demand(not (names := differing(before, after)), f"it changed a parent in place: {some(names)}")


@rule("merge", "pieces-give-the-whole", needs=("merges-finitely",))
def pieces_give_the_whole(case: MergeCase) -> None:
    """What says `elementwise = True` gives the same for flat pieces of a tensor as for the whole."""
    if not case.cls.elementwise:  # type: ignore[attr-defined]
        raise NotApplicable("it takes whole tensors")
    method = case.fitted()
    for name in SHAPES:
        base_n, parents = case.base[name].flatten(), [p[name].flatten() for p in case.parents]
        whole = case.tensor(method, name, case.parents, case.base).flatten()
        cuts = [slice(i, i + 5) for i in range(0, base_n.numel(), 5)]
        pieces = [method.tensor(name, [p[cut] for p in parents], base_n[cut], None) for cut in cuts]
        near = torch.allclose(torch.cat(pieces), whole, rtol=CLOSE["rtol"], atol=CLOSE["atol"])
        demand(near, f"pieces of {name} give other values than the whole")


@rule("merge", "converts-what-is-stored", needs=("merges-finitely",))
def converts_what_is_stored(case: MergeCase) -> None:
    """What says `as_stored = True` gives the same for tensors in bfloat16 as for these in float32."""
    if not case.cls.as_stored:  # type: ignore[attr-defined]
        raise NotApplicable("it takes tensors that are converted")
    method, stored = case.fitted(), [{n: t.bfloat16() for n, t in p.items()} for p in case.parents]
    converted = [{n: t.float() for n, t in p.items()} for p in stored]
    if not case.cls.needs_base:  # type: ignore[attr-defined]
        stored[0] = converted[0]
    for name in SHAPES:
        found = case.tensor(method, name, stored, case.base)
        wanted = case.tensor(method, name, converted, case.base)
        demand(found.dtype == torch.float32, f"{name} comes in {found.dtype}, asked for was float32")
        demand(torch.equal(found, wanted), f"{name} has other values if the parents come in bfloat16")


@rule("merge", "measures-the-same-again", needs=("builds",))
def measures_the_same_again(case: MergeCase) -> None:
    """What it measures of a parent belongs to the parent's tensors, and is the same another time."""
    method = case.built()
    if method.measures_on is None:
        raise NotApplicable("it asks its parents nothing")
    demand(not method.elementwise, "it says `elementwise = True`: pieces of a tensor come without what was measured")
    run = case.run(case.parents, case.base)
    found, again = (asked.parent("a", case.parents[0]).in_files(method.measure(run.parent(0), run)) for _ in range(2))
    demand(found, "it measures on data, and returns nothing")
    demand(not (names := differing(found, again)), f"it measured something else the second time: {some(names)}")


@rule("merge", "linear-is-a-weighted-sum", needs=("merges-finitely",))
def linear_is_a_weighted_sum(case: MergeCase) -> None:
    """What says `linear = True` gives the sum of its inputs, weighted as it weighs unit vectors."""
    if not case.cls.linear:  # type: ignore[attr-defined]
        raise NotApplicable("it does not say so")
    method = case.fitted()
    for name in SHAPES:
        given = [p[name] for p in case.parents] + ([case.base[name]] if case.cls.needs_base else [])  # type: ignore[attr-defined]
        units = list(torch.eye(len(given)))
        base_unit = units[case.count] if len(units) > case.count else None
        weights = method.tensor(name, units[: case.count], base_unit, None)
        wanted = sum(w * t for w, t in zip(weights.tolist(), given, strict=True))
        found = method.tensor(name, given[: case.count], given[case.count] if base_unit is not None else None, None)
        near = torch.allclose(found, torch.as_tensor(wanted), rtol=CLOSE["rtol"], atol=1e-5)
        demand(near, f"{name} is no sum with the weights that unit vectors get")
