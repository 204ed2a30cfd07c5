"""Give the formulas of norms for derivatives of any order, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops.protocol.pair import Needs, Pair, Pairs, accumulated, affine, cast


def norm_dual(inputs: Pairs, eps: float, rms: bool) -> Pair:
    """Return y = (xh∘w + b)∘(1 + scale) + shift and its tangent; the inputs are x, weight, bias, scale, shift."""
    dtype, inputs = inputs[0].primal.dtype, [Pair(*accumulated(pair)) for pair in inputs]
    h, _, _ = _normalised(inputs, eps, rms)
    y, t_y = affine(h, _one_plus(inputs[3]), inputs[4])
    return Pair(y.to(dtype), None if t_y is None else t_y.expand_as(y).to(dtype))


def norm_dual_backward(cotangent: Pair, inputs: Pairs, eps: float, rms: bool, needs: Needs) -> list[Pair]:
    """Return the gradients of x, weight, bias, scale, shift and of their tangents, from the cotangents of y and t_y."""
    wide = [Pair(*accumulated(pair)) for pair in inputs]
    (_, t_x), (weight, t_weight), _, (scale, t_scale), _ = wide
    (h, t_h), (xh, t_xh), rstd = _normalised(wide, eps, rms)
    zero = torch.zeros_like(h)
    dy, dt_y, t_h, t_xh = (zero if x is None else x for x in (*accumulated(cotangent), t_h, t_xh))

    one_plus = 1.0 if scale is None else 1 + scale
    dh = dy * one_plus if t_scale is None else dy * one_plus + dt_y * t_scale
    dt_h = dt_y * one_plus
    gain = 1.0 if weight is None else weight
    dxh = dh * gain if t_weight is None else dh * gain + dt_h * t_weight
    dt_xh = dt_h * gain

    a = zero[..., :1] if t_x is None else (xh * t_x).mean(-1, keepdim=True)
    c1, b = (xh * dt_xh).mean(-1, keepdim=True), (t_xh * dt_xh).mean(-1, keepdim=True)
    dt_x = rstd * _project(dt_xh, xh, rms)
    dx = rstd * (_project(dxh, xh, rms) - c1 * t_xh - b * xh) - rstd * a * dt_x
    grads = [(dx, dt_x), (dh * xh + dt_h * t_xh, dt_h * xh), (dh, dt_h), (dy * h + dt_y * t_h, dt_y * h), (dy, dt_y)]
    return [
        Pair(
            *(
                None if not need or like is None else cast(grad.sum_to_size(like.shape), like.dtype)
                for grad, need in zip(pair, wanted)
            )
        )
        for pair, (like, _), wanted in zip(grads, inputs, needs, strict=True)
    ]


def _normalised(inputs: Pairs, eps: float, rms: bool) -> tuple[Pair, Pair, Tensor]:
    """Return h = xh∘w + b, xh, each with its tangent, and rstd."""
    (x, t_x), weight, bias, _, _ = inputs
    centred = x if rms else x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    xh = centred * rstd
    t_xh = None if t_x is None else rstd * _project(t_x, xh, rms)
    normed = Pair(xh, t_xh)
    return affine(normed, weight, bias), normed, rstd


def _one_plus(scale: Pair) -> Pair:
    return Pair(None if scale.primal is None else 1 + scale.primal, scale.tangent)


def _project(u: Tensor, xh: Tensor, rms: bool) -> Tensor:
    """Return Pi(u) = u - mean u - xh mean(xh∘u); RMSNorm leaves the mean out."""
    u = u if rms else u - u.mean(-1, keepdim=True)
    return u - xh * (xh * u).mean(-1, keepdim=True)
