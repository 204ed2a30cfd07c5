"""Compute one tile of attention's backward, shared by the kernels for keys and for queries.

It is (BLOCK_N, BLOCK_M), or its transpose where BY_KEYS: so the left operand of every matmul into a gradient is what
has just been computed, and nothing has to be turned around. The statistics of the queries come as a column or,
BY_KEYS, as a row.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention_bands import first_row
from .tiles import Described, Strided, add_cross, add_crosses, add_pair, as_operand, at_least, load_tile, store_tile

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # It lies below every logit but -inf.


class Cotangents(NamedTuple):
    """Cotangents of o and t_o, each (B, H, N, D_V). None is a structural zero."""

    do: Strided | Described | None
    dt_o: Strided | Described | None


class Statistics(NamedTuple):
    """Statistics of each query, (B, H, N) in float32: P = exp2(S - lse - rest), all in units of log 2.

    rest is None unless a float mask may push lse too far from 0 to hold it. A query that sees no key has lse = inf.
    delta_t is None where no logit moves, or no cotangent asks how.
    """

    lse: Any
    rest: Any
    mu: Any
    delta: Any
    delta_t: Any


@triton.jit
def indices(start_n, start_m, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BY_KEYS: tl.constexpr):
    """Return the tile's queries and keys, shaped so that they broadcast to the tile."""
    offs_n, offs_m = start_n + tl.arange(0, BLOCK_N), start_m + tl.arange(0, BLOCK_M)
    if BY_KEYS:
        return offs_n[None, :], offs_m[:, None]
    else:
        return offs_n[:, None], offs_m[None, :]


@triton.jit
def load_statistics(STATISTICS, P, first_n, at):
    """Load all statistics of the tile's queries; None where there is none."""
    rest, mu, delta_t = None, None, None
    lse = _load_statistic(STATISTICS.lse, P, first_n, at)
    delta = _load_statistic(STATISTICS.delta, P, first_n, at)
    if STATISTICS.rest is not None:
        rest = _load_statistic(STATISTICS.rest, P, first_n, at)
    if STATISTICS.delta_t is not None:
        mu = _load_statistic(STATISTICS.mu, P, first_n, at)
        delta_t = _load_statistic(STATISTICS.delta_t, P, first_n, at)
    return lse, rest, mu, delta, delta_t


@triton.jit
def _load_statistic(ptr, P, first_n, at):
    """Load one of them: 0 beyond the last query, where q, do and dt_o are 0 as well, so that nothing comes of it."""
    b, h, i, _, n, _ = at
    return tl.load(ptr + first_row(P, b, h, first_n) + i, mask=i < n, other=0.0)


@triton.jit
def load_queries(
    IN, CO, b, h, first, start, n,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, UNIT: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Load (q, t_q, do, dt_o) of BLOCK_N queries, None where there is none."""
    t_q, do, dt_o = None, None, None
    q = load_tile(IN.q, b, h, first, start, n, BLOCK_N, D, UNIT, STREAM)
    if IN.t_q is not None:
        t_q = load_tile(IN.t_q, b, h, first, start, n, BLOCK_N, D, UNIT, STREAM)
    if CO.do is not None:
        do = load_tile(CO.do, b, h, first, start, n, BLOCK_N, D_V, UNIT, STREAM)
    if CO.dt_o is not None:
        dt_o = load_tile(CO.dt_o, b, h, first, start, n, BLOCK_N, D_V, UNIT, STREAM)
    return q, t_q, do, dt_o


@triton.jit
def load_keys(
    IN, b, h, first, start, m,
    BLOCK_M: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, UNIT: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Load (k, t_k, v, t_v) of BLOCK_M keys, None where there is none."""
    t_k, t_v = None, None
    k = load_tile(IN.k, b, h, first, start, m, BLOCK_M, D, UNIT, STREAM)
    v = load_tile(IN.v, b, h, first, start, m, BLOCK_M, D_V, UNIT, STREAM)
    if IN.t_k is not None:
        t_k = load_tile(IN.t_k, b, h, first, start, m, BLOCK_M, D, UNIT, STREAM)
    if IN.t_v is not None:
        t_v = load_tile(IN.t_v, b, h, first, start, m, BLOCK_M, D_V, UNIT, STREAM)
    return k, t_k, v, t_v


@triton.jit
def logits(s, IN, at, scale):
    """Return S under the mask, in units of log 2, from s = q kᵀ."""
    s *= scale * LOG2_E
    if IN.mask is not None:
        s = under_mask(s, IN.mask, at, True)
    return s


@triton.jit
def under_mask(s, MASK, at, EDGES: tl.constexpr):
    """Return s, in units of log 2, under a mask: -inf where a bool one is False, or with a float one added.

    With EDGES it is -inf beyond a float mask, too. The forward hides its edges itself: there it would spill registers.
    """
    _, _, i, _, n, _ = at
    if MASK.ptr.dtype.element_ty == tl.int1:
        return tl.where(load_mask(MASK, at, 0), s, float("-inf"))
    else:
        mask = load_mask(MASK, at, float("-inf") if EDGES else 0)
        # A row of finfo.min is not dead: all its keys weigh the same, and the change of units must not make it -inf. So
        # such a low value counts as LOWEST / 2, until the forward has an lse, which is finfo.min.
        bias = at_least(mask.to(tl.float32), LOWEST / 2) * LOG2_E
        dead = mask == float("-inf")
        if EDGES:
            dead = dead | (i >= n)
        return s + tl.where(dead, float("-inf"), bias)


@triton.jit
def add_tile(
    acc, query, key, statistics, IN, OUT, P, first_n, at, limits, scale,
    BY_KEYS: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Add a tile's share to (dk, dt_k, dv, dt_v) if BY_KEYS, otherwise to (dq, dt_q, (), ()).

    () is a gradient that nobody needs. limits is None for a tile that is seen whole, or (low, high, cut), of which low
    and high are used only if `cut`. The order of the matmuls keeps the fewest registers alive: at most P and two more
    tiles.
    """
    q, t_q, do, dt_o = query
    k, t_k, v, t_v = key
    lse, rest, mu, delta, delta_t = statistics
    d_mask, dt_mask = OUT
    if BY_KEYS:
        others = (q, t_q, do, dt_o)
    else:
        others = (k, t_k, do, dt_o)
    USES_S: tl.constexpr = (len(acc[0]) > 0) or (d_mask is not None)
    USES_T: tl.constexpr = USES_S or (len(acc[1]) > 0) or (dt_mask is not None)
    MOVES_V: tl.constexpr = (len(acc[2]) > 0) and (dt_o is not None)
    # A held operand is used as soon as possible, to free registers. A streamed one is loaded once for two products, and
    # the sums over tiles come last: otherwise the compiler would put off all but their loads before a loop over
    # columns.
    HELD: tl.constexpr = STREAM == 0
    MOVES: tl.constexpr = (delta_t is not None) and (USES_S or MOVES_V)
    JOINT: tl.constexpr = (delta_t is not None) and (dt_o is not None) and USES_S and not HELD

    _, _, i, j, _, _ = at
    zero = tl.zeros((i + j).shape, tl.float32)
    if HELD or not MOVES:
        s = add_cross(zero, q, k, BY_KEYS, PRECISION, D, STREAM)
    else:
        s, t = add_crosses(zero, zero, q, k, t_q, t_k, BY_KEYS, PRECISION, D, STREAM)
    s = logits(s, IN, at, scale) - _statistic(lse, P, first_n, at, BY_KEYS)
    if rest is not None:
        s -= _statistic(rest, P, first_n, at, BY_KEYS)
    if limits is not None:
        low, high, cut = limits
        if cut:
            s = tl.where(seen(at, low, high), s, float("-inf"))
    p = tl.exp2(s)
    p_low, pz_low, d_t_low, d_s_low = as_operand(p, q, PRECISION), None, None, None
    if HELD:
        acc = _add_products(acc, others, p_low, None, None, None, PRECISION, D, D_V, STREAM)

    d_s = zero
    if delta_t is not None:
        if MOVES:
            if HELD:
                t = zero
                if t_q is not None:
                    t = add_cross(t, t_q, k, BY_KEYS, PRECISION)
                if t_k is not None:
                    t = add_cross(t, q, t_k, BY_KEYS, PRECISION)
            z = _moved_logits(t, IN, at, scale) - _statistic(mu, P, first_n, at, BY_KEYS)
        if MOVES_V:
            pz_low = as_operand(p * z, q, PRECISION)
            if HELD:
                acc = _add_products(acc, others, None, pz_low, None, None, PRECISION, D, D_V, STREAM)
        if USES_T:
            w = zero
            if JOINT:
                w, g = add_crosses(zero, zero, dt_o, v, do, t_v, BY_KEYS, PRECISION, D_V, STREAM)
            elif dt_o is not None:
                w = add_cross(zero, dt_o, v, BY_KEYS, PRECISION, D_V, STREAM)
            d_t = p * (w - _statistic(delta_t, P, first_n, at, BY_KEYS))
            if dt_mask is not None:
                _store_mask(dt_mask, d_t, P, at)
            d_t_low = as_operand(d_t, q, PRECISION)
            if HELD:
                acc = _add_products(acc, others, None, None, d_t_low, None, PRECISION, D, D_V, STREAM)
        if USES_S:
            d_s = d_t * z
    if USES_S:
        if not JOINT:
            g = zero
            if do is not None:
                g = add_cross(g, do, v, BY_KEYS, PRECISION, D_V, STREAM)
            if (dt_o is not None) and (t_v is not None):
                g = add_cross(g, dt_o, t_v, BY_KEYS, PRECISION, D_V, STREAM)
        d_s += p * (g - _statistic(delta, P, first_n, at, BY_KEYS))
        if d_mask is not None:
            _store_mask(d_mask, d_s, P, at)
        d_s_low = as_operand(d_s, q, PRECISION)
        if HELD:
            acc = _add_products(acc, others, None, None, None, d_s_low, PRECISION, D, D_V, STREAM)
    if not HELD:
        acc = _add_products(acc, others, p_low, pz_low, d_t_low, d_s_low, PRECISION, D, D_V, STREAM)
    return acc


@triton.jit
def _add_products(
    acc, others, p, pz, d_t, d_s,
    PRECISION: tl.constexpr, D: tl.constexpr, D_V: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Add to the gradients what P, P_t, dT and dS give; None adds nothing: it is not needed, or comes another time."""
    dx, dt_x, dv, dt_v = acc
    x, t_x, do, dt_o = others
    dt_v, dv = add_pair(dt_v, dv, p, pz, dt_o, do, PRECISION, D_V, STREAM)
    dt_x, dx = add_pair(dt_x, dx, d_t, d_s, x, t_x, PRECISION, D, STREAM)
    return dx, dt_x, dv, dt_v


@triton.jit
def _statistic(x, P, first_n, at, BY_KEYS: tl.constexpr):
    """Load a statistic BY_KEYS, where each tile has its own; else all tiles have the same, loaded before."""
    if BY_KEYS:
        return _load_statistic(x, P, first_n, at)
    else:
        return x


@triton.jit
def _moved_logits(t, IN, at, scale):
    """Return T, from t = t_q kᵀ + q t_kᵀ."""
    t *= scale
    if IN.t_mask is not None:
        t += load_mask(IN.t_mask, at, 0).to(tl.float32)
    return t


@triton.jit
def seen(at, low, high):
    """Return whether the key is there, and lies in the query's band."""
    _, _, i, j, _, m = at
    return (j < m) & (j >= i + low) & (j <= i + high)


@triton.jit
def load_mask(MASK, at, beyond):
    """Load a tile of a mask, or its one row if all queries share it; beyond its edges it is `beyond`."""
    b, h, i, j, n, m = at
    ptrs = MASK.ptr + b.to(tl.int64) * MASK.stride_b + h.to(tl.int64) * MASK.stride_h + j.to(tl.int64) * MASK.stride_d
    live = j < m
    if MASK.stride_n is not None:
        ptrs, live = ptrs + i.to(tl.int64) * MASK.stride_n, live & (i < n)
    return tl.load(ptrs, mask=live, other=beyond)


@triton.jit
def _store_mask(ptr, x, P, at):
    """Write a tile of a contiguous (B, H, N, M) gradient."""
    b, h, i, j, n, m = at
    tl.store(ptr + first_row(P, b, h, i) * m + j, x.to(ptr.dtype.element_ty), mask=(i < n) & (j < m))


@triton.jit
def store_gradient(ptr, first, live, x, factor, D: tl.constexpr, STREAM: tl.constexpr):
    """Write the live rows of factor x, unless nobody needs them."""
    if ptr is not None:
        tile = ()
        for i in tl.static_range(len(x)):
            tile = tile + (x[i] * factor,)
        store_tile(ptr, first, live, tile, D, STREAM)
