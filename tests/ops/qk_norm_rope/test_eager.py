"""Norm and rotation of queries and keys in plain PyTorch against float64 autodiff: forward, tangent, both backwards."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastdistill.ops.qk_norm_rope import eager
from tests.ops.qk_norm_rope.eager_cases import ALL_NAMES, NAMES, Case, backward, check, flat, forward, problem


@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_norm_rotation_and_dtype(norm: str, interleaved: bool, dtype: torch.dtype) -> None:
    """Check each with a tangent to each tensor."""
    check(eager, Case(norm, interleaved, dtype=dtype))


CASES = [
    *(Case(tangents=tangents, parts=NAMES[2:4]) for r in range(5) for tangents in itertools.combinations(NAMES[:4], r)),
    Case("layer", tangents=("q_bias",)),
    Case("layer", parts=("k_weight",)),
    Case("rms", parts=()),
    Case("none", tangents=("k",)),
    Case("layer", parts=(), offset=30.0, spread=0.03, d=128),
    Case("rms", offset=1e-4, spread=1e-4),
    Case("layer", lengths=(3, 7)),
    Case("rms", lengths=(7, 3), angles="each"),
    Case("rms", True, angles="each"),
    Case("layer", angles="none"),
    Case("none", angles="none"),
    Case("rms", True, d=72),
    Case("rms", d=2),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_absent_is_left_out(case: Case) -> None:
    """Check subsets of tangents, absent parts, absent angles, other lengths of keys, and angles for each sample."""
    check(eager, case)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_only_what_is_needed_comes_back(name: str) -> None:
    """Check that it is the same as among all."""
    case = Case("layer")
    primals, tangents, angles = problem(case)
    d = [torch.randn_like(primals[side]) for side in ("q", "q", "k", "k")]
    at = (primals, tangents, angles)
    every = backward(eager, case, d, at)
    needs = tuple(other == name for other in ALL_NAMES)
    found = backward(eager, case, d, at, needs)
    assert [g is not None for g in found] == list(needs)
    torch.testing.assert_close(found[ALL_NAMES.index(name)], every[ALL_NAMES.index(name)])


def test_a_loss_of_queries_alone_has_zeros_for_keys() -> None:
    case = Case()
    primals, tangents, angles = problem(case)
    d = torch.randn(2, *primals["q"].shape).unbind(0)
    grads = backward(eager, case, (*d, None, None), (primals, tangents, angles))
    assert all((grad != 0).any() for grad in grads[0::2])
    assert all((grad == 0).all() for grad in grads[1::2])


def test_rotating_back_undoes_it() -> None:
    """Check that R is orthogonal, whichever pairs it turns."""
    primals, _, (cos, sin) = problem(Case(dtype=torch.float64))
    for interleaved in (False, True):
        turned = eager.rotate(primals["q"], cos.double(), sin.double(), interleaved)
        back = eager.rotate(turned, cos.double(), -sin.double(), interleaved)
        torch.testing.assert_close(back, primals["q"], rtol=0, atol=1e-6)
        torch.testing.assert_close(turned.norm(), primals["q"].norm(), rtol=1e-6, atol=0)


def test_any_strides() -> None:
    """Check that views of a packed projection give what copies of them give."""
    case = Case(heads=(4, 4))
    primals, tangents, angles = problem(case)
    packed = torch.randn(2, 7, 3, 4, 16).permute(2, 0, 3, 1, 4)
    primals["q"], primals["k"] = packed[0], packed[1]
    found = forward(eager, case, primals, tangents, angles)
    primals["q"], primals["k"] = packed[0].contiguous(), packed[1].contiguous()
    torch.testing.assert_close(flat(found), flat(forward(eager, case, primals, tangents, angles)))
    assert all(x.is_contiguous() for x in found)
