"""Whether parents are kin: how far each is from the base, or from the others, and whether they went the same way, by
layers. From samples of the matrices, so that it costs little of a merge's time; norms are estimates.

Shapes: M parents, and the base as the last of K models where there is one.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

logger = logging.getLogger(__name__)

PIECES, PIECE = 16, 4096
"""What is read of a matrix: so many pieces of so many elements, evenly apart."""
STRANGERS = 0.5
"""Cosine of two models' weights below which they hardly come from one: that of models which were trained from different
random weights is near 0, and fine-tuning one leaves it near 1."""

_BLOCK = re.compile(r"^(.*?\.\d+)\.")


@dataclass
class Kinship:
    """names: of the parents. products: layer -> dot products KK of the models' samples. with_base: whether the last
    model is the base."""

    names: Sequence[str]
    products: Mapping[str, torch.Tensor]
    with_base: bool

    def rows(self) -> list[dict[str, Any]]:
        """One for each layer: `layer`; `distance`, per parent, from the base or from the parents' mean, as a share of
        its norm; `cosine`, of the task vectors of two parents or, without a base, of their weights: the mean over
        pairs, None for one parent."""
        found = []
        for layer, products_KK in self.products.items():
            steps_MM, norm = self._steps(products_KK)
            lengths_M = steps_MM.diagonal().clamp(min=0).sqrt()
            cosine = _mean_cosine(steps_MM if self.with_base else products_KK)
            found.append({"layer": layer, "distance": [_ratio(x, norm) for x in lengths_M.tolist()], "cosine": cosine})
        return found

    def _steps(self, products_KK: torch.Tensor) -> tuple[torch.Tensor, float]:
        """(dot products MM of parent less reference, norm of the reference)."""
        count = len(self.names)
        origin_K = torch.zeros(len(products_KK), dtype=torch.float64)
        if self.with_base:
            origin_K[-1] = 1
        else:
            origin_K[:count] = 1 / count
        change_MK = torch.eye(len(products_KK), dtype=torch.float64)[:count] - origin_K
        return change_MK @ products_KK @ change_MK.T, math.sqrt(max(0.0, float(origin_K @ products_KK @ origin_K)))

    def strangers(self) -> list[str]:
        """A line for each two models that hardly come from one."""
        total_KK = torch.stack(list(self.products.values())).sum(0)
        names = [*self.names, *(["the base"] if self.with_base else [])]
        found = []
        for i in range(len(names)):
            for j in range(i + 1, len(names)):
                cosine = _cosine(total_KK, i, j)
                if cosine is not None and cosine < STRANGERS:
                    found.append(f"'{names[i]}' and '{names[j]}' (cosine {cosine:.2f})")
        return found

    def warn(self) -> None:
        if found := self.strangers():
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            logger.warning(
                "these do not seem to come from one model, and weights that do not, seldom merge: %s%s",
                ", ".join(found[:3]),
                more,
            )

    def summary(self) -> str:
        """In a line: ranges over the layers."""
        rows = self.rows()
        far = [x for row in rows for x in row["distance"] if x is not None]
        cosines = [row["cosine"] for row in rows if row["cosine"] is not None]
        said = [f"{_span(far, percent=True)} from {'the base' if self.with_base else 'their mean'}"] if far else []
        if cosines:
            said.append(f"cosine of their {'task vectors' if self.with_base else 'weights'} {_span(cosines)}")
        return "; ".join(said) or "no matrices to compare"

    def table(self) -> str:
        """For a terminal: a line per layer."""
        rows = self.rows()
        width = max([5, *(len(row["layer"]) for row in rows)])
        head = "distance of each parent, % of the base" if self.with_base else "distance of each from their mean, %"
        lines = [f"{'layer':<{width}}  {'cosine':>6}  {head}"]
        for row in rows:
            cosine = "-" if row["cosine"] is None else f"{row['cosine']:.2f}"
            far = "  ".join("-" if x is None else f"{100 * x:.3g}" for x in row["distance"])
            lines.append(f"{row['layer']:<{width}}  {cosine:>6}  {far}")
        return "\n".join(lines)


def measure(
    names: Sequence[str], models: Sequence[Mapping[str, torch.Tensor]], base: Mapping[str, torch.Tensor] | None
) -> Kinship:
    """Compare the matrices that all models have in one shape."""
    every = [*models, *([base] if base is not None else [])]
    products: dict[str, torch.Tensor] = {}
    for name, first in every[0].items():
        if first.dim() < 2 or not first.is_floating_point() or not first.numel():
            continue
        if not all(name in model and model[name].shape == first.shape for model in every):
            continue
        samples_KS = torch.stack([_sample(model[name]) for model in every])
        key = layer(name)
        products[key] = products.get(key, torch.zeros(len(every), len(every), dtype=torch.float64)) + (
            samples_KS @ samples_KS.T
        ) * (first.numel() / samples_KS.shape[1])
    return Kinship(names, products, base is not None)


def layer(name: str) -> str:
    """The block that a tensor belongs to, by its name: `bert.encoder.layer.3`; of others what stands before their own
    name."""
    found = _BLOCK.match(name)
    return found.group(1) if found else name.rsplit(".", 2)[0]


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    if flat.numel() <= PIECES * PIECE:
        return flat.double()
    starts = [i * (flat.numel() - PIECE) // (PIECES - 1) for i in range(PIECES)]
    return torch.cat([flat[start : start + PIECE] for start in starts]).double()


def _cosine(products_KK: torch.Tensor, i: int, j: int) -> float | None:
    norm = math.sqrt(max(0.0, float(products_KK[i, i] * products_KK[j, j])))
    return float(products_KK[i, j]) / norm if norm else None


def _mean_cosine(products_MM: torch.Tensor) -> float | None:
    count = len(products_MM)
    found = [_cosine(products_MM, i, j) for i in range(count) for j in range(i + 1, count)]
    known = [x for x in found if x is not None]
    return sum(known) / len(known) if known else None


def _ratio(length: float, norm: float) -> float | None:
    return length / norm if norm else None


def _span(values: Sequence[float], percent: bool = False) -> str:
    low, high = min(values), max(values)
    return f"{100 * low:.3g} to {100 * high:.3g} %" if percent else f"{low:.2f} to {high:.2f}"
