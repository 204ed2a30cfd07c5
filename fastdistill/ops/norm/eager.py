"""LayerNorm and RMSNorm, affine and modulated, with their tangents and both backward passes, in plain PyTorch.

    xh = (x - mean x) rstd, or x rstd for RMSNorm     h = xh weight + bias      y = h (1 + scale) + shift
    t_xh = rstd Pi(t_x)     Pi(u) = u - mean u - xh mean(xh u), or u - xh mean(xh u) for RMSNorm

The primal backward, at cotangent dy, is dh = dy (1 + scale); dxh = dh weight; dx = rstd Pi(dxh), and sums of products
for the rest. The mixed backward is the same map at cotangent dt_y, together with its tangent along (t_x, ...; dy): its
value is (dt_x, ...), its tangent is (dx, ...). So everything below is a pair (value, tangent), where a tangent of None
is zero. Means are over the last dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.protocol.pair import ABSENT, Needs, Pair, Pairs, affine, cast, without_tangents
from fastdistill.ops.protocol.row_blocks import (
    At,
    Gradients,
    Rows,
    accumulator_dtype,
    memories,
    part,
    parts,
    row_blocks,
)

MOST_OFFSET = 1.0  # means up to so many standard deviations cost PyTorch's kernel no digits
LEAST_SAMPLE = 1 << 14  # elements of a sample from which on a kernel for each is worth its launch
Statistics = Sequence[Tensor | None]  # mean, None for RMSNorm, and rstd of each row


def norm_forward(inputs: Pairs, *, eps: float, rms: bool) -> tuple[list[Pair], Statistics]:
    """Return the normalised, affine, modulated x and its tangent: (((y, t_y),), (mean, rstd)).

    Args:
        inputs: the pairs of x (B, T, C), of any strides, of weight and bias (C,), and of scale and shift (B or 1, T or
            1, C); all but x may be None.
        eps: added to the variance.
        rms: RMSNorm, which takes no mean.

    Returns:
        y, t_y in x's dtype; mean, rstd (B, T), and all of the computation, in float32 (float64 for float64). t_y is
        None without any tangent, mean is None for RMSNorm.

    Equivalent to:
        `torch.func.jvp(reference.norm, (x, weight, bias, scale, shift), (t_x, t_weight, ...))`
    """
    x = inputs[0].primal
    dtype, taken = accumulator_dtype(x), memories(inputs)
    y, t_y = Rows(x.shape, x.dtype, x.device), Rows(x.shape, x.dtype, x.device)
    mean, rstd = (Rows(x.shape[:-1], dtype, x.device) for _ in range(2))
    for at in row_blocks(x):
        of_y, *statistics = forward_block(parts(inputs, at), eps=eps, rms=rms, dtype=dtype)
        for result, found in zip((y, t_y, mean, rstd), (*of_y, *statistics), strict=True):
            if found is not None:
                result.put(found, at, taken)
    return [Pair(y.whole, t_y.whole)], (mean.whole, rstd.whole)


def forward_block(inputs: Pairs, *, eps: float, rms: bool, dtype: torch.dtype) -> tuple[Pair, Tensor | None, Tensor]:
    """Return ((y, t_y), mean, rstd) of some rows, in `dtype`; t_y may be a mere t_shift, in its shape and memory."""
    (x, t_x), weight, bias, scale, shift = inputs
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
    h = affine(Pair(xh, t_xh), _in(weight, dtype), _in(bias, dtype))
    return affine(h, _one_plus(scale, dtype), _in(shift, dtype)), mean, rstd.squeeze(-1)


def norm_backward(
    cotangents: Pairs, inputs: Pairs, saved: tuple[Any, Statistics], *, rms: bool, needs: Needs
) -> list[Pair]:
    """Return the gradients of <dy, y> + <dt_y, t_y>, in pairs as `needs`.

    Args:
        cotangents: ((dy, dt_y),). Without dt_y this is the primal backward, and no tangent is read; with dt_y, dy may
            be None.
        inputs, rms: as in `norm_forward`.
        saved: its outputs, which aren't read, and mean and rstd.
        needs: which gradients of x, weight, bias, scale, shift and of their tangents are wanted; the others are None.

    Returns:
        (dx, dt_x), (dweight, dt_weight), ..., each in the shape and dtype of its argument.

    Raises:
        ValueError: there is no cotangent.
    """
    ((dy, dt_y),) = cotangents
    if dt_y is None and dy is None:
        raise ValueError("dy: expected a tensor where dt_y is None, got None")
    (x, _), _, _, (scale, _), (shift, _) = inputs
    mean, rstd = saved[1]
    assert rstd is not None
    grads = Gradients(inputs, needs, x, cotangents)
    blocks, centred = plan(x, scale, shift, mean, rstd, primal=dt_y is None)
    if not centred and scale is None and shift is None and x.dtype == rstd.dtype:
        blocks = [()]  # one kernel, without a temporary
    for at in blocks:
        statistics = (part(mean, at), part(rstd, at))
        (of_y,) = parts(cotangents, at)
        block = backward_block(of_y, parts(inputs, at), statistics, rms=rms, needs=needs, centred=centred)
        grads.put(block, at)
    return grads.results()


def plan(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, mean: Tensor | None, rstd: Tensor, *, primal: bool
) -> tuple[list[At], bool]:
    """Return the blocks of a backward pass, and whether their rows have to be centred.

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
    cotangent: Pair, inputs: Pairs, statistics: Statistics, *, rms: bool, needs: Needs, centred: bool = True
) -> list[Pair]:
    """Return the gradients at some rows, in float32 or better; those of parameters may still want to be summed.

    None is zero, or was not asked for; some that were not asked for may be there. They may be the cotangents.
    Without `centred`, LayerNorm's primal backward takes x as it is: see `plan`.
    """
    (dy, dt_y), (mean, rstd) = cotangent, statistics
    assert rstd is not None
    if dt_y is None and mean is not None and _are_vectors(inputs[3].primal, inputs[4].primal):
        return _native_backward(dy, [x for x, _ in inputs], mean, rstd, needs, centred)
    if dt_y is None:
        of_y, inputs = Pair(dy), without_tangents(inputs)
        wants = [of_primal for of_primal, _ in needs]
    else:
        of_y = Pair(dt_y, dy)
        wants = [of_primal or of_tangent for of_primal, of_tangent in needs]
    (x, t_x), weight, bias, scale, _ = inputs
    dtype, rstd = rstd.dtype, rstd.unsqueeze(-1)
    rows = x.to(dtype) if mean is None else x.to(dtype) - mean.unsqueeze(-1)
    of_y, weights = _in(of_y, dtype), _in(weight, dtype)
    of_h = affine(of_y, _one_plus(scale, dtype))
    found = [ABSENT, ABSENT, of_h, ABSENT, of_y]
    core = _Normed(rows, None, rstd, rms)
    a, t_xh = (None, None)
    if t_x is not None:
        t_rows = t_x.to(dtype)
        a = core.along(t_rows)
        t_xh = core.pull_back(t_rows, a)
    if wants[0]:
        found[0] = _input_gradient(affine(of_h, weights), core, t_xh, a)
    if wants[1]:
        found[1] = affine(of_h, Pair(core.xh, t_xh))
    if wants[3]:
        found[3] = affine(of_y, affine(Pair(core.xh, t_xh), weights, _in(bias, dtype)))
    return found if dt_y is None else [Pair(tangent, value) for value, tangent in found]


def _are_vectors(*modulations: Tensor | None) -> bool:
    return all(a is None or a.shape[:2] == (1, 1) for a in modulations)


def _native_backward(
    dy: Tensor, primals: Sequence[Any], mean: Tensor, rstd: Tensor, needs: Needs, centred: bool
) -> list[Pair]:
    """Return the primal gradients of a LayerNorm by PyTorch's kernel, whose weight is weight (1 + scale)."""
    x, weight, bias, scale, _ = primals
    dtype, mean, rstd = rstd.dtype, mean.unsqueeze(-1), rstd.unsqueeze(-1)
    rows = x.to(dtype)
    if centred:
        rows, mean = rows - mean, torch.zeros_like(mean)
    weight, bias = cast(weight, dtype), cast(bias, dtype)
    factor = None if scale is None else 1 + scale.to(dtype).flatten()
    gamma = factor if weight is None else weight if factor is None else weight * factor
    parameters = any(of_primal for of_primal, _ in needs[1:])
    if gamma is None and parameters:
        gamma = rows.new_ones(rows.shape[-1])
    dx, along, total = torch.ops.aten.native_layer_norm_backward(
        dy.to(dtype), rows, rows.shape[-1:], mean, rstd, gamma, gamma, (needs[0][0], parameters, parameters)
    )
    if not parameters:
        return [Pair(dx), *[ABSENT] * 4]
    dweight, dbias = (along, total) if factor is None else (along * factor, total * factor)
    dscale = along if weight is None else along * weight
    dscale = dscale if bias is None else torch.addcmul(dscale, total, bias)
    return list(map(Pair, (dx, dweight, dbias, dscale[None, None], total[None, None])))


class _Normed:
    """Rows, centred for LayerNorm, and what is normalised of them."""

    def __init__(self, rows: Tensor, xh: Tensor | None, rstd: Tensor, rms: bool) -> None:
        self.rows, self._xh, self.rstd, self._rms = rows, xh, rstd, rms

    @property
    def xh(self) -> Tensor:
        """Return the normalised rows, made once somebody asks."""
        if self._xh is None:
            self._xh = self.rows * self.rstd
        return self._xh

    def along(self, u: Tensor) -> Tensor:
        """Return mean(xh u)."""
        return (self.xh * u).mean(dim=-1, keepdim=True)

    def pull_back(self, u: Tensor, along: Tensor | None = None) -> Tensor:
        """Return rstd Pi(u); `along` is mean(xh u), for who has it."""
        if self._rms:
            return torch.addcmul(u, self.xh, self.along(u) if along is None else along, value=-1).mul_(self.rstd)
        shape, zero = self.rows.shape[-1:], torch.zeros_like(self.rstd)
        only_input = (True, False, False)
        return torch.ops.aten.native_layer_norm_backward(u, self.rows, shape, zero, self.rstd, None, None, only_input)[
            0
        ]


def _in(x: Pair, dtype: torch.dtype) -> Pair:
    return Pair(cast(x.primal, dtype), cast(x.tangent, dtype))


def _one_plus(scale: Pair, dtype: torch.dtype) -> Pair:
    return Pair(None if scale.primal is None else 1 + scale.primal.to(dtype), cast(scale.tangent, dtype))


def _input_gradient(of_xh: Pair, core: _Normed, t_xh: Tensor | None, a: Tensor | None) -> Pair:
    """Return rstd Pi(dxh) and its tangent; `a` is mean(xh t_x)."""
    dxh, t_dxh = of_xh
    along = None if t_xh is None else core.along(dxh)
    value = core.pull_back(dxh, along)
    tangent = None if t_dxh is None else core.pull_back(t_dxh)
    if t_xh is not None and a is not None and along is not None:
        other = (t_xh * dxh).mean(dim=-1, keepdim=True)
        change = (t_xh * along).addcmul_(core.xh, other).addcmul_(value, a).mul_(core.rstd)
        tangent = change.neg_() if tangent is None else tangent.sub_(change)
    return Pair(value, tangent)


def fresh(x: Tensor, like: Tensor) -> Tensor:
    """Return a copy of x in the dtype of `like`, contiguous and in memory of its own."""
    return like.new_empty(like.shape).copy_(x)
