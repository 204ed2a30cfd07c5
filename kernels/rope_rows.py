"""Share between the directions of `qk_norm_rope` how tensors reach the kernels, and the rules for a head's halves.

A row, the channels of one head of one token, is held as a pair (u, v) of tiles (ROWS, HALF): entry i of u and of v turn
together. None instead of a pair is zero, and leaves out its loads and sums.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Pairs, check_dtype
from .limits import WIDEST_ROTATED_HEAD
from .tiles import strided


class Channels(NamedTuple):
    """Tensor (D,) as the kernel receives it."""

    ptr: Any
    stride: int


class Angles(NamedTuple):
    """Angles as cos and sin, (B or 1, L, D/2) each and both of the same strides. No tensors are no rotation."""

    cos: Any
    sin: Any
    stride_b: int
    stride_n: int
    stride_d: int


class Side(NamedTuple):
    """Side that the kernels read, queries or keys: rows are heads of tokens of samples, heads numbered fastest."""

    x: Any
    t_x: Any
    weight: Any
    t_weight: Any
    bias: Any
    t_bias: Any
    dy: Any
    dt_y: Any
    heads: int
    length: int
    rows: int


def check(q: Tensor, k: Tensor) -> None:
    """Raise TypeError for a dtype, ValueError for a head dim that the kernels cannot take."""
    for name, x in (("q", q), ("k", k)):
        check_dtype(name, x)
        if x.shape[-1] % 2 or not 2 <= x.shape[-1] <= WIDEST_ROTATED_HEAD:
            raise ValueError(
                f"{name}: expected an even head dim of at most {WIDEST_ROTATED_HEAD} for the Triton kernel, got "
                f"{x.shape[-1]}"
            )


def side_of(unit: int, inputs: Pairs, of_y: tuple[Tensor | None, Tensor | None] = (None, None)) -> Side:
    """Return queries or keys with their weight and bias, by pointers and strides, of rows in units of `unit` elements.

    of_y: the cotangents of the output and of its tangent. See `stride_unit`.
    """
    (x, t_x), (weight, t_weight), (bias, t_bias) = inputs
    batch, heads, length, _ = x.shape
    w, t_w, b, t_b = (None if a is None else Channels(a, a.stride(0)) for a in (weight, t_weight, bias, t_bias))
    rows, t_rows, d_rows, dt_rows = (strided(a, unit) for a in (x, t_x, *of_y))
    return Side(rows, t_rows, w, t_w, b, t_b, d_rows, dt_rows, heads, length, batch * heads * length)


def angles_of(cos: Tensor | None, sin: Tensor | None) -> Angles:
    """Return the angles by pointers and strides."""
    if cos is None or sin is None:
        return Angles(None, None, 0, 0, 0)
    cos, sin = torch.broadcast_tensors(cos, sin)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return Angles(cos, sin, 0 if cos.shape[0] == 1 else cos.stride(0), cos.stride(1), cos.stride(2))


def empty(x: Tensor) -> Tensor:
    """Return memory like x, contiguous and uninitialised: a kernel writes every element."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@triton.jit
def rows_of(X, rows):
    """Return sample, head and token of rows, their number in a contiguous (B, H, N, D) tensor, and which exist."""
    exists = rows < X.rows
    token = rows // X.heads
    h = (rows % X.heads).to(tl.int64)
    n = (token % X.length).to(tl.int64)
    b = (token // X.length).to(tl.int64)
    return b, h, n, (b * X.heads + h) * X.length + n, exists


@triton.jit
def load_halves(
    X, at, D: tl.constexpr, UNIT: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr
):
    """Load a pair in float32, zero beyond the edges; None gives None."""
    if X is None:
        return None
    else:
        b, h, n, _, exists = at
        ptrs = X.ptr + ((b * X.stride_b + h * X.stride_h + n * X.stride_n) * UNIT)[:, None]
        if INTERLEAVED:
            offs_d = tl.arange(0, 2 * HALF)
            x = tl.load(ptrs + offs_d[None, :] * X.stride_d, mask=exists[:, None] & (offs_d < D)[None, :], other=0.0)
            u, v = tl.split(tl.reshape(x.to(tl.float32), (ROWS, HALF, 2)))
        else:
            offs_d = tl.arange(0, HALF)
            live = exists[:, None] & (offs_d < D // 2)[None, :]
            u = tl.load(ptrs + offs_d[None, :] * X.stride_d, mask=live, other=0.0).to(tl.float32)
            v = tl.load(ptrs + (offs_d + D // 2)[None, :] * X.stride_d, mask=live, other=0.0).to(tl.float32)
        return u, v


@triton.jit
def store_halves(ptr, x, at, D: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Write a pair to rows of a contiguous tensor; a pair of None is zeros, and no tensor takes nothing."""
    if ptr is not None:
        _, _, _, rows, exists = at
        ptrs = ptr + (rows * D)[:, None]
        if x is None:
            u = tl.zeros((ROWS, HALF), tl.float32)
            v = u
        else:
            u, v = x
        if INTERLEAVED:
            offs_d = tl.arange(0, 2 * HALF)
            y = tl.reshape(tl.join(u, v), (ROWS, 2 * HALF)).to(ptr.dtype.element_ty)
            tl.store(ptrs + offs_d[None, :], y, mask=exists[:, None] & (offs_d < D)[None, :])
        else:
            offs_d = tl.arange(0, HALF)
            live = exists[:, None] & (offs_d < D // 2)[None, :]
            tl.store(ptrs + offs_d[None, :], u.to(ptr.dtype.element_ty), mask=live)
            tl.store(ptrs + (offs_d + D // 2)[None, :], v.to(ptr.dtype.element_ty), mask=live)


@triton.jit
def channels_of(D: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr):
    """Return the channels of u and of v."""
    offs = tl.arange(0, HALF)
    if INTERLEAVED:
        return 2 * offs, 2 * offs + 1
    else:
        return offs, offs + D // 2


@triton.jit
def load_channels(W, D: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr):
    """Load a pair (1, HALF) of a weight or a bias in float32; None gives None."""
    if W is None:
        return None
    else:
        if INTERLEAVED:
            offs_d = tl.arange(0, 2 * HALF)
            w = tl.load(W.ptr + offs_d * W.stride, mask=offs_d < D, other=0.0).to(tl.float32)
            u, v = tl.split(tl.reshape(w, (HALF, 2)))
        else:
            offs_d = tl.arange(0, HALF)
            u = tl.load(W.ptr + offs_d * W.stride, mask=offs_d < D // 2, other=0.0).to(tl.float32)
            v = tl.load(W.ptr + (offs_d + D // 2) * W.stride, mask=offs_d < D // 2, other=0.0).to(tl.float32)
        return u[None, :], v[None, :]


@triton.jit
def load_angles(ANGLES, at, D: tl.constexpr, HALF: tl.constexpr):
    """Load (cos, sin), each (ROWS, HALF); no angles give None."""
    if ANGLES.cos is None:
        return None
    else:
        b, _, n, _, exists = at
        offs = tl.arange(0, HALF)
        at_angles = (b * ANGLES.stride_b + n * ANGLES.stride_n)[:, None] + offs[None, :] * ANGLES.stride_d
        live = exists[:, None] & (offs < D // 2)[None, :]
        cos = tl.load(ANGLES.cos + at_angles, mask=live, other=0.0).to(tl.float32)
        sin = tl.load(ANGLES.sin + at_angles, mask=live, other=0.0).to(tl.float32)
        return cos, sin


@triton.jit
def turned(x, angles, BACK: tl.constexpr):
    """Return R x or, if BACK, its transpose applied to x, which is the inverse."""
    if x is None:
        return None
    elif angles is None:
        return x
    else:
        u, v = x
        cos, sin = angles
        if BACK:
            return u * cos + v * sin, v * cos - u * sin
        else:
            return u * cos - v * sin, u * sin + v * cos


@triton.jit
def times(x, y):
    """Return x∘y, where None is zero."""
    if (x is None) or (y is None):
        return None
    else:
        return x[0] * y[0], x[1] * y[1]


@triton.jit
def scaled(x, factor):
    """Return x∘factor, where a factor of None is one."""
    if factor is None:
        return x
    else:
        return times(x, factor)


@triton.jit
def plus(x, y):
    """Return x + y, where None is zero."""
    if x is None:
        return y
    elif y is None:
        return x
    else:
        return x[0] + y[0], x[1] + y[1]


@triton.jit
def mean_of(x, y, D: tl.constexpr):
    """Return mean(x∘y) over the channels, (ROWS, 1)."""
    return ((tl.sum(x[0] * y[0], 1) + tl.sum(x[1] * y[1], 1)) / D)[:, None]


@triton.jit
def centred(x, live, D: tl.constexpr):
    """Return x - mean x, still zero beyond the edges."""
    mean = ((tl.sum(x[0], 1) + tl.sum(x[1], 1)) / D)[:, None]
    return tl.where(live, x[0] - mean, 0.0), tl.where(live, x[1] - mean, 0.0)


@triton.jit
def normalised(x, t_x, exists, eps, D: tl.constexpr, NORM: tl.constexpr, HALF: tl.constexpr):
    """Return xh, t_xh, a = mean(xh∘t_x) and rstd; for NORM "none", return x and t_x themselves."""
    if NORM == "none":
        return x, t_x, None, None
    else:
        live = exists[:, None] & (tl.arange(0, HALF) < D // 2)[None, :]
        if NORM == "layer":
            # A large mean leaves its own rounding in every entry, which may be no small part of a tiny spread.
            x = centred(centred(x, live, D), live, D)
        rstd = tl.where(exists[:, None], 1 / tl.sqrt(mean_of(x, x, D) + eps), 0.0)
        xh = x[0] * rstd, x[1] * rstd
        if t_x is None:
            return xh, None, None, rstd
        else:
            projected, a = project(t_x, xh, live, D, NORM)
            return xh, (projected[0] * rstd, projected[1] * rstd), a, rstd


@triton.jit
def project(x, xh, live, D: tl.constexpr, NORM: tl.constexpr):
    """Return Pi(x), and mean(xh∘x)."""
    along = mean_of(xh, x, D)
    if NORM == "layer":
        x = centred(x, live, D)
    return (x[0] - xh[0] * along, x[1] - xh[1] * along), along


@triton.jit
def back_through_norm(
    dxh, dt_xh, xh, t_xh, a, rstd, exists, D: tl.constexpr, NORM: tl.constexpr, HALF: tl.constexpr
):  # fmt: skip
    """Return the cotangents of x and of t_x."""
    if NORM == "none":
        return dxh, dt_xh
    else:
        live = exists[:, None] & (tl.arange(0, HALF) < D // 2)[None, :]
        dx, dt_x = None, None
        if dt_xh is not None:
            projected, along = project(dt_xh, xh, live, D, NORM)
            dt_x = projected[0] * rstd, projected[1] * rstd
            if t_xh is not None:
                across = mean_of(t_xh, dt_xh, D)
                dx = (
                    -(t_xh[0] * along + xh[0] * across + dt_x[0] * a),
                    -(t_xh[1] * along + xh[1] * across + dt_x[1] * a),
                )
        if dxh is not None:
            projected, _ = project(dxh, xh, live, D, NORM)
            dx = plus(dx, projected)
        if dx is not None:
            dx = dx[0] * rstd, dx[1] * rstd
        return dx, dt_x
