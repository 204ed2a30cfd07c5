"""Linear layers and activations on the CPU: ours against `torch.func.jvp` of PyTorch's own.

    OMP_NUM_THREADS=1 python -m fastdistill.benchmarks.cpu_linear    # a minute; prints the tables of results/NOTES.md

CPU times of this process in milliseconds, the least of interleaved rounds, at the sizes of DiT blocks, float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdistill as fd
from fastdistill.ops.linear import joins

# Rows, K, N: modulations of DiT-S and DiT-XL; qkv, proj, fc1, fc2 of DiT-S and fc1 of DiT-XL with 256 tokens.
LINEARS = (
    (4, 384, 2304),
    (32, 384, 2304),
    (4, 1152, 6912),
    (32, 1152, 6912),
    (256, 384, 1152),
    (256, 384, 384),
    (256, 384, 1536),
    (256, 1536, 384),
    (256, 1152, 4608),
)
ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
    "gelu": (fd.gelu, F.gelu, 1),
    "gelu, tanh": (partial(fd.gelu, approximate="tanh"), partial(F.gelu, approximate="tanh"), 1),
    "silu": (fd.silu, F.silu, 1),
    "swiglu": (fd.swiglu, lambda gate, up: F.silu(gate) * up, 2),
    "geglu": (fd.geglu, lambda gate, up: F.gelu(gate) * up, 2),
}
ROUNDS = 9


def least(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The least CPU time of each in milliseconds, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: min(found[1:]) for name, found in times.items()}


def forward(op: Callable[..., Tensor], primals: list[Tensor], tangents: list[Tensor]) -> None:
    """Value and tangent."""
    with torch.no_grad():
        torch.func.jvp(op, tuple(primals), tuple(tangents))


def mixed(op: Callable[..., Tensor], primals: list[Tensor], tangents: list[Tensor], others: list[Tensor]) -> None:
    """Value, tangent, and the gradients of a loss of both."""
    leaves = [x.detach().requires_grad_() for x in (*primals, *tangents)]
    found = torch.func.jvp(op, tuple(leaves[: len(primals)]), tuple(leaves[len(primals) :]))
    y, t_y = found[0], found[1]
    torch.autograd.grad((y, t_y), [*leaves, *others], (y.detach(), t_y.detach()))


def row(name: str, ours: Callable[..., Tensor], plain: Callable[..., Tensor], *point: list[Tensor]) -> str:
    """A line of the table."""
    cells = [name]
    for run, extra in ((forward, point[:2]), (mixed, point)):
        found = least({"plain": partial(run, plain, *extra), "ours": partial(run, ours, *extra)})
        cells += [f"{found['plain']:.1f}", f"{found['ours']:.1f}", f"{found['plain'] / found['ours']:.2f}x"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print both tables."""
    torch.manual_seed(0)
    print("| | forward + tangent, torch | ours | faster | with all gradients, torch | ours | faster |")
    print("|---|---|---|---|---|---|---|")
    for rows, k, n in LINEARS:
        x, t_x = torch.randn(2, rows, k).unbind(0)
        weight, bias = torch.randn(n, k, requires_grad=True), torch.randn(n, requires_grad=True)
        ours, plain = (lambda x, op=op, w=weight, b=bias: op(x, w, b) for op in (fd.linear, F.linear))
        name = f"linear {rows} x {k} -> {n}, {'one matmul' if joins(rows, k, n) else 'two'}"
        print(row(name, ours, plain, [x], [t_x], [weight, bias]), flush=True)
    for name, (ours, plain, count) in ACTIVATIONS.items():
        points = torch.randn(2 * count, 256, 4608).unbind(0)
        print(row(f"{name} 256 x 4608", ours, plain, list(points[:count]), list(points[count:]), []), flush=True)


if __name__ == "__main__":
    main()
