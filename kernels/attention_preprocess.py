"""Compute the statistics of each query that the tiles of attention's backward need, from its o and t_o."""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .attention_bands import band, first_row, locate, visible
from .attention_tile import LOG2_E, LOWEST, indices, logits, seen
from .tiles import Strided, add_cross, at_least, load_tile, with_rests

FAR = tl.constexpr(1024.0)  # Beyond this |lse|, float32 holds too few of its digits.


class Saved(NamedTuple):
    """Results that the forward left, and the cotangents of its statistics."""

    o: Strided
    t_o: Strided | None
    o_rest: Strided | None
    t_o_rest: Strided | None
    lse: Tensor
    d_lse: Tensor | None
    d_mu: Tensor | None


@triton.jit
def preprocess_kernel(
    IN, CO, SAVED, STATISTICS, P, scale,
    D: tl.constexpr, D_V: tl.constexpr, LOWER_RIGHT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Write the statistics of BLOCK_N queries of one head, whatever sequences they are in."""
    tiles_n = tl.cdiv(P.rows, BLOCK_N)
    pid = tl.program_id(0)
    start, bh = (pid % tiles_n) * BLOCK_N, pid // tiles_n
    b, h, origin = bh // P.heads, bh % P.heads, start * 0
    live = start + tl.arange(0, BLOCK_N) < P.rows
    rows = first_row(P, b, h, start) + tl.arange(0, BLOCK_N)

    saved = tl.load(SAVED.lse + rows, mask=live, other=float("-inf"))
    dead = saved == float("-inf")
    lse = tl.where(dead, float("inf"), at_least(saved, LOWEST / 2) * LOG2_E)
    if STATISTICS.rest is not None:
        rest = tl.zeros([BLOCK_N], tl.float32)
        far = (tl.abs(saved) > FAR) & ~dead
        if tl.max(far.to(tl.int32), 0) > 0:
            top, log_total = _split_lse(IN, P, b, h, start, scale, D, LOWER_RIGHT, UNIT, PRECISION, BLOCK_N, BLOCK_M)
            lse = tl.where(far, top, lse)
            rest = tl.where(far, log_total, rest)
        tl.store(STATISTICS.rest + rows, rest, mask=live)
    tl.store(STATISTICS.lse + rows, lse, mask=live)

    o = _load_unrounded(SAVED.o, SAVED.o_rest, b, h, origin, start, P.rows, BLOCK_N, D_V, UNIT)
    delta = tl.zeros([BLOCK_N], tl.float32)
    if CO.do is not None:
        delta = _add_row_dot(delta, load_tile(CO.do, b, h, origin, start, P.rows, BLOCK_N, D_V, UNIT), o)
    if SAVED.d_lse is not None:
        delta -= tl.load(SAVED.d_lse + rows, mask=live, other=0.0)
    delta_t = tl.zeros([BLOCK_N], tl.float32)
    if CO.dt_o is not None:
        dt_o = load_tile(CO.dt_o, b, h, origin, start, P.rows, BLOCK_N, D_V, UNIT)
        t_o = _load_unrounded(SAVED.t_o, SAVED.t_o_rest, b, h, origin, start, P.rows, BLOCK_N, D_V, UNIT)
        delta = _add_row_dot(delta, dt_o, t_o)
        delta_t = _add_row_dot(delta_t, dt_o, o)
    if SAVED.d_mu is not None:
        delta_t -= tl.load(SAVED.d_mu + rows, mask=live, other=0.0)
    tl.store(STATISTICS.delta + rows, tl.where(dead, 0.0, delta), mask=live)
    if STATISTICS.delta_t is not None:
        tl.store(STATISTICS.delta_t + rows, tl.where(dead, 0.0, delta_t), mask=live)


@triton.jit
def _load_unrounded(
    x, rest, b, h, first, start, n, ROWS: tl.constexpr, D: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """Load rows of x in float32, with what rounding took from them where the forward kept it."""
    rest_rows = None
    if rest is not None:
        rest_rows = load_tile(rest, b, h, first, start, n, ROWS, D, UNIT)
    return with_rests(load_tile(x, b, h, first, start, n, ROWS, D, UNIT), rest_rows)


@triton.jit
def _add_row_dot(acc, x, y):
    """Return acc + rowsum(x∘y)."""
    for i in tl.static_range(len(x)):
        acc += tl.sum(x[i].to(tl.float32) * y[i], 1)
    return acc


@triton.jit
def _split_lse(
    IN, P, b, h, start_n, scale,
    D: tl.constexpr, LOWER_RIGHT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Return lse as two numbers, of which one alone would round a huge lse too coarsely, in units of log 2.

    They are the largest S of each query, and log2 rowsum exp2(S - it).
    """
    _, origin, n, _, m = locate(P, b)
    low, high = band(P, n, m, LOWER_RIGHT)
    begin, _, _, end = visible(start_n, low, high, m, BLOCK_N, BLOCK_M)
    q = load_tile(IN.q, b, h, origin, start_n, n, BLOCK_N, D, UNIT)
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start_m in tl.range(begin, end, BLOCK_M):
        k = load_tile(IN.k, b, h // P.group, origin, start_m, m, BLOCK_M, D, UNIT)
        i, j = indices(start_n, start_m, BLOCK_N, BLOCK_M, False)
        at = (b, h, i, j, n, m)
        s = add_cross(tl.zeros((BLOCK_N, BLOCK_M), tl.float32), q, k, False, PRECISION)
        s = tl.where(seen(at, low, high), logits(s, IN, at, scale), float("-inf"))
        top_new = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - top_new) + tl.sum(tl.exp2(s - top_new[:, None]), 1)
        top = top_new
    return top, tl.log2(at_least(total, 0.5))  # The total is 1 or more, except in dead rows.
