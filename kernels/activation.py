"""GELU, SiLU and their gated forms, with their tangents and both backward passes, reading each element once.

README.md derives the formulas under "Activations", in the symbols used here.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FUSION, Launch, Pairs, check_dtype

KINDS = ("silu", "gelu", "gelu_tanh")
BLOCK, WARPS = 1024, 4  # elements and warps of a program: eight elements a thread, 16 bytes of bfloat16

FAR = tl.constexpr(20.0)  # Beyond it phi is the identity or zero in float32, and a polynomial of x can only overflow.
SPREAD = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)
SQRT_HALF = tl.constexpr(math.sqrt(0.5))
PDF_0 = tl.constexpr(1 / math.sqrt(2 * math.pi))


class Strided(NamedTuple):
    """Tensor as the kernels receive it: rows of columns, the rows numbered over all other dimensions."""

    ptr: Any
    row_strides: tuple[int, ...]
    stride_c: int


class Inputs(NamedTuple):
    """Inputs that a kernel reads. None is left out: a factor of one, a tangent or a cotangent of zero."""

    x: Any
    t_x: Any
    up: Any
    t_up: Any
    dy: Any = None
    dt_y: Any = None


class Outputs(NamedTuple):
    """Outputs that the forward writes, contiguous. None is not wanted."""

    y: Tensor
    t_y: Tensor | None


class Gradients(NamedTuple):
    """Gradients that the backward writes, contiguous, in the order of the inputs' pairs. None is not wanted."""

    dx: Tensor | None
    dt_x: Tensor | None
    dup: Tensor | None
    dt_up: Tensor | None


def activation_forward(inputs: Pairs, *, kind: str) -> tuple[tuple[Outputs], tuple[()]]:
    """Return y = phi(x) up and its tangent: ((y, t_y),), and no residuals.

    Args:
        inputs: (primal, tangent) of x and of up, all of one shape and dtype, float32, bfloat16 or float16, any strides;
            computed in float32. up of None is one; a tangent of None is zero and costs nothing.
        kind: "silu", "gelu" or "gelu_tanh".

    Returns:
        y, t_y, contiguous and of x's dtype; t_y is None without any tangent.

    Equivalent to:
        torch.func.jvp of phi(x) * up

    Raises:
        TypeError: another dtype. ValueError: a tangent of up without up.
    """
    (x, t_x), (up, t_up) = inputs
    given = Inputs(x, t_x, up, t_up)
    _check(given)
    outputs = Outputs(_empty(x), None if t_x is None and t_up is None else _empty(x))
    _launch(given, outputs, kind)
    return (outputs,), ()


def activation_backward(
    cotangents: Pairs,
    inputs: Pairs,
    saved: tuple[Pairs, Sequence[Tensor | None]],
    *,
    kind: str,
    needs: Sequence[tuple[bool, bool]],
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return the gradients of sum(dy * y) + sum(dt_y * t_y).

    Args:
        cotangents: (dy, dt_y); None is zero.
        inputs, kind: as in `activation_forward`.
        saved: what it returned, of which nothing is read.
        needs: which gradients of x, up and of their tangents are wanted. The others are None.

    Returns:
        (dx, dt_x), (dup, dt_up), contiguous and of x's dtype.

    Equivalent to:
        torch.autograd.grad of that sum

    Raises:
        TypeError, ValueError: as `activation_forward`.
    """
    ((dy, dt_y),), ((x, t_x), (up, t_up)) = cotangents, inputs
    given = Inputs(x, t_x, up, t_up, dy, dt_y)
    _check(given)
    gradients = Gradients(*(_empty(x) if need else None for wants in needs for need in wants))
    if any([z is not None for z in gradients]):
        _launch(given, gradients, kind)
    return [(gradients.dx, gradients.dt_x), (gradients.dup, gradients.dt_up)]


def plan(inputs: Inputs, outputs: Outputs | Gradients, kind: str) -> Launch:
    """Return how to launch `kernel_of` outputs on these tensors. Runs nothing: one can also just compile it."""
    sizes, strides = coalesced(inputs.x.shape, [z.stride() for z in inputs if z is not None])
    width, rows = sizes[0], math.prod(sizes[1:])
    block_c = min((BLOCK, BLOCK // 2, BLOCK // 4), key=lambda block: (-width % block, -block))  # the least padding
    block_c = min(block_c, 1 << (width - 1).bit_length())
    block_rows = min(BLOCK // block_c, 1 << (rows - 1).bit_length())
    steps = iter(strides)
    sources = [None if z is None else Strided(z, (step := next(steps))[1:], step[0]) for z in inputs]
    return Launch(
        grid=(triton.cdiv(rows, block_rows) * triton.cdiv(width, block_c),),
        args=(Inputs(*sources), outputs, tuple(sizes[1:]), rows, width),
        options={
            "KIND": kind,
            "ROWS": block_rows,
            "BLOCK_C": block_c,
            "num_warps": WARPS,
            **FUSION,
        },
    )


def coalesced(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[tuple[int, ...]]]:
    """Join dimensions as far as all these tensors of one shape allow; return the sizes, and each tensor's strides.

    The innermost dimension comes first, and there are two at least: columns, and rows.
    """
    sizes: list[int] = []
    kept: list[list[int]] = []  # a dimension's stride in each tensor
    for dim in reversed(range(len(shape))):
        steps = [step[dim] for step in strides]
        if shape[dim] == 1:
            continue
        if sizes and all(outer == inner * sizes[-1] for outer, inner in zip(steps, kept[-1])):
            sizes[-1] *= shape[dim]
        else:
            sizes.append(shape[dim])
            kept.append(steps)
    while len(sizes) < 2:
        sizes.append(1)
        kept.append([0 if kept else 1] * len(strides))
    return sizes, list(zip(*kept))


def kernel_of(outputs: Outputs | Gradients) -> Any:
    """Return the kernel that writes these."""
    return _forward_kernel if isinstance(outputs, Outputs) else _backward_kernel


def _launch(inputs: Inputs, outputs: Outputs | Gradients, kind: str) -> None:
    if inputs.x.numel():
        launch = plan(inputs, outputs, kind)
        kernel_of(outputs)[launch.grid](*launch.args, **launch.options)


def _check(inputs: Inputs) -> None:
    check_dtype("x", inputs.x)
    if inputs.up is None and inputs.t_up is not None:
        raise ValueError("t_up: expected None without an up, got a tensor")


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@triton.jit
def _forward_kernel(
    IN, OUT, SIZES, R, C, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Write a tile of ROWS rows by BLOCK_C columns of y and t_y."""
    rows, offs_c, live = _tile(R, C, ROWS, BLOCK_C)
    phi, slope, _ = _derivatives(_load(IN.x, SIZES, rows, offs_c, live), KIND)
    y, t_y = phi, None
    if IN.t_x is not None:
        t_y = slope * _load(IN.t_x, SIZES, rows, offs_c, live)
    if IN.up is not None:
        up = _load(IN.up, SIZES, rows, offs_c, live)
        y = phi * up
        if t_y is not None:
            t_y = t_y * up
    if IN.t_up is not None:
        t_y = _sum(t_y, phi * _load(IN.t_up, SIZES, rows, offs_c, live))
    _store(OUT.y, y, rows, offs_c, live, C)
    if OUT.t_y is not None:
        _store(OUT.t_y, t_y, rows, offs_c, live, C)


@triton.jit
def _backward_kernel(
    IN, OUT, SIZES, R, C, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Write a tile of ROWS rows by BLOCK_C columns of the gradients; g and h are the cotangents of phi and phi' t_x."""
    rows, offs_c, live = _tile(R, C, ROWS, BLOCK_C)
    phi, slope, curvature = _derivatives(_load(IN.x, SIZES, rows, offs_c, live), KIND)
    zero = tl.zeros_like(phi)
    dy, dt_y, t_x = zero, zero, zero
    if IN.dy is not None:
        dy = _load(IN.dy, SIZES, rows, offs_c, live)
    if IN.dt_y is not None:
        dt_y = _load(IN.dt_y, SIZES, rows, offs_c, live)
    if IN.t_x is not None:
        t_x = _load(IN.t_x, SIZES, rows, offs_c, live)
    g, h = dy, dt_y
    if IN.up is not None:
        up = _load(IN.up, SIZES, rows, offs_c, live)
        g, h = dy * up, dt_y * up
    if IN.t_up is not None:
        g += dt_y * _load(IN.t_up, SIZES, rows, offs_c, live)
    if OUT.dx is not None:
        _store(OUT.dx, slope * g + curvature * t_x * h, rows, offs_c, live, C)
    if OUT.dup is not None:
        _store(OUT.dup, phi * dy + slope * t_x * dt_y, rows, offs_c, live, C)
    if OUT.dt_x is not None:
        _store(OUT.dt_x, slope * h, rows, offs_c, live, C)
    if OUT.dt_up is not None:
        _store(OUT.dt_up, phi * dt_y, rows, offs_c, live, C)


@triton.jit
def _derivatives(x, KIND: tl.constexpr):
    """Return phi, phi' and phi'' at x; the compiler drops what is not used."""
    near = tl.where(x < -FAR, -FAR, tl.where(x > FAR, FAR, x))  # NaN stays NaN
    if KIND == "gelu":
        p = 0.5 + 0.5 * tl.erf(x * SQRT_HALF)
        density = PDF_0 * tl.exp(-0.5 * near * near)
        return x * p, p + near * density, density * (2 - near * near)
    else:
        if KIND == "silu":
            v, v1, v2 = x, 1.0, 0.0
        else:
            square = near * near
            v = SPREAD * near * (1 + CUBIC * square)
            v1 = SPREAD * (1 + 3 * CUBIC * square)
            v2 = 6 * CUBIC * SPREAD * near
        decay = tl.exp(-tl.abs(v))
        large = 1 / (1 + decay)
        small = decay * large
        p, q = tl.where(v < 0, small, large), tl.where(v < 0, large, small)  # logistic(v), logistic(-v)
        if KIND == "silu":
            # An x beyond FAR would lose its small phi' to the clamp, and doesn't need it, because nothing overflows
            # here.
            return x * p, p + x * p * q, p * q * (2 + x * (q - p))
        return x * p, p + near * p * q * v1, p * q * (2 * v1 + near * (v2 + (q - p) * v1 * v1))


@triton.jit
def _tile(R, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the program's rows (ROWS, 1) and columns (1, BLOCK_C), and which of them there are."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    rows = (pid // tiles_c).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    offs_c = (pid % tiles_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return rows, offs_c, (rows < R) & (offs_c < C)


@triton.jit
def _load(x, SIZES, rows, offs_c, live):
    """Load (ROWS, BLOCK_C) in float32, zero beyond the edges."""
    ptrs = x.ptr + offs_c * x.stride_c
    for i in tl.static_range(len(SIZES) - 1):
        ptrs += (rows % SIZES[i]) * x.row_strides[i]
        rows = rows // SIZES[i]
    ptrs += rows * x.row_strides[len(SIZES) - 1]
    return tl.load(ptrs, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, z, rows, offs_c, live, C):
    """Store (ROWS, BLOCK_C) into a contiguous tensor of rows of C."""
    tl.store(ptr + rows * C + offs_c, z.to(ptr.dtype.element_ty), mask=live)


@triton.jit
def _sum(x, y):
    """Return x + y, where x of None is zero."""
    if x is None:
        return y
    else:
        return x + y
