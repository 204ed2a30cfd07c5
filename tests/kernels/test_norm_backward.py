"""Test the norms' backward kernel against float64 autodiff, primal and mixed, and where its sums go."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastdistill as fd
from fastdistill import reference
from fastdistill.kernels import configs, norm, norm_backward
from fastdistill.kernels.norm_rows import inputs_of
from fastdistill.ops.protocol.pair import flat
from fastdistill.testing import assert_accurate, cast, reference_vjp, relative_error
from tests.kernels.device import DEVICE
from tests.kernels.test_norm import EPS, NAMES, Tensors, inputs, pairs

ALL_NAMES = (*NAMES, *(f"t_{name}" for name in NAMES))
MODULATIONS = {"sample": (2, 1), "token": (2, 5), "position": (1, 5), "one": (1, 1)}


def run(
    primals: Tensors, tangents: Tensors, dy: Tensor | None, dt_y: Tensor | None, *, rms: bool = False
) -> dict[str, Tensor]:
    """Return all gradients that autodiff would give, by name."""
    saved = norm.norm_forward(pairs(primals, tangents), eps=EPS, rms=rms)
    needs = [primals.get(name) is not None for name in NAMES]
    needs += [dt_y is not None and tangents.get(name) is not None for name in NAMES]
    wanted = list(zip(needs[:5], needs[5:]))
    found = flat(norm.norm_backward([(dy, dt_y)], pairs(primals, tangents), saved, rms=rms, needs=wanted))
    assert [x is not None for x in found] == needs
    return {name: x for name, x in zip(ALL_NAMES, found, strict=True) if x is not None}


def check(primals: Tensors, tangents: Tensors, *, rms: bool = False, cotangents: str = "both") -> None:
    """Assert the tolerance rule for each gradient, shapes and dtypes, and float32's cap on the error as a whole."""
    x = primals["x"]
    assert x is not None
    dy, dt_y = (torch.randn(x.shape, device=DEVICE).to(x.dtype) for _ in range(2))
    dy, dt_y = (None if cotangents == "tangent" else dy), (None if cotangents == "primal" else dt_y)
    zeros = torch.zeros_like(x) if dy is None else dy

    def fn(**tensors: Tensor | None) -> Tensor:
        return reference.norm(**tensors, eps=EPS, rms=rms)

    exact = cast(primals, torch.float64), cast(tangents, torch.float64)
    truths = reference_vjp(fn, *exact, zeros.double(), None if dt_y is None else dt_y.double())
    baselines = reference_vjp(fn, primals, tangents, zeros, dt_y)
    found = run(primals, tangents, dy, dt_y, rms=rms)
    assert found.keys() == truths.keys()
    for name, actual in found.items():
        like = {**primals, **{f"t_{name}": t for name, t in tangents.items()}}[name]
        assert like is not None and (actual.shape, actual.dtype) == (like.shape, like.dtype)
        assert actual.is_contiguous()
        assert_accurate(actual, truths[name], baselines[name], name=f"d{name}", order=1 if dt_y is None else 2)
        assert actual.dtype != torch.float32 or relative_error(actual, truths[name]) < 5e-6, name


def modulated(kind: str, names: tuple[str, ...] = NAMES, dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensors]:
    """Return `inputs` of (2, 5, 24) with scale and shift for each sample, token or position, or one for all."""
    both = inputs(names, shape=(2, 5, 24), dtype=dtype)
    for tensors in both:
        for name in ("scale", "shift"):
            tensors[name] = torch.randn(*MODULATIONS[kind], 24, device=DEVICE).to(dtype)
    return both


@pytest.mark.parametrize("cotangents", ["primal", "tangent", "both"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize(
    "names",
    [("x",), ("x", "weight"), ("x", "weight", "bias"), ("x", "scale", "shift"), NAMES],
    ids=["plain", "weight", "affine", "modulated", "all"],
)
def test_every_member_of_the_family(names: tuple[str, ...], rms: bool, cotangents: str) -> None:
    """Check it with a tangent to each tensor; the value, the tangent, or both are in the loss."""
    check(*inputs(names, shape=(2, 5, 40)), rms=rms, cotangents=cotangents)


@pytest.mark.parametrize("tangents", [names for r in range(6) for names in itertools.combinations(NAMES, r)], ids=str)
def test_every_subset_of_tangents(tangents: tuple[str, ...]) -> None:
    """Check that what a missing tangent leaves out is left out of each gradient."""
    check(*inputs(NAMES, tangents, shape=(2, 3, 24)), rms=len(tangents) % 2 == 0)


@pytest.mark.parametrize("kind", MODULATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_modulation(kind: str, dtype: torch.dtype) -> None:
    """Check gradients that are sums over tokens, over samples, over both, or over nothing."""
    check(*modulated(kind, dtype=dtype))


@pytest.mark.parametrize("width", [1, 5, 63, 64, 65, 384, 1152, 1536])
def test_every_width(width: int) -> None:
    """Check powers of two and all else."""
    check(*inputs(shape=(2, 3, width)))


@pytest.mark.parametrize(("width", "rms"), [(4095, False), (5120, True), (8191, False)], ids=str)
def test_wide_rows_take_their_sums_in_a_second_launch(width: int, rms: bool) -> None:
    """Check rows too wide for their ten sums: columns follow, with the statistics that the rows left."""
    primals, tangents = inputs(shape=(1, 2, width))
    assert not configs.norm_sums_fit(width, 10, False)
    check(primals, tangents, rms=rms)


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 1), (1, 17), (2, 33)])
@pytest.mark.parametrize("cotangents", ["primal", "both"])
def test_every_number_of_rows(batch: int, length: int, cotangents: str) -> None:
    """Check one row, one a sample, and one more than a program takes at a time."""
    check(*inputs(shape=(batch, length, 16)), cotangents=cotangents)


def test_programs_that_take_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check sums over steps of a program and then over programs, the last of which is cut short."""
    tile = configs.NormConfig(rows=2, block_c=16, num_warps=1)
    monkeypatch.setattr(configs, "norm_backward_config", lambda *_: (tile, 3))
    check(*inputs(shape=(2, 13, 16)))


def test_columns_in_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the same for the second launch, with a last tile of columns that is cut short."""
    monkeypatch.setattr(configs, "norm_sums_fit", lambda *_: False)
    monkeypatch.setattr(configs, "norm_columns_config", lambda *_: (configs.NormConfig(2, 16, 1), 3))
    check(*inputs(shape=(2, 13, 40)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_16_bits(dtype: torch.dtype, rms: bool) -> None:
    """Check that only inputs and outputs are rounded: the error as a whole is one rounding."""
    primals, tangents = inputs(dtype=dtype)
    check(primals, tangents, rms=rms)
    dy, dt_y = torch.randn(2, *primals["x"].shape, device=DEVICE).to(dtype).unbind(0)
    exact = cast(primals, torch.float64), cast(tangents, torch.float64)
    truths = reference_vjp(lambda **a: reference.norm(**a, eps=EPS, rms=rms), *exact, dy.double(), dt_y.double())
    for name, actual in run(primals, tangents, dy, dt_y, rms=rms).items():
        assert relative_error(actual, truths[name]) < (3e-3 if dtype == torch.bfloat16 else 4e-4), name


@pytest.mark.parametrize("cotangents", ["primal", "both"])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_huge_mean_and_tiny_variance(cotangents: str, rms: bool) -> None:
    """Check that a spread of a thousandth of the mean costs the gradients nothing, because x is given."""
    primals, tangents = inputs(("x", "scale", "shift"), shape=(2, 5, 1153))
    primals["x"] = 30 + 0.03 * primals["x"]
    x = primals["x"]
    dy, dt_y = torch.randn(2, *x.shape, device=DEVICE).unbind(0)
    dt_y = None if cotangents == "primal" else dt_y

    def fn(**tensors: Tensor | None) -> Tensor:
        return reference.norm(**tensors, eps=EPS, rms=rms)

    exact = cast(primals, torch.float64), cast(tangents, torch.float64)
    truths = reference_vjp(fn, *exact, dy.double(), None if dt_y is None else dt_y.double())
    for name, actual in run(primals, tangents, dy, dt_y, rms=rms).items():
        assert relative_error(actual, truths[name]) < 5e-6, name


def test_any_strides() -> None:
    """Check strided inputs and cotangents; gradients are contiguous."""
    primals, tangents = inputs(shape=(2, 5, 24))
    primals["x"] = torch.randn(24, 5, 2, device=DEVICE).permute(2, 1, 0)
    primals["weight"] = torch.randn(48, device=DEVICE)[::2]
    dy = torch.randn(2, 24, 5, device=DEVICE).mT
    dt_y = torch.randn(24, device=DEVICE).expand(2, 5, 24)
    found = run(primals, tangents, dy, dt_y)
    packed = ({name: None if x is None else x.contiguous() for name, x in part.items()} for part in (primals, tangents))
    for name, other in run(*packed, dy.contiguous(), dt_y.contiguous()).items():
        torch.testing.assert_close(found[name], other, rtol=1e-6, atol=1e-6)


def test_dtypes_may_differ() -> None:
    """Check bfloat16 activations, float32 parameters and modulation: each gradient has its argument's dtype."""
    primals, tangents = inputs()
    low = [{**part, "x": part["x"].bfloat16()} for part in (primals, tangents)]
    dy, dt_y = torch.randn(2, *primals["x"].shape, device=DEVICE).bfloat16().unbind(0)
    found = run(*low, dy, dt_y)
    full = run(*({**part, "x": part["x"].float()} for part in low), dy.float(), dt_y.float())
    for name, gradient in found.items():
        assert gradient.dtype == (torch.bfloat16 if name in ("x", "t_x") else torch.float32)
        torch.testing.assert_close(gradient, full[name].to(gradient.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_only_what_is_needed_is_written(name: str) -> None:
    """Check that the launches have no other outputs, and that the gradient is the same as among all."""
    primals, tangents = inputs(shape=(2, 3, 24))
    dy, dt_y = torch.randn(2, 2, 3, 24, device=DEVICE).unbind(0)
    saved = norm.norm_forward(pairs(primals, tangents), eps=EPS, rms=False)
    point = inputs_of(pairs(primals, tangents))
    task = norm_backward.plan(norm_backward.Cotangents(dy, dt_y), point, *saved[1], False, [name])
    written = [x for launch in task.launches for part in launch.args[3:6] for x in part if x is not None]
    assert len(written) == len(task.launches) == 1
    needs = tuple(other == name for other in ALL_NAMES)
    wanted = list(zip(needs[:5], needs[5:]))
    found = flat(norm.norm_backward([(dy, dt_y)], pairs(primals, tangents), saved, rms=False, needs=wanted))
    assert [x is not None for x in found] == list(needs)
    alone = found[ALL_NAMES.index(name)]
    torch.testing.assert_close(alone, run(primals, tangents, dy, dt_y)[name], rtol=1e-6, atol=1e-6)


def test_sums_are_the_same_each_time() -> None:
    """Check them to the last bit: no two programs add to one number."""
    primals, tangents = inputs(shape=(3, 40, 16))
    dy, dt_y = torch.randn(2, 3, 40, 16, device=DEVICE).unbind(0)
    first, second = (run(primals, tangents, dy, dt_y) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_rows() -> None:
    """Check that gradients of parameters are zeros."""
    primals, tangents = inputs(shape=(0, 5, 16))
    empty = torch.zeros(0, 5, 16, device=DEVICE)
    found = run(primals, tangents, empty, empty)
    assert (found["weight"] == 0).all() and found["weight"].shape == (16,) and found["t_x"].shape == (0, 5, 16)


def test_no_cotangent_is_refused() -> None:
    primals, tangents = inputs()
    with pytest.raises(ValueError, match=r"^dy: expected a tensor"):
        run(primals, tangents, None, None)


@pytest.mark.parametrize("through_tangent", [False, True], ids=["primal", "mixed"])
def test_an_explicit_triton_runs_no_other_backward(monkeypatch: pytest.MonkeyPatch, through_tangent: bool) -> None:
    """Check that the op's gradients come from the kernel, and are those of the plain formula."""
    monkeypatch.setattr("fastdistill.ops.norm.eager.norm_backward", None)
    primals, tangents = modulated("sample", ("x", "weight"))

    def gradients(op: object) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (*primals.values(), *tangents.values())]
        y, t_y = torch.func.jvp(op, tuple(leaves[:4]), tuple(leaves[4:]))
        loss = (y.sin() * t_y).sum() if through_tangent else y.sin().sum()
        return list(torch.autograd.grad(loss, leaves if through_tangent else leaves[:4]))

    ours = gradients(lambda x, w, scale, shift: fd.ada_rms_norm(x, scale, shift, w, impl="triton"))
    plain = gradients(lambda x, w, scale, shift: reference.ada_rms_norm(x, scale, shift, w))
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=2e-5)
