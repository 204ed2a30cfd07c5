"""Compute both backwards of attention, through the output alone and through its tangent as well, without atomics.

Three kernels: statistics of each query, then the gradients of keys and values, then those of queries and masks.
README.md derives them under "Backward", in the symbols used here.
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
from .attention_arguments import Inputs, check, mask_by_pointer, precision, use_descriptors
from .attention_bands import Problem, band, first_row, live_between, live_tiles, locate, problem_of, sequences, visible
from .attention_preprocess import Saved, preprocess_kernel
from .attention_tile import (
    Cotangents,
    Statistics,
    add_tile,
    indices,
    load_keys,
    load_queries,
    load_statistics,
    store_gradient,
)
from .launch import FUSION, Launch, Pairs
from .tiles import Described, Strided, described, stride_unit, strided, zeros

# Head dims up to which four and two accumulators of 64 rows fit the registers of four warps, and two under a mask.
WIDEST_OF_FOUR, WIDEST_OF_TWO, WIDEST_MASKED = 64, 128, 96


class Gradients(NamedTuple):
    """Gradients that the kernels write, contiguous. None is not wanted."""

    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    d_mask: Tensor | None
    dt_q: Tensor | None
    dt_k: Tensor | None
    dt_v: Tensor | None
    dt_mask: Tensor | None


class Task(NamedTuple):
    """Task of a backward: tensors without those that no cotangent asks about, and the gradients to write."""

    primals: tuple[Tensor, Tensor, Tensor, Tensor | None]
    tangents: tuple[Tensor | None, ...]
    cotangents: tuple[Tensor | None, ...]
    saved: Saved
    statistics: Statistics
    gradients: Gradients
    problem: Problem
    scale: float
    constants: dict[str, Any]


def attention_backward(
    cotangents: Pairs,
    inputs: Pairs,
    saved: tuple[Pairs, Sequence[Tensor | None]],
    *,
    window: tuple[int, int],
    lower_right: bool,
    cu_seqlens: tuple[Tensor, Tensor, int, int] | None,
    scale: float,
    needs: Sequence[tuple[bool, bool]],
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Return the gradients of sum(do * o) + sum(dt_o * t_o) + sum(d_lse * lse) + sum(d_mu * mu).

    Args:
        cotangents: (do, dt_o) and (d_lse, d_mu) of `attention_forward`'s outputs; None is zero.
        inputs, window, lower_right, cu_seqlens, scale: as there.
        saved: what it returned. Without o_rest and t_o_rest 16-bit gradients suffer from the rounding of o and t_o.
        needs: which gradients of q, k, v, the mask and of their tangents are wanted. The others are None, and so is
            that of a bool mask or of an absent tangent.

    Returns:
        (dq, dt_q), (dk, dt_k), (dv, dt_v), (d_mask, dt_mask), contiguous, each in its primal's dtype. A query that sees
        no key passes nothing on.

    Equivalent to:
        torch.autograd.grad of that sum
    """
    task, gradients = prepare(
        cotangents, inputs, saved,
        window=window, lower_right=lower_right, cu_seqlens=cu_seqlens, scale=scale, needs=needs,
    )  # fmt: skip
    if task is not None:
        perform(task)
    return list(zip(gradients[:4], gradients[4:]))


def perform(task: Task, descriptors: bool | None = None) -> None:
    """Launch what the task takes. descriptors: load rows by TMA, by default where the GPU and the tensors allow it."""
    _launch(preprocess_kernel, plan_preprocess(task))
    for part in parts_of_keys(task):
        _launch(_keys_kernel, plan_keys(part, descriptors=descriptors))
    for part in parts_of_queries(task):
        _launch(_queries_kernel, plan_queries(part, descriptors=descriptors))


def _launch(kernel: Any, launch: Launch) -> None:
    kernel[launch.grid](*launch.args, **launch.options)


def prepare(
    cotangents: Pairs,
    inputs: Pairs,
    saved: tuple[Pairs, Sequence[Tensor | None]],
    *,
    window: tuple[int, int],
    lower_right: bool,
    cu_seqlens: tuple[Tensor, Tensor, int, int] | None,
    scale: float,
    needs: Sequence[tuple[bool, bool]],
) -> tuple[Task | None, Gradients]:
    """Return the kernels' task, None where there is nothing to do, and all gradients, zero where no kernel writes."""
    check(inputs)
    (do, dt_o), (d_lse, d_mu) = cotangents
    (o, t_o), (lse, mu), rests = *saved[0], saved[1]
    primals, tangents = (tuple(part) for part in zip(*inputs))
    q, k, v, mask = primals
    t_q, t_k, t_v, t_mask = asked = _asked(dt_o, d_mu, tangents)
    if not any(x is not None for x in asked):
        dt_o = d_mu = None
    wanted = [need for part in zip(*needs) for need in part]
    given = any(x is not None for x in (do, dt_o, d_lse, d_mu))
    idle = not (q.numel() and k.numel() and given and any(wanted))
    # Some kernel writes every element of these; of the others some or none.
    written = [not idle and cu_seqlens is None and x is not None for x in (*primals[:3], None, *asked[:3], None)]
    gradients = Gradients._make(map(_gradient, (*primals, *tangents), wanted, written))
    if idle:
        return None, gradients

    moves = any(x is not None for x in (t_q, t_k, t_mask))
    biased = mask is not None and mask.dtype != torch.bool
    unit = stride_unit(q, k, v, t_q, t_k, t_v, do, dt_o, o, t_o, *rests)
    lse, d_lse, d_mu, mu = (None if x is None else x.contiguous() for x in (lse, d_lse, d_mu, mu))
    assert lse is not None
    task = Task(
        primals=primals,
        tangents=asked,
        cotangents=(do, dt_o),
        saved=Saved._make([*(strided(x, unit) for x in (o, t_o, *rests)), lse, d_lse, d_mu]),
        statistics=Statistics(
            lse=torch.empty_like(lse),
            rest=torch.empty_like(lse) if biased else None,
            mu=mu if moves else None,
            delta=torch.empty_like(lse),
            delta_t=torch.empty_like(lse) if moves else None,
        ),
        gradients=Gradients._make(None if x is None else y for x, y in zip((*primals, *asked), gradients)),
        problem=problem_of(q, k, window, cu_seqlens),
        scale=scale,
        constants={
            "D": q.shape[3],
            "D_V": v.shape[3],
            "LOWER_RIGHT": lower_right,
            "UNIT": unit,
            "PRECISION": precision(q.dtype),
        },
    )
    return task, gradients


def _asked(dt_o: Tensor | None, d_mu: Tensor | None, tangents: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Return the tangents that the cotangents ask about: mu does not depend on t_v."""
    if dt_o is not None:
        return tangents
    return (*tangents[:2], None, tangents[3]) if d_mu is not None else (None,) * 4


def _gradient(x: Tensor | None, need: bool, written: bool) -> Tensor | None:
    if x is None or not need or x.dtype == torch.bool:
        return None
    return (torch.empty if written else torch.zeros)(x.shape, dtype=x.dtype, device=x.device)


def plan_preprocess(task: Task, config: configs.Config | None = None) -> Launch:
    """Return how to launch the pre-pass. Runs nothing: one can also just compile it."""
    config = config or configs.Config(32, 32, 1 if task.statistics.lse.device.type == "cpu" else 4, 1)
    q, problem = task.primals[0], task.problem
    programs = triton.cdiv(problem.rows, config.block_n) * q.shape[0] * problem.heads
    args = (*_operands(task, config, False), task.saved, task.statistics, problem, task.scale)
    return Launch((programs,), args, _options(task, config))


def parts_of_keys(task: Task) -> list[Task]:
    """Return the task once for each launch of the kernel for keys: fewer accumulators at a time the wider they are."""
    if (most := _most_accumulators(task)) == 1:
        return _parts(task, ["dk"], ["dt_k"], ["dv"], ["dt_v"])
    _, dk, dv, _, _, dt_k, dt_v, _ = task.gradients
    if sum(x is not None for x in (dk, dv, dt_k, dt_v)) > most:
        return _parts(task, ["dk", "dt_k"], ["dv", "dt_v"])
    return _parts(task, ["dk", "dt_k", "dv", "dt_v"])


def parts_of_queries(task: Task) -> list[Task]:
    """Return the task once for each launch of the kernel for queries and masks."""
    if _most_accumulators(task) == 1:
        return _parts(task, ["dq", "d_mask"], ["dt_q", "dt_mask"])
    return _parts(task, ["dq", "d_mask", "dt_q", "dt_mask"])


def _most_accumulators(task: Task) -> int:
    """Return how many accumulators of 64 rows fit the registers beside the tiles."""
    width, masked = max(task.constants["D"], task.constants["D_V"]), task.primals[3] is not None
    mixed = any(x is not None for x in task.tangents)
    if mixed and width > (WIDEST_MASKED if masked else WIDEST_OF_TWO):
        return 1
    return 2 if width > WIDEST_OF_FOUR else 4


def _parts(task: Task, *groups: list[str]) -> list[Task]:
    """Return the task with the gradients of one group at a time, without the groups of which none is wanted."""
    parts = []
    for group in groups:
        gradients = Gradients(**{name: x if name in group else None for name, x in task.gradients._asdict().items()})
        if any(x is not None for x in gradients):
            parts.append(task._replace(gradients=gradients))
    return parts


def plan_keys(task: Task, config: configs.Config | None = None, descriptors: bool | None = None) -> Launch:
    """Return how to launch the kernel for keys and values, by default with the shipped config."""
    (q, k, _, mask), problem = task.primals, task.problem
    config, operands = _choices(task, "backward_kv", problem.m, config, descriptors)
    tiles = None if mask is None else live_tiles(mask.mT, config.block_m, config.block_n)
    programs = triton.cdiv(problem.m, config.block_m) * sequences(q, problem) * k.shape[1]
    args = (*operands, task.statistics, task.gradients, problem, tiles, task.scale, k.shape[2])
    return Launch((programs,), args, _options(task, config))


def plan_queries(task: Task, config: configs.Config | None = None, descriptors: bool | None = None) -> Launch:
    """Return how to launch the kernel for queries and masks, by default with the shipped config."""
    (q, _, _, mask), problem = task.primals, task.problem
    config, operands = _choices(task, "backward_q", problem.n, config, descriptors)
    tiles = None if mask is None else live_tiles(mask, config.block_n, config.block_m)
    programs = triton.cdiv(problem.n, config.block_n) * sequences(q, problem) * problem.heads
    args = (*operands, task.statistics, task.gradients, problem, tiles, task.scale)
    return Launch((programs,), args, _options(task, config))


def _choices(
    task: Task, kernel: str, length: int, config: configs.Config | None, descriptors: bool | None
) -> tuple[configs.Config, tuple[Inputs, Cotangents]]:
    """Return the config and the operands: where they are not given, those for the GPU and the tensors at hand."""
    (q, k, v, mask), tangents, problem = task.primals, task.tangents, task.problem
    arch = configs.arch_of(q.device)
    if descriptors is None:
        tensors = (q, k, v, *tangents[:3], *task.cotangents)
        descriptors = problem.cu_n is None and use_descriptors(arch, *tensors)
    if config is None:
        banded = problem.left is not None or problem.right is not None
        config = configs.attention_config(
            kernel,
            arch if descriptors else min(arch, 80),
            q.dtype,
            max(q.shape[3], v.shape[3]),
            "".join(letter for letter, x in zip(configs.TANGENTS, tangents) if x is not None),
            "mask" if mask is not None else "band" if banded else "none",
            length,
        )
    return config, _operands(task, config, descriptors)


def _operands(task: Task, config: configs.Config, descriptors: bool) -> tuple[Inputs, Cotangents]:
    """Return the operands by descriptors for tiles of this size, or by pointers."""
    (q, k, v, mask), (t_q, t_k, t_v, t_mask) = task.primals, task.tangents

    def operand(x: Tensor | None, height: int) -> Strided | Described | None:
        return described(x, height, config.stream) if descriptors else strided(x, task.constants["UNIT"])

    n, m = config.block_n, config.block_m
    six = [operand(x, height) for x, height in zip((q, k, v, t_q, t_k, t_v), (n, m, m, n, m, m))]
    masks = [mask_by_pointer(x) for x in (mask, t_mask)]
    return Inputs._make([*six, *masks]), Cotangents(*(operand(x, n) for x in task.cotangents))


def _options(task: Task, config: configs.Config) -> dict[str, Any]:
    return {**task.constants, **config.options(), **FUSION}


@triton.jit
def _keys_kernel(
    IN, CO, STATISTICS, OUT, P, TILES, scale, kv_rows,
    D: tl.constexpr, D_V: tl.constexpr, LOWER_RIGHT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Write the gradients of BLOCK_M keys of one key head, from all the queries of its group that see them."""
    tiles_m = tl.cdiv(P.m, BLOCK_M)
    pid = tl.program_id(0)
    tile_m, pid_zh = pid % tiles_m, pid // tiles_m
    kv_heads = P.heads // P.group
    h_kv, start_m = pid_zh % kv_heads, tile_m * BLOCK_M
    b, first_n, N, first_m, M = locate(P, pid_zh // kv_heads)
    if start_m >= M:
        return
    low, high = band(P, N, M, LOWER_RIGHT)
    begin, whole_begin, whole_end, end = visible(start_m, -high, -low, N, BLOCK_M, BLOCK_N)
    key = load_keys(IN, b, h_kv, first_m, start_m, M, BLOCK_M, D, D_V, UNIT, STREAM)  # (BLOCK_M, D), (BLOCK_M, D_V)

    dk, dt_k, dv, dt_v = (), (), (), ()
    if OUT.dk is not None:
        dk = zeros(BLOCK_M, D, STREAM)
    if OUT.dt_k is not None:
        dt_k = zeros(BLOCK_M, D, STREAM)
    if OUT.dv is not None:
        dv = zeros(BLOCK_M, D_V, STREAM)
    if OUT.dt_v is not None:
        dt_v = zeros(BLOCK_M, D_V, STREAM)
    for g in tl.range(0, P.group):
        h = h_kv * P.group + g
        listed, first, last = None, begin // BLOCK_N, tl.cdiv(end, BLOCK_N)
        if TILES is not None:
            listed, first, last = live_between(TILES, b, h, tile_m, begin, end, BLOCK_N)
        for tile in tl.range(first, last):
            start_n = tile * BLOCK_N
            if listed is not None:
                start_n = tl.load(listed + tile) * BLOCK_N
            query = load_queries(IN, CO, b, h, first_n, start_n, N, BLOCK_N, D, D_V, UNIT, STREAM)
            i, j = indices(start_n, start_m, BLOCK_N, BLOCK_M, True)
            limits = None
            if (P.left is not None) or (P.right is not None):
                limits = (low, high, (start_n < whole_begin) | (start_n >= whole_end))
            dk, dt_k, dv, dt_v = add_tile(
                (dk, dt_k, dv, dt_v), query, key, STATISTICS, IN, (None, None), P, first_n, (b, h, i, j, N, M), limits,
                scale, True, PRECISION, D, D_V, STREAM,
            )  # fmt: skip

    row = (b.to(tl.int64) * kv_heads + h_kv) * kv_rows + first_m + start_m
    live = start_m + tl.arange(0, BLOCK_M) < M
    store_gradient(OUT.dk, row, live, dk, scale, D, STREAM)
    store_gradient(OUT.dt_k, row, live, dt_k, scale, D, STREAM)
    store_gradient(OUT.dv, row, live, dv, 1.0, D_V, STREAM)
    store_gradient(OUT.dt_v, row, live, dt_v, 1.0, D_V, STREAM)


@triton.jit
def _queries_kernel(
    IN, CO, STATISTICS, OUT, P, TILES, scale,
    D: tl.constexpr, D_V: tl.constexpr, LOWER_RIGHT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STREAM: tl.constexpr,
):  # fmt: skip
    """Write the gradients of BLOCK_N queries of one head, and their rows of the masks' gradients."""
    tiles_n = tl.cdiv(P.n, BLOCK_N)
    pid = tl.program_id(0)
    tile_n, pid_zh = pid % tiles_n, pid // tiles_n
    h, start_n = pid_zh % P.heads, tile_n * BLOCK_N
    b, first_n, N, first_m, M = locate(P, pid_zh // P.heads)
    if start_n >= N:
        return
    low, high = band(P, N, M, LOWER_RIGHT)
    begin, whole_begin, whole_end, end = visible(start_n, low, high, M, BLOCK_N, BLOCK_M)
    listed, first, last = None, begin // BLOCK_M, tl.cdiv(end, BLOCK_M)
    if TILES is not None:
        listed, first, last = live_between(TILES, b, h, tile_n, begin, end, BLOCK_M)
    query = load_queries(IN, CO, b, h, first_n, start_n, N, BLOCK_N, D, D_V, UNIT, STREAM)  # (BLOCK_N, D), (., D_V)
    i = start_n + tl.arange(0, BLOCK_N)[:, None]
    statistics = load_statistics(STATISTICS, P, first_n, (b, h, i, i, N, M))

    dq, dt_q = (), ()
    if OUT.dq is not None:
        dq = zeros(BLOCK_N, D, STREAM)
    if OUT.dt_q is not None:
        dt_q = zeros(BLOCK_N, D, STREAM)
    for tile in tl.range(first, last):
        start_m = tile * BLOCK_M
        if listed is not None:
            start_m = tl.load(listed + tile) * BLOCK_M
        key = load_keys(IN, b, h // P.group, first_m, start_m, M, BLOCK_M, D, D_V, UNIT, STREAM)
        j = start_m + tl.arange(0, BLOCK_M)[None, :]
        limits = (low, high, (start_m < whole_begin) | (start_m >= whole_end))
        sums = add_tile(
            (dq, dt_q, (), ()), query, key, statistics, IN, (OUT.d_mask, OUT.dt_mask), P, first_n, (b, h, i, j, N, M),
            limits, scale, False, PRECISION, D, D_V, STREAM,
        )  # fmt: skip
        dq, dt_q = sums[0], sums[1]

    first = first_row(P, b, h, first_n + start_n)
    live = start_n + tl.arange(0, BLOCK_N) < N
    store_gradient(OUT.dq, first, live, dq, scale, D, STREAM)
    store_gradient(OUT.dt_q, first, live, dt_q, scale, D, STREAM)
