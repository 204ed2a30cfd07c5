"""Measure attention with its tangent on a CPU: ours against `torch.func.jvp` of math SDPA, in time and memory.

    python -m fastdistill.benchmarks.run.cpu_attention [--rounds 7] [--output benchmarks/results/cpu_attention.json]

"forward" computes o and t_o. "training" adds the gradients of o, without a graph for the tangent where the
implementation allows it; this is what a MeanFlow step does. Every case first passes the parity gate against float64,
and nothing is timed that fails it. The implementations run in interleaved rounds. Times are CPU times of this thread,
which other processes disturb least; the JSON has the wall time beside them. Memory is the growth of the peak resident
set in a fresh process (Linux only).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdistill as fd
from fastdistill import reference
from fastdistill.benchmarks.run.environment import ROOT, fingerprint
from fastdistill.ops.attention import eager as attention
from fastdistill.ops.protocol.pair import ABSENT, Pair, paired
from fastdistill.testing import assert_accurate, make_qkv

eager: Any = attention  # The arguments are spread from tuples, whose lengths a type checker can't count.
Tensors = tuple[Tensor, ...]
Run = Callable[[Tensors, Tensors], Tensors]


@dataclass(frozen=True)
class AttentionShape:
    """Describe the shape of a case; SHAPES names each by its length."""

    n: int
    batch: int
    heads: int
    d: int = 64

    def inputs(self, heads: int | None = None) -> tuple[Tensors, Tensors]:
        """Return primals and tangents, of all heads or of the first few."""
        primals, tangents = (make_qkv(self.batch, self.heads, self.n, self.d, seed=seed) for seed in (0, 1))
        return tuple(x[:, :heads] for x in primals), tuple(x[:, :heads] for x in tangents)


SHAPES = {str(n): AttentionShape(n, batch, heads) for n, batch, heads in ((256, 4, 12), (1024, 1, 12), (4096, 1, 4))}


def torch_forward(primals: Tensors, tangents: Tensors) -> Tensors:
    """Compute o and t_o the way one writes them without this library."""
    with sdpa_kernel(SDPBackend.MATH):
        o, t_o = torch.func.jvp(F.scaled_dot_product_attention, primals, tangents)[:2]
    return o, t_o


def torch_training(primals: Tensors, tangents: Tensors) -> Tensors:
    """Compute o, t_o and the gradients of o, without this library."""
    leaves = tuple(x.detach().requires_grad_() for x in primals)
    o, t_o = torch_forward(leaves, tangents)
    return o, t_o, *torch.autograd.grad(o, leaves, torch.ones_like(o))


FULL: dict[str, Any] = {"window": (-1, -1), "lower_right": False, "cu_seqlens": None}


def eager_forward(primals: Tensors, tangents: Tensors) -> Tensors:
    """Run the implementation itself."""
    inputs = [*paired(primals, tangents), ABSENT]
    ((o, t_o), _), _ = eager.attention_forward(inputs, **FULL, scale=primals[0].shape[-1] ** -0.5)
    assert t_o is not None
    return o, t_o


def eager_training(primals: Tensors, tangents: Tensors) -> Tensors:
    """Run its forward, and its primal backward."""
    o, t_o = eager_forward(primals, tangents)
    scale, needs = primals[0].shape[-1] ** -0.5, [*[(True, False)] * 3, (False, False)]
    cotangents, inputs = [Pair(torch.ones_like(o)), ABSENT], [*map(Pair, primals), ABSENT]
    gradients = eager.attention_backward(cotangents, inputs, ([ABSENT] * 2, ()), **FULL, scale=scale, needs=needs)
    return o, t_o, *(x for x, _ in gradients if x is not None)


def fd_forward(primals: Tensors, tangents: Tensors) -> Tensors:
    """Compute o and t_o by the public op under the public driver."""
    return fd.jvp(fd.scaled_dot_product_attention, primals, tangents)


def fd_training(primals: Tensors, tangents: Tensors) -> Tensors:
    """Compute o, t_o and the gradients of o by the public op under the public driver."""
    leaves = tuple(x.detach().requires_grad_() for x in primals)
    o, t_o = fd_forward(leaves, tangents)
    return o, t_o, *torch.autograd.grad(o, leaves, torch.ones_like(o))


IMPLEMENTATIONS: dict[str, dict[str, Run]] = {
    "torch.func.jvp of math SDPA": {"forward": torch_forward, "training": torch_training},
    "fastdistill.eager": {"forward": eager_forward, "training": eager_training},
    "fd.jvp of fd.scaled_dot_product_attention": {"forward": fd_forward, "training": fd_training},
}
BASELINE = next(iter(IMPLEMENTATIONS))


def check_parity(case: AttentionShape) -> None:
    """Check every implementation on one head of this case, by the project's tolerance rule."""
    primals, tangents = case.inputs(heads=1)
    exact = tuple(x.double().requires_grad_() for x in primals), tuple(x.double() for x in tangents)
    o, t_o = torch.func.jvp(reference.attention, *exact)[:2]
    truths = o, t_o, *torch.autograd.grad(o, exact[0], torch.ones_like(o))
    baselines = torch_training(primals, tangents)
    for name, runs in IMPLEMENTATIONS.items():
        for label, actual, truth, baseline in zip(
            ("o", "t_o", "dq", "dk", "dv"), runs["training"](primals, tangents), truths, baselines, strict=True
        ):
            assert_accurate(actual.detach(), truth.detach(), baseline.detach(), name=f"N={case.n} {label} of {name}")


def time_case(case: AttentionShape, mode: str, rounds: int) -> dict[str, dict[str, float]]:
    """Return the times of each implementation in milliseconds; rounds are interleaved, and the first only warms up."""
    primals, tangents = case.inputs()
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(rounds + 1):
        for name, runs in IMPLEMENTATIONS.items():
            cpu, wall = time.process_time(), time.perf_counter()
            runs[mode](primals, tangents)
            samples[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {name: summary(rest) for name, (_, *rest) in samples.items()}


def summary(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Return the least and the median of the CPU and wall times, in milliseconds."""
    cpu, wall = ([1e3 * x for x in times] for times in zip(*samples, strict=True))
    return {
        "cpu_ms_min": min(cpu),
        "cpu_ms_median": statistics.median(cpu),
        "wall_ms_min": min(wall),
        "wall_ms_median": statistics.median(wall),
    }


def peak_memory(name: str, case: AttentionShape, mode: str) -> float:
    """Return the MiB that a run adds to the peak resident set of a fresh process, not counting the inputs."""
    arguments = ["--memory-of", name, str(case.n), mode]
    command = [sys.executable, "-m", "fastdistill.benchmarks.run.cpu_attention", *arguments]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def print_memory(name: str, n: str, mode: str) -> None:
    """Print the memory of a run, in the fresh process; a tiny run first loads the libraries."""
    run = IMPLEMENTATIONS[name][mode]
    run(*AttentionShape(16, 1, 1).inputs())
    primals, tangents = SHAPES[n].inputs()
    before = resident("VmRSS")
    run(primals, tangents)
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """Return MiB from the system's account of this process; the field VmRSS is the memory now, VmHWM its peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field)) / 1024


def time_in_turns(rounds: int) -> list[dict[str, Any]]:
    """Return a result for each case, mode and implementation."""
    measured = []
    for case in SHAPES.values():
        check_parity(case)
    for case in SHAPES.values():
        for mode in ("forward", "training"):
            timings = time_case(case, mode, rounds)
            for name, timing in timings.items():
                speedup = timings[BASELINE]["cpu_ms_min"] / timing["cpu_ms_min"]
                entry = {"case": asdict(case), "mode": mode, "implementation": name, **timing, "speedup": speedup}
                measured.append(entry | {"peak_mib": peak_memory(name, case, mode)})
                print(line(measured[-1]), flush=True)
    return measured


def line(entry: dict[str, Any]) -> str:
    """Return one line of the printed table."""
    shape = "B{batch} H{heads} N{n} D{d}".format(**entry["case"])
    times = (
        f"{entry['cpu_ms_min']:9.1f} {entry['cpu_ms_median']:9.1f} {entry['speedup']:7.2f}x {entry['peak_mib']:8.0f}"
    )
    return f"{shape:17} {entry['mode']:9} {entry['implementation']:42} {times}"


def main() -> None:
    """Check, measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/cpu_attention.json")
    parser.add_argument("--memory-of", nargs=3, metavar=("IMPLEMENTATION", "N", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print_memory(*arguments.memory_of)
        return
    print(f"{'shape':17} {'mode':9} {'implementation':42} {'ms (min)':>9} {'median':>9} {'':>8} {'peak MiB':>8}")
    measured = time_in_turns(arguments.rounds)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"environment": fingerprint(), "results": measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
