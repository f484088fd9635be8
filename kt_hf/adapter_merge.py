"""Adapters become one adapter: what a merge method makes of the changes that they stand for.

The tensors that a method is given are the changes themselves, scaling * B A, with a base of zeros; a module that an
adapter leaves alone counts as a change of zero. So every method means what it means for full models, less the base.
What comes out is written as a product of two factors again.

Shapes: M adapters, O outputs, I inputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kt_hf import checkpoint, folding
from kt_hf.adapters import Adapter, Pair, as_matrix, ranks_of, write_adapter
from kt_hf.errors import IntegrityError, RecipeError, nearest
from kt_hf.functional import low_rank
from kt_hf.functional.averaging import weighted_mean
from kt_hf.loading import recorded
from kt_hf.merge import MergeMethod
from kt_hf.merge_engine import SLACK, Memory, one_thread_each
from kt_hf.merging import Tensors, copy_files, written_aside
from kt_hf.progress import Bytes

WAYS = ("changes", "factors")
IN_FULL = ("method", "mean", "first")


@dataclass(frozen=True)
class How:
    """What an adapter is to be, beside the method's own settings.

    rank: of each module at most; error: the relative error (Frobenius) that each module may have, else nothing but
    rounding is left out of weighted sums, and the sum of the adapters' ranks is kept of all others. combine: `changes`,
    or A and B each for itself as peft's `linear` does. in_full: of tensors that adapters hold in full, such as a head:
    what the `method` makes of them, their `mean`, or those of the `first` adapter.
    """

    rank: int | None = None
    error: float | None = None
    combine: str = "changes"
    in_full: str = "method"

    def check(self, method: str, linear: bool) -> None:
        check_size(self.rank, self.error)
        for option, value, valid in (("--combine", self.combine, WAYS), ("--in-full", self.in_full, IN_FULL)):
            if value not in valid:
                raise RecipeError(f"{option} {value} is unknown", nearest(value, valid))
        if self.combine == "factors" and not linear:
            raise RecipeError(
                f"--combine factors merges A and B apart, and {method} is no weighted sum",
                "leave it out: the changes themselves are then merged, which is what the method means",
            )


def check_size(rank: int | None, error: float | None) -> None:
    """Refuse what is no rank, or no relative error."""
    if rank is not None and rank < 1:
        raise RecipeError(f"--rank {rank} is no rank", "give 1 or more")
    if error is not None and not 0 < error < 1:
        raise RecipeError(f"--error {error} is no relative error", "a number between 0 and 1, such as 0.05")


def merge_adapters(
    method: MergeMethod,
    name: str,
    adapters: Sequence[Adapter],
    output: Path,
    *,
    how: How,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    compute: torch.dtype = torch.float32,
    threads: int | None = None,
    files: Mapping[str, str] | None = None,
) -> str:
    """Write the merged adapter; returns what is to be said of it.

    base: what all adapt, where they do not say or say it in several ways. dtype: of the result; default: the first
    adapter's. files: texts to write beside, by name.
    """
    how.check(name, method.linear)
    for adapter in adapters:
        _refuse(adapter)
    _refuse_strangers(adapters, base)
    modules = _modules(adapters)
    work = _Merging(method, adapters, how, compute)
    pairs: dict[str, Pair] = {}
    total = lost = 0.0
    progress = Bytes(f"merging into {output.name}", sum(_bytes(adapters, m) for m in modules))
    try:
        with one_thread_each(threads or torch.get_num_threads()) as workers:
            for module, found in zip(modules, workers.map(work.module, modules), strict=True):
                total, lost = total + found.total, lost + found.lost
                if found.pair is not None:
                    pairs[module] = found.pair
                progress.add(_bytes(adapters, module))
    finally:
        progress.close()
    full = _in_full(method, name, adapters, how, base, compute)
    if not pairs:
        raise RecipeError(f"nothing is left of what the adapters change by {name}", "give other weights")
    first = next(iter(adapters[0].pairs.values()))
    dtype = dtype or first.a.dtype
    pairs = {module: _stored(pair, dtype, work.adds_to_biases) for module, pair in pairs.items()}
    for pair in pairs.values():
        if not all(bool(t.isfinite().all()) for t in (pair.a, pair.b)):
            raise RecipeError(f"{name} gives non-finite values", "look at its settings, and at --dtype")
    bases = _bases(adapters)
    with checkpoint.disk(output), written_aside(output) as staged:
        copy_files(adapters[0].folder, staged, None)
        size = write_adapter(staged, _config(adapters, full, base), pairs, {**bases, **full})
        for file, text in (files or {}).items():
            (staged / file).write_text(text)
    kept = 1 - lost / total if total else 1.0
    whole = "all of the merged change" if lost <= low_rank.NOTHING * total else f"{kept:.2%} of its squared norm kept"
    if how.combine == "factors":
        whole = f"A and B merged apart, which is off by {math.sqrt(lost / total):.3g} of the merged change"
    return f"{len(pairs)} modules of {ranks_of(pairs)}, {whole}, {size / 1e6:.3g} MB"


@dataclass
class _Found:
    """A module's merged factors, the squared norm of the merged change and of what the factors lack of it."""

    pair: Pair | None
    total: float
    lost: float


class _Merging:
    """One merge, module by module."""

    def __init__(self, method: MergeMethod, adapters: Sequence[Adapter], how: How, compute: torch.dtype):
        self.method, self.adapters, self.how, self.compute = method, adapters, how, compute
        self.memory = Memory(max([SLACK, *(self._bytes(p) for a in adapters for p in a.pairs.values())]))
        self.adds_to_biases = any(p.bias is not None for a in adapters for p in a.pairs.values())

    def module(self, module: str) -> _Found:
        pairs_M = [adapter.pairs.get(module) for adapter in self.adapters]
        some = next(pair for pair in pairs_M if pair is not None)
        with torch.no_grad():
            found = self._factors(f"{module}.weight", pairs_M, some)
            bias = self._bias(f"{module}.bias", pairs_M)
        if not found.rank and bias is None:
            return _Found(None, found.total, found.lost)
        b_OR, a_RI = found.b_OR, found.a_RI
        if not found.rank:  # the bias alone changes, and peft knows no adapter of rank 0
            b_OR, a_RI = torch.zeros(some.shape[0], 1), torch.zeros(1, a_RI.shape[1])
        ones = (1,) * (some.b.dim() - 2)
        a, b = a_RI.reshape(-1, *some.a.shape[1:]), b_OR.reshape(*b_OR.shape, *ones)
        return _Found(Pair(a, b, 1.0, some.embedding, bias), found.total, found.lost)

    def _factors(self, name: str, pairs_M: Sequence[Pair | None], some: Pair) -> low_rank.Factors:
        if self.method.linear:
            weights_M = self._coefficients(name)
            pairs = [(p, w * p.scaling) for p, w in zip(pairs_M, weights_M, strict=True) if p is not None]
            matrices = [pair.matrices(torch.float64) for pair, _ in pairs]
            b_M, a_M, scales_M = [b for b, _ in matrices], [a for _, a in matrices], [w for _, w in pairs]
            if self.how.combine == "factors":
                return self._apart(name, b_M, a_M, scales_M)
            b_OR, a_RI = low_rank.added(b_M, a_M, scales_M)
            return low_rank.reduced(b_OR, a_RI, self.how.rank, self.how.error)
        rank = self.how.rank
        if rank is None and self.how.error is None:
            rank = sum(pair.rank for pair in pairs_M if pair is not None)
        with self.memory.hold(self._bytes(some)):
            deltas_M = [self._zeros(some) if pair is None else pair.delta(self.compute) for pair in pairs_M]
            merged = self._merged(name, deltas_M, self._zeros(some))
            return low_rank.factored(as_matrix(merged, some.embedding), rank, self.how.error)

    def _zeros(self, pair: Pair) -> torch.Tensor:
        return torch.zeros(pair.shape[::-1] if pair.embedding else pair.shape, dtype=self.compute)

    def _bytes(self, pair: Pair) -> int:
        """What a change takes as a whole: the adapters', the base, the result, and what a method wants for itself."""
        return (len(self.adapters) + 4) * math.prod(pair.shape) * self.compute.itemsize

    def _coefficients(self, name: str) -> list[float]:
        """What the method multiplies each adapter's change by: a weighted sum of unit vectors shows it."""
        units_MM = torch.eye(len(self.adapters), dtype=torch.float64)
        return self._merged(name, list(units_MM), torch.zeros(len(units_MM), dtype=torch.float64)).tolist()

    def _merged(self, name: str, tensors_M: list[torch.Tensor], zeros: torch.Tensor) -> torch.Tensor:
        return self.method.tensor(name, tensors_M, zeros if self.method.needs_base else None, None)

    def _apart(
        self, name: str, b_M: list[torch.Tensor], a_M: list[torch.Tensor], scales_M: list[float]
    ) -> low_rank.Factors:
        """(sum_m sqrt(w_m) B_m) (sum_m sqrt(w_m) A_m): besides the sum that is meant, the products of one adapter's B
        with another's A."""
        if len({b.shape[1] for b in b_M}) > 1:
            ranks = sorted({b.shape[1] for b in b_M})
            raise RecipeError(
                f"{name}: adapters of the ranks {ranks} have no factors that could be added up",
                "leave out --combine factors",
            )
        b_OR = sum(b * abs(w) ** 0.5 for b, w in zip(b_M, scales_M, strict=True))
        a_RI = sum(a * (abs(w) ** 0.5 * (1 if w >= 0 else -1)) for a, w in zip(a_M, scales_M, strict=True))
        assert isinstance(b_OR, torch.Tensor) and isinstance(a_RI, torch.Tensor)
        meant_b, meant_a = low_rank.added(b_M, a_M, scales_M)
        off = low_rank.reduced(torch.cat([meant_b, b_OR], 1), torch.cat([meant_a, -a_RI]))
        found = low_rank.reduced(b_OR, a_RI, self.how.rank, self.how.error)
        return low_rank.Factors(found.b_OR, found.a_RI, low_rank.reduced(meant_b, meant_a).total, off.total)

    def _bias(self, name: str, pairs_M: Sequence[Pair | None]) -> torch.Tensor | None:
        """What adapters with `lora_bias` add to a bias."""
        some = next((pair.bias for pair in pairs_M if pair is not None and pair.bias is not None), None)
        if some is None:
            return None
        zeros = torch.zeros_like(some, dtype=self.compute)
        given = [zeros.clone() if p is None or p.bias is None else p.bias.to(self.compute) * p.scaling for p in pairs_M]
        return self._merged(name, given, zeros)


def _stored(pair: Pair, dtype: torch.dtype, adds_to_biases: bool) -> Pair:
    """As it is written; where one module adds to its bias, peft has all do so."""
    bias = pair.bias
    if bias is None and adds_to_biases and not pair.embedding:
        bias = torch.zeros(pair.shape[0])
    return Pair(pair.a.to(dtype), pair.b.to(dtype), 1.0, pair.embedding, bias.to(dtype) if bias is not None else None)


def _modules(adapters: Sequence[Adapter]) -> list[str]:
    """All that any adapter changes, in order. Refused: another shape, or held in full by another adapter."""
    found: dict[str, tuple[str, Pair]] = {}
    for adapter in adapters:
        for module, pair in adapter.pairs.items():
            label, first = found.setdefault(module, (adapter.label, pair))
            if (pair.shape, pair.embedding) != (first.shape, first.embedding):
                raise RecipeError(
                    f"{module} is {list(first.shape)} in '{label}' and {list(pair.shape)} in '{adapter.label}'",
                    "merge adapters of one base",
                )
    adds = next((a.label for a in adapters for p in a.pairs.values() if p.bias is not None), None)
    embeddings = [module for module, (_, pair) in found.items() if pair.embedding]
    if adds and embeddings:
        raise RecipeError(
            f"'{adds}' adds to biases (lora_bias), and {embeddings[0]} is an embedding: peft has no adapter of both",
            "merge them as full models: --fold",
        )
    for adapter in adapters:
        both = sorted(m for m in found if m not in adapter.pairs and f"{m}.weight" in adapter.full)
        if both:
            raise RecipeError(
                f"{both[0]} is adapted by '{found[both[0]][0]}' and held in full by '{adapter.label}'",
                "merge them as full models: --fold",
            )
    return list(found)


def _bytes(adapters: Sequence[Adapter], module: str) -> int:
    return sum(4 * (a.pairs[module].a.numel() + a.pairs[module].b.numel()) for a in adapters if module in a.pairs)


# --- tensors that adapters hold in full ------------------------------------------------------------------------------


def _in_full(
    method: MergeMethod, name: str, adapters: Sequence[Adapter], how: How, base: str | None, compute: torch.dtype
) -> Tensors:
    """Heads, biases and the like. An adapter that lacks one leaves the base's as it is."""
    names = list(dict.fromkeys(n for adapter in adapters for n in adapter.full))
    lacking = [n for n in names if any(n not in adapter.full for adapter in adapters)]
    wanted = names if method.needs_base and how.in_full == "method" else lacking if how.in_full != "first" else []
    values = _base_values(adapters[0], base, wanted) if wanted else {}
    merged = {}
    for n in names:
        held = [adapter.full[n] for adapter in adapters if n in adapter.full]
        if any(tensor.shape != held[0].shape for tensor in held):
            raise RecipeError(
                f"{n} has the shapes {sorted({tuple(t.shape) for t in held})} in the adapters",
                "merge adapters with the same labels and vocabulary",
            )
        if how.in_full == "first" or not held[0].is_floating_point():
            merged[n] = held[0].clone()
            continue
        of_base = values.get(n)
        if n in wanted and (of_base is None or of_base.shape != held[0].shape):
            who = f"{name} asks what it was before" if n not in lacking else "not all adapters hold it"
            raise RecipeError(
                f"{n} is held in full by adapters, {who}, and the base has no such tensor",
                "name a base that has it (--base), or say --in-full mean, or --in-full first",
            )
        given = [a.full[n].to(compute) if n in a.full else _known(of_base).to(compute) for a in adapters]
        before = _known(of_base).to(compute) if method.needs_base and how.in_full == "method" else None
        found = (
            method.tensor(n, given, before, None)
            if how.in_full == "method"
            else weighted_mean(given, [1.0] * len(given))
        )
        merged[n] = found.to(held[0].dtype)
    return merged


def _known(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor


def _base_values(adapter: Adapter, base: str | None, names: Sequence[str]) -> Tensors:
    """The base's tensors of these names; those that it has."""
    return folding.base_tensors(adapter, folding.base_of(adapter, base), names)


def _bases(adapters: Sequence[Adapter]) -> Tensors:
    """Copies of the base's weights that stand beside adapters of embeddings: they have to be the same."""
    found: Tensors = {}
    for adapter in adapters:
        for name, tensor in adapter.bases.items():
            if not torch.equal(found.setdefault(name, tensor), tensor):
                raise RecipeError(
                    f"'{adapters[0].label}' and '{adapter.label}' stand on different {name}",
                    "merge adapters of one base, and of one vocabulary",
                )
    return found


# --- what goes together ----------------------------------------------------------------------------------------------


def _refuse(adapter: Adapter) -> None:
    if any(pair.magnitude is not None for pair in adapter.pairs.values()):
        raise RecipeError(
            f"adapter '{adapter.label}' is DoRA: it scales the base's weights, which no sum of adapters does",
            "merge full models instead: --fold",
        )
    if not adapter.pairs:
        raise IntegrityError(f"adapter '{adapter.label}' adapts nothing", "fetch or make it again")


def _refuse_strangers(adapters: Sequence[Adapter], base: str | None) -> None:
    first = adapters[0]
    for other in adapters[1:]:
        if base is None and _resolved(first.base) != _resolved(other.base):
            raise RecipeError(
                f"'{first.label}' adapts {first.base}, and '{other.label}' {other.base}",
                "merge adapters of one base; if it is one, say which: --base DIR_OR_HUB_ID",
            )
        one, two = (recorded(a.folder).get("labels") for a in (first, other))
        if one and two and one != two:
            raise RecipeError(
                f"'{first.label}' and '{other.label}' differ in their labels", "merge adapters with the same labels"
            )


def _resolved(base: str | None) -> str | None:
    return str(Path(base).resolve()) if base and Path(base).exists() else base


def _config(adapters: Sequence[Adapter], full: Tensors, base: str | None) -> dict[str, Any]:
    first = adapters[0].config
    kept = ("task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version")
    saved = list(dict.fromkeys(m for a in adapters for m in a.config.get("modules_to_save") or []))
    for name in full:
        module, _, last = name.rpartition(".")
        if last != "bias" and not any(f".{module}.".find(f".{entry}.") >= 0 for entry in saved):
            saved.append(module)
    biases = [a.config.get("bias", "none") for a in adapters]
    return {
        **{key: first[key] for key in kept if first.get(key)},
        **({"base_model_name_or_path": base} if base else {}),
        "modules_to_save": saved or None,
        "bias": next((word for word in ("all", "lora_only") if word in biases), "none"),
        "fan_in_fan_out": any(a.config.get("fan_in_fan_out") for a in adapters),
    }
