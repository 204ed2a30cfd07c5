"""Check that the problems that are counted are right: each pair is PyTorch's own jvp of the specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdistill.benchmarks.count.op_problems import NAMES, problem
from fastdistill.ops.protocol.cases import every_case

ROWS = {f"{row.name}, {variant}".removesuffix(", "): (row, variant) for row in every_case() for variant in row.variants}


def flat(pair: Any) -> list[torch.Tensor]:
    """Return the outputs, then their tangents."""
    return [x for part in pair for x in ([part] if isinstance(part, torch.Tensor) else part)]


@pytest.mark.parametrize("name", [name for name in NAMES if name in ROWS])
def test_a_problem_is_the_op_and_its_tangent(name: str) -> None:
    """Check both results, parameters having no tangent."""
    task, (row, variant) = problem(name), ROWS[name]
    sizes, options = row.variant(variant, row.counted)
    names = list(row.shapes(sizes))
    tangents = tuple(torch.zeros_like(x) if t is None else t for x, t in zip(task.primals, task.tangents))
    assert [t is None for t in task.tangents] == [name in row.parameters for name in names]

    def formula(*primals: torch.Tensor) -> Any:
        return row.of_reference(dict(zip(names, primals)), options)

    expected = torch.func.jvp(formula, task.primals, tangents)
    for actual, truth in zip(flat(task.pair(task.primals, task.tangents, False)), flat(expected), strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-4)


def test_the_network_of_a_problem_has_gradients_for_every_parameter() -> None:
    """Check that every parameter has a gradient and a tangent, both through the driver."""
    task = problem("DiT under fd.jvp")
    leaves = [x.detach().requires_grad_() for x in task.primals]
    u, du_dt = task.pair(leaves, task.tangents, False)
    assert u.shape == du_dt.shape == task.primals[0].shape
    assert u.requires_grad and not du_dt.requires_grad
    gradients = torch.autograd.grad(u.sum(), leaves, allow_unused=True)
    assert all(gradient is not None for gradient in gradients)
