"""Draw several training times: pairs (t, s), shortcut's (t, delta), and IMM's triples (t, r, s).

If only a share of the rows is `distinct`, those rows come first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.paths import LINEAR, Path
from fastdistill.times.laws import TimeSampler, Uniform, draw, level_of_time, time_of_level


def pair_times(
    batch: int,
    sampler: TimeSampler,
    distinct: float,
    *,
    end_sampler: TimeSampler | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw (t, s), each (batch,) float32: t the larger and s the smaller of two independent draws.

    The first `distinct_rows(batch, distinct)` rows keep s; the others get s = t, where the average velocity is the
    instantaneous one. Those rows keep the larger draw as their t, so that t has one law on all rows. (Two draws that
    round to the same float32 leave a distinct row with s = t; the objectives are right there too.)

    Args:
        sampler: law of both draws, or of the first one when `end_sampler` is given.
        distinct: the share of rows with s != t, in [0, 1]. MeanFlow's text calls this the ratio of r != t.
        end_sampler: law of the second draw, e.g. `LogitNormal(-4, 1.6)` to see more pairs that end near the data.

    Source: Geng et al. 2025 (MeanFlow), arXiv:2505.13447, section 4.3 "Sampling time steps (r, t)".
    """
    count = distinct_rows(batch, distinct)
    first = sampler(batch, generator, device)
    second = (end_sampler or sampler)(batch, generator, device)
    t = torch.maximum(first, second)
    return t, torch.cat((torch.minimum(first, second)[:count], t[count:]))


def triangle_times(
    batch: int,
    distinct: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw (t, s), each (batch,) float32: uniform on the triangle 0 <= s <= t <= 1, then uniform on its diagonal.

    Args:
        distinct: the share of rows off the diagonal; those come first.

    Source: Boffi et al. 2025, arXiv:2505.18825, section 3 (temporal sampling; 25 % off the diagonal).
    """
    count = distinct_rows(batch, distinct)
    first, second = (draw(torch.rand, batch, generator, device) for _ in range(2))
    t = torch.cat((torch.maximum(first, second)[:count], first[count:]))
    return t, torch.cat((torch.minimum(first, second)[:count], first[count:]))


def gap_times(
    batch: int,
    gap: TimeSampler,
    distinct: float = 1.0,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw (t, s), each (batch,) float32, by their distance: d from `gap`, s uniform on [0, 1 - d), t = s + d.

    Args:
        gap: law of the distance, e.g. `LogitNormal(-0.8, 1.0)`.
        distinct: the share of rows with s < t; they come first, and the others get s = t.

    Source: Sabour et al. 2025 (AYF), arXiv:2506.14603, algorithm 1. TVM (arXiv:2511.19797, section 7.3) draws the gap
    alike, but s from a logit-normal law cut off at 1 - d.
    """
    count = distinct_rows(batch, distinct)
    d = gap(batch, generator, device)
    s = draw(torch.rand, batch, generator, device) * (1 - d)
    t = (s + d).clamp(max=1)
    return t, torch.cat((s[:count], t[count:]))


def dyadic_times(
    batch: int,
    distinct: float = 0.125,
    *,
    finest: int = 128,
    sampler: TimeSampler | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw shortcut's (t, delta), each (batch,) float32: two steps of delta lead from t to t - 2 delta >= 0.

    2 delta is 1, 1/2, ... 2 / finest with equal probability, and t a multiple of it. The other rows have delta = 0.

    Args:
        distinct: the share of rows with delta > 0; those come first.
        finest: the number of steps of the finest grid, a power of 2.
        sampler: law of t of the other rows; None is `Uniform()`.

    Source: Frans et al. 2025 (shortcut models), arXiv:2410.12557; 1/8 and 128 as in its code.
    """
    if finest < 2 or finest & (finest - 1):
        raise ValueError(f"finest: expected a power of 2, at least 2, got {finest}")
    count = distinct_rows(batch, distinct)
    t = (sampler or Uniform())(batch, generator, device)
    level = (draw(torch.rand, batch, generator, device) * math.log2(finest)).floor()
    step = 2.0**-level
    slot = (draw(torch.rand, batch, generator, device) / step).floor() + 1
    chosen = torch.arange(batch, device=t.device) < count
    return torch.where(chosen, slot * step, t), torch.where(chosen, 0.5 * step, 0.0)


def imm_times(
    batch: int,
    group: int = 4,
    *,
    path: Path = LINEAR,
    k: float = 12,
    low: float = 0.0,
    high: float = 0.994,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw IMM's (t, r, s), each (batch,) float32, with s <= r <= t and t > 0.

    Here t is uniform on [low, high], and s uniform on [low, t].

    r is `imm_middle(t, s)`. The rows of a group share their times, since they are compared as a sample of one law.

    Args:
        group: M, the rows of a group; it divides the batch.
        k, low, high: see `imm_middle`.

    Source: Zhou et al. 2025 (IMM), arXiv:2503.07565, section 4.2.
    """
    if group < 1 or batch % group:
        raise ValueError(f"group: expected a divisor of the batch, {batch}, got {group}")
    first, second = (draw(torch.rand, batch // group, generator, device) for _ in range(2))
    # One torch.rand in 2^24 is 0, a time without noise, which `imm` refuses. So t is at least half of the least step
    # there.
    t = (low + (high - low) * first).clamp_min(2.0**-25).clamp(max=high)
    s = torch.minimum(low + (t - low) * second, t)
    r = imm_middle(t, s, path=path, k=k, low=low, high=high)
    return t.repeat_interleave(group), r.repeat_interleave(group), s.repeat_interleave(group)


def imm_middle(
    t: Tensor, s: Tensor, *, path: Path = LINEAR, k: float = 12, low: float = 0.0, high: float = 0.994
) -> Tensor:
    """Return IMM's r(s, t) = max(s, level^-1(level(t) - (level(high) - level(low)) / 2^k)) with level = beta / alpha.

    Args:
        t, s: alike in shape, float32, low <= s <= t <= high.
        k: the larger, the nearer r is to t, and the smaller the bias and the larger the variance.
        low, high: the range of the times; below 1 where alpha(1) = 0, so that the noise level is finite.

    Source: Zhou et al. 2025 (IMM), arXiv:2503.07565, section 4.2 "Mapping function", by a constant decrement in eta.
    """
    ends = level_of_time(path, torch.tensor([low, high]))
    if not (0 <= low < high <= 1) or not bool(ends.isfinite().all()) or ends[1] > 1e9:
        raise ValueError(f"low, high: expected 0 <= low < high with a finite noise level, got {low}, {high}")
    if not (math.isfinite(k) and k >= 0):
        raise ValueError(f"k: expected a finite number >= 0, got {k}")
    step = ((ends[1] - ends[0]) / 2**k).item()
    r = time_of_level(path, (level_of_time(path, t) - step).clamp_min(0))
    return torch.maximum(s, torch.minimum(r.to(t.dtype), t))


def distinct_rows(batch: int, distinct: float) -> int:
    """Return the number of leading rows of `pair_times` with s != t: `round(distinct * batch)`, half to even."""
    if not 0 <= distinct <= 1:
        raise ValueError(f"distinct: expected a share in [0, 1], got {distinct}")
    return round(distinct * batch)
