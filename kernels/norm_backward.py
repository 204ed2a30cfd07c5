"""Compute the norms' gradients: of rows and of their tangents, of parameters and of modulation.

README.md derives the formulas under "The norms' backward", in the symbols used here.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import FUSION, Launch, Pairs
from .norm_rows import (
    Inputs,
    add,
    factor_gradient,
    in_order,
    inputs_of,
    load,
    load_or_none,
    load_rows,
    pair,
    plus,
    store_rows,
    strided,
    summed_up,
    times,
    times_backward,
    zero_sums,
)

NAMES = ("x", "weight", "bias", "scale", "shift", "h", "gate")
SUMMED = ("weight", "bias", "scale", "shift", "gate")


class Cotangents(NamedTuple):
    """Cotangents of the modulated y and its tangent, and of r = x + gate∘h and its tangent. None is zero."""

    dy: Any
    dt_y: Any
    dr: Any = None
    dt_r: Any = None


class RowGradients(NamedTuple):
    """Gradients of rows that the kernel writes, contiguous. None is not wanted."""

    dx: Tensor | None
    dt_x: Tensor | None
    dh: Tensor | None
    dt_h: Tensor | None


class Statistics(NamedTuple):
    """Statistics of each row, (B, T) float32. The last three pass from a launch with whole rows to one without."""

    mean: Tensor | None
    rstd: Tensor
    rest: Tensor | None
    t_mean: Tensor | None
    a: Tensor | None


class Sums(NamedTuple):
    """Sums over rows: where these gradients go, in the order of `SUMMED`, primals first. None is not wanted."""

    dweight: Tensor | None = None
    dbias: Tensor | None = None
    dscale: Tensor | None = None
    dshift: Tensor | None = None
    dgate: Tensor | None = None
    dt_weight: Tensor | None = None
    dt_bias: Tensor | None = None
    dt_scale: Tensor | None = None
    dt_shift: Tensor | None = None
    dt_gate: Tensor | None = None


class Plan(NamedTuple):
    """Plan of the launches, in order, and what they write: rows, and by name the sums over a program's rows."""

    launches: list[Launch]
    rows: RowGradients
    sums: dict[str, Tensor]


def norm_backward(
    cotangents: Pairs,
    inputs: Pairs,
    saved: tuple[Any, tuple[Tensor | None, Tensor]],
    *,
    rms: bool,
    needs: Sequence[tuple[bool, bool]],
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return the gradients of <dy, y> + <dt_y, t_y>, in pairs as `needs`.

    Args:
        cotangents: ((dy, dt_y),). Without dt_y this is the primal backward, and no tangent is read; with dt_y, dy may
            be None.
        inputs, rms: as in `norm_forward`.
        saved: its outputs, which aren't read, and mean and rstd.
        needs: which gradients of x, weight, bias, scale, shift and of their tangents are wanted; the others are None.

    Returns:
        (dx, dt_x), (dweight, dt_weight), ..., each in the shape and dtype of its argument. Sums over rows are taken in
        float32 and in a fixed order.

    Raises:
        ValueError: there is no cotangent.
    """
    ((dy, dt_y),) = cotangents
    if dy is None and dt_y is None:
        raise ValueError("dy: expected a tensor where dt_y is None, got None")
    return gradient_pairs(NAMES[:5], Cotangents(dy, dt_y), inputs_of(inputs), saved[1], rms, needs)


def gradient_pairs(
    names: Sequence[str],
    cotangents: Cotangents,
    inputs: Inputs,
    statistics: tuple[Tensor | None, Tensor],
    rms: bool,
    needs: Sequence[tuple[bool, bool]],
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return the gradients of the inputs of these names and of their tangents, in pairs as `needs`."""
    both = [(name, f"t_{name}") for name in names]
    wanted = [name for pair, need in zip(both, needs, strict=True) for name, want in zip(pair, need) if want]
    found = gradients(cotangents, inputs, *statistics, rms, wanted)
    return [(found.get(of_primal), found.get(of_tangent)) for of_primal, of_tangent in both]


def gradients(
    cotangents: Cotangents, inputs: Inputs, mean: Tensor | None, rstd: Tensor, rms: bool, wanted: Sequence[str]
) -> dict[str, Tensor]:
    """Return the wanted gradients by the names of their tensors; of those that are None, none."""
    given = {**inputs._asdict(), **{f"t_{name}": getattr(inputs, name) for name in NAMES}}
    wanted = [name for name in wanted if given[name] is not None]
    if not wanted:
        return {}
    if inputs.x.numel() == 0:
        return {name: torch.zeros_like(given[name], memory_format=torch.contiguous_format) for name in wanted}
    if cotangents.dt_y is None and cotangents.dt_r is None:
        inputs = inputs._replace(**dict.fromkeys((f"t_{name}" for name in NAMES), None))
    turned = inputs.x.shape[1] == 1 < inputs.x.shape[0]
    if turned:  # one row a sample: then rather one sample of many rows
        cotangents, inputs = Cotangents(*map(_turned, cotangents)), Inputs(*map(_turned, inputs))
        mean, rstd = (None if x is None else x.mT for x in (mean, rstd))
    task = plan(cotangents, inputs, mean, rstd, rms, wanted)
    for launch in task.launches:
        _backward_kernel[launch.grid](*launch.args, **launch.options)
    rows = {
        name[1:]: x.to(given[name[1:]].dtype)
        for name, x in task.rows._asdict().items()
        if x is not None and name[1:] in wanted
    }
    sums = {name: _summed(x, getattr(inputs, name.removeprefix("t_"))) for name, x in task.sums.items()}
    found = {**rows, **sums}
    return (
        {name: x if x.dim() < 3 else x.transpose(0, 1).contiguous() for name, x in found.items()} if turned else found
    )


def plan(
    cotangents: Cotangents, inputs: Inputs, mean: Tensor | None, rstd: Tensor, rms: bool, wanted: Sequence[str]
) -> Plan:
    """Return how to launch the kernel. Runs nothing: one can also just compile it, with meta tensors.

    Where a whole row leaves no room, a second launch takes the sums, and h, whose gradients follow from those of x. Its
    programs see a few columns each.
    """
    x = inputs.x
    batch, length, width = x.shape
    summed = [name for name in wanted if name.removeprefix("t_") in SUMMED]
    by_row = [name for name in summed if _is_by_row(getattr(inputs, name.removeprefix("t_")), x)]
    added_up = [name for name in summed if name not in by_row]
    residual = inputs.h is not None and any(name in wanted for name in ("h", "t_h", "gate", "t_gate"))
    split = not configs.norm_sums_fit(width, len(added_up), residual)
    mixed = cotangents.dt_y is not None or cotangents.dt_r is not None
    dtype = torch.float32 if split and residual else x.dtype  # where dh and dgate follow from it
    dx = _empty(x, dtype, "x" in wanted or (split and residual))
    dt_x = _empty(x, dtype, "t_x" in wanted or (split and residual and mixed))
    dh, dt_h = (_empty(x, inputs.h.dtype, True) if name in wanted else None for name in ("h", "t_h"))
    known = (_empty(rstd, rstd.dtype, split) for _ in range(3))
    sources = (Inputs(*map(strided, inputs)), Statistics(mean, rstd, *known))

    def launch(cotangents: Cotangents, rows: RowGradients, names: Sequence[str], columns: bool) -> Launch:
        config = configs.norm_columns_config if columns else configs.norm_backward_config
        tile, steps = config(batch, length, width, len(set(names) - set(by_row)))
        chunks = triton.cdiv(length, tile.rows * steps)
        likes = {name: getattr(inputs, name.removeprefix("t_")) for name in names}
        outs = {name: _destination(like, x, name in by_row, chunks) for name, like in likes.items()}
        sums.update(outs)
        partial, whole = (Sums(**{f"d{n}": t for n, t in outs.items() if (n in by_row) == w}) for w in (False, True))
        return Launch(
            grid=(batch * chunks, triton.cdiv(width, tile.block_c)),
            args=(Cotangents(*map(strided, cotangents)), *sources, rows, partial, whole, length, steps),
            options={
                "C": width,
                "RMS": rms,
                "COLUMNS": columns,
                "ROWS": tile.rows,
                "BLOCK_C": tile.block_c,
                "num_warps": tile.num_warps,
                **FUSION,
            },
        )

    sums: dict[str, Tensor] = {}
    rows = RowGradients(dx, dt_x, dh, dt_h)
    if not split:
        return Plan([launch(cotangents, rows, summed, False)], rows, sums)
    onward = Cotangents(cotangents.dy, cotangents.dt_y, *((dx, dt_x) if residual else (None, None)))
    of_rows = launch(cotangents, RowGradients(dx, dt_x, None, None), by_row, False)
    of_columns = launch(onward, RowGradients(None, None, dh, dt_h), added_up, True)
    return Plan([of_rows, of_columns], rows, sums)


def _empty(like: Tensor, dtype: torch.dtype, wanted: bool) -> Tensor | None:
    return torch.empty(like.shape, dtype=dtype, device=like.device) if wanted else None


def _is_by_row(like: Tensor, x: Tensor) -> bool:
    """Return whether a parameter has a row for each of x's: then a program writes rows of its gradient, not sums."""
    return like.dim() == 3 and like.shape[1] == x.shape[1] > 1


def _destination(like: Tensor, x: Tensor, by_row: bool, chunks: int) -> Tensor:
    """Return (B, T, C) for gradients by row, else (B, chunks, C) of partial sums."""
    batch, length, width = x.shape
    alone = by_row and like.shape[0] == batch
    shape = (batch, length if by_row else chunks, width)
    return torch.empty(shape, dtype=like.dtype if alone else torch.float32, device=x.device)


def _summed(partial: Tensor, like: Tensor) -> Tensor:
    """Return the second stage: what the programs left, summed to the parameter's shape and in its dtype."""
    if partial.shape == like.shape:
        return partial.to(like.dtype)
    total = partial.sum((0, 1)) if like.dim() == 1 else partial.sum_to_size(like.shape)
    return total.to(like.dtype)


def _turned(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.transpose(0, 1) if x.dim() == 3 else x


@triton.jit
def _backward_kernel(
    CO, IN, STATS, OUT, PARTIAL, WHOLE, T, steps,
    C: tl.constexpr, RMS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Take ROWS rows of one sample at a time, `steps` times, and add their share to the sums over rows."""
    chunks = tl.cdiv(T, ROWS * steps)
    pid = tl.program_id(0)
    b = (pid // chunks).to(tl.int64)
    start_t = (pid % chunks) * steps * ROWS
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = zero_sums(PARTIAL, ROWS, BLOCK_C)
    for step in tl.range(0, steps):
        offs_t = start_t + step * ROWS + tl.arange(0, ROWS)
        live = (offs_t < T)[:, None] & (offs_c < C)[None, :]
        at = (b, offs_t, offs_c, live)
        xh, t_xh, a, rstd = _normalised(IN, STATS, T, at, C, RMS, COLUMNS)
        row, of_w, of_b, of_s, of_m = _through_affine(CO, IN, xh, t_xh, at, C)
        dr, dt_r = None, None
        if not COLUMNS:  # A launch of columns has nothing but the cotangents of r here.
            dr, dt_r = _through_norm(row[0], row[1], xh, t_xh, a, rstd, C, RMS)
        dg, dt_g = _through_residual(CO, IN, OUT, dr, dt_r, b * T + offs_t, at, C)
        found = in_order(
            of_w[0], of_b[0], of_s[0], of_m[0], dg, of_w[1], of_b[1], of_s[1], of_m[1], dt_g
        )  # fmt: skip
        for i in tl.static_range(len(WHOLE)):
            store_rows(WHOLE[i], b * T + offs_t, offs_c, live, found[i], C)
        sums = summed_up(sums, PARTIAL, found)
    for i in tl.static_range(len(PARTIAL)):
        if PARTIAL[i] is not None:
            ptrs = PARTIAL[i] + pid.to(tl.int64) * C + offs_c
            tl.store(ptrs, tl.sum(sums[i], 0), mask=offs_c < C)


@triton.jit
def _normalised(IN, STATS, T, at, C: tl.constexpr, RMS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return xh, t_xh, a = mean(xh∘t_x) and rstd; COLUMNS reads the means that a launch with whole rows wrote."""
    b, offs_t, offs_c, live = at
    rows, exists = b * T + offs_t, offs_t < T
    x, t_x = load_rows(IN, b, offs_t, offs_c, live, C)  # (ROWS, BLOCK_C)
    rstd = tl.load(STATS.rstd + rows, mask=exists, other=0.0)
    if not RMS:
        x = tl.where(live, x - tl.load(STATS.mean + rows, mask=exists, other=0.0)[:, None], 0.0)
        if COLUMNS:
            rest = tl.load(STATS.rest + rows, mask=exists, other=0.0)
        else:
            rest = tl.sum(x, 1) / C
        x = tl.where(live, x - rest[:, None], 0.0)
        if (not COLUMNS) and (STATS.rest is not None):
            tl.store(STATS.rest + rows, rest, mask=exists)
    xh = x * rstd[:, None]  # (ROWS, BLOCK_C)
    t_xh, a = None, None
    if t_x is not None:
        if not RMS:
            if COLUMNS:
                t_mean = tl.load(STATS.t_mean + rows, mask=exists, other=0.0)
            else:
                t_mean = tl.sum(t_x, 1) / C
            t_x = tl.where(live, t_x - t_mean[:, None], 0.0)
            if (not COLUMNS) and (STATS.t_mean is not None):
                tl.store(STATS.t_mean + rows, t_mean, mask=exists)
        if COLUMNS:
            a = tl.load(STATS.a + rows, mask=exists, other=0.0)
        else:
            a = tl.sum(xh * t_x, 1) / C
        if (not COLUMNS) and (STATS.a is not None):
            tl.store(STATS.a + rows, a, mask=exists)
        t_xh = (t_x - xh * a[:, None]) * rstd[:, None]  # (ROWS, BLOCK_C)
    return xh, t_xh, a, rstd


@triton.jit
def _through_affine(CO, IN, xh, t_xh, at, C: tl.constexpr):
    """Return the cotangents of xh and t_xh, and gradients of weight, bias, scale, shift and tangents before any sum."""
    b, offs_t, offs_c, live = at
    dy = load_or_none(CO.dy, b, offs_t, offs_c, live, C)  # (ROWS, BLOCK_C)
    dt_y = load_or_none(CO.dt_y, b, offs_t, offs_c, live, C)  # (ROWS, BLOCK_C)
    z, t_z = times(xh, t_xh, IN.weight, IN.t_weight, 0.0, b, offs_t, offs_c, live, C)
    z, t_z = plus(z, t_z, IN.bias, IN.t_bias, b, offs_t, offs_c, live, C)
    dz, dt_z = times_backward(dy, dt_y, IN.scale, IN.t_scale, 1.0, at, C)
    dxh, dt_xh = times_backward(dz, dt_z, IN.weight, IN.t_weight, 0.0, at, C)
    dw, dt_w = factor_gradient(dz, dt_z, xh, t_xh)
    ds, dt_s = factor_gradient(dy, dt_y, z, t_z)
    return pair(dxh, dt_xh), pair(dw, dt_w), pair(dz, dt_z), pair(ds, dt_s), pair(dy, dt_y)


@triton.jit
def _through_norm(dxh, dt_xh, xh, t_xh, a, rstd, C: tl.constexpr, RMS: tl.constexpr):
    """Return the cotangents of the rows and of their tangents."""
    dx, dt_x = None, None
    if dt_xh is not None:
        dt_x, along = _project(dt_xh, xh, C, RMS)
        dt_x = dt_x * rstd[:, None]
        if t_xh is not None:
            across = tl.sum(t_xh * dt_xh, 1) / C
            dx = -(t_xh * along[:, None] + xh * across[:, None] + dt_x * a[:, None])
    if dxh is not None:
        projected, _ = _project(dxh, xh, C, RMS)
        dx = add(dx, projected)
    if dx is not None:
        dx = dx * rstd[:, None]
    return pair(dx, dt_x)


@triton.jit
def _through_residual(CO, IN, OUT, dr, dt_r, rows, at, C: tl.constexpr):
    """Write the gradients of x, h and their tangents; return those of the gate and its tangent before any sum."""
    b, offs_t, offs_c, live = at
    dr = add(dr, load_or_none(CO.dr, b, offs_t, offs_c, live, C))  # (ROWS, BLOCK_C)
    dt_r = add(dt_r, load_or_none(CO.dt_r, b, offs_t, offs_c, live, C))  # (ROWS, BLOCK_C)
    store_rows(OUT.dx, rows, offs_c, live, dr, C)
    store_rows(OUT.dt_x, rows, offs_c, live, dt_r, C)
    dgate, dt_gate = None, None
    if IN.h is not None:
        dh, dt_h = times_backward(dr, dt_r, IN.gate, IN.t_gate, 0.0, at, C)
        store_rows(OUT.dh, rows, offs_c, live, dh, C)
        store_rows(OUT.dt_h, rows, offs_c, live, dt_h, C)
        h = load(IN.h, b, offs_t, offs_c, live, C)  # (ROWS, BLOCK_C)
        t_h = load_or_none(IN.t_h, b, offs_t, offs_c, live, C)  # (ROWS, BLOCK_C)
        dgate, dt_gate = factor_gradient(dr, dt_r, h, t_h)
    return pair(dgate, dt_gate)


@triton.jit
def _project(u, xh, C: tl.constexpr, RMS: tl.constexpr):
    """Return Pi(u), and mean(xh∘u)."""
    along = tl.sum(xh * u, 1) / C
    if not RMS:
        u = u - (tl.sum(u, 1) / C)[:, None]
    return u - xh * along[:, None], along
