"""Compile the kernels for GPUs that need not be there, and table their registers, spills, memory and instructions.

    python -m fastdistill.benchmarks.compile.aot_table            # every shipped config, ten minutes or less
    python -m fastdistill.benchmarks.compile.aot_table --arch 90  # only these architectures, only on the screen

Triton compiles for any architecture; only running needs the GPU. Each attention config is compiled for the costliest
call that it serves. The program fails if a kernel spills, wants more memory than there is, or leaves the tensor cores
idle.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import multiprocessing
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import ty_to_cpp

from fastdistill import tune
from fastdistill.benchmarks.compile import op_kernels
from fastdistill.benchmarks.run.environment import RESULTS
from fastdistill.kernels import activation, attention, attention_backward, configs, norm, norm_backward, qk_norm_rope
from fastdistill.kernels.configs import Config
from fastdistill.tune import CallKind

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# KiB that a program may have; sm_80's results also serve 8.6, 8.9 and 12.x.
SHARED_MEMORY = {80: 99, 90: 227, 100: 227}
TENSOR_MEMORY = 512  # Columns on sm_100; a kernel that wants more compiles to a stub without any error.
SMALLEST_KERNEL = 300  # Number of instructions.
WGMMA_ROWS = 64
ALSO = (72, 80, 112)  # head dims of several parts: 64 + 16 with a tail, 64 + 16, 64 + 32 + 16
PACKED = (64, 128)
KEY = 7  # The number of leading fields of a result that say what was compiled.


class Resources(NamedTuple):
    """Hold the resources of a compiled kernel.

    Args:
        spills: number of local-memory loads and stores.
        mma, wgmma: number of tensor-core instructions, and of those among them that only Hopper has.
    """

    kernel: str
    arch: int
    dtype: str
    d: int
    tangents: str
    mask: str
    config: str
    registers: int
    spills: int
    shared_kib: float
    tensor_memory: int
    instructions: int
    mma: int
    wgmma: int


class Task(NamedTuple):
    """Describe one kernel to compile: a case, an architecture and a config; a norm's config has a class of its own.

    Args:
        packed: takes packed sequences, which the kernels load by pointers, with sm_80's configs on every GPU.
    """

    case: CallKind
    arch: int
    config: Any
    packed: bool = False


class _NoGPU:
    """Imitate as much of Triton's driver as compiling for an architecture needs."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def map_python_to_cpp_type(self, name: str) -> str:
        return ty_to_cpp(name)


@contextmanager
def compiling_for(arch: int) -> Iterator[None]:
    """Let Triton compile for this architecture, whatever the machine has."""
    driver = triton.runtime.driver
    previous = driver._active  # It is None on a machine without a GPU, where the public property would raise.
    driver.set_active(_NoGPU(arch))
    for module in (activation, attention, attention_backward, norm, norm_backward, qk_norm_rope):
        for kernel in vars(module).values():
            if isinstance(kernel, triton.runtime.jit.JITFunction):
                kernel.device_caches.clear()
    try:
        yield
    finally:
        driver.set_active(previous)


def compile_task(task: Task) -> list[Any]:
    """Compile without a GPU and without data; return the kernels: one, or two where a call launches two."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so nothing can be compiled: unset it")
    with compiling_for(task.arch), _precision(task):
        if task.case.kernel in op_kernels.kernels():
            return op_kernels.compiled(task.case)
        return tune.compiled(task.case, task.arch, task.config, costliest=True, packed=task.packed)


@contextmanager
def _precision(task: Task) -> Iterator[None]:
    """Set the float32 precision that the configs serve: sm_80's serve exact products on every GPU, the others TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if task.arch == 80 else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def config_words(config: Any) -> str:
    """Return a config in the words of the table."""
    if isinstance(config, Config):
        return tune.words(config)
    return f"{config.rows}x{config.block_c}, {config.num_warps} warps"


def resources_of(task: Task) -> Resources:
    """Compile, and read the resources off the machine code; of two kernels, return those of the costlier one."""
    return max((_resources(task, kernel) for kernel in compile_task(task)), key=lambda row: (row.spills, row.registers))


def _resources(task: Task, kernel: Any) -> Resources:
    case = task.case
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return Resources(
        kernel=case.kernel,
        arch=task.arch,
        dtype=str(case.dtype).removeprefix("torch."),
        d=case.d,
        tangents=case.tangents,
        mask="packed" if task.packed else case.mask,
        config=config_words(task.config),
        registers=int(registers[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared_kib=kernel.metadata.shared / 1024,
        tensor_memory=getattr(kernel.metadata, "tmem_size", 0) or 0,
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/", code, re.MULTILINE)),
        mma=len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)", code)),
        wgmma=len(re.findall(r"\bHGMMA", code)),
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def problems(row: Resources) -> list[str]:
    """Return what is wrong with a compiled kernel, a line each."""
    attends = family(row.kernel) == "attention"
    low = attends and (row.dtype, row.arch) != ("float32", 80)
    checks = {
        f"{row.spills} register spills": row.spills > 0,
        f"{row.shared_kib:g} KiB of shared memory": row.shared_kib > SHARED_MEMORY[row.arch],
        f"{row.tensor_memory} columns of tensor memory": row.tensor_memory > TENSOR_MEMORY,
        f"only {row.instructions} instructions": attends and row.instructions < SMALLEST_KERNEL,
        "no tensor-core instructions": low and row.mma == 0,
        "no wgmma": low and row.arch == 90 and row.d >= 64 and rows_of_matmuls(row) >= WGMMA_ROWS and row.wgmma == 0,
    }
    return [f"{' '.join(map(str, row[:6]))} ({row.config}): {text}" for text, bad in checks.items() if bad]


def rows_of_matmuls(row: Resources) -> int:
    """Return the rows of the tile that stays with a program; below 64 of them, Hopper's wgmma is out of reach."""
    block_n, block_m = (int(size) for size in row.config.split(",")[0].split("x"))
    return block_m if row.kernel == "backward_kv" else block_n


def shipped(archs: Sequence[int] = configs.ARCHITECTURES) -> list[Task]:
    """Return a task for each config and each head dim that is costly in its own way, and for norms of each size."""
    tasks: dict[Task, None] = {}
    for entry in configs.shipped():
        also = [d for d in ALSO if configs.nearest(entry._replace(d=d), configs.shipped()) == entry]
        for d in (entry.d, *(also if (entry.arch, entry.bits) == (90, 16) else ())):
            dtype = torch.float32 if entry.bits == 32 else torch.bfloat16
            case = CallKind(entry.kernel, dtype, d, entry.tangents, entry.mask, 1024)
            tasks[Task(case, entry.arch, entry.config)] = None
            if entry.arch == 80 and entry.bits == 16 and entry.mask == "none" and d in PACKED:
                tasks[Task(case, 90, entry.config, packed=True)] = None
    for arch in configs.ARCHITECTURES:
        tasks |= {Task(case, arch, config): None for case, config in op_kernels.cases()}
    return [task for task in tasks if task.arch in archs]


def family(kernel: str) -> str:
    """Return the kernels' module that the kernel of a row belongs to."""
    return op_kernels.family(kernel) if kernel in op_kernels.kernels() else "attention"


def sources() -> dict[str, str]:
    """Return a hash of each module's code for the GPU, but for comments and docstrings: another one, other rows."""
    hashes = {}
    for name in sorted({"attention", *op_kernels.families()}):
        digest = hashlib.sha256()
        for path in op_kernels.files(name):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
                if isinstance(node, ast.FunctionDef) and any("triton" in ast.unparse(line) for line in decorators):
                    if ast.get_docstring(node) is not None:
                        node.body = node.body[1:]
                    digest.update(ast.unparse(node).encode())
        hashes[name] = digest.hexdigest()[:16]
    return hashes


def markdown(rows: Sequence[Resources]) -> str:
    """Return the results as a table with a paragraph above."""
    heads = [*Resources._fields[:6], "config", "registers", "spills", "shared", "TMEM", "instructions", "MMA", "wgmma"]
    legend = (
        f"Compiled ahead of time with Triton {triton.__version__}, never run. Each config under the costliest call "
        "that it serves: with these tangents (m: the mask's), a band beside a mask, and the mask's gradients. d is the "
        "head dim, or the channels of a norm. Spills: local-memory instructions. Shared memory in KiB, tensor memory "
        "(TMEM) in columns. MMA: tensor-core instructions, and wgmma those of them that only Hopper has: these need "
        "tiles of 64 rows, for which two sums as wide as a head of 256 leave no registers."
    )
    lines = [legend, "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [row.kernel, f"sm_{row.arch}", *row[2:4], row.tangents or "-", *row[5:9], f"{row.shared_kib:g}"]
        cells += [row.tensor_memory or "-", row.instructions, row.mma or "-", row.wgmma or "-"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def resources_of_all(tasks: Sequence[Task], jobs: int) -> list[Resources]:
    """Compile the tasks side by side; return their resources in order, and print the progress."""
    started, rows = time.monotonic(), []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for row in pool.map(resources_of, tasks):
            rows.append(row)
            line = "; ".join(problems(row)) or f"{' '.join(map(str, row[:6]))}: {row.config}, {row.registers} registers"
            print(f"[{len(rows)}/{len(tasks)}, {time.monotonic() - started:.0f} s] {line}", flush=True)
    return rows


def write(rows: Sequence[Resources], path: Path) -> None:
    """Write the table as JSON and as Markdown."""
    table = {"triton": triton.__version__, "sources": sources(), "rows": [row._asdict() for row in rows]}
    lines = json.dumps(table, indent=None).replace('{"kernel"', '\n{"kernel"')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(lines + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")


def recorded(path: Path = RESULTS / "aot") -> tuple[str, dict[str, str], list[Resources]]:
    """Load a table that was written: its version of Triton, its sources, and its results."""
    table = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return table["triton"], table["sources"], [Resources(**row) for row in table["rows"]]


def key(task: Task) -> tuple[Any, ...]:
    """Return the fields with which a task's result starts."""
    case, dtype = task.case, str(task.case.dtype).removeprefix("torch.")
    mask = "packed" if task.packed else case.mask
    return (case.kernel, task.arch, dtype, case.d, case.tangents, mask, config_words(task.config))


def still_valid(path: Path) -> dict[tuple[Any, ...], Resources]:
    """Return the results of an earlier table that still hold, because Triton and the family's source are the same."""
    if not path.with_suffix(".json").exists():
        return {}
    with_triton, of_sources, rows = recorded(path)
    now = sources()
    same = {name for name in now if with_triton == triton.__version__ and of_sources.get(name) == now[name]}
    known = {*configs.KERNELS, *op_kernels.kernels()}
    return {row[:KEY]: row for row in rows if row.kernel in known and family(row.kernel) in same}


def main() -> None:
    """Compile, print the progress, write the table, and fail on any problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=SHARED_MEMORY, help="compile only for these, and write no table"
    )
    parser.add_argument("--all", action="store_true", help="compile also what the table has and has not changed since")
    parser.add_argument("--jobs", type=int, default=2, help="number of processes")
    parser.add_argument("--out", type=Path, default=RESULTS / "aot", help="path of the table without the suffix")
    arguments = parser.parse_args()
    tasks = shipped(arguments.arch or configs.ARCHITECTURES)
    known = {} if arguments.all else still_valid(arguments.out)
    measured = resources_of_all([task for task in tasks if key(task) not in known], arguments.jobs)
    known |= {row[:KEY]: row for row in measured}
    rows = [known[key(task)] for task in tasks]
    if not arguments.arch:
        write(rows, arguments.out)
    if found := [line for row in rows for line in problems(row)]:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
