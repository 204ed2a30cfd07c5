"""Attention with its tangent on a GPU: ours against what else there is, in TFLOP/s and memory.

    python -m benchmarks.gpu_attention                                   # all of D, N and modes; table and JSON
    python -m benchmarks.gpu_attention --dims 72 --lengths 256 --modes forward
    python -m benchmarks.gpu_attention --smoke                           # on any CPU, in seconds: only that it works

Modes, and the matmuls of 2·B·H·N·M·D operations that each is credited with, whatever it does:
  forward   o and t_o, all three tangents given: 6            primal    the gradients of o alone: 5
  mixed     the gradients of o and t_o, to the tangents, too: 15
The backwards are timed without the forward before them. Whatever is timed first passes the project's tolerance rule,
against float64, on a small problem of the same head dim: what is wrong is reported, and not timed. SDPA's own kernels
know no tangents; the plain attention that they do, 2 matmuls forward and 5 backward, is the floor.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.environment import ROOT, commit, fingerprint
from fastdistill import ops, reference, tune
from fastdistill.testing import assert_accurate

Tensors = tuple[Tensor, ...]
Data = tuple[Tensors, Tensors, Tensors]
MODES = {"forward": 6, "primal": 5, "mixed": 15}
PLAIN = {"forward": 2, "primal": 5}
DIMS, LENGTHS = (64, 72, 80, 96, 128), (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
COMPILED_LENGTHS = (256, 1024, 4096)  # Inductor takes half a minute for each shape
TOKENS = 32768  # in a batch
MATH_MATRICES = {"forward": 8, "primal": 10, "mixed": 24}  # (N, M) matrices of 4 bytes that math holds at its peak


class Shape(NamedTuple):
    """A self-attention."""

    batch: int
    heads: int
    n: int
    d: int

    def operations(self, matmuls: int) -> float:
        """Floating-point operations of so many matmuls."""
        return 2.0 * matmuls * self.batch * self.heads * self.n**2 * self.d


class Way(NamedTuple):
    """An implementation. run: (o, t_o), differentiable, of primals and tangents; t_o is None for plain attention.

    limit: why it can't do a shape in a mode, or None.
    """

    run: Callable[[Tensors, Tensors, bool], tuple[Tensor, Tensor | None]]
    limit: Callable[[Shape, str], str | None]
    plain: bool = False


def ways(device: str) -> dict[str, Way]:
    """What there is on this machine."""
    impl = "triton" if device == "cuda" else "torch"

    def ours(primals: Tensors, tangents: Tensors, mixed: bool) -> tuple[Tensor, Tensor | None]:
        o, t_o = ops.attention_jvp(*primals, *tangents, tangent_grad=mixed, impl=impl)
        return o, t_o

    def math(primals: Tensors, tangents: Tensors, mixed: bool) -> tuple[Tensor, Tensor | None]:
        with sdpa_kernel(SDPBackend.MATH):
            o, t_o = torch.func.jvp(F.scaled_dot_product_attention, primals, tangents)[:2]
        return o, t_o

    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v

    @torch.compile(dynamic=False)
    def compiled(primals: Tensors, tangents: Tensors, mixed: bool) -> tuple[Tensor, Tensor | None]:
        o, t_o = torch.func.jvp(written_out, primals, tangents)[:2]
        return o, t_o

    def limit_of_compiled(shape: Shape, mode: str) -> str | None:
        return _too_large(shape, mode) if shape.n in COMPILED_LENGTHS else f"compiled for {COMPILED_LENGTHS} only"

    found = {
        "fastdistill": Way(ours, lambda shape, mode: None),
        "math, torch.func.jvp": Way(math, _too_large),
    }
    if device == "cuda":
        found["the same, compiled"] = Way(compiled, limit_of_compiled)
        if importlib.util.find_spec("jvp_flash_attention"):
            found["jvp-flash-attention"] = Way(_jvp_flash_attention, _limit_of_jvp_flash_attention)
        found["SDPA flash, no tangent"] = _sdpa(SDPBackend.FLASH_ATTENTION)
        found["SDPA cuDNN, no tangent"] = _sdpa(SDPBackend.CUDNN_ATTENTION)
    return found


def _too_large(shape: Shape, mode: str) -> str | None:
    matrices = 4 * MATH_MATRICES[mode] * shape.batch * shape.heads * shape.n**2
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 2**32
    return f"about {matrices / 2**30:.0f} GiB of (N, M) matrices" if matrices > 0.9 * free else None


def _sdpa(backend: SDPBackend) -> Way:
    def run(primals: Tensors, tangents: Tensors, mixed: bool) -> tuple[Tensor, Tensor | None]:
        with sdpa_kernel(backend):
            q, k, v = primals
            return F.scaled_dot_product_attention(q, k, v), None

    return Way(run, lambda shape, mode: None if mode in PLAIN else "no tangents", plain=True)


def _jvp_flash_attention(primals: Tensors, tangents: Tensors, mixed: bool) -> tuple[Tensor, Tensor | None]:
    """As its README says: `fwd_dual` under torch.func.jvp."""
    attend = importlib.import_module("jvp_flash_attention.jvp_attention").JVPAttn.fwd_dual
    o, t_o = torch.func.jvp(lambda q, k, v: attend(q, k, v), primals, tangents)[:2]
    return o, t_o


def _limit_of_jvp_flash_attention(shape: Shape, mode: str) -> str | None:
    """What version 0.14 asserts, and what its backward leaves out."""
    if shape.d not in (16, 32, 64, 128, 256):
        return "head dims 16, 32, 64, 128 and 256 only"
    if shape.n % 32:
        return "lengths that 32 divides only"
    return "its backward drops the cotangent of the tangent" if mode == "mixed" else None


def inputs(shape: Shape, dtype: torch.dtype, device: str) -> Data:
    """Primals, tangents, and the cotangents of o and t_o, all standard normal."""
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.batch, shape.heads, shape.n, shape.d)
    q, k, v, t_q, t_k, t_v, do, dt_o = (
        torch.randn(size, dtype=dtype, device=device, generator=generator) for _ in range(8)
    )
    return (q, k, v), (t_q, t_k, t_v), (do, dt_o)


def workload(way: Way, mode: str, data: Data) -> Callable[[], Tensors]:
    """What is timed: the forward, or, after a forward right here, the backward."""
    primals, tangents, (do, dt_o) = data
    if mode == "forward":
        return lambda: tuple(x for x in way.run(primals, tangents, False) if x is not None)
    mixed = mode == "mixed"
    leaves = tuple(x.detach().requires_grad_() for x in primals)
    leaf_tangents = tuple(x.detach().requires_grad_(mixed) for x in tangents)
    o, t_o = way.run(leaves, leaf_tangents, mixed)
    if not mixed or t_o is None:
        return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)
    both = (o, t_o)
    return lambda: torch.autograd.grad(both, (*leaves, *leaf_tangents), (do, dt_o), retain_graph=True)


def parity(way: Way, mode: str, d: int, dtype: torch.dtype, device: str, n: int) -> str | None:
    """The gate: how a way is wrong, on a small problem, or None. Failing to run is wrong, too."""
    data = inputs(Shape(1, 2, n, d), dtype, device)
    primals, tangents, cotangents = (tuple(x.double() for x in some) for some in data)
    names = ("o", "t_o") if mode == "forward" else ("dq", "dk", "dv", "dt_q", "dt_k", "dt_v")

    def decomposed(primals: Tensors, tangents: Tensors, mixed: bool) -> tuple[Tensor, Tensor | None]:
        o, t_o = torch.func.jvp(reference.attention, primals, tangents)[:2]
        return o, t_o

    plain = Way(decomposed, lambda shape, mode: None)
    truths, baselines = (workload(plain, mode, each)() for each in ((primals, tangents, cotangents), data))
    try:
        for name, actual, truth, baseline in zip(names, workload(way, mode, data)(), truths, baselines):
            assert_accurate(actual, truth, baseline, name=name, order=2 if mode == "mixed" else 1)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def times_on(device: str, run: Callable[[], object], milliseconds: float) -> list[float]:
    """Of single calls, in ms: by CUDA events with a cold L2 cache, or by the clock."""
    if device == "cuda":
        return tune.cuda_times(run, milliseconds)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    return times


def measure(way: Way, mode: str, shape: Shape, data: Data, milliseconds: float) -> dict[str, Any]:
    """Quartiles of the time; on a GPU TFLOP/s, too, and the memory that a call takes beyond what was there."""
    device = data[0][0].device.type
    run = workload(way, mode, data)
    times = times_on(device, run, milliseconds)
    low, median, high = statistics.quantiles(times, n=4)
    row: dict[str, Any] = {"ms": median, "ms_quartiles": [low, high], "calls": len(times)}
    if device == "cuda":
        row["tflops"] = shape.operations((PLAIN if way.plain else MODES)[mode]) / median * 1e-9
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row


def ceilings() -> dict[str, float]:
    """What this GPU does at best: a large matrix product in bfloat16, and a copy, counting bytes read and written."""
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = statistics.median(tune.cuda_times(lambda: x @ y))
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    copy = statistics.median(tune.cuda_times(lambda: target.copy_(source)))
    return {"matmul_tflops": 2 * 8192**3 / matmul * 1e-9, "copy_tb_per_s": 2 * source.nbytes / copy * 1e-9}


def bench(args: argparse.Namespace, device: str, save: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """A row for each mode, head dim, length and way, saved one by one."""
    started, dtype, contenders = time.monotonic(), tune.DTYPES[args.dtype], ways(device)
    rows: list[dict[str, Any]] = []
    gate: dict[tuple[str, str, int], str | None] = {}
    for mode, d, n in itertools.product(args.modes, args.dims, args.lengths):
        shape = Shape(max(1, args.tokens // n), args.heads, n, d)
        data = inputs(shape, dtype, device)
        for name, way in contenders.items():
            row: dict[str, Any] = {"mode": mode, "way": name, "dtype": args.dtype, **shape._asdict()}
            if time.monotonic() - started > args.budget:
                row["left_out"] = "out of time"
            elif limit := way.limit(shape, mode):
                row["left_out"] = limit
            else:
                key = (name, mode, d)
                if key not in gate:
                    gate[key] = parity(way, mode, d, dtype, device, 24 if args.smoke else 512)
                row |= {"wrong": gate[key]} if gate[key] else _timed(way, mode, shape, data, args.milliseconds)
            rows.append(row)
            print(line(row), flush=True)
            save(rows)
    return rows


def _timed(way: Way, mode: str, shape: Shape, data: Data, milliseconds: float) -> dict[str, Any]:
    try:
        return measure(way, mode, shape, data, milliseconds)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"left_out": "out of memory"}


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    head = "{mode:8} D={d:<4} N={n:<6} B={batch:<4} {way:32}".format(**row)
    for reason in ("left_out", "wrong"):
        if reason in row:
            return f"{head} {reason.replace('_', ' ')}: {row[reason]}"
    low, high = row["ms_quartiles"]
    text = f"{head} {row['ms']:9.4f} ms ({low:.4f} - {high:.4f})"
    return text + (f" {row['tflops']:7.1f} TFLOP/s {row['peak_mib']:9.1f} MiB" if "tflops" in row else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, measure, print the table, write the JSON; fail if ours was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=[*MODES])
    parser.add_argument("--dims", nargs="+", type=int, default=[*DIMS], metavar="D")
    parser.add_argument("--lengths", nargs="+", type=int, default=[*LENGTHS], metavar="N")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="in a batch")
    parser.add_argument("--dtype", choices=tune.DTYPES, default="bfloat16")
    parser.add_argument("--milliseconds", type=float, default=300, help="of repetitions of each (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="start nothing after it")
    parser.add_argument("--commit", default=commit(), help="of the code, where there is no repository")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu_attention.json")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, on the CPU")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.dims, args.lengths, args.heads, args.tokens, args.dtype = [8], [24], 2, 48, "float32"
    elif not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --smoke shows that the program works")
    device = "cpu" if args.smoke else "cuda"
    environment = {**fingerprint(), "commit": args.commit, "triton": _triton_version()}
    if device == "cuda":
        environment["ceilings"] = ceilings()
        print(environment["ceilings"], flush=True)

    def save(rows: list[dict[str, Any]]) -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"environment": environment, "results": rows}, indent=1) + "\n")

    rows = bench(args, device, save)
    if wrong := [line(row) for row in rows if row["way"] == "fastdistill" and "wrong" in row]:
        raise SystemExit("\n".join(["ours is wrong:", *wrong]))


def _triton_version() -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is None:
        return None
    import triton

    return str(triton.__version__)


if __name__ == "__main__":
    main()
