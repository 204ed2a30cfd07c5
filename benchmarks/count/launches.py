"""Count what an op and a DiT block cost on memory: kernels launched and bytes moved, by torch.func.jvp and by ours.

    OMP_NUM_THREADS=1 python -m fastdistill.benchmarks.count.launches  # a minute on a CPU: results/launches.json, .md

`fastdistill.benchmarks.count.counting` says what is counted. "Backward" is that of a loss of output and tangent, to all
inputs and to their tangents. The floor is one kernel that reads every input once and writes every result once. Where
there is a GPU, ours is also timed: GB/s of the floor's bytes, against those of a copy on the same GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdistill as fd
from fastdistill.benchmarks.count.counting import counted, size
from fastdistill.benchmarks.ops.plain_dit import plain_block
from fastdistill.benchmarks.run.clock import Clock, CudaClock
from fastdistill.benchmarks.run.environment import RESULTS, ceilings, fingerprint
from fastdistill.models.dit import DiTBlock
from fastdistill.ops.protocol.cases import PublicOp, dit, every_case
from fastdistill.testing import relative_error

Op = Callable[..., Any]
Tensors = tuple[Tensor, ...]
TOKENS, WIDTH, HEADS, RATIO = 256, 1152, 16, 4.0  # DiT-XL/2 on latents of 32 x 32
WAYS = ("torch.func.jvp", "ours, torch", "ours, Triton")
BLOCKS = {False: "DiT-XL/2", True: "with RoPE, QK-norm"}
MATMULS = {"mm", "bmm", "addmm", "addmm_", "baddbmm"}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class ComparedOp(NamedTuple):
    """Op as a function of the tensors that have tangents in a network, in plain PyTorch and as ours.

    shapes: of these tensors. parameters: bytes of the tensors without a tangent, which are read as well.
    """

    plain: Op
    ours: Op
    shapes: tuple[tuple[int, ...], ...]
    parameters: int
    triton: bool


class Sizes(NamedTuple):
    """Sizes of a DiT's tensors."""

    batch: int = 16
    tokens: int = TOKENS
    width: int = WIDTH
    heads: int = HEADS


def compared_ops(sizes: Sizes, dtype: torch.dtype, device: str) -> dict[str, ComparedOp]:
    """Return every op of the rooms' `cases.py` at the sizes of a DiT. Parameters have no tangents."""
    return {
        f"{row.name}, {variant}".removesuffix(", "): _compared(row, variant, sizes, dtype, device)
        for row in every_case()
        for variant in row.launched
    }


def _compared(row: PublicOp, variant: str, of_dit: Sizes, dtype: torch.dtype, device: str) -> ComparedOp:
    sizes, given = row.variant(variant, dit(*of_dit))
    options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    shapes = row.shapes(sizes)
    still = {name: torch.randn(shapes[name], dtype=dtype, device=device) for name in row.parameters if name in shapes}
    moving = [name for name in shapes if name not in still]

    def bound(call: Callable[..., Tensors]) -> Op:
        def of_moving(*primals: Tensor) -> Tensors:
            with sdpa_kernel(SDPBackend.MATH):  # the only one of PyTorch's attentions that has a tangent
                return tuple(y.to(dtype) for y in call(dict(zip(moving, primals)) | still, options))

        return of_moving

    tensors = [*still.values(), *(x for x in options.values() if isinstance(x, Tensor))]
    read = sum(x.nbytes for x in tensors)
    return ComparedOp(bound(row.of_native), bound(row.of_op), tuple(shapes[name] for name in moving), read, row.triton)


def draw(case: ComparedOp, dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
    """Return primals and tangents, each with a memory of its own."""
    leaf = partial(torch.randn, dtype=dtype, device=device, requires_grad=True)
    primals, tangents = (tuple(leaf(shape) for shape in case.shapes) for _ in range(2))
    return primals, tangents


def pushed(op: Op, primals: Tensors, tangents: Tensors) -> Tensors:
    """Return outputs, then their tangents."""
    out, t_out = torch.func.jvp(op, primals, tangents)[:2]
    return (*out, *t_out)


def pulled(results: Tensors, primals: Tensors, tangents: Tensors) -> Callable[[], Tensors]:
    """Return the backward of outputs and tangents, to all inputs and all tangents."""
    cotangents = tuple(torch.ones_like(z) for z in results)
    return lambda: torch.autograd.grad(results, (*primals, *tangents), cotangents, retain_graph=True)


def count_ops(dtype_name: str, device: str, sizes: Sizes, clock: Clock | None = None) -> list[dict[str, Any]]:
    """Count a row for each op, way and direction, timed if there is a clock."""
    dtype, rows = DTYPES[dtype_name], []
    for name, case in compared_ops(sizes, dtype, device).items():
        primals, tangents = draw(case, dtype, device)
        results = pushed(case.ours, primals, tangents)
        inputs, written = (sum(map(size, each)) for each in ((*primals, *tangents), results))
        least = {"forward": inputs + written + case.parameters, "backward": 2 * inputs + written + case.parameters}
        per = sum(x.numel() for x in results) // 2
        ways = {"torch.func.jvp": (case.plain, "torch"), "ours, torch": (case.ours, "torch")}
        if case.triton:
            ways["ours, Triton"] = (case.ours, "triton")
        for way, (op, impl) in ways.items():
            forward = partial(pushed, op, primals, tangents)
            with counted(impl, device) as of_forward:
                outs = forward()
            backward = pulled(outs, primals, tangents)
            with counted(impl, device) as of_backward:
                backward()
            timed = clock if way != WAYS[1] or not case.triton else None  # on a GPU, ours is Triton's
            for direction, run, found in (("forward", forward, of_forward), ("backward", backward, of_backward)):
                row = {
                    "op": name,
                    "dtype": dtype_name,
                    "way": way,
                    "direction": direction,
                    "kernels": len(found),
                    "bytes": sum(kernel.bytes for kernel in found) / per,
                    "floor": least[direction] / per,
                    "names": [kernel.name for kernel in found],
                }
                rows.append(row | (speed(run, least[direction], timed) if timed else {}))
    return rows


def speed(run: Callable[[], Tensors], least: int, clock: Clock) -> dict[str, float]:
    """Measure on a GPU the median time, GB/s of the floor's bytes, and the kernels that really ran."""
    timed = clock.warm_up(run)
    seconds = statistics.median(clock.sample(timed) for _ in range(20))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        run()
        torch.cuda.synchronize()
    ran = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {"ms": 1e3 * seconds, "gb_per_s": 1e-9 * least / seconds, "kernels_profiled": len(ran)}


def block_ways(rope: bool, sizes: Sizes, device: str) -> dict[str, tuple[Callable[[], Any], str]]:
    """Return the run and the implementation of each way of a DiT block with its tangent, amid a network."""
    torch.manual_seed(0)
    batch, tokens, width, heads = sizes
    block = DiTBlock(width, heads, RATIO, qk_norm=rope).to(device)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    state = dict(block.named_parameters())
    shapes = ((batch, tokens, width), (batch, 1, width), (batch, tokens, width), (batch, width))
    point, direction = (tuple(torch.randn(shape, device=device) for shape in shapes) for _ in range(2))
    angles = fd.rope_angles((tokens,), width // heads, device=device) if rope else None

    def plain(x: Tensor, gate: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return plain_block(state, "", heads, x + gate * h, c, angles)

    def ours(x: Tensor, gate: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        stream, (gate_mlp, branch) = block(x, (gate, h), c, angles)
        return stream, gate_mlp, branch

    with torch.no_grad():
        stream, gate_mlp, branch = ours(*point)
        if not relative_error(stream + gate_mlp * branch, plain(*point)) < 1e-5:
            raise SystemExit("parity failed: our block and the plain one are different functions")
    low = [(z[0], z[1], z[2].bfloat16(), z[3]) for z in (point, direction)]  # a branch comes from a matmul
    return {
        "`torch.func.jvp` of plain modules": (lambda: torch.func.jvp(plain, *low), "torch"),
        "`fd.jvp`, torch": (lambda: fd.jvp(ours, *low), "torch"),
        "`fd.jvp`, Triton": (lambda: fd.jvp(ours, *low), "triton"),
        "plain modules without a tangent": (lambda: plain(*low[0]), "torch"),
    }


def count_blocks(sizes: Sizes, device: str) -> list[dict[str, Any]]:
    """Count the kernels of a block under bfloat16 autocast, with float32 parameters, by kind."""
    rows = []
    for rope in (False, True):
        for way, (run, impl) in block_ways(rope, sizes, device).items():
            with torch.autocast(device, torch.bfloat16), counted(impl, device) as kernels:
                run()
            names = [kernel.name for kernel in kernels]
            kinds = {
                "matmuls": sum(name in MATMULS for name in names),
                "ours": sum("." in name for name in names),
                "casts": names.count("_to_copy"),
            }
            row: dict[str, Any] = {"block": BLOCKS[rope], "way": way, "kernels": len(names), **kinds}
            row |= {"others": len(names) - sum(kinds.values()), "mib": sum(k.bytes for k in kernels) / 2**20}
            rows.append(row | {"names": names})
    return rows


def tables(rows: Sequence[dict[str, Any]], blocks: Sequence[dict[str, Any]], copy: float | None, sizes: Sizes) -> str:
    """Return both tables, and what the numbers mean."""
    bandwidth = "GB/s: not yet measured." if copy is None else f"GB/s: of a copy, {copy:.0f}."
    size = f"{sizes.tokens} tokens of width {sizes.width}"
    legend = (
        f"Counted by `python -m fastdistill.benchmarks.count.launches` on {sizes.batch} x {size}, {sizes.heads} heads "
        f"(DiT-XL/2: {TOKENS} of {WIDTH}, {HEADS}). A cell is kernels · bytes an element of the outputs. PyTorch's "
        "kernels are those that its dispatcher runs; Triton's are launches, with PyTorch's kernels beside them. "
        f"{bandwidth}"
    )
    text = [legend, ""]
    for direction, title in (("forward", "Output and tangent"), ("backward", "Gradients of both")):
        for dtype in DTYPES:
            text += [f"{title}, {dtype}:", "", *_op_table(rows, direction, dtype), ""]
    text += [
        f"A DiT block with its tangent, bfloat16 autocast, float32 parameters, 1 x {size}:",
        "",
        "| block | | kernels | matmuls | Triton | casts | others | MiB moved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in blocks:
        cells = [row[name] for name in ("block", "way", "kernels", "matmuls", "ours", "casts", "others")]
        text.append("| " + " | ".join(map(str, cells)) + f" | {row['mib']:.0f} |")
    return "\n".join(text) + "\n"


def _op_table(rows: Sequence[dict[str, Any]], direction: str, dtype: str) -> list[str]:
    found = {(r["op"], r["way"]): r for r in rows if (r["direction"], r["dtype"]) == (direction, dtype)}
    timed = any("gb_per_s" in row for row in found.values())
    heads = ["op", *WAYS, "floor", *(["GB/s", "of torch.func.jvp"] if timed else [])]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for op in dict.fromkeys(op for op, _ in found):
        of_op = [found.get((op, way)) for way in WAYS]
        cells = [op, *("-" if row is None else f"{row['kernels']} · {row['bytes']:.1f}" for row in of_op)]
        fastest, plain = found.get((op, WAYS[2]), found[op, WAYS[1]]), found[op, WAYS[0]]
        speeds = [f"{row['gb_per_s']:.0f}" for row in (fastest, plain)] if timed else []
        lines.append("| " + " | ".join([*cells, f"1 · {fastest['floor']:.1f}", *speeds]) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, measure where there is a GPU, print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=Sizes().batch, help="samples, of the ops")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="in a sample")
    parser.add_argument("--width", type=int, default=WIDTH, help="of a token")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "launches", help="without its suffix")
    args = parser.parse_args(arguments)
    device = args.device
    sizes = Sizes(args.batch, args.tokens, args.width, HEADS)
    torch.manual_seed(0)
    clock = CudaClock() if device == "cuda" else None
    rows = [row for dtype in DTYPES for row in count_ops(dtype, device, sizes, clock)]
    blocks = count_blocks(sizes._replace(batch=1), device)
    copy = None if clock is None else ceilings(torch.device(device), clock)["copy_gbs"]
    results = {"environment": fingerprint(), "sizes": sizes._asdict(), "copy_gb_per_s": copy}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = json.dumps(results | {"ops": rows, "blocks": blocks}).replace('{"op"', '\n{"op"')
    args.out.with_suffix(".json").write_text(lines.replace('{"block"', '\n{"block"') + "\n", encoding="utf-8")
    text = tables(rows, blocks, copy, sizes)
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
