"""Compare the gated residual and its norm by the norms' kernels with float64 autodiff, forward and backward."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

import fastdistill as fd
from fastdistill import reference
from fastdistill.kernels import configs
from fastdistill.kernels import gated_norm as kernel
from tests.kernels.device import DEVICE
from tests.ops.gated_norm.eager_cases import (
    COTANGENTS,
    MODULATED,
    NAMES,
    Case,
    backward,
    check,
    draw_cotangents,
    problem,
)

PARTS = {"plain": ("x", "h"), "gate": ("x", "h", "gate"), "modulated": MODULATED, "all": NAMES}


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_every_kind(parts: str, rms: bool) -> None:
    """Check all tangents and cotangents."""
    check(kernel, Case(rms=rms, parts=PARTS[parts]), DEVICE)


@pytest.mark.parametrize(
    "tangents", [(), *itertools.combinations(MODULATED, 1), ("x", "h"), ("gate", "shift")], ids="+".join
)
def test_subsets_of_tangents(tangents: tuple[str, ...]) -> None:
    """Check that a missing tangent is a structural zero; with any, both outputs have one."""
    check(kernel, Case(parts=MODULATED, tangents=tangents), DEVICE)


@pytest.mark.parametrize(
    "cotangents", [n for r in range(1, 5) for n in itertools.combinations(COTANGENTS, r)], ids="+".join
)
def test_every_subset_of_cotangents(cotangents: tuple[str, ...]) -> None:
    """Check a loss of the residual alone, of the norm alone, and of tangents alone."""
    check(kernel, Case(cotangents=cotangents, shape=(2, 3, 24)), DEVICE)


@pytest.mark.parametrize("modulation", [(2, 1), (2, 5), (1, 5), (1, 1)])
def test_every_modulation(modulation: tuple[int, int]) -> None:
    """Check modulation for each sample, each token, each position, and one for all."""
    check(kernel, Case(parts=MODULATED, modulation=modulation), DEVICE)


@pytest.mark.parametrize("width", [1, 63, 64, 1152, 1536])
def test_every_width(width: int) -> None:
    """Check widths that take one launch."""
    check(kernel, Case(parts=MODULATED, shape=(2, 3, width)), DEVICE)


@pytest.mark.parametrize(("width", "rms"), [(4095, False), (5120, True)], ids=str)
def test_wide_rows_take_their_sums_in_a_second_launch(width: int, rms: bool) -> None:
    """Check the gradients of h and the gate too, which follow from those of x."""
    assert not configs.norm_sums_fit(width, 10, True)
    check(kernel, Case(rms=rms, shape=(1, 2, width), modulation=(1, 1)), DEVICE)


@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 1, 16), (2, 33, 16)], ids=str)
def test_every_number_of_rows(shape: tuple[int, int, int]) -> None:
    """Check one row, one a sample, and more than a program takes."""
    check(kernel, Case(parts=MODULATED, modulation=(shape[0], 1), shape=shape), DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype: torch.dtype) -> None:
    """Check that only inputs and outputs are rounded."""
    check(kernel, Case(dtype=dtype, block=dtype), DEVICE)


@pytest.mark.parametrize(
    ("stream", "block"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=["wide", "narrow"]
)
def test_stream_and_blocks_of_different_dtypes(stream: torch.dtype, block: torch.dtype) -> None:
    """Check that each output, and each gradient, has the accuracy of its dtype."""
    check(kernel, Case(dtype=stream, block=block), DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_huge_mean_and_tiny_variance(dtype: torch.dtype, rms: bool) -> None:
    """Check by the rule, because all error comes from rounding x."""
    check(kernel, Case(rms=rms, parts=MODULATED, dtype=dtype, block=dtype, mean=30.0, std=0.03), DEVICE, capped=False)


def test_no_rows() -> None:
    """Check that gradients of what all rows share are zeros."""
    case = Case(shape=(0, 5, 16), modulation=(1, 1))
    found = backward(kernel, *problem(case, DEVICE), draw_cotangents(case, DEVICE), False)
    assert found["h"].shape == (0, 5, 16) and (found["gate"] == 0).all() and (found["t_weight"] == 0).all()


def test_a_wide_or_double_h_is_refused_by_name() -> None:
    primals, tangents = problem(Case(), DEVICE)
    inputs = [({**primals, "h": primals["h"].double()}[name], tangents[name]) for name in NAMES]
    with pytest.raises(TypeError, match=r"h: expected float32, .* got torch\.float64"):
        kernel.gated_norm_forward(inputs, eps=1e-6, rms=False)


@pytest.mark.parametrize("through_tangent", [False, True], ids=["primal", "mixed"])
def test_an_explicit_triton_runs_no_other_implementation(
    monkeypatch: pytest.MonkeyPatch, through_tangent: bool
) -> None:
    """Check the public op end to end, with a float32 stream and bfloat16 blocks."""
    monkeypatch.setattr("fastdistill.ops.gated_norm.eager.gated_norm_forward", None)
    monkeypatch.setattr("fastdistill.ops.gated_norm.eager.gated_norm_backward", None)
    primals, tangents = problem(Case(parts=MODULATED, block=torch.bfloat16), DEVICE)

    def gradients(op: object) -> list[Tensor]:
        leaves = [part[name].clone().requires_grad_() for part in (primals, tangents) for name in MODULATED]
        (r, y), (t_r, t_y) = torch.func.jvp(op, tuple(leaves[:5]), tuple(leaves[5:]))
        loss = (r.sin() * t_r).sum() + (y.float().sin() * t_y.float()).sum()
        loss = loss if through_tangent else (r.sin() + y.float().sin()).sum()
        return list(torch.autograd.grad(loss, leaves if through_tangent else leaves[:5]))

    named = lambda op: lambda *a, **kw: op(**dict(zip(MODULATED, a)), **kw)  # noqa: E731
    ours = gradients(partial(named(fd.gated_residual_ada_norm), impl="triton"))
    plain = gradients(named(reference.gated_residual_ada_norm))
    for gradient, expected in zip(ours, plain, strict=True):
        assert gradient.dtype == expected.dtype
        torch.testing.assert_close(gradient, expected, rtol=2e-2, atol=5e-2)
