"""Compare the norm kernel's values with float64 autodiff of the plain formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastdistill as fd
from fastdistill import reference
from fastdistill.kernels import norm as kernel
from fastdistill.testing import assert_accurate, cast, reference_jvp, relative_error
from tests.kernels.device import DEVICE

Tensors = dict[str, Tensor | None]
NAMES = ("x", "weight", "bias", "scale", "shift")
EPS = 1e-5


def inputs(
    names: tuple[str, ...] = NAMES,
    tangents: tuple[str, ...] | None = None,
    *,
    shape: tuple[int, int, int] = (2, 5, 72),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensors, Tensors]:
    """Draw standard normal x, an affine map, a scale a sample, a shift a token, and by default a tangent to each."""
    batch, length, width = shape
    shapes = {"x": shape, "weight": (width,), "bias": (width,), "scale": (batch, 1, width), "shift": (1, length, width)}
    draws = [
        {name: torch.randn(shapes[name], dtype=torch.float64, device=DEVICE).to(dtype) for name in names}
        for _ in range(2)
    ]
    return draws[0], {name: t for name, t in draws[1].items() if tangents is None or name in tangents}


def pairs(primals: Tensors, tangents: Tensors) -> list[tuple[Any, Tensor | None]]:
    """Return them in the order of the kernel's inputs."""
    return [(primals.get(name), tangents.get(name)) for name in NAMES]


def run(primals: Tensors, tangents: Tensors, *, rms: bool = False, eps: float = EPS) -> kernel.Outputs:
    """Run the kernel on named tensors."""
    (of_y,), statistics = kernel.norm_forward(pairs(primals, tangents), eps=eps, rms=rms)
    return kernel.Outputs(*of_y, *statistics)


def check(primals: Tensors, tangents: Tensors, *, rms: bool = False, eps: float = EPS) -> None:
    """Assert that y, t_y keep the tolerance rule, and float32 its cap; that mean, rstd have float32's accuracy."""
    outputs = run(primals, tangents, rms=rms, eps=eps)

    def fn(**tensors: Tensor | None) -> Tensor:
        return reference.norm(**tensors, eps=eps, rms=rms)

    exact, t_exact = cast(primals, torch.float64), cast(tangents, torch.float64)
    truths, baselines = reference_jvp(fn, exact, t_exact), reference_jvp(fn, primals, tangents)
    for name, actual, truth, baseline in zip(("y", "t_y"), (outputs.y, outputs.t_y), truths, baselines):
        if actual is not None:
            assert_accurate(actual, truth, baseline, name=name)
            assert actual.dtype != torch.float32 or relative_error(actual, truth) < 1e-6, name
    assert (outputs.t_y is None) == (not tangents)
    x = exact["x"]
    centred = x if rms else x - x.mean(-1, keepdim=True)
    assert relative_error(outputs.rstd, (centred.square().mean(-1) + eps).rsqrt()) < 1e-6
    if rms:
        assert outputs.mean is None
    else:
        torch.testing.assert_close(outputs.mean.double(), x.mean(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(
    "names",
    [("x",), ("x", "weight"), ("x", "weight", "bias"), ("x", "scale", "shift"), NAMES],
    ids=["plain", "weight", "affine", "modulated", "all"],
)
def test_every_member_of_the_family(names: tuple[str, ...], rms: bool) -> None:
    """Check it with a tangent to each tensor."""
    check(*inputs(names), rms=rms)


@pytest.mark.parametrize("tangents", [(), *((name,) for name in NAMES), ("x", "scale"), ("weight", "shift")], ids=str)
def test_subsets_of_tangents(tangents: tuple[str, ...]) -> None:
    """Check that a missing tangent is a structural zero; without any there is no t_y."""
    check(*inputs(NAMES, tangents))


@pytest.mark.parametrize("width", [1, 2, 63, 64, 72, 128, 1000, 1152, 4097, 8191, 8192])
def test_every_width(width: int) -> None:
    """Check powers of two and all else; rows come one or sixteen to a program."""
    check(*inputs(shape=(2, 3, width)))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 1), (1, 17), (2, 33)])
def test_every_number_of_rows(batch: int, length: int) -> None:
    """Check one row, one a sample, and one more than a program takes."""
    check(*inputs(shape=(batch, length, 16)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype: torch.dtype) -> None:
    """Check that only inputs and outputs are rounded."""
    check(*inputs(dtype=dtype))


def test_dtypes_may_differ() -> None:
    """Check dtypes under autocast: bfloat16 activations, float32 parameters and modulation; y has x's dtype."""
    primals, tangents = inputs()
    low = run({**primals, "x": primals["x"].bfloat16()}, {**tangents, "x": tangents["x"].bfloat16()})
    exact = {**primals, "x": primals["x"].bfloat16().float()}, {**tangents, "x": tangents["x"].bfloat16().float()}
    assert low.y.dtype == low.t_y.dtype == torch.bfloat16
    full = run(*exact)
    assert torch.equal(low.y, full.y.bfloat16()) and torch.equal(low.t_y, full.t_y.bfloat16())


def test_any_strides() -> None:
    """Check a permuted x, a cut-out t_x, every other weight, and scales broadcast from one row and over all rows."""
    primals, tangents = inputs(shape=(2, 5, 24))
    primals["x"] = torch.randn(24, 5, 2, device=DEVICE).permute(2, 1, 0)
    tangents["x"] = torch.randn(4, 9, 30, device=DEVICE)[1:3, 2:7, 3:27]
    primals["weight"] = torch.randn(48, device=DEVICE)[::2]
    primals["scale"], tangents["scale"] = torch.randn(1, 1, 24, device=DEVICE), torch.randn(1, 1, 24, device=DEVICE)
    primals["shift"], tangents["shift"] = (
        torch.randn(2, 5, 24, device=DEVICE),
        torch.randn(2, 1, 24, device=DEVICE).expand(2, 5, 24),
    )
    check(primals, tangents)


def test_a_large_mean_is_taken_off_before_squaring() -> None:
    """Check inputs on which one pass over sums of squares would lose everything."""
    primals, tangents = inputs(("x",))
    primals["x"] = primals["x"] + 100
    outputs = run(primals, tangents)
    truth, t_truth = reference_jvp(reference.norm, cast(primals, torch.float64), cast(tangents, torch.float64))
    assert relative_error(outputs.y, truth) < 1e-5 and relative_error(outputs.t_y, t_truth) < 1e-5


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_mean_and_tiny_variance(rms: bool, dtype: torch.dtype) -> None:
    """Check by the rule; in float32 the spread is a thousandth of the mean, and y and t_y lose nothing."""
    primals, tangents = inputs(("x", "scale", "shift"), shape=(2, 5, 1153))
    primals["x"] = 30 + (0.03 if dtype == torch.float32 else 0.3) * primals["x"]
    check(cast(primals, dtype), cast(tangents, dtype), rms=rms)


@pytest.mark.parametrize("width", [1536, 5120])
def test_rms_across_all_heads(width: int) -> None:
    """Check the widths of Wan's query and key norms."""
    check(*inputs(("x", "weight"), shape=(1, 2, width)), rms=True)


def test_a_constant_row_has_no_direction() -> None:
    """Check zero variance: y is the bias, and t_y stays finite by eps."""
    primals, tangents = inputs(("x",))
    primals["x"] = torch.full_like(primals["x"], 3.0)
    outputs = run(primals, tangents)
    assert (outputs.y == 0).all() and outputs.t_y.isfinite().all()


def test_no_rows() -> None:
    """Check that an empty batch launches nothing."""
    outputs = run(*inputs(shape=(0, 5, 16)))
    assert outputs.y.shape == outputs.t_y.shape == (0, 5, 16) and outputs.rstd.shape == (0, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(1, 1, 4, dtype=torch.float64)}, TypeError, "x: expected float32, .* got torch.float64"),
        ({"x": torch.zeros(1, 1, 8193)}, ValueError, "x: expected at most 8192 channels .* got 8193"),
        ({"weight": None}, ValueError, "t_weight: expected None without a weight"),
    ],
    ids=["float64", "wide row", "tangent of nothing"],
)
def test_what_it_cannot_do_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """Check that the message names the argument."""
    primals, tangents = inputs()
    with pytest.raises(error, match=message):
        run({**primals, **change}, tangents)


def test_wider_rows_are_refused_by_the_public_op_where_it_was_asked_for_by_name() -> None:
    """Check that they are left to PyTorch where it was not."""
    x, t_x = torch.randn(2, 2, 8193, device=DEVICE).unbind(0)
    with pytest.raises(ValueError, match="x: expected at most 8192 channels for the Triton kernel, got 8193"):
        torch.func.jvp(lambda x: fd.layer_norm(x, (8193,), impl="triton"), (x,), (t_x,))
    ours = torch.func.jvp(lambda x: fd.layer_norm(x, (8193,)), (x,), (t_x,))
    torch.testing.assert_close(ours, torch.func.jvp(lambda x: reference.layer_norm(x, (8193,)), (x,), (t_x,)))
