"""LayerNorm and RMSNorm, affine and modulated, with their tangents and both backward passes, in plain PyTorch.

    xh = (x - mean x) rstd, or x rstd for RMSNorm     h = xh weight + bias      y = h (1 + scale) + shift
    t_xh = rstd Pi(t_x)     Pi(u) = u - mean u - xh mean(xh u), or u - xh mean(xh u) for RMSNorm

The primal backward, at cotangent dy, is dh = dy (1 + scale); dxh = dh weight; dx = rstd Pi(dxh), and sums of products
for the rest. The mixed backward is the same map at cotangent dt_y, together with its tangent along (t_x, ...; dy): its
value is (dt_x, ...), its tangent is (dx, ...). So everything below is a pair (value, tangent), where a tangent of None
is zero. Means are over the last dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def norm_forward(
    x: Tensor,
    t_x: Tensor | None,
    weight: Tensor | None,
    t_weight: Tensor | None,
    bias: Tensor | None,
    t_bias: Tensor | None,
    scale: Tensor | None,
    t_scale: Tensor | None,
    shift: Tensor | None,
    t_shift: Tensor | None,
    *,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The normalised, affine, modulated x and its tangent: (y, t_y, mean, rstd).

    x (B, T, C), any strides; weight, bias (C,) or None; scale, shift (B or 1, T or 1, C) or None. y and t_y are in x's
    dtype; mean and rstd (B, T), and all of the computation, in float32 (float64 for float64). t_y is None without any
    tangent, mean is None for RMSNorm.

    Equivalent to: `torch.func.jvp(reference.norm, (x, weight, bias, scale, shift), (t_x, t_weight, ...))`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if rms:
        mean, rows = None, x.to(dtype)
        rstd = torch.rsqrt(rows.square().mean(dim=-1, keepdim=True) + eps)
        xh = rows * rstd
    else:
        rows = x.to(dtype)
        mean = rows.mean(dim=-1, keepdim=True)
        centred = rows - mean
        # A large common offset leaves a rounding of the mean in every entry: the tangent would see it as a slope.
        rest = centred.mean(dim=-1, keepdim=True)
        centred, mean = centred.sub_(rest), mean + rest
        rstd = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
        xh = centred.mul_(rstd)
    t_xh = None if t_x is None else rstd * _project(t_x.to(dtype), xh, rms)[0]
    h = _affine(_Pair(xh, t_xh), _pair(weight, t_weight, dtype), _pair(bias, t_bias, dtype))
    y = _affine(h, _one_plus(scale, t_scale, dtype), _pair(shift, t_shift, dtype))
    t_y = y.tangent
    if t_y is not None:  # without t_x it may be a mere t_shift: in its shape, and not ours to give away
        t_y = _fresh(t_y, x) if t_x is None else t_y.to(x.dtype).contiguous()
    return y.value.to(x.dtype).contiguous(), t_y, None if mean is None else mean.squeeze(-1), rstd.squeeze(-1)


def norm_backward(
    dy: Tensor | None,
    dt_y: Tensor | None,
    x: Tensor,
    t_x: Tensor | None,
    weight: Tensor | None,
    t_weight: Tensor | None,
    bias: Tensor | None,
    t_bias: Tensor | None,
    scale: Tensor | None,
    t_scale: Tensor | None,
    shift: Tensor | None,
    t_shift: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    rms: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of <dy, y> + <dt_y, t_y>: (dx, dweight, dbias, dscale, dshift, dt_x, ..., dt_shift).

    `needs` says which of the ten, in that order; the others are None. Each has the shape and dtype of its argument.
    Without dt_y this is the primal backward, and no tangent is read; with dt_y, dy may be None.
    """
    if dt_y is None:
        cotangent, t_cotangent, t_x, t_weight, t_bias, t_scale = dy, None, None, None, None, None
        wants = [(need, False) for need in needs[:5]]
    else:
        cotangent, t_cotangent = dt_y, dy
        wants = list(zip(needs[5:], needs[:5], strict=True))
    if cotangent is None:
        raise ValueError("dy: expected a tensor where dt_y is None, got None")
    dtype, rstd = rstd.dtype, rstd.unsqueeze(-1)
    xh = (x.to(dtype) if mean is None else x.to(dtype) - mean.unsqueeze(-1)) * rstd
    projected, a = (None, None) if t_x is None else _project(t_x.to(dtype), xh, rms)
    normed = _Pair(xh, None if projected is None else projected.mul_(rstd))

    weights = _pair(weight, t_weight, dtype)
    of_y = _Pair(cotangent.to(dtype), None if t_cotangent is None else t_cotangent.to(dtype))
    of_h = _affine(of_y, _one_plus(scale, t_scale, dtype))
    found: list[_Pair | None] = [None] * 5
    if any(wants[0]):
        found[0] = _input_gradient(_affine(of_h, weights), normed, a, rstd, rms)
    if any(wants[1]):
        found[1] = _affine(of_h, normed)
    found[2] = of_h
    if any(wants[3]):
        found[3] = _affine(of_y, _affine(normed, weights, _pair(bias, t_bias, dtype)))
    found[4] = of_y

    results = [
        [_gradient(grad, like, want) for grad, want in zip(pair or (None, None), wanted, strict=True)]
        for pair, like, wanted in zip(found, (x, weight, bias, scale, shift), wants, strict=True)
    ]
    of_value, of_tangent = zip(*results, strict=True)
    return (*of_value, *of_tangent) if dt_y is None else (*of_tangent, *of_value)


class _Pair(NamedTuple):
    value: Tensor
    tangent: Tensor | None


def _pair(x: Tensor | None, t_x: Tensor | None, dtype: torch.dtype) -> _Pair | None:
    return None if x is None else _Pair(x.to(dtype), None if t_x is None else t_x.to(dtype))


def _one_plus(scale: Tensor | None, t_scale: Tensor | None, dtype: torch.dtype) -> _Pair | None:
    return _pair(None if scale is None else 1 + scale.to(dtype), t_scale, dtype)


def _affine(x: _Pair, factor: _Pair | None, addend: _Pair | None = None) -> _Pair:
    """x * factor + addend by the product rule; a factor of None is one, an addend of None is zero."""
    value, t_value = (None, None) if addend is None else addend
    if factor is None:
        return _Pair(x.value if value is None else x.value + value, _sum(x.tangent, t_value))
    if factor.tangent is not None:
        t_value = _multiply_add(t_value, x.value, factor.tangent)
    if x.tangent is not None:
        t_value = _multiply_add(t_value, x.tangent, factor.value)
    return _Pair(_multiply_add(value, x.value, factor.value), t_value)


def _sum(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return y if x is None else x if y is None else x + y


def _multiply_add(addend: Tensor | None, x: Tensor, factor: Tensor) -> Tensor:
    return x * factor if addend is None else torch.addcmul(addend, x, factor)


def _project(u: Tensor, xh: Tensor, rms: bool) -> tuple[Tensor, Tensor]:
    """Pi(u), and mean(xh u)."""
    along = (xh * u).mean(dim=-1, keepdim=True)
    return torch.addcmul(u if rms else u - u.mean(dim=-1, keepdim=True), xh, along, value=-1), along


def _input_gradient(of_xh: _Pair, normed: _Pair, a: Tensor | None, rstd: Tensor, rms: bool) -> _Pair:
    """rstd Pi(dxh) and its tangent; `a` is mean(xh t_x)."""
    xh, t_xh = normed
    projected, along = _project(of_xh.value, xh, rms)
    tangent = None if of_xh.tangent is None else _project(of_xh.tangent, xh, rms)[0]
    if t_xh is not None and a is not None:
        change = t_xh * along + xh * (t_xh * of_xh.value).mean(dim=-1, keepdim=True) + projected * (a * rstd)
        tangent = -change if tangent is None else tangent - change
    return _Pair(rstd * projected, None if tangent is None else rstd * tangent)


def _gradient(grad: Tensor | None, like: Tensor | None, wanted: bool) -> Tensor | None:
    if like is None or not wanted:
        return None
    return like.new_zeros(like.shape) if grad is None else _fresh(grad.sum_to_size(like.shape), like)


def _fresh(x: Tensor, like: Tensor) -> Tensor:
    return like.new_empty(like.shape).copy_(x)
