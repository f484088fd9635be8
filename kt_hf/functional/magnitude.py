"""The k largest magnitudes of a tensor, found by counting bit patterns instead of sorting.

Shapes: R rows of N elements. A float32's bits without the sign, read as an integer, order as its magnitude does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

PART = 1 << 17
"""Elements at once: what is computed about them stays in the cache."""


class Threshold(NamedTuple):
    """magnitude: the k-th largest. above: how many are larger. equal: how many are as large."""

    magnitude: float
    above: int
    equal: int


def magnitude_threshold(values: torch.Tensor, k: int, origin: torch.Tensor | None = None) -> Threshold:
    """The k-th largest of |values|, or of |values - origin|, exactly, for 1 <= k <= N."""
    return magnitude_thresholds(values, [k], origin)[0]


def magnitude_thresholds(
    values: torch.Tensor, ks: Sequence[int], origin: torch.Tensor | None = None
) -> list[Threshold]:
    """`magnitude_threshold` for several k at once.

    Counts the upper 16 bits of all, then the lower 16 of those in the bin where the k-th is. What is between `values`
    and `origin` is made part by part, in the precision of `origin`, so that it need not be held. Values in float64 go
    the slow way, by `kthvalue`.
    """
    dtype = values.dtype if origin is None else origin.dtype
    assert all(1 <= k <= values.numel() for k in ks)
    if dtype != torch.float32:
        sizes = (values if origin is None else values.to(dtype) - origin).abs().reshape(-1)
        kth = [sizes.kthvalue(len(sizes) - k + 1).values for k in ks]
        return [Threshold(size.item(), int((sizes > size).sum()), int((sizes == size).sum())) for size in kth]
    parts = values.reshape(-1).split(PART)
    origins = [None] * len(parts) if origin is None else origin.reshape(-1).split(PART)

    def patterns() -> Iterator[torch.Tensor]:
        room = torch.empty(2, min(PART, values.numel()))
        for part, start in zip(parts, origins, strict=True):
            found = part if start is None else torch.sub(part.to(dtype), start, out=room[0, : len(part)])
            bits = room[1, : len(part)].view(torch.int32)
            yield torch.bitwise_and(found.view(torch.int32), 0x7FFFFFFF, out=bits)

    counts = torch.zeros(1 << 15, dtype=torch.int64)
    for bits in patterns():
        counts += torch.bincount(bits >> 16, minlength=1 << 15)
    places = [_from_the_top(counts, k) for k in ks]
    inside: dict[int, list[np.ndarray]] = {upper: [] for upper, _ in places}
    for bits in patterns():
        whole, top = bits.numpy(), (bits >> 16).numpy()
        for upper, found in inside.items():
            found.append(whole[top == upper] & 0xFFFF)  # numpy's is four times as fast
    lows = {
        upper: torch.from_numpy(np.bincount(np.concatenate(found), minlength=1 << 16))
        for upper, found in inside.items()
    }
    thresholds = []
    for k, (upper, above) in zip(ks, places, strict=True):
        lower, more = _from_the_top(lows[upper], k - above)
        pattern = torch.tensor(upper << 16 | lower, dtype=torch.int32)
        thresholds.append(Threshold(pattern.view(torch.float32).item(), above + more, int(lows[upper][lower])))
    return thresholds


def _from_the_top(counts: torch.Tensor, k: int) -> tuple[int, int]:
    """(bin of the k-th from the top, how many are in the bins above it)."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, k))
    return len(counts) - 1 - place, int(from_top[place - 1]) if place else 0


class Keep:
    """Sets to 0 what is not among the k largest magnitudes; of equal ones the first stay. Called with the parts of the
    values in their order."""

    def __init__(
        self, values: torch.Tensor, k: int, origin: torch.Tensor | None = None, threshold: Threshold | None = None
    ):
        """threshold: where it is known."""
        self.num_equal: int | None = None
        """How many as large as the threshold may still come; None: all of them."""
        if k <= 0:
            self.magnitude, self.below = float("inf"), float("inf")
        elif k >= values.numel():
            self.magnitude, self.below = 0.0, 0.0
        else:
            self.magnitude, above, equal = threshold or magnitude_threshold(values, k, origin)
            dtype = values.dtype if origin is None else origin.dtype
            as_values = np.float32 if dtype == torch.float32 else np.float64
            self.below = float(np.nextafter(as_values(self.magnitude), as_values(0)))
            if above + equal > k and self.magnitude > 0:
                self.num_equal = k - above

    def __call__(self, part: torch.Tensor) -> torch.Tensor:
        if self.magnitude == 0:
            return part
        if self.num_equal == 0:
            return torch.nn.functional.hardshrink(part, self.magnitude)
        kept = torch.nn.functional.hardshrink(part, self.below)
        if self.num_equal is not None:
            equal = kept.abs() == self.magnitude
            count = int(equal.sum())
            if count > self.num_equal:
                kept[equal.nonzero()[self.num_equal :, 0]] = 0.0
            self.num_equal = max(self.num_equal - count, 0)
        return kept


class KeepBetween:
    """Sets to 0 what is among the `top` largest magnitudes, and all but the k next ones. Called as `Keep`."""

    def __init__(self, values: torch.Tensor, top: int, k: int, origin: torch.Tensor | None = None):
        inner = [n for n in (top, top + k) if 0 < n < values.numel()]
        found = dict(zip(inner, magnitude_thresholds(values, inner, origin), strict=True)) if inner else {}
        self.all, self.top = (Keep(values, n, origin, found.get(n)) for n in (top + k, top))

    def __call__(self, part: torch.Tensor) -> torch.Tensor:
        return self.all(part) - self.top(part)


def num_kept(density: float, numel: int) -> int:
    """How many of `numel` a density keeps: rounded down as in peft and mergekit, but one at least where it is not 0."""
    return max(int(density * numel), 1) if density > 0 and numel else 0


def ranks_of_rows(values_RN: torch.Tensor, scale: float = 1.0, offset: float = 0.0) -> torch.Tensor:
    """Within each row the ranks of the magnitudes in float32, from 1/2 for the largest to N - 1/2, times `scale` plus
    `offset`. Shape RN.

    Exact in rows of less than 1,024 elements; of equal ones the first comes first. In longer rows by counting: those
    whose magnitudes share the exponent and 5 bits of the mantissa (they differ by less than one part in 32), and those
    below about 2^-16 of the largest, share the mean of their ranks.
    """
    count = values_RN.shape[1]
    bits_RN = values_RN.float().contiguous().view(torch.int32) & 0x7FFFFFFF
    if count < COUNTED:
        ranks_N = (torch.arange(count) + 0.5).mul_(scale).add_(offset)
        return torch.empty(values_RN.shape).scatter_(1, _order_of_rows(bits_RN), ranks_N.expand(values_RN.shape))
    bins_RN = bits_RN >> 18
    lowest_R1 = bins_RN.amax(1, keepdim=True) - (BINS - 1)
    starts_R1 = torch.arange(0, len(values_RN) * BINS, BINS, dtype=torch.int32)[:, None]
    places_RN = (bins_RN - lowest_R1).clamp_(min=0).add_(starts_R1)
    counts_RT = torch.bincount(places_RN.view(-1), minlength=len(values_RN) * BINS).view(-1, BINS).float()
    means_RT = counts_RT.div(2).sub_(counts_RT.cumsum(1)).add_(count).mul_(scale).add_(offset)
    return means_RT.view(-1).index_select(0, places_RN.view(-1)).view(values_RN.shape)


COUNTED, BINS = 1024, 512
"""Length from which rows are ranked by counting, and into how many bins."""


def _order_of_rows(bits_RN: torch.Tensor) -> torch.Tensor:
    """Within each row the places, from the largest pattern on; of equal ones the first comes first. int64.

    Sorts by the lower, then by the upper 16 bits, for a stable sort of 16-bit numbers takes linear time.
    """
    bits_RN = 0x7FFFFFFF - bits_RN
    lower_RN, upper_RN = (bits_RN & 0xFFFF).numpy().astype(np.uint16), (bits_RN >> 16).to(torch.int16)
    order_RN = torch.from_numpy(np.argsort(lower_RN, axis=-1, kind="stable"))
    then_RN = np.argsort(upper_RN.gather(1, order_RN).numpy(), axis=-1, kind="stable")
    return order_RN.gather(1, torch.from_numpy(then_RN))
