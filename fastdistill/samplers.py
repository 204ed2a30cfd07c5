"""Samplers: from noise at t = 1 to data at t = 0, one family of free functions.

Two take a velocity and integrate it (`euler`, `heun`, and `adaptive` with the help of scipy); three take a network and
jump along its flow map (`average_velocity`, `consistency`, and `gamma`, whose extremes the other two are). `sample`
calls any of them by name.

The state x starts as unit noise on most paths, and as `path.prior(noise)` on any. `steps` is a number of equal steps
from t = 1 to 0, or the times themselves, falling. Samplers run in the caller's gradient mode (wrap them in
`torch.no_grad()` to generate). Times reach the network as (B,) tensors in float32, or float64 for a float64 state.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.paths import LINEAR, Path

Net = Callable[..., Tensor]  # net(x, t=t, s=s, y=y) -> the average velocity from t to s; s = t: the instantaneous one
Velocity = Callable[[Tensor, Tensor], Tensor]  # velocity(x, t)
Steps = int | Sequence[float]


def euler(velocity: Velocity, x: Tensor, steps: Steps) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 1 to 0 at first order; x (B, ...); one evaluation a step."""
    for t, s in intervals(steps):
        x = x - (t - s) * velocity(x, _times(x, t))
    return x


def heun(velocity: Velocity, x: Tensor, steps: Steps) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 1 to 0 at second order; x (B, ...); two evaluations a step.

    Source: Karras et al. 2022 (EDM), arXiv:2206.00364, algorithm 1, without its Euler step at the end: here the
    velocity is finite at t = 0.
    """
    for t, s in intervals(steps):
        v = velocity(x, _times(x, t))
        v_end = velocity(x - (t - s) * v, _times(x, s))
        x = x - (t - s) * 0.5 * (v + v_end)
    return x


def adaptive(
    velocity: Velocity,
    x: Tensor,
    steps: Steps = 1,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 1 to 0 in steps of the solver's choice, by scipy's `solve_ivp`.

    The whole batch is one system, whose state travels to the CPU at every evaluation: it is for references, not for
    speed.

    Args:
        x: (B, ...), float32 or float64. Nothing here has a gradient.
        steps: only its first and last time matter.
        rtol, atol: tolerances of the local error; float32 states can't use much less than 1e-6.
        method: a name that `solve_ivp` knows.

    Raises:
        ImportError: scipy isn't installed. RuntimeError: the solver gave up. ValueError: an argument is off.
    """
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x: expected float32 or float64, got {x.dtype}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x: expected no gradient, which the solver would lose, got a tensor that requires grad")
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise ImportError("adaptive: expected scipy, which isn't installed: pip install scipy") from error
    grid = intervals(steps)

    def rate(t: float, state: Any) -> Any:
        v = velocity(torch.from_numpy(state).to(x).reshape(x.shape), _times(x, t))
        return v.flatten().to("cpu", torch.float64).numpy()

    with torch.no_grad():
        start = x.flatten().to("cpu", torch.float64).numpy()
        result = solve_ivp(rate, (grid[0][0], grid[-1][1]), start, method=method, rtol=rtol, atol=atol)
    if not result.success:
        raise RuntimeError(f"adaptive: expected the solver to reach the end, got: {result.message}")
    return torch.from_numpy(result.y[:, -1]).to(x).reshape(x.shape)


def average_velocity(
    net: Net, x: Tensor, steps: Steps = 1, y: Tensor | None = None, *, g: float | Tensor | None = None
) -> Tensor:
    """Jump along the learned flow map, x_s = x_t - (t - s) u(x_t, t, s): one-step generation for steps = 1.

    With the exact u any number of steps gives the exact flow map. One evaluation a step. On any path.

    Args:
        g: guidance scale for a network that takes it as an input, a number or (B,); None passes none.

    Source: Geng et al. 2025 (MeanFlow), arXiv:2505.13447, algorithm 2 (there for one step).
    """
    for t, s in intervals(steps):
        x = _jump(net, x, t, s, y, g)
    return x


def consistency(
    net: Net,
    x: Tensor,
    steps: Steps = 1,
    y: Tensor | None = None,
    *,
    g: float | Tensor | None = None,
    path: Path = LINEAR,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Jump to the data, x0 = f(x_t, t, 0), and between jumps return to the noise level of s with fresh noise.

    x_s = alpha(s) x0 + beta(s) noise; on a path that ends at beta(0) > 0 the jump's state holds some noise already,
    and only the rest is added. One evaluation a step; the last time must be the path's own end, 0.

    Args:
        g: guidance scale for a network that takes it as an input, a number or (B,); None passes none.
        generator: of the noise; None is the global one of the state's device.

    Source: Song et al. 2023 (consistency models), arXiv:2303.01469, algorithm 1.
    """
    grid = intervals(steps)
    if grid[-1][1] != 0:
        raise ValueError(f"steps: expected times that end at 0, got {grid[-1][1]}")
    for t, s in grid:
        x = _jump(net, x, t, 0.0, y, g)
        if s > 0:
            shrink, added = _renoise(path, 0.0, s)
            x = shrink * x + added * _noise(x, generator)
    return x


def gamma(
    net: Net,
    x: Tensor,
    steps: Steps = 1,
    y: Tensor | None = None,
    *,
    gamma: float,
    g: float | Tensor | None = None,
    path: Path = LINEAR,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Jump beyond s to less noise, and return to s with fresh noise: gamma of its amount is new.

    With r the end of the jump, beta(r)/alpha(r) = (1 - gamma^2)^(1/2) beta(s)/alpha(s), and
        x_s = (alpha(s)/alpha(r)) f(x_t, t, r) + gamma beta(s) noise.
    gamma = 0 is `average_velocity`, gamma = 1 is `consistency`. Where the path ends before so little noise, r = 0 and
    the noise added is what is missing. One evaluation a step.

    Args:
        gamma: in [0, 1]. g, generator: as of `consistency`.

    Source: Sabour et al. 2025 (AYF), arXiv:2506.14603, its γ-sampling, on any path; Kim et al. 2024 (CTM),
    arXiv:2310.02279.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma: expected in [0, 1], got {gamma}")
    for t, s in intervals(steps):
        end = s if gamma == 0 else _less_noise(path, s, math.sqrt(1 - gamma**2))
        x = _jump(net, x, t, end, y, g)
        if end != s:
            shrink, added = _renoise(path, end, s)
            x = shrink * x + (added if end == 0 else gamma * _level(path, s)[1]) * _noise(x, generator)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "euler": euler,
    "heun": heun,
    "adaptive": adaptive,
    "average_velocity": average_velocity,
    "consistency": consistency,
    "gamma": gamma,
}
_OF_VELOCITIES = ("euler", "heun", "adaptive")
_RENOISING = ("consistency", "gamma")


def sample(
    name: str,
    net: Net,
    x1: Tensor,
    steps: Steps = 1,
    y: Tensor | None = None,
    *,
    path: Path = LINEAR,
    g: float | Tensor | None = None,
    scale: float = 1.0,
    null: int | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """Data from unit noise x1 (B, ...) by the sampler called `name`, on any path.

    Args:
        net: called as net(x, t=t, s=s, y=y), with g=g (B,) where g isn't None.
        scale, null: classifier-free guidance by two evaluations: of velocities, see `guided`, or of jumps, see
            `guided_map`. Only of networks that learnt it neither in their target nor as an input.
        options: of the one sampler, such as `gamma` or `rtol`.

    Raises:
        ValueError: an unknown name, or a `scale` with g, or without labels.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {name!r}")
    x = path.prior(x1)
    if name in _OF_VELOCITIES:
        return SAMPLERS[name](guided(net, y, scale, null, g=g), x, steps, **options)
    if name in _RENOISING:
        options |= {"path": path, "generator": generator}
    if scale != 1:
        net = guided_map(net, scale, _check_guidable(y, scale, null, g))
    return SAMPLERS[name](net, x, steps, y, g=g, **options)


def guided(
    net: Net,
    y: Tensor | None = None,
    scale: float = 1.0,
    null: int | None = None,
    *,
    g: float | Tensor | None = None,
) -> Velocity:
    """The network's instantaneous velocity, with classifier-free guidance: v_null + scale (v_y - v_null).

    Scale 1 is the plain conditional velocity (unconditional for y = None) and costs one evaluation a call; any other
    scale needs y and costs two, as one call on a doubled batch.

    Args:
        y: (B,) int64 labels, or None.
        null: the label that stands for "no label", i.e. the number of classes.
        g: guidance scale for a network that takes it as an input, a number or (B,); None passes none. It excludes
            any other `scale` than 1.

    Source: Ho and Salimans 2022, arXiv:2207.12598, where our scale is their 1 + w.
    """
    if scale == 1:
        return lambda x, t: net(x, t=t, s=t, y=y, **_guidance(x, g))
    both = guided_map(net, scale, _check_guidable(y, scale, null, g))
    return lambda x, t: both(x, t=t, s=t, y=y)


def guided_map(net: Net, scale: float, null: int) -> Net:
    """The network whose average velocity is u_null + scale (u_y - u_null), from one call on a doubled batch.

    Its jump is f_null + scale (f_y - f_null) as well, of the ends, which is IMM's guidance. It isn't where the guided
    flow leads: the two agree for s -> t alone, so that methods which learn a guided flow have guidance in their target.

    Args:
        net: trained with and without labels; called as net(x, t=t, s=s, y=y).
        null: the label that stands for "no label", i.e. the number of classes.

    Source: Zhou et al. 2025 (IMM), arXiv:2503.07565, the paragraph on classifier-free guidance.
    """

    def average(x: Tensor, t: Tensor, s: Tensor, y: Tensor) -> Tensor:
        u_label, u_null = conditional_pair(net, x, t, s, y, null)
        return u_null + scale * (u_label - u_null)

    return average


def conditional_pair(net: Net, x: Tensor, t: Tensor, s: Tensor, y: Tensor, null: int) -> tuple[Tensor, Tensor]:
    """The velocities from t to s with labels y and with no label, each (B, ...), from one call on the doubled batch."""
    x, t, s, y = torch.cat((x, x)), torch.cat((t, t)), torch.cat((s, s)), torch.cat((y, torch.full_like(y, null)))
    u_label, u_null = net(x, t=t, s=s, y=y).chunk(2)
    return u_label, u_null


def intervals(steps: Steps) -> list[tuple[float, float]]:
    """The pairs (t, s) that a sampler walks: `steps` equal ones from 1 to 0, or those between the given times."""
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        return [((steps - i) / steps, (steps - i - 1) / steps) for i in range(steps)]
    times = [float(t) for t in steps]
    falling = all(t > s for t, s in itertools.pairwise(times))
    if len(times) < 2 or not falling or not (times[0] <= 1 and times[-1] >= 0):
        raise ValueError(f"steps: expected two or more falling times in [0, 1], got {times}")
    return list(itertools.pairwise(times))


def _check_guidable(y: Tensor | None, scale: float, null: int | None, g: float | Tensor | None) -> int:
    """The null label, where guidance at this scale is possible."""
    if g is not None:
        raise ValueError(f"scale: expected 1 for a network that takes guidance as an input, got {scale} and g")
    if y is None or null is None:
        raise ValueError(f"y, null: expected labels and the null label for guidance at scale {scale}, got None")
    return null


def _jump(net: Net, x: Tensor, t: float, s: float, y: Tensor | None, g: float | Tensor | None) -> Tensor:
    return x - (t - s) * net(x, t=_times(x, t), s=_times(x, s), y=y, **_guidance(x, g))


def _guidance(x: Tensor, g: float | Tensor | None) -> dict[str, Tensor]:
    if g is None:
        return {}
    if isinstance(g, Tensor) and g.shape not in ((), x.shape[:1]):
        raise ValueError(f"g: expected a number or shape ({len(x)},), got {tuple(g.shape)}")
    return {"g": _times(x, 1.0) * g}


def _level(path: Path, t: float) -> tuple[float, float]:
    """alpha and beta at one time, in float64 on the CPU."""
    time = torch.tensor(t, dtype=torch.float64)
    return path.alpha(time).item(), path.beta(time).item()


def _less_noise(path: Path, s: float, factor: float) -> float:
    """The time at which beta / alpha is `factor` times what it is at s, or the path's end if that isn't reached."""
    (alpha, beta), start = _level(path, s), _level(path, 0.0)
    angle = math.atan2(factor * beta, alpha)
    if angle <= math.atan2(start[1], start[0]):
        return 0.0
    return path.time_at(torch.tensor(angle, dtype=torch.float64)).item()


def _renoise(path: Path, r: float, s: float) -> tuple[float, float]:
    """The law of x_s given x_r and no more, for r < s: N(shrink x_r, added^2 I)."""
    if path.coupling != "independent":
        raise ValueError(
            f"path: fresh noise expects one whose x0 and x1 are independent, got {type(path).__name__}, coupled by "
            f"{path.coupling}; average_velocity and the samplers of velocities fit it"
        )
    (alpha, beta), (alpha_s, beta_s) = _level(path, r), _level(path, s)
    shrink = alpha_s / alpha
    return shrink, math.sqrt(max(beta_s**2 - (shrink * beta) ** 2, 0.0))


def _noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    device = x.device if generator is None else generator.device
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.randn(x.shape, generator=generator, device=device, dtype=dtype).to(x)


def _times(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
