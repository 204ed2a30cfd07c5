"""Check that the counted problems are right: each pair equals PyTorch's own jvp of the public op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastdistill as fd
from fastdistill.benchmarks.count.op_problems import Problem, problem

# Each op is called on the primals of its problem.
PLAIN: dict[str, Callable[..., Any]] = {
    "attention": fd.scaled_dot_product_attention,
    "attention, causal": lambda q, k, v: fd.scaled_dot_product_attention(q, k, v, is_causal=True),
    "layer_norm": lambda x, weight, bias: fd.layer_norm(x, weight.shape, weight, bias),
    "rms_norm": lambda x, weight: fd.rms_norm(x, weight.shape, weight),
    "ada_layer_norm": fd.ada_layer_norm,
    "gated_residual_ada_norm": fd.gated_residual_ada_norm,
    "gelu, tanh": lambda x: fd.gelu(x, "tanh"),
    "swiglu": fd.swiglu,
    "timestep_embedding": lambda t: fd.timestep_embedding(t, 256),
}


def flat(pair: Any) -> list[torch.Tensor]:
    """Return the outputs, then their tangents."""
    return [x for part in pair for x in ([part] if isinstance(part, torch.Tensor) else part)]


@pytest.mark.parametrize("name", PLAIN)
def test_a_problem_is_the_op_and_its_tangent(name: str) -> None:
    """Check both results, with all tangents given."""
    task: Problem = problem(name)
    expected = torch.func.jvp(PLAIN[name], task.primals, task.tangents)
    for actual, truth in zip(flat(task.pair(task.primals, task.tangents, False)), flat(expected), strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-5)


def test_the_network_of_a_problem_has_gradients_for_every_parameter() -> None:
    """Check that every parameter has a gradient and a tangent, both through the driver."""
    task = problem("DiT under fd.jvp")
    leaves = [x.detach().requires_grad_() for x in task.primals]
    u, du_dt = task.pair(leaves, task.tangents, False)
    assert u.shape == du_dt.shape == task.primals[0].shape
    assert u.requires_grad and not du_dt.requires_grad
    gradients = torch.autograd.grad(u.sum(), leaves, allow_unused=True)
    assert all(gradient is not None for gradient in gradients)
