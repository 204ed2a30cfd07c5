"""Test the memory-bound ops in the table of compiled kernels: all are there, none spills, two are compiled again."""

from __future__ import annotations

import pytest
import triton

from fastdistill.benchmarks.compile import aot_table, op_kernels
from fastdistill.benchmarks.compile.aot_table import Task

CASES = list(op_kernels.cases())
TASKS = [task for task in aot_table.shipped() if task.case.kernel in op_kernels.kernels()]
WITH, _, RECORDED = aot_table.recorded()
ROWS = {row[: aot_table.KEY]: row for row in RECORDED}


def test_each_op_is_in_the_table_in_each_size_on_each_architecture_without_spills() -> None:
    assert len(TASKS) == 3 * len(CASES)
    assert {case.kernel for case, _ in CASES} == set(op_kernels.kernels())
    rows = [ROWS[aot_table.key(task)] for task in TASKS]
    assert not [line for row in rows for line in aot_table.problems(row)]
    assert all(row.spills == row.mma == 0 for row in rows)


def test_every_kernel_belongs_to_a_module_whose_files_are_hashed() -> None:
    """Check that a change of these makes `make aot` measure again."""
    assert op_kernels.families() == {"norm", "gated_norm", "activation", "qk_norm_rope"}
    assert op_kernels.families() | {"attention"} == set(aot_table.sources())
    assert {"norm.py", "norm_backward.py", "gated_norm.py"} <= {path.name for path in op_kernels.files("gated_norm")}
    assert {"attention.py", "attention_backward.py", "tiles.py"} <= {p.name for p in op_kernels.files("attention")}


def test_wide_rows_of_a_backward_are_two_launches() -> None:
    """Check that there is one for rows, and one for what is summed over them."""
    by_case = {(case.kernel, case.d): len(op_kernels.launches(case)) for case, _ in CASES}
    assert by_case["layer_norm_backward", 8192] == by_case["gated_residual_ada_norm_backward", 8192] == 2
    narrow = ("layer_norm_backward", 384), ("swiglu_backward", 4608), ("qk_norm_rope_backward", 72)
    assert [by_case[case] for case in narrow] == [1, 1, 1]


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
