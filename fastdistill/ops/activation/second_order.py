"""Give the formulas of activations for derivatives of any order, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.ops.activation.eager import CUBIC, SPREAD
from fastdistill.ops.protocol.pair import (
    Needs,
    Pair,
    Pairs,
    accumulated,
    add_product,
    affine,
    cast,
    needed,
    times,
)


def activation_dual(inputs: Pairs, *, kind: str) -> list[Pair]:
    """Return (y, t_y): y = phi up, t_y = phi' t_x up + phi t_up; no t_y without any tangent."""
    dtype = inputs[0].primal.dtype
    (x, t_x), up = (Pair(*accumulated(pair)) for pair in inputs)
    phi, slope, _ = _derivatives(x, kind)
    y, t_y = affine(Pair(phi, times(slope, t_x)), up)
    return [Pair(cast(y, dtype), cast(t_y, dtype))]


def activation_dual_backward(cotangents: Pairs, inputs: Pairs, *, kind: str, needs: Needs) -> list[Pair]:
    """Return the gradients of x, up and of their tangents; g and h are the cotangents of phi and of phi' t_x."""
    (dy, dt_y), (x, t_x), up = (Pair(*accumulated(pair)) for pair in (*cotangents, *inputs))
    phi, slope, curvature = _derivatives(x, kind)
    h, g = affine(Pair(dt_y, dy), up)  # h = dt_y up and g = dy up + dt_y t_up are a product rule, too
    gradients = [
        Pair(add_product(times(slope, g), times(curvature, t_x), h), times(slope, h)),
        Pair(add_product(times(phi, dy), times(slope, t_x), dt_y), times(phi, dt_y)),
    ]
    return needed(gradients, inputs, needs)


def _derivatives(x: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return phi, phi' and phi'' at x. With v = x for SiLU, phi = x logistic(v); GELU's tanh is one of these, too."""
    if kind == "gelu":
        p = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return x * p, p + x * density, density * (2 - x * x)
    v, v1, v2 = x, torch.ones_like(x), torch.zeros_like(x)
    if kind == "gelu_tanh":
        v, v1, v2 = SPREAD * (x + CUBIC * x**3), SPREAD * (1 + 3 * CUBIC * x * x), 6 * CUBIC * SPREAD * x
    p, q = torch.sigmoid(v), torch.sigmoid(-v)
    return x * p, p + x * p * q * v1, p * q * (2 * v1 + x * (v2 + (q - p) * v1 * v1))
