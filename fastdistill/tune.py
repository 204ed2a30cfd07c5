"""Measure which configs of the attention kernels are fastest on this GPU, and keep them for later calls.

    python -m fastdistill.tune                                           # some common shapes, a quarter of an hour
    python -m fastdistill.tune --head-dims 72 --lengths 256 --masks none band
    python -m fastdistill.tune --export kernels/configs.json             # add what is known of this GPU to a table

What it finds goes to a file of the user's after every case, and every later call of the ops looks there first. Stopped
at any moment and started again, it goes on where it was. Nothing has to be tuned for a new length: the table serves
the nearest.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import triton
from torch import Tensor

from fastdistill.kernels import attention, configs
from fastdistill.kernels.attention_arguments import use_descriptors
from fastdistill.kernels.configs import Config, Entry
from fastdistill.ops.attention import eager
from fastdistill.ops.protocol.pair import Pair, Pairs, flat, paired, without_tangents

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
LARGEST_ERROR = {16: 2e-2, 32: 1e-4}  # Relative, by bits: ten times the kernels' own, far below that of a fault.
TOKENS = 32768  # The number of tokens in a timed batch.
HEADS = 16
REGISTERS = 224  # The registers for tiles alone, of 255.
MOST_CANDIDATES = 24
Tensors = Sequence[Tensor | None]
Results = tuple[Pairs, Sequence[Tensor | None]]  # outputs and residuals


class Case(NamedTuple):
    """Describe a kind of call that gets a config of its own; the fields are those of `kernels.configs.Entry`."""

    kernel: str
    dtype: torch.dtype
    d: int
    tangents: str
    mask: str
    length: int

    def __str__(self) -> str:
        dtype, tangents = str(self.dtype).removeprefix("torch."), self.tangents or "-"
        return f"{self.kernel} {dtype} D={self.d} tangents {tangents} mask {self.mask} N={self.length}"

    def entry(self, arch: int, config: Config, measured: str | None = None) -> Entry:
        """Return the line of the table that a launch reads; a launch by pointers reads those of sm_80."""
        if not use_descriptors(arch, torch.empty(1, 1, 16, self.d, dtype=self.dtype)):
            arch = min(arch, 80)
        bits = self.dtype.itemsize * 8
        log2_length = configs.bucket(self.length)
        return Entry(self.kernel, arch, bits, self.d, self.tangents, self.mask, log2_length, config, measured)


class Call(NamedTuple):
    """Arguments that forward and backward share: pairs of primal and tangent, then the rest by name."""

    inputs: Sequence[Pair]
    options: dict[str, Any]


class Runner(Protocol):
    """Describe the interface of what tuning needs of a GPU."""

    arch: int
    where: str

    def fitting(self, case: Case, candidates: Sequence[Config]) -> list[Config]:
        """Return the candidates that compile, fit the GPU's memories, and don't spill."""

    def milliseconds(self, case: Case, config: Config) -> float:
        """Return the time of a call."""

    def fault(self, case: Case, config: Config) -> str | None:
        """Describe what is wrong with the results, or return None."""


def call_of(case: Case, device: str, batch: int, heads: int = HEADS, seed: int = 0) -> Call:
    """Draw random arguments: causal for a band; a float mask for a mask, with a tangent if the case has one."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=case.dtype, device=device, generator=generator)

    shape, square = (batch, heads, case.length, case.d), (1, 1, case.length, case.length)
    primals = [normal(*shape) for _ in "qkv"]
    tangents = [normal(*shape) if name in case.tangents else None for name in "qkv"]
    whole = (batch, heads, case.length, case.length)
    mask = normal(*square).expand(whole) if case.mask == "mask" else None
    t_mask = normal(*square).expand(whole) if mask is not None and "m" in case.tangents else None
    window = (-1, 0 if case.mask == "band" else -1)
    options = {"window": window, "lower_right": False, "cu_seqlens": None, "scale": case.d**-0.5}
    return Call([*paired(primals, tangents), Pair(mask, t_mask)], options)


def results_of(call: Call, implementation: Any, grad: bool = True) -> Results:
    """Return outputs and residuals: what the backward of a 16-bit call needs besides, unless not `grad`."""
    results: Results = implementation.attention_forward(call.inputs, **call.options, grad=grad, tangent_grad=grad)
    return results


def gradients_of(case: Case, call: Call, results: Results, implementation: Any, of_mask: bool = False) -> Tensors:
    """Return the gradients that the case's kernel computes, of the sum of o and, where anything moves, that of t_o."""
    (outputs, (o_rest, t_o_rest)), inputs = results, call.inputs
    if not case.tangents:
        outputs, inputs, t_o_rest = without_tangents(outputs), without_tangents(inputs), None
    sums = Pair(*(None if x is None else torch.ones_like(x, dtype=case.dtype) for x in outputs[0]))
    wanted = "kv" if case.kernel == "backward_kv" else "qm" if of_mask else "q"
    needs = [(name in wanted, name in wanted and name in case.tangents) for name in "qkvm"]
    saved, cotangents = (outputs, (o_rest, t_o_rest)), [sums, Pair(None)]
    return flat(implementation.attention_backward(cotangents, inputs, saved, **call.options, needs=needs))


def candidates(case: Case, shared_kib: int = 227) -> list[Config]:
    """Return the configs whose tiles should fit registers and shared memory, the largest tiles first."""
    narrow = case.dtype == torch.float32 or case.d > 128  # For these, tiles of 64 rows are large.
    kept, streamed = ((16, 32, 64), (16, 32, 64)) if narrow else ((64, 128), (32, 64, 128))
    stages = (2, 3, 4) if case.kernel == "forward" and not narrow else (1, 2, 3)
    least = 32 if narrow else 128  # The least number of a tile's elements for each warp.
    pipelines = [(depth, 0) for depth in stages] + [(2, 128 // case.dtype.itemsize)] * narrow  # The last one streams.
    found = []
    for rows, columns, warps, (depth, width) in itertools.product(kept, streamed, (4, 8), pipelines):
        shape = (columns, rows) if case.kernel == "backward_kv" else (rows, columns)
        if rows * columns >= least * warps and _plausible(case, rows, columns, warps, depth, width, shared_kib):
            found.append(Config(*shape, warps, depth, width))
    return sorted(found, key=lambda config: -config.block_n * config.block_m)[:MOST_CANDIDATES]


def _plausible(case: Case, rows: int, columns: int, warps: int, stages: int, stream: int, shared_kib: int) -> bool:
    """Return whether the tiles fit: `rows` accumulate while `columns` pass in `stages`, or both pass with `stream`."""
    mixed, width = bool(case.tangents), -(-case.d // 16) * 16
    accumulators = (2 if case.kernel == "backward_kv" else 1) * (1 + mixed)
    registers = rows * (accumulators * width + (3 - (case.kernel == "forward") + mixed) * columns) / (32 * warps)
    kept = 0 if stream else (1 if case.kernel == "forward" else 2) * (1 + mixed) * rows * width
    passing = (rows + columns) * stream if stream else 2 * columns * width
    return registers <= REGISTERS and (kept + (1 + mixed) * stages * passing) * case.dtype.itemsize <= shared_kib * 1024


def tune(
    cases: Sequence[Case], runner: Runner, path: Path, *, again: bool = False, budget: float = float("inf"),
    report: Callable[[str], None] = print,
) -> list[Entry]:  # fmt: skip
    """Add the fastest config of each case to the file, one by one; known cases are left out unless `again`."""
    known = {entry[:7]: entry for entry in (configs.read(path) if path.exists() else ())}
    started = time.monotonic()
    for number, case in enumerate(cases, start=1):
        head = f"[{number}/{len(cases)}] {case}:"
        key = case.entry(runner.arch, configs.INTERPRETED)[:7]
        if key in known and not again:
            report(f"{head} known, {words(known[key].config)}")
            continue
        if time.monotonic() - started > budget:
            report(f"{head} out of time; the same command goes on from here")
            break
        entry, line = _fastest(case, runner)
        report(f"{head} {line}")
        if entry is not None:
            known[key] = entry
            configs.write(path, list(known.values()))
            configs.reload()
    return list(known.values())


def _fastest(case: Case, runner: Runner) -> tuple[Entry | None, str]:
    """Return the entry of the fastest config whose results are right, and a line about it."""
    started = time.monotonic()
    place = case.entry(runner.arch, configs.INTERPRETED)
    shipped = configs.nearest(place, configs.shipped())
    shared_kib = 99 if place.arch == 80 else 227  # All GPUs that read those entries have this much.
    tried = list(dict.fromkeys([*([shipped.config] if shipped else []), *candidates(case, shared_kib)]))
    fitting = runner.fitting(case, tried)
    times = {config: runner.milliseconds(case, config) for config in fitting}
    faults = []
    for config in sorted(times, key=lambda config: times[config]):
        if fault := runner.fault(case, config):
            faults.append(f"{words(config)} left out: {fault}")
            continue
        before = f", shipped {times[shipped.config]:.3f} ms" if shipped and shipped.config in times else ""
        line = f"{words(config)}, {times[config]:.3f} ms{before}; {len(fitting)} of {len(tried)} fit"
        measured = f"{runner.where}: {times[config]:.4f} ms"
        line = "; ".join([f"{line}, {time.monotonic() - started:.0f} s", *faults])
        return case.entry(runner.arch, config, measured), line
    return None, "; ".join([f"none of {len(tried)} configs can be used", *faults])


def words(config: Config) -> str:
    """Return a config in words."""
    streams = f", by {config.stream} columns" if config.stream else ""
    return f"{config.block_n}x{config.block_m}, {config.num_warps} warps, {config.num_stages} stages{streams}"


@contextmanager
def compiling() -> Iterator[list[Any]]:
    """Make launches only compile their kernels and add them to the list; arguments may be meta tensors."""
    jit = triton.runtime.jit.JITFunction
    run, kernels = jit.run, []

    def compile_only(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        kernels.append(run(self, *args, warmup=True, **options))
        return kernels[-1]

    jit.run = compile_only
    try:
        yield kernels
    finally:
        jit.run = run


def compiled(case: Case, arch: int, config: Config, *, costliest: bool = False, packed: bool = False) -> list[Any]:
    """Compile what a case launches, for the GPU for which Triton compiles; `packed` takes packed sequences.

    `costliest` adds all that a call with these tangents and this mask may have.
    """
    batch = 1 if packed else 2
    call, shape = call_of(case, "meta", batch), (batch, HEADS, case.length, case.d)
    if packed:
        ends = torch.empty(3, dtype=torch.int32, device="meta")
        call.options.update(cu_seqlens=(ends, ends, case.length, case.length))
    if costliest and case.mask != "none":
        call.options.update(window=(64, 8), lower_right=True)
    with compiling() as kernels, configs.forced(arch, {case.kernel: config}):
        if case.kernel == "forward":
            results_of(call, attention, grad=costliest)
        else:
            o, lse = torch.empty(shape, device="meta"), torch.empty(shape[:3], device="meta")
            saved = ([Pair(o, o), Pair(lse, lse)], (None, None))
            gradients_of(case, call, saved, attention, of_mask=costliest and case.mask == "mask")
    return kernels if case.kernel == "forward" else kernels[1:]  # The first kernel is the pre-pass over rows.


def _problem(case: Case, arch: int, config: Config) -> str | None:
    """Return why a config can't be used on this GPU, or None; a process of its own fills Triton's cache."""
    try:
        for kernel in compiled(case, arch, config):
            kernel._init_handles()
            if kernel.n_spills:
                return f"{kernel.n_spills} registers spilled"
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError, RuntimeError) as error:
        return str(error)
    return None


def cuda_times(run: Callable[[], object], milliseconds: float = 300, least: int = 10, most: int = 200) -> list[float]:
    """Return times of single calls by CUDA events, in ms, after warming up and each with a cold L2 cache.

    The cache is overwritten for as long as the host takes to launch the call, so that the launch itself doesn't count.
    """
    cache = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    for _ in range(3):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
    flushes = 1 + int((time.perf_counter() - started) * 1.5 / (cache.nbytes / 3e12))
    torch.cuda.synchronize()
    stop_at = time.monotonic() + milliseconds / 1000
    times: list[float] = []
    while len(times) < least or (time.monotonic() < stop_at and len(times) < most):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        for _ in range(flushes):
            cache.zero_()
        events[0].record()
        run()
        events[1].record()
        events[1].synchronize()
        times.append(events[0].elapsed_time(events[1]))
    return times


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def _problem_alone(case: Case, arch: int, config: Config) -> str | None:
    with _pool(1) as pool:
        try:
            return pool.submit(_problem, case, arch, config).result()
        except BrokenProcessPool:
            return "crashes the compiler"


class GPU:
    """Measure on the current CUDA device."""

    def __init__(self, jobs: int) -> None:
        self.arch = configs.arch_of(torch.device("cuda", torch.cuda.current_device()))
        self.where = f"{torch.cuda.get_device_name()}, triton {triton.__version__}"
        self._jobs = jobs
        self._pool = _pool(jobs)
        self._ready: tuple[Case | None, Any] = (None, None)

    def fitting(self, case: Case, candidates: Sequence[Config]) -> list[Config]:
        """Return the candidates that compile, fit the GPU's memories, and don't spill."""
        tasks = [(case, self.arch, config) for config in candidates]
        try:
            problems = list(self._pool.map(_problem, *zip(*tasks)))
        except BrokenProcessPool:  # A config crashed the compiler; a process for each tells which.
            self._pool = _pool(self._jobs)
            problems = [_problem_alone(*task) for task in tasks]
        return [config for config, problem in zip(candidates, problems) if problem is None]

    def milliseconds(self, case: Case, config: Config) -> float:
        """Return the median time of a call."""
        if self._ready[0] != case:
            call = call_of(case, "cuda", batch=max(1, TOKENS // case.length))
            self._ready = (case, (call, None if case.kernel == "forward" else results_of(call, attention)))
        call, results = self._ready[1]
        with configs.forced(self.arch, {case.kernel: config}):
            if results is None:
                return statistics.median(cuda_times(lambda: results_of(call, attention, grad=False)))
            return statistics.median(cuda_times(lambda: gradients_of(case, call, results, attention)))

    def fault(self, case: Case, config: Config) -> str | None:
        """Describe where the results differ from the torch implementation, on partial tiles; or return None."""
        case = case._replace(length=min(case.length, 336))  # 16 divides this length, so Triton compiles nothing anew.
        call = call_of(case, "cuda", batch=2, seed=1)
        results = results_of(call, eager)
        with configs.forced(self.arch, {case.kernel: config}):
            if case.kernel == "forward":
                both: list[Tensors] = [flat(x) for x, _ in (results_of(call, attention), results)]
            else:
                both = [gradients_of(case, call, results, module) for module in (attention, eager)]
        return difference(both[0], both[1], LARGEST_ERROR[case.dtype.itemsize * 8])


def difference(actual: Tensors, expected: Tensors, largest: float) -> str | None:
    """Describe the first pair whose relative error is larger than `largest`, or return None."""
    for index, (x, y) in enumerate(zip(actual, expected)):
        if x is None or y is None:
            continue
        error = float((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-30))
        if not error <= largest:
            return f"result {index} is off by {error:.1e}, at most {largest:.0e} is right"
    return None


def cases_of(args: argparse.Namespace) -> list[Case]:
    """Return the cases of the command line: with and without tangents, the forward and both halves of the backward."""
    return [
        Case(kernel, DTYPES[dtype], d, tangents, mask, length)
        for dtype, d, length, mask, kernel in itertools.product(
            args.dtypes, args.head_dims, args.lengths, args.masks, args.kernels
        )
        for tangents in args.tangents
        if kernel != "forward" or tangents
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastdistill.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kernels", nargs="+", choices=configs.KERNELS, default=configs.KERNELS)
    add("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    add("--head-dims", nargs="+", type=int, default=[64, 72, 128], metavar="D")
    add("--lengths", nargs="+", type=int, default=[256, 1024, 8192], metavar="N")
    add("--masks", nargs="+", choices=configs.MASKS, default=["none"])
    add("--tangents", nargs="+", default=["qkv", ""], help="letters; '' is a backward without tangents")
    add("--jobs", type=int, default=max(1, min(16, (os.cpu_count() or 3) - 2)), help="number of processes that compile")
    add("--budget", type=float, default=float("inf"), metavar="SECONDS", help="start no case after this time")
    add("--again", action="store_true", help="measure known cases again")
    add("--export", type=Path, metavar="FILE", help="write all that is known of this GPU into a table, and stop")
    args = parser.parse_args(arguments)
    path = configs.cache_path()
    if path is None:
        parser.error("there is no CUDA device here: nothing can be measured, and the shipped configs are in use")
    if args.export:
        table = {entry[:7]: entry for file in (args.export, path) if file.exists() for entry in configs.read(file)}
        configs.write(args.export, list(table.values()))
        print(f"{args.export}: {len(table)} entries")
        return
    print(f"{path}", flush=True)
    tune(cases_of(args), GPU(args.jobs), path, again=args.again, budget=args.budget, report=_print)


def _print(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
