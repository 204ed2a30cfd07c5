"""Plain gradients of attention in 16 bits on the CPU: by the torch implementation, which "auto" takes for them."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastdistill as fd
from fastdistill.testing import make_qkv
from tests.large_logits import CASES, Case, check_gradients

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("impl", ["torch", "auto"])
def test_plain_gradients_keep_the_rule(impl: str, case: Case, dtype: torch.dtype) -> None:
    check_gradients(partial(fd.scaled_dot_product_attention, impl=impl), case, dtype)


@DTYPES
def test_so_do_those_of_the_output_beside_a_tangent(dtype: torch.dtype) -> None:
    """Check it as in MeanFlow, whose loss keeps no graph of the tangent."""

    def pushed(*qkv: Tensor, **options: Any) -> Tensor:
        op = partial(fd.scaled_dot_product_attention, **options)
        return fd.jvp(op, qkv, tuple(torch.ones_like(x) for x in qkv))[0]

    check_gradients(pushed, Case(64, 16.0), dtype)


@DTYPES
def test_compiled_calls_keep_it_too(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    check_gradients(torch.compile(fd.scaled_dot_product_attention, backend="aot_eager"), Case(64, 16.0), dtype)


@pytest.mark.parametrize("needs", [False, True])
def test_without_a_gradient_it_is_pytorchs_own_op(needs: bool) -> None:
    """Check it where none is needed, and where grad mode is off."""
    q, k, v = (x.requires_grad_(needs) for x in make_qkv(n=9, d=16, dtype=torch.bfloat16))
    with torch.set_grad_enabled(not needs):
        found, expected = (op(q, k, v) for op in (fd.scaled_dot_product_attention, F.scaled_dot_product_attention))
    assert torch.equal(found, expected)
