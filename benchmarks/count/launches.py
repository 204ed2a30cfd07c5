"""Count the kernels that an op and a DiT block launch, and the bytes that they move: torch.func.jvp against ours.

    OMP_NUM_THREADS=1 python -m fastdistill.benchmarks.count.launches  # a minute on a CPU: results/launches.json, .md

`fastdistill.benchmarks.count.counting` says what is counted. "Backward" means the gradients of a loss of output and
tangent, in all inputs and their tangents. The floor is one kernel that reads every input once and writes every result
once. On a GPU, ours is also timed: GB/s of the floor's bytes, beside those of a copy on the same GPU.
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
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdistill as fd
from fastdistill.benchmarks.count.counting import counted, size
from fastdistill.benchmarks.ops.plain_dit import modulated, plain_block, turned
from fastdistill.benchmarks.run.clock import Clock, CudaClock
from fastdistill.benchmarks.run.environment import RESULTS, ceilings, fingerprint
from fastdistill.models.dit import DiTBlock
from fastdistill.testing import relative_error

Op = Callable[..., Any]
Tensors = tuple[Tensor, ...]
TOKENS, WIDTH, HEADS, RATIO = 256, 1152, 16, 4.0  # These are DiT-XL/2 on latents of 32 x 32.
WAYS = ("torch.func.jvp", "ours, torch", "ours, Triton")
BLOCKS = {False: "DiT-XL/2", True: "with RoPE, QK-norm"}
MATMULS = {"mm", "bmm", "addmm", "addmm_", "baddbmm"}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class ComparedOp(NamedTuple):
    """Describe an op as a function of tensors that all have tangents, in plain PyTorch and as ours, with their shapes.

    Args:
        parameters: bytes of the other tensors that are read.
        streams: number of tensors of the result's shape whose elements are counted.
    """

    plain: Op
    ours: Op
    shapes: tuple[tuple[int, ...], ...]
    parameters: int = 0
    triton: bool = True
    streams: int = 1


class Sizes(NamedTuple):
    """Hold the sizes of a DiT's tensors."""

    batch: int = 16
    tokens: int = TOKENS
    width: int = WIDTH
    heads: int = HEADS


def compared_ops(sizes: Sizes, dtype: torch.dtype, device: str) -> dict[str, ComparedOp]:
    """Return every op at the sizes of a DiT; parameters have no tangents."""
    batch, tokens, width, heads = sizes
    make = partial(torch.randn, dtype=dtype, device=device)
    w, b, of_head = make(width), make(width), make(width // heads)
    matrix, of_six = make(width, width), make(6 * width, width)
    cos, sin = fd.rope_angles((tokens,), width // heads, device=device)
    x, one, hidden = (batch, tokens, width), (batch, 1, width), (batch, tokens, int(RATIO * width))
    head, last = (batch, heads, tokens, width // heads), (width,)

    def plain_step(x: Tensor, gate: Tensor, h: Tensor, scale: Tensor, shift: Tensor) -> Tensors:
        r = x + gate * h
        return r, modulated(r, scale, shift)

    def plain_heads(q: Tensor, k: Tensor) -> Tensors:
        normed = (F.rms_norm(z, z.shape[-1:], of_head, 1e-6) for z in (q, k))
        return tuple(turned(z, cos, sin).to(dtype) for z in normed)

    def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v)

    tanh: dict[str, Any] = {"approximate": "tanh"}
    heads_of = partial(fd.qk_norm_rope, cos=cos, sin=sin, q_weight=of_head, k_weight=of_head, interleaved=True)
    return {
        "layer_norm": ComparedOp(
            lambda x: F.layer_norm(x, last, w, b), lambda x: fd.layer_norm(x, last, w, b), (x,), 2 * w.nbytes
        ),
        "rms_norm": ComparedOp(
            lambda x: F.rms_norm(x, last, w, 1e-6), lambda x: fd.rms_norm(x, last, w, 1e-6), (x,), w.nbytes
        ),
        "ada_layer_norm": ComparedOp(modulated, fd.ada_layer_norm, (x, one, one)),
        "ada_rms_norm": ComparedOp(
            lambda x, scale, shift: F.rms_norm(x, last, eps=1e-6) * (1 + scale) + shift, fd.ada_rms_norm, (x, one, one)
        ),
        "gated_residual_ada_norm": ComparedOp(plain_step, fd.gated_residual_ada_norm, (x, one, x, one, one)),
        "qk_norm_rope": ComparedOp(plain_heads, heads_of, (head, head), 2 * cos.nbytes, streams=2),
        "gelu": ComparedOp(F.gelu, fd.gelu, (hidden,)),
        "gelu, tanh": ComparedOp(partial(F.gelu, **tanh), partial(fd.gelu, **tanh), (hidden,)),
        "silu": ComparedOp(F.silu, fd.silu, (hidden,)),
        "swiglu": ComparedOp(lambda gate, up: F.silu(gate) * up, fd.swiglu, (hidden, hidden)),
        "geglu": ComparedOp(lambda gate, up: F.gelu(gate) * up, fd.geglu, (hidden, hidden)),
        "linear, tokens": ComparedOp(
            lambda x: F.linear(x, matrix), lambda x: fd.linear(x, matrix), (x,), matrix.nbytes, triton=False
        ),
        "linear, modulation": ComparedOp(
            lambda x: F.linear(x, of_six), lambda x: fd.linear(x, of_six), (one,), of_six.nbytes, triton=False
        ),
        "attention": ComparedOp(plain_attention, fd.scaled_dot_product_attention, (head,) * 3),
    }


def draw(compared: ComparedOp, dtype: torch.dtype, device: str) -> tuple[Tensors, Tensors]:
    """Draw primals and tangents, each with memory of its own."""
    leaf = partial(torch.randn, dtype=dtype, device=device, requires_grad=True)
    primals, tangents = (tuple(leaf(shape) for shape in compared.shapes) for _ in range(2))
    return primals, tangents


def pushed(op: Op, primals: Tensors, tangents: Tensors) -> Tensors:
    """Return the outputs, then their tangents."""
    out, t_out = torch.func.jvp(op, primals, tangents)[:2]
    return (*out, *t_out) if isinstance(out, tuple) else (out, t_out)


def pulled(results: Tensors, primals: Tensors, tangents: Tensors) -> Callable[[], Tensors]:
    """Return the backward of outputs and tangents, in all inputs and all tangents."""
    cotangents = tuple(torch.ones_like(z) for z in results)
    return lambda: torch.autograd.grad(results, (*primals, *tangents), cotangents, retain_graph=True)


def count_ops(dtype_name: str, device: str, sizes: Sizes, clock: Clock | None = None) -> list[dict[str, Any]]:
    """Return the counts of each op, way and direction; with a clock, ours is also timed."""
    dtype, counts = DTYPES[dtype_name], []
    for name, compared in compared_ops(sizes, dtype, device).items():
        primals, tangents = draw(compared, dtype, device)
        results = pushed(compared.ours, primals, tangents)
        inputs, written = (sum(map(size, each)) for each in ((*primals, *tangents), results))
        read_once = inputs + compared.parameters
        least = {"forward": read_once + written, "backward": read_once + inputs + written}
        per = results[0].numel() * compared.streams
        ways = {"torch.func.jvp": (compared.plain, "torch"), "ours, torch": (compared.ours, "torch")}
        if compared.triton:
            ways["ours, Triton"] = (compared.ours, "triton")
        for way, (op, impl) in ways.items():
            forward = partial(pushed, op, primals, tangents)
            with counted(impl, device) as of_forward:
                outs = forward()
            backward = pulled(outs, primals, tangents)
            with counted(impl, device) as of_backward:
                backward()
            # On a GPU, only Triton's form of ours is timed.
            timed = clock if way != WAYS[1] or not compared.triton else None
            for direction, run, found in (("forward", forward, of_forward), ("backward", backward, of_backward)):
                entry = {
                    "op": name,
                    "dtype": dtype_name,
                    "way": way,
                    "direction": direction,
                    "kernels": len(found),
                    "bytes": sum(kernel.bytes for kernel in found) / per,
                    "floor": least[direction] / per,
                    "names": [kernel.name for kernel in found],
                }
                counts.append(entry | (speed(run, least[direction], timed) if timed else {}))
    return counts


def speed(run: Callable[[], Tensors], least: int, clock: Clock) -> dict[str, float]:
    """Measure on a GPU the median time, GB/s of the floor's bytes, and the number of kernels that really ran."""
    timed = clock.warm_up(run)
    seconds = statistics.median(clock.sample(timed) for _ in range(20))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        run()
        torch.cuda.synchronize()
    ran = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return {"ms": 1e3 * seconds, "gb_per_s": 1e-9 * least / seconds, "kernels_profiled": len(ran)}


def block_ways(rope: bool, sizes: Sizes, device: str) -> dict[str, tuple[Callable[[], Any], str]]:
    """Return the run and the implementation of each way to compute a DiT block, amid a network, with its tangent."""
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
    # The branch comes from a matmul, so it has 16 bits.
    low = [(z[0], z[1], z[2].bfloat16(), z[3]) for z in (point, direction)]
    return {
        "`torch.func.jvp` of plain modules": (lambda: torch.func.jvp(plain, *low), "torch"),
        "`fd.jvp`, torch": (lambda: fd.jvp(ours, *low), "torch"),
        "`fd.jvp`, Triton": (lambda: fd.jvp(ours, *low), "triton"),
        "plain modules without a tangent": (lambda: plain(*low[0]), "torch"),
    }


def count_blocks(sizes: Sizes, device: str) -> list[dict[str, Any]]:
    """Return the kernels of a block by kind, under bfloat16 autocast with float32 parameters."""
    counts = []
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
            entry: dict[str, Any] = {"block": BLOCKS[rope], "way": way, "kernels": len(names), **kinds}
            entry |= {"others": len(names) - sum(kinds.values()), "mib": sum(k.bytes for k in kernels) / 2**20}
            counts.append(entry | {"names": names})
    return counts


def tables(counts: Sequence[dict[str, Any]], blocks: Sequence[dict[str, Any]], copy: float | None, sizes: Sizes) -> str:
    """Return both tables, with a text that explains the numbers."""
    bandwidth = "GB/s: not yet measured." if copy is None else f"GB/s: of a copy, {copy:.0f}."
    size = f"{sizes.tokens} tokens of width {sizes.width}"
    legend = (
        f"Counted by `python -m fastdistill.benchmarks.count.launches` on {sizes.batch} x {size}, {sizes.heads} heads "
        f"(DiT-XL/2: {TOKENS} of {WIDTH}, {HEADS}). A cell is kernels · bytes an element. PyTorch's kernels are those "
        f"that its dispatcher runs; Triton's are launches, with PyTorch's kernels beside them. {bandwidth}"
    )
    text = [legend, ""]
    for direction, title in (("forward", "Output and tangent"), ("backward", "Gradients of both")):
        for dtype in DTYPES:
            text += [f"{title}, {dtype}:", "", *_op_table(counts, direction, dtype), ""]
    text += [
        f"A DiT block with its tangent, bfloat16 autocast, float32 parameters, 1 x {size}:",
        "",
        "| block | | kernels | matmuls | Triton | casts | others | MiB moved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in blocks:
        cells = [entry[name] for name in ("block", "way", "kernels", "matmuls", "ours", "casts", "others")]
        text.append("| " + " | ".join(map(str, cells)) + f" | {entry['mib']:.0f} |")
    return "\n".join(text) + "\n"


def _op_table(counts: Sequence[dict[str, Any]], direction: str, dtype: str) -> list[str]:
    found = {
        (entry["op"], entry["way"]): entry
        for entry in counts
        if (entry["direction"], entry["dtype"]) == (direction, dtype)
    }
    timed = any("gb_per_s" in entry for entry in found.values())
    heads = ["op", *WAYS, "floor", *(["GB/s", "of torch.func.jvp"] if timed else [])]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for op in dict.fromkeys(op for op, _ in found):
        of_op = [found.get((op, way)) for way in WAYS]
        cells = [op, *("-" if entry is None else f"{entry['kernels']} · {entry['bytes']:.1f}" for entry in of_op)]
        fastest, plain = found.get((op, WAYS[2]), found[op, WAYS[1]]), found[op, WAYS[0]]
        speeds = [f"{entry['gb_per_s']:.0f}" for entry in (fastest, plain)] if timed else []
        lines.append("| " + " | ".join([*cells, f"1 · {fastest['floor']:.1f}", *speeds]) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, measure where there is a GPU, print the tables, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=Sizes().batch, help="number of samples for the ops")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="number of tokens in a sample")
    parser.add_argument("--width", type=int, default=WIDTH, help="width of a token")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "launches", help="path of the results without the suffix")
    args = parser.parse_args(arguments)
    device = args.device
    sizes = Sizes(args.batch, args.tokens, args.width, HEADS)
    torch.manual_seed(0)
    clock = CudaClock() if device == "cuda" else None
    counts = [entry for dtype in DTYPES for entry in count_ops(dtype, device, sizes, clock)]
    blocks = count_blocks(sizes._replace(batch=1), device)
    copy = None if clock is None else ceilings(torch.device(device), clock)["copy_gbs"]
    results = {"environment": fingerprint(), "sizes": sizes._asdict(), "copy_gb_per_s": copy}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = json.dumps(results | {"ops": counts, "blocks": blocks}).replace('{"op"', '\n{"op"')
    args.out.with_suffix(".json").write_text(lines.replace('{"block"', '\n{"block"') + "\n", encoding="utf-8")
    text = tables(counts, blocks, copy, sizes)
    args.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
