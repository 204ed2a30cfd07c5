"""Test the memory-bound ops in the table of compiled kernels: all are there, none spills, two are compiled again."""

from __future__ import annotations

import pytest
import triton

from fastdistill.benchmarks.compile import aot_table, memory_bound
from fastdistill.benchmarks.compile.aot_table import Task

TASKS = [task for task in aot_table.shipped() if task.case.kernel in memory_bound.SIZES]
WITH, _, RECORDED = aot_table.recorded()
ROWS = {row[: aot_table.KEY]: row for row in RECORDED}


def test_each_op_is_in_the_table_in_each_size_on_each_architecture_without_spills() -> None:
    assert len(TASKS) == 3 * sum(map(len, memory_bound.SIZES.values()))
    rows = [ROWS[aot_table.key(task)] for task in TASKS]
    assert not [line for row in rows for line in aot_table.problems(row)]
    assert all(row.spills == row.mma == 0 for row in rows)


def test_every_kernel_is_in_a_family_whose_files_are_there() -> None:
    """Check the files whose change makes `make aot` compile again."""
    for kernel in memory_bound.SIZES:
        patterns = aot_table.FAMILIES[aot_table.family(kernel)]
        assert all(list(aot_table.KERNELS.glob(pattern)) for pattern in patterns)
    assert {aot_table.family(kernel) for kernel in memory_bound.SIZES} == {"norm", *memory_bound.FAMILIES}


def test_wide_rows_of_a_backward_are_two_launches() -> None:
    """Check that one launch takes the rows, and one the sums over them."""
    by_case = {(case.kernel, case.d): len(memory_bound.launches(case)) for case, _ in memory_bound.cases()}
    assert by_case["norm_backward", 8192] == by_case["gated_norm_backward", 8192] == 2
    assert (
        by_case["norm_backward", 384] == by_case["swiglu_backward", 4608] == by_case["qk_norm_rope_backward", 72] == 1
    )


@pytest.mark.parametrize("kernel", ["swiglu_backward", "qk_norm_rope"])
def test_a_compiled_op_is_as_recorded(kernel: str) -> None:
    """Check it on Hopper; another compiler gives other numbers, but no problems."""
    task = next(task for task in TASKS if (task.case.kernel, task.arch) == (kernel, 90))
    row = aot_table.resources_of(task)
    assert not aot_table.problems(row)
    if triton.__version__ == WITH:
        assert row == ROWS[aot_table.key(task)]


def test_a_spill_would_be_found() -> None:
    row = ROWS[aot_table.key(TASKS[0])]
    assert "1 register spills" in aot_table.problems(row._replace(spills=1))[0]
    assert isinstance(TASKS[0], Task) and not aot_table.problems(row)
