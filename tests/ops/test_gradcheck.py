"""PyTorch's own judges of derivatives, `gradcheck` and `gradgradcheck`, with all their checks, on every public op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdistill as fd
from tests.ops.op_cases import IMPLS, OPS, calls, draw

RUNS = [pytest.param(name, impl, id="-".join([name, *impl.values()])) for name in OPS for impl in IMPLS[name]]


def of_tensors(name: str, impl: dict[str, str], at: int) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """Return the op with its first or last options as a function of its tensors, and those tensors."""
    case = OPS[name]
    shapes, options = max((call for call in calls(name) if call[1] == _options(name)[at]), key=lambda c: len(c[0]))
    tensors = draw(shapes)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return case.of_op(dict(zip(tensors, values)), options, **impl)

    return run, [x.requires_grad_() for x in tensors.values()]


def _options(name: str) -> list[dict[str, Any]]:
    return [options for _, options in calls(name)]


@pytest.mark.parametrize(("name", "impl"), RUNS)
def test_gradcheck(name: str, impl: dict[str, str]) -> None:
    for at in (0, -1):
        run, leaves = of_tensors(name, impl, at)
        assert gradcheck(
            run,
            leaves,
            check_forward_ad=True,
            check_backward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
            check_undefined_grad=True,
        )


@pytest.mark.parametrize(("name", "impl"), RUNS)
def test_gradgradcheck(name: str, impl: dict[str, str]) -> None:
    """Check it with MATH attention, for "auto" without tangents is PyTorch's flash, which has no second derivative."""
    run, leaves = of_tensors(name, impl, 0)
    with sdpa_kernel(SDPBackend.MATH):
        assert gradgradcheck(
            run, leaves, check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True, fast_mode=True
        )


def test_a_second_derivative_of_flash_is_refused_as_pytorch_refuses_it() -> None:
    q = torch.randn(1, 2, 3, 4, requires_grad=True)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        (g,) = torch.autograd.grad(fd.scaled_dot_product_attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(g.sum(), q)


def test_merging_of_attention() -> None:
    """Check two parts of the keys, of which the second sees nothing in its first row."""
    outs = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lses = [torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def run(a: Tensor, b: Tensor, lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        dead = torch.tensor([True, False])
        return fd.ops.merge_attention([a, b], [lse_a, lse_b.masked_fill(dead, float("-inf"))])

    checks = {"check_batched_grad": True}
    every = {"check_forward_ad": True, "check_batched_forward_grad": True, "check_undefined_grad": True, **checks}
    assert gradcheck(run, [*outs, *lses], **every)
    assert gradgradcheck(run, [*outs, *lses], check_fwd_over_rev=True, check_rev_over_rev=True, **checks)
