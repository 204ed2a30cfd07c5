"""Row tiles of any width: a tile that is 72 wide is a tuple of a 64-wide and a 16-wide part.

Triton's tiles are powers of two. Padding a head dim of 72 to 128 would cost 1.78x the work; as 64 + 16, with the last 8
columns masked, it costs 1.11x. The helpers here take and return such tuples, and the kernels never look inside. With
STREAM nothing but sums is such a tuple: rows are loaded where they are multiplied, STREAM columns at a time.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

REST = tl.constexpr(256.0)  # This factor keeps what rounding took from a small float16 clear of the subnormal numbers.


class Strided(NamedTuple):
    """Tensor of 4 dimensions as a kernel receives it: pointer, then strides, all but the last in units of UNIT."""

    ptr: Any
    stride_b: int
    stride_h: int
    stride_n: int | None
    stride_d: int


class Described(NamedTuple):
    """Tensor of 4 dimensions as a kernel receives it for the copy engine (TMA) of GPUs from 9.0, by parts."""

    parts: tuple[TensorDescriptor, ...]


@triton.constexpr_function
def column_parts(width: int, stream: int = 0) -> tuple[tuple[int, int], ...]:
    """Cover `width` <= 256 columns by at most three powers of two from 16 to 128, as (first column, part width).

    Only the last may reach beyond `width`: 72 -> ((0, 64), (64, 16)), 96 -> ((0, 64), (64, 32)), 128 -> ((0, 128),).
    Of rows that are streamed all parts have the width `stream`.
    """
    if stream:
        return tuple((first, stream) for first in range(0, width, stream))
    narrowest = 16  # A tensor-core matmul sums over at least this many.
    while True:
        parts: list[tuple[int, int]] = []
        first, rest = 0, -(-width // narrowest) * narrowest
        while rest:
            part = min(128, 1 << (rest.bit_length() - 1))
            parts.append((first, part))
            first, rest = first + part, rest - part
        if len(parts) <= 3:
            return tuple(parts)
        narrowest *= 2


def stride_unit(*tensors: torch.Tensor | None) -> int:
    """Return the common factor, 8 or 1, that kernels take out of the batch, head and row strides of these tensors.

    Triton knows a stride to be aligned only when 16 divides it. Rows of 72 elements of 16 bits lie 144 bytes apart, fit
    for 16-byte loads, but 16 does not divide 72 and they would be loaded element by element. So kernels receive
    stride / 8 and multiply by a constant 8.
    """
    strides = (s for x in tensors if x is not None for size, s in zip(x.shape[:-1], x.stride()[:-1]) if size > 1)
    return 8 if all(s % 8 == 0 for s in strides) else 1


def strided(x: torch.Tensor | None, unit: int = 1) -> Strided | None:
    """Return a 4-D tensor for a kernel. A dimension of size 1 may have any stride; here it gets 0."""
    if x is None:
        return None
    units = (unit, unit, unit, 1)
    return Strided(x, *(0 if size == 1 else s // u for size, s, u in zip(x.shape, x.stride(), units)))


def describable(x: torch.Tensor) -> bool:
    """Return whether descriptors can name this tensor's elements: all aligned to 16 bytes, and none broadcast."""
    strides = [s for size, s in zip(x.shape[:-1], x.stride()[:-1]) if size > 1]
    aligned = all(s > 0 and s * x.element_size() % 16 == 0 for s in strides)
    return aligned and x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and x.numel() > 0


def described(x: torch.Tensor | None, height: int, stream: int = 0) -> Described | None:
    """Return a 4-D tensor for kernels that load tiles of that height; one descriptor does if rows are streamed."""
    if x is None:
        return None
    strides = [16 if size == 1 else s for size, s in zip(x.shape[:-1], x.stride()[:-1])] + [1]
    widths = [stream] if stream else [width for _, width in column_parts(x.shape[-1])]
    blocks = [[1, 1, height, width] for width in widths]
    return Described(tuple(TensorDescriptor(x, list(x.shape), strides, block) for block in blocks))


@triton.jit
def load_tile(
    x, b, h, first, start, n, ROWS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr, STREAM: tl.constexpr = 0
):  # fmt: skip
    """Load rows start ... start + ROWS - 1 of a sequence of n, whose row 0 is row `first` of head h of sample b.

    Rows from n on and columns from D on are zero. With STREAM nothing is loaded yet. The result then says from where
    the products below load STREAM columns at a time, each time anew.
    """
    PARTS: tl.constexpr = column_parts(D)
    tile = ()
    if len(x) == 1:  # Described
        if STREAM:
            tile = (x.parts[0], b, h, start)
        else:
            for i in tl.static_range(len(PARTS)):
                tile = tile + (x.parts[i].load([b, h, start, PARTS[i][0]]).reshape(ROWS, PARTS[i][1]),)
    else:
        rows = start + tl.arange(0, ROWS)
        head = (b.to(tl.int64) * x.stride_b + h.to(tl.int64) * x.stride_h + first.to(tl.int64) * x.stride_n) * UNIT
        if STREAM:
            tile = (x.ptr + head + rows.to(tl.int64)[:, None] * x.stride_n * UNIT, x.stride_d, (rows < n)[:, None])
        else:
            for i in tl.static_range(len(PARTS)):
                tile = tile + (_load_part(x, head, rows, rows < n, PARTS[i][0], PARTS[i][1], D, UNIT),)
    return tile


@triton.jit
def _load_columns(rows, first, D: tl.constexpr, STREAM: tl.constexpr):
    """Load STREAM columns of streamed rows, from column `first` on."""
    if len(rows) == 4:  # Described
        source, b, h, start = rows
        return source.load([b, h, start, first]).reshape(source.block_shape[2], STREAM)
    else:
        ptrs, stride, mask = rows
        cols = first + tl.arange(0, STREAM)
        if D % STREAM > 0:
            mask = mask & (cols[None, :] < D)
        return tl.load(ptrs + cols[None, :] * stride, mask=mask, other=0.0)


@triton.jit
def _load_part(x, head, rows, live, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr):
    cols = FIRST + tl.arange(0, WIDTH)
    ptrs = x.ptr + head + rows.to(tl.int64)[:, None] * x.stride_n * UNIT + cols[None, :] * x.stride_d
    mask = live[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (cols[None, :] < D)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _columns(rows, i, D: tl.constexpr, STREAM: tl.constexpr):
    """Return part i of the columns, which is there, or is loaded now."""
    if STREAM:
        return _load_columns(rows, i * STREAM, D, STREAM)
    else:
        return rows[i]


@triton.jit
def store_tile(ptr, first_row, live, x, D: tl.constexpr, STREAM: tl.constexpr = 0):
    """Write the live rows of x to rows first_row, first_row + 1, ... of a contiguous (..., D) tensor."""
    PARTS: tl.constexpr = column_parts(D, STREAM)
    for i in tl.static_range(len(PARTS)):
        _store_part(ptr + first_row * D, live, x[i], PARTS[i][0], PARTS[i][1], D)


@triton.jit
def store_with_rests(ptr, rest, first_row, live, x, D: tl.constexpr, STREAM: tl.constexpr):
    """Write x as `store_tile` does, and to `rest`, unless None, what rounding takes from x, times REST: exactly."""
    PARTS: tl.constexpr = column_parts(D, STREAM)
    for i in tl.static_range(len(PARTS)):
        low = x[i].to(ptr.dtype.element_ty)
        _store_part(ptr + first_row * D, live, low, PARTS[i][0], PARTS[i][1], D)
        if rest is not None:
            taken = x[i] * REST - low.to(tl.float32) * REST
            _store_part(rest + first_row * D, live, taken, PARTS[i][0], PARTS[i][1], D)


@triton.jit
def _store_part(ptr, live, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    rows = tl.arange(0, live.shape[0])
    cols = FIRST + tl.arange(0, WIDTH)
    mask = live[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (cols[None, :] < D)
    tl.store(ptr + rows[:, None] * D + cols[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def with_rests(x, rest):
    """Return rounded x as float32 plus what rounding took from it; a rest of None is zero."""
    tile = ()
    for i in tl.static_range(len(x)):
        if rest is None:
            tile = tile + (x[i].to(tl.float32),)
        else:
            tile = tile + (x[i].to(tl.float32) + rest[i].to(tl.float32) * (1 / REST),)
    return tile


@triton.jit
def zeros(ROWS: tl.constexpr, D: tl.constexpr, STREAM: tl.constexpr = 0):
    """Return a float32 accumulator (ROWS, D)."""
    PARTS: tl.constexpr = column_parts(D, STREAM)
    tile = ()
    for i in tl.static_range(len(PARTS)):
        tile = tile + (_zero_part(ROWS, PARTS[i][1]),)
    return tile


@triton.jit
def _zero_part(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros((ROWS, WIDTH), tl.float32)


@triton.jit
def add_cross(
    acc, x, y, TURNED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr = 0, STREAM: tl.constexpr = 0
):  # fmt: skip
    """Return acc + x yᵀ, TURNED acc + y xᵀ: the parts are of the summed dimension, acc is one plain tile."""
    if STREAM:
        for first in tl.range(0, D, STREAM):
            x_i, y_i = _load_columns(x, first, D, STREAM), _load_columns(y, first, D, STREAM)
            acc = _add_dot(acc, x_i, y_i, TURNED, PRECISION)
    else:
        for i in tl.static_range(len(x)):
            acc = _add_dot(acc, x[i], y[i], TURNED, PRECISION)
    return acc


@triton.jit
def add_crosses(
    a, b, x, y, t_x, t_y, TURNED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, STREAM: tl.constexpr
):  # fmt: skip
    """Return (a + x yᵀ, b + t_x yᵀ + x t_yᵀ) of streamed rows, loaded once for both; None is left out."""
    for first in tl.range(0, D, STREAM):
        x_i, y_i = _load_columns(x, first, D, STREAM), _load_columns(y, first, D, STREAM)
        a = _add_dot(a, x_i, y_i, TURNED, PRECISION)
        if t_x is not None:
            b = _add_dot(b, _load_columns(t_x, first, D, STREAM), y_i, TURNED, PRECISION)
        if t_y is not None:
            b = _add_dot(b, x_i, _load_columns(t_y, first, D, STREAM), TURNED, PRECISION)
    return a, b


@triton.jit
def _add_dot(acc, x, y, TURNED: tl.constexpr, PRECISION: tl.constexpr):
    if TURNED:
        return tl.dot(y, x.T, acc, input_precision=PRECISION)
    else:
        return tl.dot(x, y.T, acc, input_precision=PRECISION)


@triton.jit
def add_pair(first, second, a, b, x, y, PRECISION: tl.constexpr, D: tl.constexpr, STREAM: tl.constexpr):
    """Return (first + a x, second + a y + b x), part by part so that one of x serves both; () and None are left out."""
    PARTS: tl.constexpr = column_parts(D, STREAM)
    new_first, new_second = (), ()
    for i in tl.static_range(len(PARTS)):
        if (x is not None) and (((len(first) > 0) and (a is not None)) or ((len(second) > 0) and (b is not None))):
            x_i = _columns(x, i, D, STREAM)
        if len(first) > 0:
            sum_i = first[i]
            if (a is not None) and (x is not None):
                sum_i = tl.dot(a, x_i, sum_i, input_precision=PRECISION)
            new_first = new_first + (sum_i,)
        if len(second) > 0:
            sum_i = second[i]
            if (a is not None) and (y is not None):
                sum_i = tl.dot(a, _columns(y, i, D, STREAM), sum_i, input_precision=PRECISION)
            if (b is not None) and (x is not None):
                sum_i = tl.dot(b, x_i, sum_i, input_precision=PRECISION)
            new_second = new_second + (sum_i,)
    return new_first, new_second


@triton.jit
def as_operand(x, other, PRECISION: tl.constexpr):
    """Return float32 x as the matmul with `other` takes it: in its dtype, for TF32 rounded to a mantissa of 10 bits."""
    if PRECISION == "tf32":
        bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    else:
        return x.to(_element_type(other[0].dtype))


@triton.constexpr_function
def _element_type(dtype: Any) -> Any:
    """Return the element type of a tile, or of the pointers to it."""
    return dtype.element_ty if dtype.is_ptr() else dtype


@triton.jit
def at_least(x, least):
    """Return the larger of the two; NaN stays NaN, which `tl.maximum` by itself would replace."""
    return tl.maximum(x, least, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def scale_rows(x, factor):
    """Return factor ∘ x with one factor a row."""
    tile = ()
    for i in tl.static_range(len(x)):
        tile = tile + (x[i] * factor[:, None],)
    return tile


@triton.jit
def add_scaled_rows(x, factor, y):
    """Return x + factor ∘ y with one factor a row."""
    tile = ()
    for i in tl.static_range(len(x)):
        tile = tile + (x[i] + factor[:, None] * y[i],)
    return tile
