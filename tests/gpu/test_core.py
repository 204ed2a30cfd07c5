"""Test what benchmarks rest on: head dims of real models, several tiles, and the configs that a GPU gets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastdistill as fd
from fastdistill import reference
from fastdistill.testing import assert_accurate
from tests.kernels.attention_cases import CAUSAL, check, inputs, normal, packed_inputs
from tests.kernels.backward_cases import check_backward, cotangents_of

DTYPES = [torch.bfloat16, torch.float32]
MODES = {"primal": ("do",), "mixed": ("do", "dt_o")}
SHAPE = {"batch": 2, "heads": 2, "n": 300, "m": 333}


@pytest.mark.parametrize("d", [64, 72, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(d: int, dtype: torch.dtype) -> None:
    check(*inputs(**SHAPE, d=d, dtype=dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("d", [64, 72, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward(d: int, dtype: torch.dtype, mode: str) -> None:
    primals, tangents = inputs(**SHAPE, d=d, dtype=dtype)
    check_backward(primals, tangents, cotangents_of(primals, *MODES[mode]))


@pytest.mark.parametrize("d", [64, 72, 128])
def test_a_band_both_ways(d: int) -> None:
    """Check a causal band."""
    primals, tangents = inputs(**SHAPE, d=d, dtype=torch.bfloat16)
    check(primals, tangents, window=CAUSAL)
    check_backward(primals, tangents, cotangents_of(primals, *MODES["mixed"]), window=CAUSAL)


@pytest.mark.parametrize("d", [64, 72, 128])
def test_a_mask_both_ways(d: int) -> None:
    """Check a learned bias with a tangent."""
    primals, tangents = inputs(**SHAPE, d=d, dtype=torch.bfloat16)
    primals["attn_mask"], tangents["attn_mask"] = (normal(1, 1, 300, 333).bfloat16() for _ in range(2))
    check(primals, tangents)
    check_backward(primals, tangents, cotangents_of(primals, *MODES["mixed"]))


@pytest.mark.parametrize("d", [64, 128])
def test_packed_sequences_both_ways(d: int) -> None:
    primals, tangents, cu_seqlens = packed_inputs([200, 1, 131], [77, 150, 131], heads=2, d=d, dtype=torch.bfloat16)
    check(primals, tangents, cu_seqlens=cu_seqlens)
    check_backward(primals, tangents, cotangents_of(primals, *MODES["mixed"]), cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("width", [384, 1152])
def test_the_norms_of_a_dit_with_all_gradients(width: int) -> None:
    """Check bfloat16 rows with float32 modulation against the same function of the same numbers in float64."""

    def both(fn: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out, t_out = torch.func.jvp(fn, tuple(leaves[:3]), tuple(leaves[3:]))
        loss = (out.double().sin() * t_out.double()).sum()
        return (out.detach(), t_out.detach(), *torch.autograd.grad(loss, leaves))

    point = [normal(2, 300, width).bfloat16(), 0.3 * normal(2, 1, width), 0.3 * normal(2, 1, width)]
    point += [torch.randn_like(x) for x in point]
    found = both(fd.ada_layer_norm, *point)
    truths = both(reference.ada_layer_norm, *(x.double() for x in point))
    baselines = both(reference.ada_layer_norm, *point)
    for i, (x, truth, baseline) in enumerate(zip(found, truths, baselines)):
        assert_accurate(x, truth, baseline, name=f"result {i}")
