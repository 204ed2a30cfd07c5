"""Normalise each head of queries and keys and turn it, with tangents and both backward passes, in one launch.

README.md derives the formulas under "Queries and keys", in the symbols used here.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSION, Launch, Pairs
from .rope_rows import (
    angles_of,
    back_through_norm,
    channels_of,
    check,
    empty,
    load_angles,
    load_channels,
    load_halves,
    normalised,
    plus,
    rows_of,
    scaled,
    side_of,
    store_halves,
    times,
    turned,
)
from .tiles import stride_unit


class Outputs(NamedTuple):
    """Outputs that the forward writes of queries or of keys, contiguous. None is not wanted."""

    y: Tensor
    t_y: Tensor | None


class Gradients(NamedTuple):
    """Gradients that the backward writes of queries or of keys, contiguous; the last four as sums for each program."""

    dx: Tensor | None
    dt_x: Tensor | None
    dweight: Tensor | None
    dt_weight: Tensor | None
    dbias: Tensor | None
    dt_bias: Tensor | None


class Options(NamedTuple):
    """Options of the kernels: norm is "rms", "layer" or "none"; see `load_halves` for the others."""

    norm: str
    eps: float
    interleaved: bool


def qk_norm_rope_forward(
    inputs: Pairs, *, norm: str, eps: float, interleaved: bool
) -> tuple[list[tuple[Tensor, Tensor | None]], tuple[()]]:
    """Return normalised and turned queries and keys with tangents: (((q_out, t_q_out), (k_out, t_k_out)), ()).

    Args:
        inputs: (primal, tangent) of q (B, H, N, D), k (B, Hkv, M, D) in float32, bfloat16 or float16, of any strides, D
            even and at most 512; of q_weight, k_weight, q_bias, k_bias (D,) or None; and of cos, sin (B or 1, max(N,
            M), D/2) or None, which have no tangents.
        norm: "rms", "layer" or "none". All is computed in float32.
        eps: added to the variance.
        interleaved: whether neighbouring channels turn together, or those of the two halves.

    Returns:
        The outputs are contiguous, in the dtype of q and k. The tangents are both None without any tangent, and neither
        with one.

    Equivalent to:
        torch.func.jvp of rotate(norm(q) * q_weight + q_bias), and the same of k

    Raises:
        TypeError: another dtype. ValueError: another D.
    """
    (q, _), (k, _), *_ = inputs
    check(q, k)
    moving = any(t is not None for _, t in inputs)
    outs = [Outputs(empty(x), empty(x) if moving else None) for x in (q, k)]
    if q.numel() or k.numel():
        launch = plan(inputs, outs, Options(norm, eps, interleaved))
        _forward_kernel[launch.grid](*launch.args, **launch.options)
    return list(map(tuple, outs)), ()  # type: ignore[arg-type]


def plan(inputs: Pairs, outs: Sequence[Outputs], options: Options) -> Launch:
    """Return how to launch the forward, which writes the outputs. Runs nothing: one can also just compile it."""
    unit = stride_unit(*inputs[0], *inputs[1])
    q, k = (side_of(unit, inputs[i:6:2]) for i in range(2))
    rows, sizes = _tile(outs[0].y.shape[-1])
    return Launch(
        grid=(sum(triton.cdiv(side.rows, rows) for side in (q, k)),),
        args=(q, k, angles_of(inputs[6][0], inputs[7][0]), *outs, options.eps),
        options={**sizes, **_constants(options, unit), "num_warps": 4},
    )


def qk_norm_rope_backward(
    cotangents: Pairs,
    inputs: Pairs,
    saved: Any,
    *,
    norm: str,
    eps: float,
    interleaved: bool,
    needs: Sequence[tuple[bool, bool]],
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return the gradients of <dq_out, q_out> + <dt_q_out, t_q_out>, and the same of k, in pairs as `needs`.

    Args:
        cotangents: (dq_out, dt_q_out) and (dk_out, dt_k_out); None is zero, and without those of the tangents no
            tangent is read.
        inputs, norm, eps, interleaved: as in `qk_norm_rope_forward`.
        saved: what it returned, which isn't read.
        needs: which gradients are wanted, in the order of the inputs; the others, and those of cos and sin, are None.

    Returns:
        (dq, dt_q), (dk, dt_k), ..., each contiguous, in the shape and dtype of its argument. Sums over rows are taken
        in float32 and in a fixed order.
    """
    check(inputs[0][0], inputs[1][0])
    read = [
        (x, t_x if i > 5 or cotangents[i % 2][1] is not None else None)  # the sides take turns; angles have no tangent
        for i, (x, t_x) in enumerate(inputs)
    ]
    launch = plan_backward(cotangents, read, needs, Options(norm, eps, interleaved))
    if any(map(any, needs)) and launch.grid[0]:
        _backward_kernel[launch.grid](*launch.args, **launch.options)
    found = [_finished(inputs[i:6:2], grads) for i, grads in enumerate(launch.args[3:5])]
    return [*(pair for both in zip(*found, strict=True) for pair in both), (None, None), (None, None)]


def plan_backward(cotangents: Pairs, inputs: Pairs, needs: Sequence[tuple[bool, bool]], options: Options) -> Launch:
    """Return how to launch the backward, with fresh `Gradients` to write."""
    unit = stride_unit(*[x for pair in (*inputs[:2], *cotangents) for x in pair])
    q, k = (side_of(unit, inputs[i:6:2], cotangents[i]) for i in range(2))
    wanted = [tuple(need for pair in needs[i:6:2] for need in pair) for i in range(2)]
    rows, sizes = _tile(inputs[0][0].shape[-1])
    steps = _steps(q.rows + k.rows, rows) if any(any(side[2:]) for side in wanted) else 1
    programs = [triton.cdiv(side.rows, rows * steps) for side in (q, k)]
    outs = [_gradients(x, side, count) for (x, _), side, count in zip(inputs[:2], wanted, programs)]
    return Launch(
        grid=(sum(programs),),
        args=(q, k, angles_of(inputs[6][0], inputs[7][0]), *outs, options.eps, steps),
        options={**sizes, **_constants(options, unit), "num_warps": 8},
    )


def _constants(options: Options, unit: int) -> dict[str, Any]:
    return {"NORM": options.norm, "UNIT": unit, "INTERLEAVED": options.interleaved, **FUSION}


def _tile(d: int) -> tuple[int, dict[str, Any]]:
    """Return how many rows a program takes at a time, about 2048 elements, and the sizes for the kernels."""
    half = triton.next_power_of_2(d // 2)
    rows = max(1, 1024 // half)
    return rows, {"D": d, "ROWS": rows, "HALF": half}


def _steps(rows: int, tile: int) -> int:
    """Return the steps of a program, so that there are about 512 programs, each of which leaves a row of sums."""
    return max(1, triton.cdiv(rows, tile) // 512)


def _gradients(x: Tensor, needs: tuple[bool, ...], programs: int) -> Gradients:
    rows = [empty(x) if need else None for need in needs[:2]]
    sums = [
        torch.empty((programs, x.shape[-1]), dtype=torch.float32, device=x.device) if need else None
        for need in needs[2:]
    ]
    return Gradients(*rows, *sums)


def _finished(side: Pairs, grads: Gradients) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return the gradients of rows, weight and bias: the second stage of the sums."""
    weight, bias = side[1][0], side[2][0]
    sums = [
        None if grad is None or like is None else grad.sum(0).to(like.dtype)
        for grad, like in zip(grads[2:], (weight, weight, bias, bias))
    ]
    return [(grads.dx, grads.dt_x), (sums[0], sums[1]), (sums[2], sums[3])]


@triton.jit
def _forward_kernel(
    Q, K, ANGLES, OUT_Q, OUT_K, eps, D: tl.constexpr, NORM: tl.constexpr,
    UNIT: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Process ROWS rows of queries, or of keys; this is one program."""
    pid = tl.program_id(0)
    tiles_q = tl.cdiv(Q.rows, ROWS)
    if pid < tiles_q:
        _forward_tile(Q, ANGLES, OUT_Q, eps, pid, D, NORM, UNIT, INTERLEAVED, ROWS, HALF)
    else:
        _forward_tile(K, ANGLES, OUT_K, eps, pid - tiles_q, D, NORM, UNIT, INTERLEAVED, ROWS, HALF)


@triton.jit
def _forward_tile(
    X, ANGLES, OUT, eps, tile, D: tl.constexpr, NORM: tl.constexpr,
    UNIT: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    at = rows_of(X, tile * ROWS + tl.arange(0, ROWS))
    x = load_halves(X.x, at, D, UNIT, INTERLEAVED, ROWS, HALF)  # (ROWS, HALF) each
    t_x = load_halves(X.t_x, at, D, UNIT, INTERLEAVED, ROWS, HALF)  # (ROWS, HALF) each
    xh, t_xh, _, _ = normalised(x, t_x, at[4], eps, D, NORM, HALF)
    weight = load_channels(X.weight, D, INTERLEAVED, HALF)  # (1, HALF) each
    y, t_y = scaled(xh, weight), scaled(t_xh, weight)
    t_y = plus(t_y, times(xh, load_channels(X.t_weight, D, INTERLEAVED, HALF)))
    y = plus(y, load_channels(X.bias, D, INTERLEAVED, HALF))
    if X.t_bias is not None:
        t_bias = load_channels(X.t_bias, D, INTERLEAVED, HALF)  # (1, HALF) each
        zero = tl.zeros((ROWS, HALF), tl.float32)
        t_y = plus(t_y, (zero + t_bias[0], zero + t_bias[1]))
    angles = load_angles(ANGLES, at, D, HALF)  # (ROWS, HALF) each
    store_halves(OUT.y, turned(y, angles, False), at, D, INTERLEAVED, ROWS, HALF)
    store_halves(OUT.t_y, turned(t_y, angles, False), at, D, INTERLEAVED, ROWS, HALF)


@triton.jit
def _backward_kernel(
    Q, K, ANGLES, OUT_Q, OUT_K, eps, steps, D: tl.constexpr, NORM: tl.constexpr,
    UNIT: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Take ROWS rows of queries, or of keys, at a time, `steps` times, and add their share to the sums over rows."""
    pid = tl.program_id(0)
    programs_q = tl.cdiv(Q.rows, ROWS * steps)
    if pid < programs_q:
        _backward_tiles(Q, ANGLES, OUT_Q, eps, steps, pid, D, NORM, UNIT, INTERLEAVED, ROWS, HALF)
    else:
        _backward_tiles(K, ANGLES, OUT_K, eps, steps, pid - programs_q, D, NORM, UNIT, INTERLEAVED, ROWS, HALF)


@triton.jit
def _backward_tiles(
    X, ANGLES, OUT, eps, steps, program, D: tl.constexpr, NORM: tl.constexpr,
    UNIT: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    weight = load_channels(X.weight, D, INTERLEAVED, HALF)  # (1, HALF) each
    t_weight = load_channels(X.t_weight, D, INTERLEAVED, HALF)  # (1, HALF) each
    sums = _zeros(OUT, ROWS, HALF)
    for step in tl.range(0, steps):
        at = rows_of(X, (program * steps + step) * ROWS + tl.arange(0, ROWS))
        angles = load_angles(ANGLES, at, D, HALF)  # (ROWS, HALF) each
        dy = turned(load_halves(X.dy, at, D, UNIT, INTERLEAVED, ROWS, HALF), angles, True)
        dt_y = turned(load_halves(X.dt_y, at, D, UNIT, INTERLEAVED, ROWS, HALF), angles, True)
        x = load_halves(X.x, at, D, UNIT, INTERLEAVED, ROWS, HALF)  # (ROWS, HALF) each
        t_x = load_halves(X.t_x, at, D, UNIT, INTERLEAVED, ROWS, HALF)  # (ROWS, HALF) each
        xh, t_xh, a, rstd = normalised(x, t_x, at[4], eps, D, NORM, HALF)
        dxh = plus(scaled(dy, weight), times(dt_y, t_weight))
        dx, dt_x = back_through_norm(dxh, scaled(dt_y, weight), xh, t_xh, a, rstd, at[4], D, NORM, HALF)
        store_halves(OUT.dx, dx, at, D, INTERLEAVED, ROWS, HALF)
        store_halves(OUT.dt_x, dt_x, at, D, INTERLEAVED, ROWS, HALF)
        sums = _summed_up(sums, OUT, (plus(times(dy, xh), times(dt_y, t_xh)), times(dt_y, xh), dy, dt_y))
    of_u, of_v = channels_of(D, INTERLEAVED, HALF)
    live = tl.arange(0, HALF) < D // 2
    for i in tl.static_range(4):
        if OUT[2 + i] is not None:
            ptrs = OUT[2 + i] + program.to(tl.int64) * D
            tl.store(ptrs + of_u, tl.sum(sums[i][0], 0), mask=live)
            tl.store(ptrs + of_v, tl.sum(sums[i][1], 0), mask=live)


@triton.jit
def _zeros(OUT, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Return a running sum of zero for each gradient of a weight or a bias that is wanted."""
    sums = ()
    for i in tl.static_range(4):
        if OUT[2 + i] is None:
            sums = sums + ((),)
        else:
            sums = sums + ((tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)),)
    return sums


@triton.jit
def _summed_up(sums, OUT, found):
    """Add what was found to the running sums."""
    new = ()
    for i in tl.static_range(4):
        if OUT[2 + i] is None:
            new = new + ((),)
        else:
            new = new + (plus(sums[i], found[i]),)
    return new
