"""LayerNorm and RMSNorm, affine and modulated, with their tangents and both backward passes, in plain PyTorch.

    xh = (x - mean x) rstd, or x rstd for RMSNorm     h = xh weight + bias      y = h (1 + scale) + shift
    t_xh = rstd Pi(t_x)     Pi(u) = u - mean u - xh mean(xh u), or u - xh mean(xh u) for RMSNorm

The primal backward, at cotangent dy, is dh = dy (1 + scale); dxh = dh weight; dx = rstd Pi(dxh), and sums of products
for the rest. The mixed backward is the same map at cotangent dt_y, together with its tangent along (t_x, ...; dy): its
value is (dt_x, ...), its tangent is (dx, ...). So everything below is a pair (value, tangent), where a tangent of None
is zero. Means are over the last dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.ops.protocol.row_blocks import At, Gradients, Rows, accumulator_dtype, memory, part, row_blocks

MOST_OFFSET = 1.0  # means up to so many standard deviations cost PyTorch's kernel no digits
LEAST_SAMPLE = 1 << 14  # elements of a sample from which on a kernel for each is worth its launch


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
    dtype = accumulator_dtype(x)
    arguments = (x, t_x, weight, t_weight, bias, t_bias, scale, t_scale, shift, t_shift)
    taken = {memory(a) for a in arguments if a is not None}
    y, t_y = Rows(x.shape, x.dtype, x.device), Rows(x.shape, x.dtype, x.device)
    mean, rstd = (Rows(x.shape[:-1], dtype, x.device) for _ in range(2))
    for at in row_blocks(x):
        block = forward_block(*(part(a, at) for a in arguments), eps=eps, rms=rms, dtype=dtype)
        for result, found in zip((y, t_y, mean, rstd), block, strict=True):
            if found is not None:
                result.put(found, at, taken)
    assert y.whole is not None and rstd.whole is not None
    return y.whole, t_y.whole, mean.whole, rstd.whole


def forward_block(
    x: Any,
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
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(y, t_y, mean, rstd) of some rows, in `dtype`; t_y may be a mere t_shift, in its shape and memory."""
    width, rows, mean = x.shape[-1], x.to(dtype), None
    if rms:
        rstd = rows.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
        xh = rows * rstd
    else:
        # A large common offset leaves a rounding of the mean in every entry, which the tangent would see as a slope:
        # the second mean takes it out.
        mean = rows.mean(dim=-1, keepdim=True)
        rows = rows - mean
        xh, rest, rstd = torch.native_layer_norm(rows, (width,), None, None, eps)
        rows, mean = rows.sub_(rest), mean.add_(rest).squeeze(-1)
    t_xh = None if t_x is None else _Normed(rows, xh, rstd, rms).pull_back(t_x.to(dtype))
    h = _affine(_Pair(xh, t_xh), _pair(weight, t_weight, dtype), _pair(bias, t_bias, dtype))
    y = _affine(h, _one_plus(scale, t_scale, dtype), _pair(shift, t_shift, dtype))
    return y.value, y.tangent, mean, rstd.squeeze(-1)


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
    if dt_y is None and dy is None:
        raise ValueError("dy: expected a tensor where dt_y is None, got None")
    arguments = (dy, dt_y, x, t_x, weight, t_weight, bias, t_bias, scale, t_scale, shift, t_shift, mean, rstd)
    grads = Gradients((x, weight, bias, scale, shift), needs, x, (dy, dt_y))
    blocks, centred = plan(x, scale, shift, mean, rstd, primal=dt_y is None)
    if not centred and scale is None and shift is None and x.dtype == rstd.dtype:
        blocks = [()]  # one kernel, without a temporary
    for at in blocks:
        grads.put(backward_block(*(part(a, at) for a in arguments), rms=rms, needs=needs, centred=centred), at)
    return grads.results()


def plan(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, mean: Tensor | None, rstd: Tensor, *, primal: bool
) -> tuple[list[At], bool]:
    """The blocks of a backward pass, and whether their rows have to be centred.

    PyTorch's kernel for the primal backward of LayerNorm has no need of it, but its error grows with |mean| rstd; what
    that is, only a CPU says without waiting. For the kernel a modulation that is one vector for a block is a weight.
    """
    if not primal or mean is None:
        return row_blocks(x), True
    centred = x.device.type != "cpu" or x.numel() == 0 or float((mean * rstd).abs().max()) > MOST_OFFSET
    modulations = [a for a in (scale, shift) if a is not None]
    vectors = all(a.shape[1] == 1 for a in modulations) and any(a.shape[0] > 1 for a in modulations)
    return row_blocks(x, by_sample=vectors and x.shape[1] * x.shape[2] >= LEAST_SAMPLE), centred


def backward_block(
    dy: Tensor | None,
    dt_y: Tensor | None,
    x: Any,
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
    rstd: Any,
    *,
    rms: bool,
    needs: tuple[bool, ...],
    centred: bool = True,
) -> tuple[Tensor | None, ...]:
    """The ten gradients at some rows, in float32 or better; those of parameters may still want to be summed.

    None is zero, or was not asked for; some that were not asked for may be there. They may be the cotangents.
    Without `centred`, LayerNorm's primal backward takes x as it is: see `plan`.
    """
    if dt_y is None and dy is not None and mean is not None and _are_vectors(scale, shift):
        return *_native_backward(dy, x, weight, bias, scale, mean, rstd, needs, centred), *[None] * 5
    if dt_y is None:
        cotangent, t_cotangent, t_x, t_weight, t_bias, t_scale = dy, None, None, None, None, None
        wants = [(need, False) for need in needs[:5]]
    else:
        cotangent, t_cotangent = dt_y, dy
        wants = list(zip(needs[5:], needs[:5], strict=True))
    assert cotangent is not None
    dtype, rstd = rstd.dtype, rstd.unsqueeze(-1)
    rows = x.to(dtype) if mean is None else x.to(dtype) - mean.unsqueeze(-1)
    weights = _pair(weight, t_weight, dtype)
    of_y = _Pair(cotangent.to(dtype), None if t_cotangent is None else t_cotangent.to(dtype))
    of_h = _affine(of_y, _one_plus(scale, t_scale, dtype))
    found: list[_Pair | None] = [None, None, of_h, None, of_y]
    core = _Normed(rows, None, rstd, rms)
    a, t_xh = (None, None)
    if t_x is not None:
        t_rows = t_x.to(dtype)
        a = core.along(t_rows)
        t_xh = core.pull_back(t_rows, a)
    if any(wants[0]):
        found[0] = _input_gradient(_affine(of_h, weights), core, t_xh, a)
    if any(wants[1]):
        found[1] = _affine(of_h, _Pair(core.xh, t_xh))
    if any(wants[3]):
        found[3] = _affine(of_y, _affine(_Pair(core.xh, t_xh), weights, _pair(bias, t_bias, dtype)))
    of_value, of_tangent = zip(*((None, None) if pair is None else pair for pair in found), strict=True)
    return (*of_value, *of_tangent) if dt_y is None else (*of_tangent, *of_value)


def _are_vectors(*modulations: Tensor | None) -> bool:
    return all(a is None or a.shape[:2] == (1, 1) for a in modulations)


def _native_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needs: tuple[bool, ...],
    centred: bool,
) -> tuple[Tensor | None, ...]:
    """The primal backward of a LayerNorm by PyTorch's kernel, whose weight is weight (1 + scale): five gradients."""
    dtype, mean, rstd = rstd.dtype, mean.unsqueeze(-1), rstd.unsqueeze(-1)
    rows = x.to(dtype)
    if centred:
        rows, mean = rows - mean, torch.zeros_like(mean)
    weight, bias = (None if a is None else a.to(dtype) for a in (weight, bias))
    factor = None if scale is None else 1 + scale.to(dtype).flatten()
    gamma = factor if weight is None else weight if factor is None else weight * factor
    parameters = any(needs[1:5])
    if gamma is None and parameters:
        gamma = rows.new_ones(rows.shape[-1])
    dx, along, total = torch.ops.aten.native_layer_norm_backward(
        dy.to(dtype), rows, rows.shape[-1:], mean, rstd, gamma, gamma, (needs[0], parameters, parameters)
    )
    if not parameters:
        return dx, None, None, None, None
    dweight, dbias = (along, total) if factor is None else (along * factor, total * factor)
    dscale = along if weight is None else along * weight
    dscale = dscale if bias is None else torch.addcmul(dscale, total, bias)
    return dx, dweight, dbias, dscale[None, None], total[None, None]


class _Normed:
    """Rows, centred for LayerNorm, and what is normalised of them."""

    def __init__(self, rows: Tensor, xh: Tensor | None, rstd: Tensor, rms: bool) -> None:
        self.rows, self._xh, self.rstd, self._rms = rows, xh, rstd, rms

    @property
    def xh(self) -> Tensor:
        """The normalised rows, once somebody asks."""
        if self._xh is None:
            self._xh = self.rows * self.rstd
        return self._xh

    def along(self, u: Tensor) -> Tensor:
        """mean(xh u)."""
        return (self.xh * u).mean(dim=-1, keepdim=True)

    def pull_back(self, u: Tensor, along: Tensor | None = None) -> Tensor:
        """rstd Pi(u); `along` is mean(xh u), for who has it."""
        if self._rms:
            return torch.addcmul(u, self.xh, self.along(u) if along is None else along, value=-1).mul_(self.rstd)
        shape, zero = self.rows.shape[-1:], torch.zeros_like(self.rstd)
        only_input = (True, False, False)
        return torch.ops.aten.native_layer_norm_backward(u, self.rows, shape, zero, self.rstd, None, None, only_input)[
            0
        ]


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


def _input_gradient(of_xh: _Pair, core: _Normed, t_xh: Tensor | None, a: Tensor | None) -> _Pair:
    """rstd Pi(dxh) and its tangent; `a` is mean(xh t_x)."""
    dxh, t_dxh = of_xh
    along = None if t_xh is None else core.along(dxh)
    value = core.pull_back(dxh, along)
    tangent = None if t_dxh is None else core.pull_back(t_dxh)
    if t_xh is not None and a is not None and along is not None:
        other = (t_xh * dxh).mean(dim=-1, keepdim=True)
        change = (t_xh * along).addcmul_(core.xh, other).addcmul_(value, a).mul_(core.rstd)
        tangent = change.neg_() if tangent is None else tangent.sub_(change)
    return _Pair(value, tangent)


def _fresh(x: Tensor, like: Tensor) -> Tensor:
    return like.new_empty(like.shape).copy_(x)
