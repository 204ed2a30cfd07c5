"""What the kernels take on GPUs that need not be there: registers, spills, shared memory, tensor-core instructions.

    python benchmarks/aot_table.py                  # every shipped config, a few minutes: results/aot.json and aot.md
    python benchmarks/aot_table.py --arch 90        # only these architectures

Triton compiles for any architecture; only running needs the GPU. Each attention config is compiled for the costliest
call that it serves. The program fails if one spills, wants more memory than there is, or leaves the tensor cores idle.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import ty_to_cpp

from fastdistill.kernels import attention, configs, norm

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_MEMORY = {80: 99, 90: 227, 100: 227}  # KiB a program may have; sm_80's row serves 8.6, 8.9 and 12.x, too
TENSOR_MEMORY = 512  # columns, sm_100; a kernel that wants more compiles to a stub without any error
SMALLEST_KERNEL = 400  # instructions
CAUSAL = "causal"  # takes the configs of masked calls
HEAD_DIMS = (32, 64, 72, 80, 96, 112, 128, 192, 256)
NORM_WIDTHS, NORM_LENGTH = (384, 1152, 4096, 8192), 256


class Case(NamedTuple):
    """One kernel to compile: attention of a head dim, or a norm of a width."""

    arch: int
    dtype: torch.dtype
    width: int
    kind: str


class Row(NamedTuple):
    """What a compiled kernel takes. spills: local-memory loads and stores; mma: tensor-core instructions."""

    arch: int
    dtype: str
    width: int
    kind: str
    config: str
    registers: int
    spills: int
    shared_kib: float
    tensor_memory: int
    instructions: int
    mma: int


class _NoGPU:
    """As much of Triton's driver as it takes to compile for an architecture."""

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
    previous = driver._active  # None so far, on a machine without a GPU; the public property would raise there
    driver.set_active(_NoGPU(arch))
    for kernel in (attention._attention_kernel, norm._norm_kernel):
        kernel.device_caches.clear()
    try:
        yield
    finally:
        driver.set_active(previous)


def compile_case(case: Case, config: configs.Config | None = None) -> Any:
    """The compiled kernel, by default with the shipped config; without a GPU and without any data."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set, so nothing can be compiled: unset it")
    with compiling_for(case.arch):
        return _compile_norm(case) if case.kind == "norm" else _compile_attention(case, config)


def _compile_attention(case: Case, config: configs.Config | None) -> Any:
    moves, masked = case.kind != configs.STILL, case.kind in (configs.MASKED, configs.STILL)
    q, k, v = (torch.empty(2, 4, 1024, case.width, dtype=case.dtype, device="meta") for _ in range(3))
    mask = torch.empty(1, 1, 1024, 1024, device="meta").expand(2, 4, 1024, 1024) if masked else None
    launch = attention.plan(
        q, k, v, q if moves else None, k if moves else None, v, mask, mask if moves else None,
        attention.allocate(q, v, any_tangent=True, keep_acc=False),
        is_causal=case.kind == CAUSAL, scale=0.125, config=config or _attention_config(case),
    )  # fmt: skip
    return attention._attention_kernel.warmup(*launch.args, grid=launch.grid, **launch.options)


def _attention_config(case: Case) -> configs.Config:
    kind = configs.MASKED if case.kind == CAUSAL else case.kind
    return configs.attention_config(case.arch, case.dtype, case.width, kind)


def _compile_norm(case: Case) -> Any:
    x = torch.empty(2, NORM_LENGTH, case.width, dtype=case.dtype, device="meta")
    channels, sample = (torch.empty(shape, device="meta") for shape in ((case.width,), (2, 1, case.width)))
    inputs: list[torch.Tensor | None] = [x, x, *[channels] * 4, *[sample] * 4]
    launch = norm.plan(x, inputs, norm.allocate(x, any_tangent=True, rms=False), eps=1e-6, rms=False)
    return norm._norm_kernel.warmup(*launch.args, grid=launch.grid, **launch.options)


def config_words(case: Case, config: configs.Config | None = None) -> str:
    """A config as the table shows it."""
    if case.kind == "norm":
        norm_config = configs.norm_config(NORM_LENGTH, case.width)
        return f"{norm_config.rows}x{norm_config.block_c}, {norm_config.num_warps} warps"
    config = config or _attention_config(case)
    return f"{config.block_n}x{config.block_m}, {config.num_warps} warps, {config.num_stages} stages"


def measure(case: Case, config: configs.Config | None = None) -> Row:
    """Compile a case and read its resources off the machine code."""
    kernel = compile_case(case, config)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return Row(
        arch=case.arch,
        dtype=str(case.dtype).removeprefix("torch."),
        width=case.width,
        kind=case.kind,
        config=config_words(case, config),
        registers=int(registers[1]),
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared_kib=kernel.metadata.shared / 1024,
        tensor_memory=getattr(kernel.metadata, "tmem_size", 0) or 0,
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/", code, re.MULTILINE)),
        mma=len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)", code)),
    )


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def problems(row: Row) -> list[str]:
    """What is wrong with a compiled kernel, a line each."""
    attends = row.kind != "norm"
    checks = {
        f"{row.spills} register spills": row.spills > 0,
        f"{row.shared_kib:g} KiB of shared memory": row.shared_kib > SHARED_MEMORY[row.arch],
        f"{row.tensor_memory} columns of tensor memory": row.tensor_memory > TENSOR_MEMORY,
        f"only {row.instructions} instructions": attends and row.instructions < SMALLEST_KERNEL,
        "no tensor-core instructions": attends and row.dtype != "float32" and row.mma == 0,
    }
    return [
        f"sm_{row.arch} {row.dtype} {row.kind} {row.width} ({row.config}): {text}"
        for text, bad in checks.items()
        if bad
    ]


def shipped(archs: list[int]) -> list[Case]:
    """Everything that the config table can be asked for, a head dim of each split and a norm of each size."""
    kinds = (configs.MOVING, configs.MASKED, CAUSAL, configs.STILL)
    return [
        *(Case(arch, torch.bfloat16, d, kind) for arch in archs for kind in kinds for d in HEAD_DIMS),
        *(Case(arch, torch.float32, d, configs.MASKED) for arch in archs for d in HEAD_DIMS),
        *(Case(arch, torch.bfloat16, width, "norm") for arch in archs for width in NORM_WIDTHS),
    ]


def markdown(rows: list[Row]) -> str:
    """The rows as a table with a paragraph above."""
    heads = (
        "arch",
        "dtype",
        "kind",
        "width",
        "config",
        "registers",
        "spills",
        "shared KiB",
        "TMEM",
        "instructions",
        "MMA",
    )
    legend = (
        f"Compiled ahead of time with Triton {triton.__version__}, never run. Kinds: *moving*, with t_q, t_k and t_v; "
        "*masked*, the same under a float mask with a tangent; *causal*, the same; *still*, with t_v alone under a "
        "float mask; *norm*, LayerNorm, affine and modulated, with all its tangents. Width: head dim or channels."
    )
    lines = [
        legend,
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for row in rows:
        cells = [f"sm_{row.arch}", row.dtype, row.kind, row.width, row.config, row.registers, row.spills]
        cells += [f"{row.shared_kib:g}", row.tensor_memory or "-", row.instructions, row.mma or "-"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compile, print as it goes, write the table, fail on any problem."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_MEMORY, default=[*SHARED_MEMORY])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "aot")
    arguments = parser.parse_args()
    rows = []
    for case in shipped(arguments.arch):
        rows.append(measure(case))
        print(*rows[-1], sep="  ", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    table = {"triton": triton.__version__, "rows": [row._asdict() for row in rows]}
    arguments.out.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    if found := [line for row in rows for line in problems(row)]:
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
