"""Compute r = x + gate∘h and a norm of r, the step between two blocks, in the norms' own kernels: see `load_rows`.

Each input is read once and each output is written once, in both directions. README.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .launch import Pairs
from .norm import run
from .norm_backward import Cotangents, gradient_pairs
from .norm_rows import Inputs, inputs_of

NAMES = ("x", "h", "gate", "weight", "bias", "scale", "shift")


def gated_norm_forward(
    inputs: Pairs, *, eps: float, rms: bool
) -> tuple[list[tuple[Tensor, Tensor | None]], tuple[Tensor | None, Tensor]]:
    """Return r = x + gate∘h and its modulated norm y, with tangents: (((r, t_r), (y, t_y)), (mean, rstd)).

    Args:
        inputs: (primal, tangent) of x and h (B, T, C), of dtypes that may differ, of the gate, as scale and shift (B or
            1, T or 1, C) or None for one, and of weight, bias, scale and shift as in `norm_forward`.
        eps, rms: as there.

    Returns:
        r, t_r in x's dtype, y, t_y in h's; the norm is that of r before its rounding. The rest is as there.

    Equivalent to:
        torch.func.jvp of r = x + gate * h; y = (norm(r) * weight + bias) * (1 + scale) + shift
    """
    outputs = run(_norms_inputs(inputs), inputs[1][0].dtype, eps, rms)
    assert outputs.r is not None
    return [(outputs.r, outputs.t_r), (outputs.y, outputs.t_y)], (outputs.mean, outputs.rstd)


def gated_norm_backward(
    cotangents: Pairs,
    inputs: Pairs,
    saved: tuple[Any, tuple[Tensor | None, Tensor]],
    *,
    rms: bool,
    needs: Sequence[tuple[bool, bool]],
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return the gradients of <dr, r> + <dt_r, t_r> + <dy, y> + <dt_y, t_y>, in pairs as `needs`.

    Args:
        cotangents: (dr, dt_r) and (dy, dt_y). Any may be None, but not all; without dt_r and dt_y no tangent is read.
        inputs, rms: as in `gated_norm_forward`.
        saved: its outputs, which aren't read, and mean and rstd.
        needs: which gradients are wanted, in the order of the inputs; the others are None.

    Returns:
        (dx, dt_x), (dh, dt_h), (dgate, dt_gate), ..., each in the shape and dtype of its argument. Sums over rows are
        taken in float32 and in a fixed order.

    Raises:
        ValueError: there is no cotangent.
    """
    (dr, dt_r), (dy, dt_y) = cotangents
    if all(d is None for d in (dr, dt_r, dy, dt_y)):
        raise ValueError("dr: expected a tensor where dt_r, dy and dt_y are None, got None")
    return gradient_pairs(NAMES, Cotangents(dy, dt_y, dr, dt_r), _norms_inputs(inputs), saved[1], rms, needs)


def _norms_inputs(inputs: Pairs) -> Inputs:
    x, h, gate, *of_norm = inputs
    return inputs_of([x, *of_norm, h, gate])
