"""Inductive moment matching: jumps from t and from r < t to the same s must end in the same law."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from fastdistill.objectives.checks import check_batch
from fastdistill.objectives.identities import flow_map
from fastdistill.objectives.objective import Objective
from fastdistill.objectives.settings import Context, MethodSettings, Run
from fastdistill.paths import LINEAR, Path, expand_time
from fastdistill.samplers import Learnt, Net, Steps
from fastdistill.settings import Bounds, ConfigError, settings
from fastdistill.times import imm_times

Statistic = Literal["v", "u"]


def imm(
    net: Net,
    x0: Tensor,
    x1: Tensor,
    t: Tensor,
    r: Tensor,
    s: Tensor,
    *,
    y: Tensor | None = None,
    path: Path = LINEAR,
    target: Net | None = None,
    group: int = 4,
    statistic: Statistic = "v",
    sharpness: float | Callable[[Tensor, Tensor], Tensor] | None = None,
    a: float = 2.0,
    b: float = 4.0,
) -> tuple[Tensor, dict[str, Any]]:
    """Return the loss E w(t) MMD^2(f(x_t, t, s), [f(x_r, r, s)]) over groups of rows, and its metrics.

    The bracket has no gradient. x_r = alpha_r x0 + (beta_r / beta_t) (x_t - alpha_t x0), DDIM's step with the true
    data, so that x_t and x_r share their noise. A group is a sample of each law, and MMD^2 is that of `mmd2`.

    Args:
        net: called as net(x, t=t, s=s, y=y).
        x0, x1: data and noise, (B, ...), alike in shape.
        t, r, s: (B,) with 0 <= s <= r <= t, t > 0, equal within each group of consecutive rows, as
            `fastdistill.times.imm_times` draws them.
        y: (B,) int64 labels, or None; a group compares whatever mixture of labels it holds. With some dropped, samples
            can be guided: see `fastdistill.samplers.guided_map`.
        target: the network of the bracket; None is `net`.
        group: M, the rows of a group; it divides B.
        statistic: see `mmd2`.
        sharpness: the factor of the kernel's exponent: a number, or a function of (t, s) elementwise; None is
            1 / (t - s), the inverse of how much of u the flow map takes.
        a, b: of the weight, see `imm_weight`.

    Returns:
        The scalar loss, averaged over groups, and detached scalars: `loss`, `raw_error` (mean MMD^2, unweighted; of
        either sign for "u").

    Raises:
        ValueError: an argument whose shape doesn't fit, a path that adds noise to coupled pairs, or, on the CPU,
            times out of order or unequal in a group.

    Source: Zhou et al. 2025 (IMM), arXiv:2503.07565, equations 8 and 12 and algorithm 1.
    """
    check_batch(x0, x1, t, s, y)
    if path.stochastic and path.coupling != "independent":
        raise ValueError(f"path: expected sigma = 0 with coupled pairs, got {path}, on which noise can't be shared")
    _check_groups(t, r, s, group)
    x_t = path.interpolate(x0, x1, t)
    x_r = _ddim(path, x_t, x0, t, r)
    ends = flow_map(net, x_t, t, s, y)
    with torch.no_grad():
        goals = flow_map(target or net, x_r, r, s, y)
    if sharpness is None:
        scale = 1 / (t - s).clamp_min(1e-6)
    else:
        scale = sharpness(t, s) if callable(sharpness) else torch.full_like(t, sharpness)
    groups = (len(t) // group, group, -1)
    error = mmd2(ends.reshape(groups), goals.reshape(groups), scale[::group], statistic)
    loss = (imm_weight(path, t[::group], a, b) * error).mean()
    rows = {"t": t.detach(), "s": s.detach(), "raw_error": error.detach().repeat_interleave(group)}
    return loss, {"loss": loss.detach(), "raw_error": error.detach().mean(), "rows": rows}


def mmd2(p: Tensor, q: Tensor, sharpness: Tensor, statistic: Statistic = "v", eps: float = 1e-8) -> Tensor:
    """Return the squared maximum mean discrepancy of samples p, q (G, M, D), a group each: (G,).

    The mean over pairs of k(p, p') + k(q, q') - 2 k(p, q'), with Laplace's kernel
    k(a, b) = exp(-sharpness max(||a - b||, eps) / D), sharpness (G,).

    Args:
        statistic: "v" averages over all M^2 pairs, and is at least 0 but biased upwards; "u" leaves out the pairs of a
            row with its own (and with its partner, p_j with q_j), is unbiased, of either sign, and needs M > 1.

    Source: Gretton et al. 2012, "A kernel two-sample test", lemma 6 (U) and its biased statistic (V).
    """
    if statistic not in ("v", "u"):
        raise ValueError(f"statistic: expected 'v' or 'u', got {statistic!r}")
    group = p.shape[1]
    if statistic == "u" and group < 2:
        raise ValueError(f"group: expected at least 2 rows for the statistic 'u', got {group}")

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squares = (a[:, :, None] - b[:, None]).square().sum(3)
        distances = squares.clamp_min(eps**2).sqrt()  # clamped before the root, whose slope at 0 is infinite
        return torch.exp(-sharpness[:, None, None].to(distances) * distances / p.shape[2])

    pairs = kernel(p, p) + kernel(q, q) - 2 * kernel(p, q)
    if statistic == "v":
        return pairs.mean((1, 2))
    own = pairs.diagonal(dim1=1, dim2=2).sum(1)
    return (pairs.sum((1, 2)) - own) / (group * (group - 1))


def imm_weight(path: Path, t: Tensor, a: float = 2.0, b: float = 4.0) -> Tensor:
    """Return IMM's weight (1/2) sigmoid(b - l) (-dl/dt) alpha^a / (alpha^2 + beta^2), l = log(alpha^2 / beta^2); (B,).

    Written so that it is finite for all t in [0, 1], for a >= 1.
    Source: Zhou et al. 2025 (IMM), arXiv:2503.07565, equation 13.
    """
    if not a >= 1:
        raise ValueError(f"a: expected >= 1, got {a}")
    alpha, beta = path.alpha(t), path.beta(t)
    turn = alpha * path.d_beta(t) - path.d_alpha(t) * beta
    squares = alpha.square() + beta.square()
    return beta * turn * alpha ** (a - 1) / ((beta.square() + math.exp(-b) * alpha.square()) * squares)


def _ddim(path: Path, x_t: Tensor, x0: Tensor, t: Tensor, r: Tensor) -> Tensor:
    t, r = expand_time(t, x0), expand_time(r, x0)
    return path.alpha(r) * x0 + path.beta(r) / path.beta(t) * (x_t - path.alpha(t) * x0)


def _check_groups(t: Tensor, r: Tensor, s: Tensor, group: int) -> None:
    if group < 1 or len(t) % group:
        raise ValueError(f"group: expected a divisor of the batch, {len(t)}, got {group}")
    if r.shape != t.shape:
        raise ValueError(f"r: expected shape {tuple(t.shape)}, one entry a row, got {tuple(r.shape)}")
    if not t.is_cpu:
        return
    if bool((t <= 0).any()):
        raise ValueError("t: expected times > 0, got 0")
    if not bool(((s <= r) & (r <= t)).all()):
        raise ValueError("r: expected times with s <= r <= t, got others")
    for name, value in (("t", t), ("r", r), ("s", s)):
        rows = value.reshape(-1, group)
        if not bool((rows == rows[:, :1]).all()):
            raise ValueError(f"{name}: expected equal times within each group of {group} rows, got different ones")


@settings
class IMM(MethodSettings):
    """Settings of inductive moment matching's training."""

    group: Annotated[int, Bounds(ge=1, le=4096)] = 4
    """Rows that share their times and are compared as a sample of one law; it divides data.batch."""
    statistic: Literal["v", "u"] = "v"
    """v: biased, never negative; u: unbiased."""
    a: Annotated[float, Bounds(ge=1)] = 2.0
    """Of the weight, see fastdistill.objectives.imm."""
    b: float = 4.0
    """Of the weight."""
    k: Annotated[float, Bounds(ge=0)] = 12.0
    """The second time r lies 2^-k of the range of noise levels nearer to the data."""
    low: Annotated[float, Bounds(ge=0, lt=1)] = 0.0
    """The least time."""
    high: Annotated[float, Bounds(gt=0, le=1)] = 0.994
    """The greatest time, below 1 so that the noise level is finite; samples start there, from the path's noise."""
    sharpness: Annotated[float | None, Bounds(gt=0)] = None
    """Of the kernel's exponent; None: 1 / (t - s)."""

    learns: ClassVar[tuple[Learnt, ...]] = ("map",)
    guides_maps: ClassVar[bool] = True

    def draw_times(self, context: Context) -> tuple[Tensor, ...]:
        return imm_times(
            context.rows,
            self.group,
            path=context.path,
            k=self.k,
            low=self.low,
            high=self.high,
            generator=context.generator,
            device=context.device,
        )

    def sample_times(self, steps: int) -> Steps:
        return [self.high * (1 - step / steps) for step in range(steps + 1)]

    def check(self, run: Run) -> None:
        if run.rows % self.group:
            raise ConfigError(f"method.group: expected a divisor of data.batch, {run.rows}, got {self.group}")


METHOD = Objective(
    imm,
    "moment",
    ("t", "r", "s"),
    tangent="none",
    formula="w(t) MMD²(f(x_t, t, s), [f(x_r, r, s)]), kernel exp(−w̃ max(‖·‖, ε)/D), w̃ = 1/(t−s), "
    "x_r = α_r x0 + (β_r/β_t)(x_t − α_t x0), r = max(s, η⁻¹(η(t) − (η_max − η_min)/2^k)), η = β/α",
    sources=("Zhou et al. 2025, arXiv:2503.07565, equations 8, 12 and 13, algorithm 1",),
    reduction="mean over the pairs of a group (V-statistic; U by option) of M = 4 rows; t != s in all rows",
    exponent=None,
    sampler="average_velocity",
    summary="Inductive moment matching: jumps from t and from a little nearer to the data must end in the same law.",
    place=17,
    settings=IMM,
    recipes={
        "ring": {"method": {"group": 16, "k": 8}},
        "digits": {"method": {"group": 4, "k": 7, "a": 1.0, "high": 0.99}},
    },
)
