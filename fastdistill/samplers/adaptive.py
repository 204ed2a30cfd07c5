"""Integrate a velocity by a solver of scipy, which chooses its own steps."""

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

    The solver treats the whole batch as one system, and its state travels to the CPU at every evaluation. So this
    sampler is meant for references, not for speed.

    Args:
        x: the state (B, ...), float32 or float64; it must not require a gradient.
        steps: times, of which only the first and the last matter.
        rtol, atol: tolerances of the local error; below about 1e-6 they exceed the precision of a float32 state.
        method: the name of one of the methods of `solve_ivp`.

    Raises:
        ImportError: scipy isn't installed.
        RuntimeError: The solver gave up.
        ValueError: x has another dtype or requires a gradient, or the times don't fall.
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
