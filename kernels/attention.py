"""Attention and its tangent in one pass over the keys: two matmuls for o, up to four more for t_o.

README.md derives the recurrences under "Attention", in the symbols used here.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .attention_arguments import Inputs, Strides, check, precision, strides_of, use_descriptors, with_descriptors
from .attention_backward import attention_backward
from .attention_bands import Problem, band, first_row, live_between, live_tiles, locate, problem_of, sequences, visible
from .attention_tile import LOG2_E, LOWEST, load_mask, under_mask
from .launch import FUSION, Launch, Pairs
from .tiles import (
    Strided,
    add_cross,
    add_crosses,
    add_pair,
    add_scaled_rows,
    as_operand,
    at_least,
    load_tile,
    scale_rows,
    store_with_rests,
    zeros,
)

__all__ = ["Outputs", "allocate", "attention_backward", "attention_forward", "plan"]

LN_2 = tl.constexpr(0.6931471805599453)
LIVE = tl.constexpr(0.5)  # a query that sees a key has a rowsum E of 1 or more, any other one of 0


class Outputs(NamedTuple):
    """Outputs that the kernel writes, contiguous. None is not wanted."""

    o: Tensor
    t_o: Tensor | None
    lse: Tensor
    mu: Tensor | None
    o_rest: Tensor | None
    t_o_rest: Tensor | None


def attention_forward(
    inputs: Pairs,
    *,
    window: tuple[int, int],
    lower_right: bool,
    cu_seqlens: tuple[Tensor, Tensor, int, int] | None,
    scale: float,
    grad: bool = False,
    tangent_grad: bool = False,
) -> tuple[Any, tuple[Tensor | None, Tensor | None]]:
    """Return softmax attention and its tangent: (((o, t_o), (lse, mu)), (o_rest, t_o_rest)).

    Args:
        inputs: (primal, tangent) of q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) and of the mask. q, k and v are
            float32, bfloat16 or float16, of any strides, D and Dv up to 256, Hkv dividing H. The mask is None, bool
            (True = attend) or float, expanded to (B, H, N, M). A tangent has its primal's shape and dtype; None is a
            zero whose loads and matmuls are left out, and a bool mask has no other.
        window: (left, right): query i sees only the keys from i + shift - left to i + shift + right, -1 being no limit;
            (-1, 0) is causal.
        lower_right: shift is M - N instead of 0: the last query then meets the last key.
        cu_seqlens: (cu_n, cu_m, max_n, max_m): B = 1, and sequence z of those packed in it has the queries from cu_n[z]
            to cu_n[z + 1] - 1 and the keys from cu_m[z] to cu_m[z + 1] - 1 (int32), at most max_n and max_m of them.
        grad, tangent_grad: in 16 bits, also return what rounding took from o, or from o and t_o, for the backward.

    Returns:
        o, t_o (B, H, N, Dv), contiguous, in q's dtype; lse and its tangent mu (B, H, N) in float32; o_rest, t_o_rest in
        q's dtype or None. Without any tangent t_o and mu are None. A query that sees no key, or lies in no sequence,
        has o = t_o = 0, lse = -inf, mu = 0.

    Equivalent to:
        torch.func.jvp of softmax(scale * q @ k.mT + attn_mask) @ v

    Raises:
        TypeError: another dtype. ValueError: a wider head, or a tangent of a mask that isn't float.
    """
    moving = any([t is not None for _, t in inputs])
    out = allocate(inputs[0][0], inputs[2][0], moving, grad, grad and tangent_grad, packed=cu_seqlens is not None)
    if out.lse.numel():
        launch = plan(inputs, out, window=window, lower_right=lower_right, cu_seqlens=cu_seqlens, scale=scale)
        _attention_kernel[launch.grid](*launch.args, **launch.options)
    else:
        check(inputs)
    return ((out.o, out.t_o), (out.lse, out.mu)), (out.o_rest, out.t_o_rest)


def allocate(
    q: Tensor, v: Tensor, moving: bool, grad: bool = False, tangent_grad: bool = False, packed: bool = False
) -> Outputs:
    """Return outputs of which the kernel writes every element; if packed, those of rows in no sequence are filled."""
    statistic, shape, rounded = q.shape[:3], (*q.shape[:3], v.shape[3]), q.dtype != torch.float32
    like: dict[str, Any] = {"dtype": q.dtype, "device": q.device}
    wide: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    new = torch.zeros if packed else torch.empty
    return Outputs(
        o=new(shape, **like),
        t_o=new(shape, **like) if moving else None,
        lse=torch.full(statistic, -math.inf, **wide) if packed else torch.empty(statistic, **wide),
        mu=new(statistic, **wide) if moving else None,
        o_rest=new(shape, **like) if grad and rounded else None,
        t_o_rest=new(shape, **like) if tangent_grad and moving and rounded else None,
    )


class Layout(NamedTuple):
    """Layout of a launch: all that follows from shapes, strides, dtypes and alignments; planned once and looked up."""

    strides: Strides
    problem: Problem  # without the bounds of packed sequences
    config: configs.Config
    descriptors: bool
    grid: tuple[int, ...]
    options: dict[str, Any]


# A named tuple is made by a Python function; these make one without, on the way to every launch.
_strided, _inputs = partial(tuple.__new__, Strided), partial(tuple.__new__, Inputs)
_LAYOUTS: dict[Any, Layout] = {}
MOST_LAYOUTS = 4096  # beyond so many, planned anew: a program whose shapes never recur would keep them all


def plan(
    inputs: Pairs,
    outputs: Outputs,
    *,
    window: tuple[int, int],
    lower_right: bool,
    cu_seqlens: tuple[Tensor, Tensor, int, int] | None,
    scale: float,
    config: configs.Config | None = None,
    descriptors: bool | None = None,
) -> Launch:
    """Return how to launch the kernel, by default with the shipped config. Runs nothing: one can also just compile it.

    descriptors: load rows by TMA, by default where the GPU has it and the tensors allow it.
    """
    (q, t_q), (k, t_k), (v, t_v), (mask, t_mask) = inputs
    if scale <= 0:  # the kernel takes row maxima before it scales
        sign = -1.0 if scale < 0 else 0.0
        q, t_q, scale = q * sign, None if t_q is None else t_q * sign, -scale or 1.0
    if not k.shape[2]:
        mask = t_mask = None
    tensors = (q, k, v, t_q, t_k, t_v, mask, t_mask)
    packed = None if cu_seqlens is None else (cu_seqlens[0].shape[0], *cu_seqlens[2:])
    lie = [None if x is None else (x.shape, x.stride(), x.dtype, x.data_ptr() % 16) for x in tensors]
    key = (q.device, *lie, window, lower_right, packed, config, descriptors, torch.get_float32_matmul_precision())
    layout = None if configs.FORCED else _LAYOUTS.get(key)
    if layout is None:
        check(inputs)
        layout = _lay_out(tensors, problem_of(q, k, window, cu_seqlens), lower_right, config, descriptors)
        if len(_LAYOUTS) >= MOST_LAYOUTS:
            _LAYOUTS.clear()
        _LAYOUTS[key] = layout
    pairs, problem = zip(tensors, layout.strides.of_inputs), layout.problem
    pointers = _inputs([None if strides is None else _strided((x, *strides)) for x, strides in pairs])
    if layout.descriptors:
        pointers = with_descriptors(pointers, tensors, layout.config)
    if cu_seqlens is not None:
        problem = problem._replace(cu_n=cu_seqlens[0], cu_m=cu_seqlens[1])
    tiles = None if mask is None else live_tiles(mask, layout.config.block_n, layout.config.block_m)
    return Launch(layout.grid, (pointers, outputs, problem, tiles, scale), layout.options)


def _lay_out(
    tensors: tuple[Any, ...],
    problem: Problem,
    lower_right: bool,
    config: configs.Config | None,
    descriptors: bool | None,
) -> Layout:
    q, _, v, *moving, mask, t_mask = tensors
    arch = configs.arch_of(q.device)
    if descriptors is None:
        descriptors = problem.cu_n is None and use_descriptors(arch, *tensors[:6])
    if config is None:
        present = "".join(name for name, t in zip(configs.TANGENTS, (*moving, t_mask)) if t is not None)
        plain = (problem.left, problem.right, problem.cu_n) == (None, None, None)
        kind = "mask" if mask is not None else "none" if plain else "band"
        table, width = arch if descriptors else min(arch, 80), max(q.shape[3], v.shape[3])
        config = configs.attention_config("forward", table, q.dtype, width, present, kind, problem.n)
    strides = strides_of(tensors)
    options = {
        "D": q.shape[3],
        "D_V": v.shape[3],
        "LOWER_RIGHT": lower_right,
        "UNIT": strides.unit,
        "PRECISION": precision(q.dtype),
        **config.options(),
        **FUSION,
    }
    grid = (triton.cdiv(problem.n, config.block_n) * sequences(q, problem) * problem.heads,)
    return Layout(strides, problem._replace(cu_n=None, cu_m=None), config, descriptors, grid, options)


@triton.constexpr_function
def lowest_float(dtype: Any) -> float:
    """Return finfo.min of a mask's dtype, as float32; what is wider or no float has that of float32."""
    return -3.3895313892515355e38 if dtype == tl.bfloat16 else -3.4028234663852886e38


@triton.jit
def _attention_kernel(
    IN, OUT, P, TILES, scale,
    D: tl.constexpr, D_V: tl.constexpr, LOWER_RIGHT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Write the results of BLOCK_N queries of one head against all the keys they see."""
    tiles_n = tl.cdiv(P.n, BLOCK_N)
    pid = tl.program_id(0)
    row, pid_zh = pid % tiles_n, pid // tiles_n
    h, start_n = pid_zh % P.heads, row * BLOCK_N
    b, first_n, N, first_m, M = locate(P, pid_zh // P.heads)
    if (P.cu_n is not None) and start_n >= N:
        return
    low, high = band(P, N, M, LOWER_RIGHT)
    q = load_tile(IN.q, b, h, first_n, start_n, N, BLOCK_N, D, UNIT, STREAM)  # (BLOCK_N, D)
    t_q = None
    if IN.t_q is not None:
        t_q = load_tile(IN.t_q, b, h, first_n, start_n, N, BLOCK_N, D, UNIT, STREAM)  # (BLOCK_N, D)

    m, e_sum, e_dot, h_dot, rho, o, a = _sweep(
        q, t_q, IN, P, TILES, (b, h, row, N, first_m, M, low, high), scale,
        D, D_V, UNIT, PRECISION, BLOCK_N, BLOCK_M, STREAM,
    )  # fmt: skip

    inverse = 1 / at_least(e_dot, LIVE)
    lse = (m + tl.log2(at_least(e_sum, LIVE))) * LN_2
    if IN.mask is not None:
        lse = tl.where(lse < LOWEST / 2.1, lowest_float(IN.mask.ptr.dtype.element_ty), lse)  # See `under_mask`.
    lse = tl.where(e_sum < LIVE, float("-inf"), lse)
    first = first_row(P, b, h, first_n + start_n)
    rows, live_n = first + tl.arange(0, BLOCK_N), start_n + tl.arange(0, BLOCK_N) < N
    # In this order no shipped config spills registers.
    o = scale_rows(o, inverse)
    if OUT.t_o is not None:
        a = add_scaled_rows(scale_rows(a, inverse), -h_dot * inverse, o)  # t_o
    tl.store(OUT.lse + rows, lse, mask=live_n)
    store_with_rests(OUT.o, OUT.o_rest, first, live_n, o, D_V, STREAM)
    if OUT.t_o is not None:
        tl.store(OUT.mu + rows, rho, mask=live_n)
        store_with_rests(OUT.t_o, OUT.t_o_rest, first, live_n, a, D_V, STREAM)


@triton.jit
def _sweep(
    q, t_q, IN, P, TILES, at, scale,
    D: tl.constexpr, D_V: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Sum over all keys that any of the queries sees, tile by tile.

    The loop is written in the order that keeps the fewest registers alive.
    """
    HELD: tl.constexpr = STREAM == 0
    MOVES_S: tl.constexpr = (IN.t_q is not None) or (IN.t_k is not None) or (IN.t_mask is not None)
    b, h, row, N, first_m, M, low, high = at
    h_kv, start_n = h // P.group, row * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    begin, whole_begin, whole_end, end = visible(start_n, low, high, M, BLOCK_N, BLOCK_M)
    listed, first, last = None, begin // BLOCK_M, tl.cdiv(end, BLOCK_M)
    if TILES is not None:
        listed, first, last = live_between(TILES, b, h, row, begin, end, BLOCK_M)

    m = tl.full([BLOCK_N], LOWEST, tl.float32)
    e_sum = tl.zeros([BLOCK_N], tl.float32)
    e_dot = tl.zeros([BLOCK_N], tl.float32)
    h_dot = tl.zeros([BLOCK_N], tl.float32)
    rho = tl.zeros([BLOCK_N], tl.float32)
    o = zeros(BLOCK_N, D_V, STREAM)  # (BLOCK_N, D_V) f32
    a = zeros(BLOCK_N, D_V, STREAM)  # (BLOCK_N, D_V) f32
    for i in tl.range(first, last):
        start_m = i * BLOCK_M
        if listed is not None:
            start_m = tl.load(listed + i) * BLOCK_M
        offs_m = start_m + tl.arange(0, BLOCK_M)
        live_m = offs_m < M
        tile = (b, h, offs_n[:, None], offs_m[None, :], N, M)
        k = load_tile(IN.k, b, h_kv, first_m, start_m, M, BLOCK_M, D, UNIT, STREAM)  # (BLOCK_M, D)
        zero = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if HELD:
            s = add_cross(zero, q, k, False, PRECISION)  # (BLOCK_N, BLOCK_M) f32
        else:
            t_k = None
            if IN.t_k is not None:
                t_k = load_tile(IN.t_k, b, h_kv, first_m, start_m, M, BLOCK_M, D, UNIT, STREAM)
            s, t = add_crosses(zero, zero, q, k, t_q, t_k, False, PRECISION, D, STREAM)
        unit = scale * LOG2_E
        if IN.mask is not None:
            s = under_mask(s * unit, IN.mask, tile, False)
            unit = 1.0
        if (start_m < whole_begin) | (start_m >= whole_end):
            seen = live_m[None, :]
            if P.left is not None:
                seen = seen & (offs_m[None, :] >= (offs_n + low)[:, None])
            if P.right is not None:
                seen = seen & (offs_m[None, :] <= (offs_n + high)[:, None])
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * unit)
        e = tl.exp2(s * unit - m_new[:, None])  # (BLOCK_N, BLOCK_M) f32
        decay = tl.exp2(m - m_new)
        m = m_new
        e_low = as_operand(e, q, PRECISION)
        e_sum = e_sum * decay + tl.sum(e, 1)

        if MOVES_S:
            if HELD:
                t = zero
                if IN.t_q is not None:
                    t = add_cross(t, t_q, k, False, PRECISION)  # (BLOCK_N, BLOCK_M) f32
                if IN.t_k is not None:
                    t_k = load_tile(IN.t_k, b, h_kv, first_m, start_m, M, BLOCK_M, D, UNIT)  # (BLOCK_M, D)
                    t = add_cross(t, q, t_k, False, PRECISION)
            t_unit = scale
            if IN.t_mask is not None:
                t = t * scale + load_mask(IN.t_mask, tile, 0).to(tl.float32)
                t_unit = 1.0
            z = t * t_unit - rho[:, None]
            step = tl.sum(e * z, 1) / at_least(e_sum, LIVE)
            rho += step
            h_low = as_operand(e * (z - step[:, None]), q, PRECISION)  # (BLOCK_N, BLOCK_M)
            h_dot = (h_dot - step * e_dot) * decay + tl.sum(h_low.to(tl.float32), 1)
            a = add_scaled_rows(scale_rows(a, decay), -step * decay, o)
        elif IN.t_v is not None:
            a = scale_rows(a, decay)

        e_dot = e_dot * decay + tl.sum(e_low.to(tl.float32), 1)
        v = load_tile(IN.v, b, h_kv, first_m, start_m, M, BLOCK_M, D_V, UNIT, STREAM)  # (BLOCK_M, D_V)
        o = scale_rows(o, decay)
        if MOVES_S:
            o, a = add_pair(o, a, e_low, h_low, v, None, PRECISION, D_V, STREAM)
        else:
            o, _ = add_pair(o, (), e_low, None, v, None, PRECISION, D_V, STREAM)
        if IN.t_v is not None:
            t_v = load_tile(IN.t_v, b, h_kv, first_m, start_m, M, BLOCK_M, D_V, UNIT, STREAM)  # (BLOCK_M, D_V)
            a, _ = add_pair(a, (), e_low, None, t_v, None, PRECISION, D_V, STREAM)
    return m, e_sum, e_dot, h_dot, rho, o, a
