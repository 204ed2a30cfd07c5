"""Give the formulas of activations for derivatives of any order, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.protocol.pair import Needs, Pairs, add, flat, paired, times


def _math(inputs: Pairs, attrs: Sequence[Any]) -> Pairs:
    primals, tangents = zip(*inputs)
    """The formulas of the forward, differentiable any number of times."""
    dtype = primals[0].dtype
    (x, up), (t_x, t_up) = _wide(primals), _wide(tangents)
    phi, slope, _ = _derivatives(x, attrs[0])
    t_y = times(times(slope, t_x), 1.0 if up is None else up)
    t_y = add(t_y, times(phi, t_up))
    y = phi if up is None else phi * up
    return paired([y.to(dtype)], [None if t_y is None else t_y.to(dtype)])


def _math_backward(cotangents: Pairs, inputs: Pairs, attrs: Sequence[Any], needs: Needs) -> Pairs:
    (d_outs, dt_outs), (primals, tangents), needs = zip(*cotangents), zip(*inputs), flat(needs)
    """The formulas of both backward passes; g and h are the cotangents of phi and of phi' t_x."""
    like = primals[0]
    (dy, dt_y), (x, up), (t_x, t_up) = _wide((d_outs[0], dt_outs[0])), _wide(primals), _wide(tangents)
    phi, slope, curvature = _derivatives(x, attrs[0])
    factor = 1.0 if up is None else up
    g, h = add(times(dy, factor), times(dt_y, t_up)), times(dt_y, factor)
    grads = [
        add(times(slope, g), times(times(curvature, t_x), h)),
        add(times(phi, dy), times(times(slope, t_x), dt_y)),
        times(slope, h),
        times(phi, dt_y),
    ]
    grads = [
        None if not need else torch.zeros_like(like) if grad is None else grad.to(like.dtype)
        for grad, need in zip(grads, needs, strict=True)
    ]
    return paired(grads[:2], grads[2:])


def _derivatives(x: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """phi, phi' and phi'' at x. With v = x for SiLU, phi = x logistic(v) and GELU's tanh is one of these, too."""
    if kind == "gelu":
        p = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return x * p, p + x * density, density * (2 - x * x)
    v, v1, v2 = x, torch.ones_like(x), torch.zeros_like(x)
    if kind == "gelu_tanh":
        spread, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
        v, v1, v2 = spread * (x + cubic * x**3), spread * (1 + 3 * cubic * x * x), 6 * cubic * spread * x
    p, q = torch.sigmoid(v), torch.sigmoid(-v)
    return x * p, p + x * p * q * v1, p * q * (2 * v1 + x * (v2 + (q - p) * v1 * v1))


def _wide(tensors: Any) -> Any:
    """16-bit tensors in float32; absent ones as they are."""
    return tuple(None if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)
