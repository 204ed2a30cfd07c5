"""Test the kernels' machine code, for GPUs that are not there: `pytest tests/kernels_aot`, without TRITON_INTERPRET.

A few sharp cases are compiled right here, and must agree with the recorded table, benchmarks/results/aot.json, which
`make aot` writes in some minutes. The table itself must cover every shipped config, without problems.
"""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
import triton

from fastdistill.benchmarks.compile import aot_table
from fastdistill.benchmarks.compile.aot_table import Resources, Task
from fastdistill.kernels import configs
from fastdistill.kernels.configs import Config
from fastdistill.tune import Case

RECORDED_WITH, RECORDED_SOURCES, RECORDED = aot_table.recorded()
STALE = "the kernels have changed since benchmarks/results/aot.json was written: `make aot` writes it anew"


def shipped(kernel: str, arch: int, d: int, tangents: str, mask: str = "none", bits: int = 16) -> Task:
    """Return a task with the config that the table has for it."""
    dtype = torch.bfloat16 if bits == 16 else torch.float32
    wanted = configs.Entry(kernel, arch, bits, d, tangents, mask, None, configs.INTERPRETED, None)
    entry = configs.nearest(wanted, configs.shipped())
    assert entry is not None
    return Task(Case(kernel, dtype, d, entry.tangents, entry.mask, 1024), arch, entry.config)


@cache
def recorded(task: Task) -> Resources:
    """Return the table's entry for a task."""
    key = aot_table.key(task)
    rows = [row for row in RECORDED if row[: len(key)] == key]
    assert len(rows) == 1, f"benchmarks/results/aot.json has {len(rows)} rows of {key}: `make aot` writes it anew"
    return rows[0]


def test_the_table_is_of_these_kernels() -> None:
    """Check that the table comes from the code as it is now."""
    assert aot_table.sources() == RECORDED_SOURCES, STALE


def test_every_shipped_config_is_in_the_table_without_problems() -> None:
    """Check spills, shared and tensor memory, and tensor cores, and that no stub stands in place of a kernel."""
    found = [line for task in aot_table.shipped() for line in aot_table.problems(recorded(task))]
    assert not found, "\n".join(found)


SHARP = [
    shipped("forward", 90, 72, "qkv"),
    shipped("forward", 100, 128, "qkvm", "mask"),
    shipped("backward_kv", 90, 64, "qkv"),
    shipped("backward_q", 80, 128, "qkv"),
    shipped("backward_kv", 90, 128, ""),
    shipped("forward", 80, 64, "qkvm", "mask", bits=32),
    shipped("backward_q", 90, 256, "qkv"),
    shipped("backward_q", 80, 128, "qkvm", "mask", bits=32),
    Task(Case("layer_norm", torch.bfloat16, 8192, "", "none", 8192), 90, configs.norm_config(8192, 8192)),
]


@pytest.mark.parametrize("task", SHARP, ids=lambda task: f"{task.case.kernel}-sm{task.arch}-D{task.case.d}")
def test_a_compiled_config_fits_as_recorded(task: Task) -> None:
    """Check that the same compiler gives the table's numbers, and another one no problems."""
    row = aot_table.resources_of(task)
    assert not aot_table.problems(row)
    if triton.__version__ == RECORDED_WITH:
        assert row == recorded(task), STALE


@pytest.mark.slow
@pytest.mark.parametrize("task", aot_table.shipped(), ids=lambda task: " ".join(map(str, recorded(task)[:7])))
def test_every_config_compiles_as_recorded(task: Task) -> None:
    """Check the whole table."""
    test_a_compiled_config_fits_as_recorded(task)


def test_hopper_gets_its_own_matmuls() -> None:
    """Check for wgmma, because 9.0 runs the instruction of the generation before at about half the rate."""
    (kernel,) = aot_table.compile_task(shipped("forward", 90, 72, "qkv"))
    assert "wgmma.mma_async" in kernel.asm["ptx"] and "mma.sync" not in kernel.asm["ptx"]


def test_rows_of_72_are_loaded_many_bytes_at_a_time() -> None:
    """Check that loads have more than an element's 2 bytes; 4 suffice where a thread's share is no more."""
    (kernel,) = aot_table.compile_task(shipped("forward", 80, 72, "qkv"))
    copies = re.findall(r"cp\.async\.\w+\.shared\.global[^;]*, (0x\w+|\d+)", kernel.asm["ptx"])
    assert copies and {int(size, 0) for size in copies} == {4, 16}
    assert not re.search(r"ld\.global(?:\.\w+)*\.b16", kernel.asm["ptx"])


def test_a_config_that_spills_is_found() -> None:
    """Check 128 rows on four warps, which leave each thread too many accumulators."""
    task = shipped("forward", 90, 64, "qkv")
    row = aot_table.resources_of(task._replace(config=Config(128, 64, 4, 2)))
    assert any("register spills" in line for line in aot_table.problems(row))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"spills": 2}, "2 register spills"),
        ({"shared_kib": 228.0}, "228 KiB of shared memory"),
        ({"tensor_memory": 513}, "513 columns"),
        ({"instructions": 16}, "only 16 instructions"),
        ({"mma": 0}, "no tensor-core"),
        ({"wgmma": 0}, "no wgmma"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_each_problem_is_found(change: dict[str, float], complaint: str) -> None:
    """Check problems that are planted in an entry that has none."""
    row = recorded(shipped("forward", 90, 64, "qkv"))
    assert not aot_table.problems(row)
    assert any(complaint in line for line in aot_table.problems(row._replace(**change)))
