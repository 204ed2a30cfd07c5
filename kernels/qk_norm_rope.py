"""A norm of each head of queries and keys, then rotary embedding, with tangents and both backwards: one launch for all.

README.md derives the formulas under "Queries and keys", in the symbols used here.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .calls import Launch
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
    """What the forward writes of queries or of keys, contiguous. None is not wanted."""

    y: Tensor
    t_y: Tensor | None


class Gradients(NamedTuple):
    """What the backward writes of queries or of keys, contiguous; the last four as a row of sums for each program."""

    dx: Tensor | None
    dt_x: Tensor | None
    dweight: Tensor | None
    dt_weight: Tensor | None
    dbias: Tensor | None
    dt_bias: Tensor | None


def qk_norm_rope_forward(
    q: Tensor,
    t_q: Tensor | None,
    k: Tensor,
    t_k: Tensor | None,
    q_weight: Tensor | None,
    t_q_weight: Tensor | None,
    k_weight: Tensor | None,
    t_k_weight: Tensor | None,
    q_bias: Tensor | None,
    t_q_bias: Tensor | None,
    k_bias: Tensor | None,
    t_k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    norm: str,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Normalised and turned queries and keys with their tangents: (q_out, t_q_out, k_out, t_k_out).

    q (B, H, N, D), k (B, Hkv, M, D) in float32, bfloat16 or float16, any strides, D even and at most 512; weights,
    biases (D,) or None; cos, sin (B or 1, max(N, M), D/2) or None. norm is "rms", "layer" or "none". All is computed in
    float32; outputs are contiguous. The tangents are both None without any tangent, and neither with one.

    Equivalent to: torch.func.jvp of rotate(norm(q) * q_weight + q_bias), and the same of k.
    Raises TypeError for another dtype, ValueError for another D.
    """
    of_q = (q, t_q, q_weight, t_q_weight, q_bias, t_q_bias)
    of_k = (k, t_k, k_weight, t_k_weight, k_bias, t_k_bias)
    check(q, k)
    moving = any(t is not None for t in (*of_q[1::2], *of_k[1::2]))
    outs = [Outputs(empty(x), empty(x) if moving else None) for x in (q, k)]
    if q.numel() or k.numel():
        launch = plan(of_q, of_k, cos, sin, outs[0], outs[1], norm, eps, interleaved)
        _forward_kernel[launch.grid](*launch.args, **launch.options)
    return (*outs[0], *outs[1])


def plan(
    of_q: tuple[Any, ...],
    of_k: tuple[Any, ...],
    cos: Tensor | None,
    sin: Tensor | None,
    out_q: Outputs,
    out_k: Outputs,
    norm: str,
    eps: float,
    interleaved: bool,
) -> Launch:
    """How to launch the forward on (x, t_x, weight, ...) of q and of k. Runs nothing: one can also just compile it."""
    unit = stride_unit(*of_q[:2], *of_k[:2])
    q, k = side_of(unit, *of_q), side_of(unit, *of_k)
    rows, options = _tile(out_q.y.shape[-1])
    return Launch(
        grid=(sum(triton.cdiv(side.rows, rows) for side in (q, k)),),
        args=(q, k, angles_of(cos, sin), out_q, out_k, eps),
        options={
            **options,
            "NORM": norm,
            "UNIT": unit,
            "INTERLEAVED": interleaved,
            "num_warps": 4,
            "enable_fp_fusion": True,
        },
    )


def qk_norm_rope_backward(
    dq_out: Tensor | None,
    dt_q_out: Tensor | None,
    dk_out: Tensor | None,
    dt_k_out: Tensor | None,
    q: Tensor,
    t_q: Tensor | None,
    k: Tensor,
    t_k: Tensor | None,
    q_weight: Tensor | None,
    t_q_weight: Tensor | None,
    k_weight: Tensor | None,
    t_k_weight: Tensor | None,
    q_bias: Tensor | None,
    t_q_bias: Tensor | None,
    k_bias: Tensor | None,
    t_k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    norm: str,
    eps: float,
    interleaved: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of <dq_out, q_out> + <dt_q_out, t_q_out>, and the same of k.

    In the order (q, k, q_weight, k_weight, q_bias, k_bias), then of their tangents; `needs` says which of the twelve,
    the others are None. Each is contiguous, in the shape and dtype of its argument. A cotangent of None is zero, and
    without those of the tangents no tangent is read. Sums over rows are taken in float32 and in a fixed order.
    """
    check(q, k)
    if dt_q_out is None:
        t_q = t_q_weight = t_q_bias = None
    if dt_k_out is None:
        t_k = t_k_weight = t_k_bias = None
    of_q = (q, t_q, q_weight, t_q_weight, q_bias, t_q_bias, dq_out, dt_q_out)
    of_k = (k, t_k, k_weight, t_k_weight, k_bias, t_k_bias, dk_out, dt_k_out)
    wanted = [_in_pairs(needs[side::2]) for side in range(2)]
    launch = plan_backward(of_q, of_k, cos, sin, wanted[0], wanted[1], norm, eps, interleaved)
    if any(needs) and launch.grid[0]:
        _backward_kernel[launch.grid](*launch.args, **launch.options)
    found = [_finished(side, grads) for side, grads in ((of_q, launch.args[3]), (of_k, launch.args[4]))]
    return tuple(grad for both in zip(*found, strict=True) for grad in both)


def plan_backward(
    of_q: tuple[Any, ...],
    of_k: tuple[Any, ...],
    cos: Tensor | None,
    sin: Tensor | None,
    needs_q: tuple[bool, ...],
    needs_k: tuple[bool, ...],
    norm: str,
    eps: float,
    interleaved: bool,
) -> Launch:
    """How to launch the backward on (x, t_x, weight, ..., dy, dt_y) of q and of k, with fresh `Gradients` to write."""
    unit = stride_unit(*of_q[:2], *of_q[6:], *of_k[:2], *of_k[6:])
    q, k = side_of(unit, *of_q), side_of(unit, *of_k)
    rows, options = _tile(of_q[0].shape[-1])
    steps = _steps(q.rows + k.rows, rows) if any((*needs_q[2:], *needs_k[2:])) else 1
    programs = [triton.cdiv(side.rows, rows * steps) for side in (q, k)]
    outs = [_gradients(side, needs, count) for side, needs, count in zip((of_q, of_k), (needs_q, needs_k), programs)]
    return Launch(
        grid=(sum(programs),),
        args=(q, k, angles_of(cos, sin), *outs, eps, steps),
        options={
            **options,
            "NORM": norm,
            "UNIT": unit,
            "INTERLEAVED": interleaved,
            "num_warps": 8,
            "enable_fp_fusion": True,
        },
    )


def _tile(d: int) -> tuple[int, dict[str, Any]]:
    """Rows a program takes at a time, about 2048 elements, and the sizes for the kernels."""
    half = triton.next_power_of_2(d // 2)
    rows = max(1, 1024 // half)
    return rows, {"D": d, "ROWS": rows, "HALF": half}


def _steps(rows: int, tile: int) -> int:
    """So that there are about 512 programs, each of which leaves a row of sums."""
    return max(1, triton.cdiv(rows, tile) // 512)


def _in_pairs(needs: tuple[bool, ...]) -> tuple[bool, ...]:
    """Of (x, weight, bias, t_x, t_weight, t_bias), in the order of `Gradients`."""
    return tuple(needs[i] for i in (0, 3, 1, 4, 2, 5))


def _gradients(side: tuple[Any, ...], needs: tuple[bool, ...], programs: int) -> Gradients:
    x = side[0]
    rows = [empty(x) if need else None for need in needs[:2]]
    sums = [
        torch.empty((programs, x.shape[-1]), dtype=torch.float32, device=x.device) if need else None
        for need in needs[2:]
    ]
    return Gradients(*rows, *sums)


def _finished(side: tuple[Any, ...], grads: Gradients) -> list[Tensor | None]:
    """Gradients of (x, weight, bias, t_x, t_weight, t_bias): the second stage of the sums."""
    sums = [
        None if grad is None or like is None else grad.sum(0).to(like.dtype)
        for grad, like in zip(grads[2:], (side[2], side[2], side[4], side[4]))
    ]
    return [grads.dx, sums[0], sums[2], grads.dt_x, sums[1], sums[3]]


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
