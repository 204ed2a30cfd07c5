"""Steps of a solver's own choice along a velocity, with the help of scipy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.samplers.spec import Sampler
from fastdistill.samplers.steps import Steps, Velocity, intervals, times_of


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
        v = velocity(torch.from_numpy(state).to(x).reshape(x.shape), times_of(x, t))
        return v.flatten().to("cpu", torch.float64).numpy()

    with torch.no_grad():
        start = x.flatten().to("cpu", torch.float64).numpy()
        result = solve_ivp(rate, (grid[0][0], grid[-1][1]), start, method=method, rtol=rtol, atol=atol)
    if not result.success:
        raise RuntimeError(f"adaptive: expected the solver to reach the end, got: {result.message}")
    return torch.from_numpy(result.y[:, -1]).to(x).reshape(x.shape)


SPEC = Sampler(adaptive, needs=("velocity",), evaluations=None)
