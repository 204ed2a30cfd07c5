"""Share between the norms' directions how tensors reach the kernels, and the rules by which pairs combine.

A pair is a primal tile and its tangent; a tangent of None is zero, and leaves out its loads and sums.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import Pairs, check_dtype
from .limits import WIDEST_ROW


class Strided(NamedTuple):
    """Tensor (B, T, C) as the kernel receives it."""

    ptr: Any
    stride_b: int
    stride_c: int
    stride_t: int


class StridedRow(NamedTuple):
    """Tensor (B, 1, C), loaded once for all rows of a program. The kernel tells it by its length."""

    ptr: Any
    stride_b: int
    stride_c: int


Source = Strided | StridedRow


class Inputs(NamedTuple):
    """Inputs that the kernels read. None is left out: a factor of one, an addend of zero, a tangent of zero.

    The rows to normalise are x, or x + gate∘h where there is an h.
    """

    x: Any
    t_x: Any
    weight: Any = None
    t_weight: Any = None
    bias: Any = None
    t_bias: Any = None
    scale: Any = None
    t_scale: Any = None
    shift: Any = None
    t_shift: Any = None
    h: Any = None
    t_h: Any = None
    gate: Any = None
    t_gate: Any = None


def inputs_of(pairs: Pairs) -> Inputs:
    """Return the inputs of pairs of x, weight, bias, scale, shift and, for a gated norm, h and gate."""
    return Inputs(*[x for pair in pairs for x in pair])


def check(named: Mapping[str, tuple[Tensor | None, Tensor | None]]) -> None:
    """Raise TypeError for a dtype of the rows, ValueError for their width or a tangent of nothing."""
    for name in ("x", "h"):
        x, _ = named.get(name, (None, None))
        if x is not None:
            check_dtype(name, x)
        if x is not None and x.shape[-1] > WIDEST_ROW:
            raise ValueError(f"{name}: expected at most {WIDEST_ROW} channels for the Triton kernel, got {x.shape[-1]}")
    for name, (primal, tangent) in named.items():
        if primal is None and tangent is not None:
            raise ValueError(f"t_{name}: expected None without a {name}, got a tensor")


def strided(x: Tensor | None) -> Source | None:
    """Return a (B or 1, T or 1, C) or (C,) tensor as a kernel receives it."""
    if x is None:
        return None
    x = x.expand(1, 1, -1) if x.dim() == 1 else x
    stride_b, stride_t, stride_c = x.stride()
    row = StridedRow(x, 0 if x.shape[0] == 1 else stride_b, stride_c)
    return row if x.shape[1] == 1 else Strided(*row, stride_t)


@triton.jit
def load(x, b, offs_t, offs_c, live, C: tl.constexpr):
    """Load (ROWS, BLOCK_C), or (1, BLOCK_C) if all rows are the same, in float32 and zero beyond the edges."""
    ptrs = x.ptr + b * x.stride_b + offs_c[None, :] * x.stride_c
    if len(x) == 3:
        tile = tl.load(ptrs, mask=(offs_c < C)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs + offs_t.to(tl.int64)[:, None] * x.stride_t, mask=live, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def load_or_none(x, b, offs_t, offs_c, live, C: tl.constexpr):
    """Load like `load`; None gives None."""
    if x is None:
        return None
    else:
        return load(x, b, offs_t, offs_c, live, C)


@triton.jit
def load_rows(IN, b, offs_t, offs_c, live, C: tl.constexpr):
    """Load the pair to normalise: x, or x + gate∘h."""
    x = load(IN.x, b, offs_t, offs_c, live, C)  # (ROWS, BLOCK_C)
    t_x = load_or_none(IN.t_x, b, offs_t, offs_c, live, C)  # (ROWS, BLOCK_C)
    if IN.h is not None:
        h = load(IN.h, b, offs_t, offs_c, live, C)  # (ROWS, BLOCK_C)
        t_h = load_or_none(IN.t_h, b, offs_t, offs_c, live, C)  # (ROWS, BLOCK_C)
        h, t_h = times(h, t_h, IN.gate, IN.t_gate, 0.0, b, offs_t, offs_c, live, C)
        x = x + h
        t_x = add(t_x, t_h)
    return pair(x, t_x)


@triton.jit
def times(y, t_y, FACTOR, T_FACTOR, PLUS: tl.constexpr, b, offs_t, offs_c, live, C: tl.constexpr):
    """Multiply a pair by factor + PLUS, by the product rule."""
    if FACTOR is not None:
        factor = load(FACTOR, b, offs_t, offs_c, live, C) + PLUS
        if t_y is not None:
            t_y = t_y * factor
        if T_FACTOR is not None:
            t_y = add(t_y, y * load(T_FACTOR, b, offs_t, offs_c, live, C))
        y = y * factor
    return pair(y, t_y)


@triton.jit
def plus(y, t_y, ADDEND, T_ADDEND, b, offs_t, offs_c, live, C: tl.constexpr):
    """Add an addend to a pair, by the sum rule."""
    if ADDEND is not None:
        y = y + load(ADDEND, b, offs_t, offs_c, live, C)
        if T_ADDEND is not None:
            t_y = add(t_y, tl.broadcast_to(load(T_ADDEND, b, offs_t, offs_c, live, C), y.shape))
    return pair(y, t_y)


@triton.jit
def times_backward(dy, dt_y, FACTOR, T_FACTOR, PLUS: tl.constexpr, at, C: tl.constexpr):
    """Return the cotangents of x and t_x where y = x (factor + PLUS)."""
    b, offs_t, offs_c, live = at
    if FACTOR is not None:
        factor = load(FACTOR, b, offs_t, offs_c, live, C) + PLUS
        dy = multiply(dy, factor)
        if T_FACTOR is not None:
            dy = add(dy, multiply(dt_y, load(T_FACTOR, b, offs_t, offs_c, live, C)))
        dt_y = multiply(dt_y, factor)
    return pair(dy, dt_y)


@triton.jit
def factor_gradient(dy, dt_y, x, t_x):
    """Return the gradients of a factor of x and of its tangent, before any sum: dy∘x + dt_y∘t_x, and dt_y∘x."""
    return pair(add(multiply(dy, x), multiply(dt_y, t_x)), multiply(dt_y, x))


@triton.jit
def pair(x, y):
    """Return (x, y).

    Triton accepts a None that a function returned as an argument, but not as an element of a tuple.
    """
    return x, y


@triton.jit
def add(x, y):
    """Return x + y, where None is zero."""
    if x is None:
        return y
    elif y is None:
        return x
    else:
        return x + y


@triton.jit
def multiply(x, y):
    """Return x * y, where None is zero."""
    if (x is None) or (y is None):
        return None
    else:
        return x * y


@triton.jit
def store_rows(ptr, rows, offs_c, live, x, C: tl.constexpr):
    """Write a tile to rows of a contiguous (..., C) tensor; a tile of None is zeros, and no tensor takes nothing."""
    if ptr is not None:
        ptrs = ptr + rows.to(tl.int64)[:, None] * C + offs_c[None, :]
        if x is None:
            tl.store(ptrs, tl.zeros(live.shape, ptr.dtype.element_ty), mask=live)
        else:
            tl.store(ptrs, x.to(ptr.dtype.element_ty), mask=live)


@triton.jit
def zero_sums(WANTED, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return a running sum for each that is wanted."""
    sums = ()
    for i in tl.static_range(len(WANTED)):
        if WANTED[i] is None:
            sums = sums + ((),)
        else:
            sums = sums + (tl.zeros((ROWS, BLOCK_C), tl.float32),)
    return sums


@triton.jit
def in_order(dweight, dbias, dscale, dshift, dgate, dt_weight, dt_bias, dt_scale, dt_shift, dt_gate):
    """Return these in the order of `Sums`; see `pair`."""
    return dweight, dbias, dscale, dshift, dgate, dt_weight, dt_bias, dt_scale, dt_shift, dt_gate


@triton.jit
def summed_up(sums, WANTED, found):
    """Return the running sums with what was found."""
    new = ()
    for i in tl.static_range(len(WANTED)):
        if WANTED[i] is None:
            new = new + ((),)
        else:
            new = new + (add(sums[i], found[i]),)
    return new
