"""Problems for every implementation of the gated residual and its norm, and their check against float64 autodiff."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdistill import reference
from fastdistill.ops.protocol.pair import flat
from fastdistill.testing import assert_accurate, cast, reference_jvp, reference_vjp, relative_error

NAMES = ("x", "h", "gate", "weight", "bias", "scale", "shift")
MODULATED = ("x", "h", "gate", "scale", "shift")
ALL_NAMES = (*NAMES, *(f"t_{name}" for name in NAMES))
COTANGENTS = ("dr", "dt_r", "dy", "dt_y")
CAPS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
EPS = 1e-3
Tensors = dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    """Problem with the arguments `parts`, of which `tangents` have a tangent.

    dtype is that of all but h and t_h, whose dtype is `block`.
    """

    rms: bool = False
    parts: tuple[str, ...] = NAMES
    tangents: tuple[str, ...] = NAMES
    cotangents: tuple[str, ...] = COTANGENTS
    modulation: tuple[int, int] = (2, 1)
    shape: tuple[int, int, int] = (2, 5, 40)
    dtype: torch.dtype = torch.float32
    block: torch.dtype = torch.float32
    mean: float = 0.0
    std: float = 1.0


def problem(case: Case, device: str = "cpu") -> tuple[Tensors, Tensors]:
    """Return primals and tangents, standard normal but for x's mean and spread, which h and the gate share."""
    vector, modulation = (case.shape[2],), (*case.modulation, case.shape[2])
    shapes = dict(zip(NAMES, (case.shape, case.shape, modulation, vector, vector, modulation, modulation), strict=True))

    def make(names: tuple[str, ...]) -> Tensors:
        return {
            name: torch.randn(shapes[name], dtype=torch.float64).to(device, case.block if name == "h" else case.dtype)
            if name in case.parts and name in names
            else None
            for name in NAMES
        }

    primals, tangents = make(NAMES), make(case.tangents)
    x, h = primals["x"], primals["h"]
    assert x is not None and h is not None
    return {**primals, "x": case.mean + case.std * x, "h": (case.std * h).to(h.dtype)}, tangents


def specification(rms: bool) -> Any:
    """Return r and y side by side, so that they are one output."""
    return lambda **a: torch.cat(reference.gated_residual_ada_norm(**a, eps=EPS, rms=rms), dim=-1)


def forward(implementation: Any, primals: Tensors, tangents: Tensors, rms: bool) -> Any:
    """Return r, t_r, y, t_y, mean and rstd."""
    inputs = [(primals[name], tangents[name]) for name in NAMES]
    (of_r, of_y), statistics = implementation.gated_norm_forward(inputs, eps=EPS, rms=rms)
    return (*of_r, *of_y, *statistics)


def backward(implementation: Any, primals: Tensors, tangents: Tensors, cotangents: Tensors, rms: bool) -> Tensors:
    """Return all gradients that autodiff would give, by name."""
    inputs = [(primals[name], tangents[name]) for name in NAMES]
    statistics = forward(implementation, primals, tangents, rms)[-2:]
    mixed = any(cotangents[name] is not None for name in ("dt_r", "dt_y"))
    needs = [primals[name] is not None for name in NAMES] + [mixed and tangents[name] is not None for name in NAMES]
    dr, dt_r, dy, dt_y = (cotangents[name] for name in COTANGENTS)
    wanted = list(zip(needs[:7], needs[7:]))
    found = flat(
        implementation.gated_norm_backward([(dr, dt_r), (dy, dt_y)], inputs, ((), statistics), rms=rms, needs=wanted)
    )
    assert [x is not None for x in found] == needs
    return {name: x for name, x in zip(ALL_NAMES, found, strict=True) if x is not None}


def draw_cotangents(case: Case, device: str = "cpu") -> Tensors:
    """Return cotangents of the dtypes of r and y."""
    dtypes = dict(zip(COTANGENTS, (case.dtype, case.dtype, case.block, case.block), strict=True))
    return {
        name: torch.randn(case.shape, dtype=torch.float64).to(device, dtypes[name]) if name in case.cotangents else None
        for name in COTANGENTS
    }


def side_by_side(first: Tensor | None, second: Tensor | None, like: Tensor) -> Tensor:
    """Join cotangents of r and y into one in float64, absent ones as zeros."""
    return torch.cat([torch.zeros_like(like).double() if d is None else d.double() for d in (first, second)], dim=-1)


def check(implementation: Any, case: Case, device: str = "cpu", *, capped: bool = True) -> None:
    """Check outputs, tangents and all gradients: shapes, dtypes, the tolerance rule, and caps on the whole error.

    The rule compares with PyTorch in one dtype, so where there are two the caps alone speak.
    """
    primals, tangents = problem(case, device)
    x = primals["x"]
    assert x is not None
    exact, fn = (cast(primals, torch.float64), cast(tangents, torch.float64)), specification(case.rms)
    r, t_r, y, t_y, mean, rstd = forward(implementation, primals, tangents, case.rms)
    truths, baselines = reference_jvp(fn, *exact), reference_jvp(fn, primals, tangents)
    truths, baselines = ([part for both in pair for part in both.chunk(2, -1)] for pair in (truths, baselines))
    moving = any(t is not None for t in tangents.values())
    assert (t_r is not None) == (t_y is not None) == moving
    assert (mean is None) == case.rms and rstd.shape == case.shape[:2]
    for name, actual, truth, base in zip(("r", "y", "t_r", "t_y"), (r, y, t_r, t_y), truths, baselines, strict=True):
        if actual is not None:
            assert actual.dtype == (case.block if name.endswith("y") else case.dtype) and actual.is_contiguous()
            compare(name, actual, truth, base, case, capped)

    cotangents = draw_cotangents(case, device)
    dr, dt_r, dy, dt_y = (cotangents[name] for name in COTANGENTS)
    d_out, dt_out = side_by_side(dr, dy, x), None if dt_r is dt_y is None else side_by_side(dt_r, dt_y, x)
    of_truth = reference_vjp(fn, *exact, d_out, dt_out)
    low = [None if d is None else d.to(case.dtype) for d in (d_out, dt_out)]
    of_base = reference_vjp(fn, primals, tangents, low[0], low[1])
    found = backward(implementation, primals, tangents, cotangents, case.rms)
    assert found.keys() == of_truth.keys()
    for name, actual in found.items():
        like = {**primals, **{f"t_{name}": t for name, t in tangents.items()}}[name]
        assert actual is not None and like is not None
        assert (actual.shape, actual.dtype) == (like.shape, like.dtype) and actual.is_contiguous()
        compare(f"d{name}", actual, of_truth[name], of_base[name], case, capped, order=1 if dt_out is None else 2)


def compare(
    name: str, actual: Tensor, truth: Tensor, base: Tensor, case: Case, capped: bool, *, order: int = 1
) -> None:
    """Check one tensor against the rule and its cap."""
    if case.dtype == case.block:
        assert_accurate(actual, truth, base, name=name, order=order)
    if capped:
        assert relative_error(actual, truth) < CAPS[actual.dtype], name
