"""Pair data and noise before a path interpolates between them.

`COUPLINGS[path.coupling](x0, x1)` pairs a batch. The noise is reordered and data rows never move, so that a row's
label, and all else that belongs to it, stays with it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

SOLVERS = {"pot": "ot", "scipy": "scipy.optimize"}  # Maps each solver, in order of preference, to its module.


def independent(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the batch as it was drawn."""
    return x0, x1


def optimal_transport(x0: Tensor, x1: Tensor, solver: str | None = None) -> tuple[Tensor, Tensor]:
    """Pair each x0 with one x1 of the batch so that the sum of squared distances is the least possible.

    This is exact, on the CPU, in float64, and about cubic in the batch. The law of each of x0 and x1 alone stays as it
    was.

    Args:
        x0, x1: (B, ...), alike in shape.
        solver: "pot" or "scipy"; None takes the first of the two that is installed.

    Returns:
        x0 itself, and x1 with its rows in another order.

    Raises:
        ValueError: shapes differ, entries aren't finite, or the solver is unknown.
        ImportError: neither package is installed, or the requested one is not.

    Equivalent to:
        x0, x1[scipy.optimize.linear_sum_assignment(torch.cdist(x0, x1).square())[1]]

    Source: Tong et al. 2023, arXiv:2302.00482, its OT-CFM by minibatches; Pooladian et al. 2023, arXiv:2304.14772.
    """
    if x0.shape != x1.shape or x0.ndim < 2 or len(x0) == 0:
        raise ValueError(f"x1: expected the shape of x0, (B, ...), got {tuple(x1.shape)} and {tuple(x0.shape)}")
    a, b = (x.detach().flatten(1).to("cpu", torch.float64) for x in (x0, x1))
    # This is half of |a - b|^2 without the squares of a and b, which no order of the noise changes.
    cost = -(a @ b.T)
    if not bool(cost.isfinite().all()):
        raise ValueError("x0, x1: expected finite entries, got one that isn't")
    name, module = _solver(solver)
    if name == "pot":
        weight: list[float] = []  # POT takes an empty list as equal weights.
        order = torch.from_numpy(module.emd(weight, weight, cost.numpy())).argmax(1)
    else:
        order = torch.from_numpy(module.linear_sum_assignment(cost.numpy())[1])
    if not torch.equal(order.sort().values, torch.arange(len(order))):
        raise RuntimeError(f"solver {name}: expected a pairing of all rows, got a plan that splits some")
    return x0, x1[order.to(x1.device)]


COUPLINGS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "independent": independent,
    "optimal_transport": optimal_transport,
}


def _solver(name: str | None) -> tuple[str, Any]:
    """Import the solver, only here, and return its name and module."""
    if name is not None and name not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)} or None, got {name!r}")
    for candidate in SOLVERS if name is None else (name,):
        try:
            return candidate, import_module(SOLVERS[candidate])
        except ImportError:
            continue
    wanted = "POT or scipy" if name is None else {"pot": "POT", "scipy": "scipy"}[name]
    raise ImportError(f"optimal_transport: expected {wanted}, which isn't installed: pip install fastdistill[ot]")
