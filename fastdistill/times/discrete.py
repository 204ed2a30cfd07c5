"""Draw the times of discrete consistency training: pairs (t, r) of a time and the next one towards the data.

They live on a path's own time: on `EDM` an even grid is Karras et al.'s grid of noise levels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.paths import EDM, Path
from fastdistill.times.laws import LogNormalLevel, check_normal, draw, level_of_time, time_of_level


def neighbour_times(
    batch: int,
    points: int,
    *,
    path: Path | None = None,
    log_normal: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw neighbours r < t of the grid 0, 1/(points - 1), ... 1, each (batch,) float32.

    Args:
        points: N of the paper, the number of times on the grid. CD: 18 fixed; CT: `ct_points`; iCT: `ict_points`.
        path: the path whose noise levels `log_normal` weighs; None is `EDM()`.
        log_normal: None draws an interval evenly. (mean, std) gives each the mass between its noise levels of a
            log-normal law, as iCT does with (-1.1, 2.0).

    Source: Song et al. 2023, arXiv:2303.01469, section 4 and algorithms 2 and 3; Song and Dhariwal 2024 (iCT),
    arXiv:2310.14189, its noise schedule.
    """
    if points < 2:
        raise ValueError(f"points: expected at least 2, got {points}")
    uniform = draw(torch.rand, batch, generator, device)
    if log_normal is None:
        index = (uniform * (points - 1)).floor().clamp(max=points - 2)
    else:
        mean, std = log_normal
        check_normal(mean, std)
        levels = level_of_time(path or EDM(), torch.linspace(0, 1, points, dtype=torch.float64))
        share = torch.special.ndtr((levels.log() - mean) / std).diff().cumsum(0)
        if not share[-1] > 0:
            raise ValueError(f"log_normal: expected a law with mass on the path's noise levels, got {log_normal}")
        edges = (share / share[-1]).to(uniform)
        index = torch.searchsorted(edges, uniform, right=True).clamp(max=points - 2).to(uniform)
    return (index + 1) / (points - 1), index / (points - 1)


def ct_points(step: int, total: int, *, start: int = 2, end: int = 150) -> int:
    """Return CT's number of grid points after `step` of `total` steps, which grows as a square root up to `end` + 1.

    Source: Song et al. 2023, arXiv:2303.01469, appendix C.
    """
    _check_progress(step, total, start, end)
    return math.ceil(math.sqrt(step / total * ((end + 1) ** 2 - start**2) + start**2) - 1) + 1


def ict_points(step: int, total: int, *, start: int = 10, end: int = 1280) -> int:
    """Return iCT's number of grid points after `step` of `total` steps: `start` intervals, doubled until `end`, plus 1.

    Source: Song and Dhariwal 2024 (iCT), arXiv:2310.14189, its discretization curriculum.
    """
    _check_progress(step, total, start, end)
    each = max(total // (int(math.log2(end // start)) + 1), 1)
    return int(min(start * 2 ** (step // each), end)) + 1


def ect_times(
    batch: int,
    stage: int,
    *,
    q: float = 2.0,
    law: LogNormalLevel | None = None,
    low: float = 0.01,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw ECT's (t, r), each (batch,) float32, r < t: a noise level sigma from `law`, and `ect_level(sigma)`.

    Args:
        stage, q: see `ect_level`.
        law: law of the noise level, with its path; None is log-normal (-1.1, 2) on `EDM()`.
        low: earlier times t are raised to it, because a path that starts at some noise has no r < t at its very start.

    Source: Geng et al. 2025 (ECT), arXiv:2406.14548, section 3.
    """
    if not 0 < low < 1:
        raise ValueError(f"low: expected a time in (0, 1), got {low}")
    law = law or LogNormalLevel(EDM())
    t = law(batch, generator, device).clamp_min(low)
    r = time_of_level(law.path, ect_level(level_of_time(law.path, t), stage, q=q))
    return t, torch.minimum(r, t)


def ect_level(sigma: Tensor, stage: int, *, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Tensor:
    """Return ECT's next noise level, sigma (1 - n(sigma) / q^(stage + 1)), at least 0, n = 1 + k sigmoid(-b sigma).

    At stage 0 most pairs reach down to 0, which is diffusion training; each stage divides the relative gap by q.
    sigma may have any shape, and the result has its dtype.

    Source: Geng et al. 2025 (ECT), arXiv:2406.14548, its mapping function by sigmoid, with the constants of its code.
    """
    if stage < 0:
        raise ValueError(f"stage: expected >= 0, got {stage}")
    if not (math.isfinite(q) and q > 1):
        raise ValueError(f"q: expected a finite number > 1, got {q}")
    return (sigma * (1 - (1 + k * torch.sigmoid(-b * sigma)) / q ** (stage + 1))).clamp_min(0)


def ect_stage(step: int, total: int, stages: int = 8) -> int:
    """Return the stage of ECT's curriculum at `step` of `total` steps, in 0 ... stages - 1, all equally long."""
    if stages < 1 or total < 1 or not 0 <= step <= total:
        raise ValueError(f"step, total, stages: expected 0 <= step <= total, got {step}, {total}, {stages}")
    return min(step * stages // total, stages - 1)


def _check_progress(step: int, total: int, start: int, end: int) -> None:
    if total < 1 or not 0 <= step <= total:
        raise ValueError(f"step: expected a number in [0, {total}], got {step}")
    if not 1 <= start <= end:
        raise ValueError(f"start, end: expected 1 <= start <= end, got {start}, {end}")
