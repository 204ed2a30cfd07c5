"""Norms in plain PyTorch against float64 autodiff of the reference: forward, tangent, and both backward passes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import reference
from fastdistill.ops.norm import eager
from fastdistill.ops.protocol import row_blocks
from fastdistill.ops.protocol.pair import Pair, flat
from fastdistill.testing import assert_accurate, cast, reference_jvp, reference_vjp, relative_error

NAMES = ("x", "weight", "bias", "scale", "shift")
ALL_NAMES = (*NAMES, *(f"t_{name}" for name in NAMES))
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EPS = 1e-3
Tensors = dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    """Problem with the arguments `parts` beside x; those in `tangents` (x among them) have a tangent."""

    rms: bool = False
    parts: tuple[str, ...] = NAMES[1:]
    tangents: tuple[str, ...] = NAMES
    modulation: tuple[int, int] = (3, 1)
    width: int = 40
    dtype: str = "fp32"
    transposed: bool = False

    def __str__(self) -> str:
        layout = ["transposed"] if self.transposed else []
        parts, tangents = "+".join(self.parts) or "plain", "+".join(self.tangents) or "none"
        return "-".join(["rms" if self.rms else "layer", parts, tangents, f"C{self.width}", self.dtype, *layout])


def problem(case: Case, offset: float = 0.5) -> tuple[Tensors, Tensors]:
    """Return primals and tangents; x has a common mode, so that means matter."""
    modulation = (*case.modulation, case.width)
    shapes = dict(zip(NAMES, ((3, 7, case.width), (case.width,), (case.width,), modulation, modulation), strict=True))

    def make(name: str) -> Tensor:
        x = torch.randn(shapes[name], dtype=torch.float64).to(DTYPES[case.dtype])
        return x.transpose(1, 2).contiguous().transpose(1, 2) if case.transposed and x.dim() == 3 else x

    present = ("x", *case.parts)
    primals: Tensors = {name: make(name) if name in present else None for name in NAMES}
    tangents: Tensors = {name: make(name) if name in present and name in case.tangents else None for name in NAMES}
    x = primals["x"]
    assert x is not None
    primals["x"] = 1.5 * x + offset
    return primals, tangents


def inputs(primals: Tensors, tangents: Tensors) -> list[Pair]:
    return [Pair(primals[name], tangents.get(name)) for name in NAMES]


def specification(rms: bool) -> Callable[..., Tensor]:
    return lambda **arguments: reference.norm(**arguments, eps=EPS, rms=rms)


def forward(primals: Tensors, tangents: Tensors, rms: bool) -> Any:
    """Return y, t_y, mean and rstd."""
    ((of_y,), statistics) = eager.norm_forward(inputs(primals, tangents), eps=EPS, rms=rms)
    return (*of_y, *statistics)


def backward(
    dy: Tensor | None,
    dt_y: Tensor | None,
    primals: Tensors,
    tangents: Tensors,
    rms: bool,
    needs: tuple[bool, ...] | None = None,
) -> Tensors:
    """Return gradients by name; by default all those that autodiff would give."""
    _, _, mean, rstd = forward(primals, tangents, rms)
    if needs is None:
        tangent_needs = [dt_y is not None and tangents[name] is not None for name in NAMES]
        needs = (*(primals[name] is not None for name in NAMES), *tangent_needs)
    saved, wanted = ((), (mean, rstd)), list(zip(needs[:5], needs[5:]))
    gradients = flat(eager.norm_backward([Pair(dy, dt_y)], inputs(primals, tangents), saved, rms=rms, needs=wanted))
    assert [x is not None for x in gradients] == list(needs)
    return dict(zip(ALL_NAMES, gradients, strict=True))


def check(case: Case) -> None:
    """Check forward, primal backward and mixed backward of a case by the tolerance rule."""
    primals, tangents = problem(case)
    fn, exact = specification(case.rms), (cast(primals, torch.float64), cast(tangents, torch.float64))
    truth, baseline = reference_jvp(fn, *exact), reference_jvp(fn, primals, tangents)
    y, t_y, mean, rstd = forward(primals, tangents, case.rms)
    assert_accurate(y, truth[0], baseline[0], name="y")
    assert y.dtype == DTYPES[case.dtype]
    assert rstd.shape == (3, 7)
    assert (mean is None) == case.rms
    if any(t is not None for t in tangents.values()):
        assert_accurate(t_y, truth[1], baseline[1], name="t_y")
    else:
        assert t_y is None
    dy, dt_y = (torch.randn(y.shape).to(y.dtype) for _ in range(2))
    for other in [None] if t_y is None else [None, dt_y]:
        truths = reference_vjp(fn, *exact, dy.double(), None if other is None else other.double())
        baselines = reference_vjp(fn, primals, tangents, dy, other)
        found = {n: x for n, x in backward(dy, other, primals, tangents, case.rms).items() if x is not None}
        assert found.keys() == truths.keys()
        for name, actual in found.items():
            kind, order = ("primal", 1) if other is None else ("mixed", 2)
            assert_accurate(actual, truths[name], baselines[name], name=f"{kind} d{name}", order=order)


# What each op of the family passes: layer_norm and rms_norm with all, some or no parameters, their adaptive forms.
PARTS = [(), ("weight",), ("weight", "bias"), ("scale", "shift"), NAMES[1:], ("scale",), ("bias", "shift")]
KINDS = [Case(rms=rms, parts=parts) for rms in (False, True) for parts in PARTS]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", KINDS, ids=str)
def test_every_kind_matches_autodiff(case: Case, dtype: str) -> None:
    """Check all tangents, in each dtype."""
    check(replace(case, dtype=dtype))


SUBSETS = [names for r in range(6) for names in itertools.combinations(NAMES, r)]


@pytest.mark.parametrize("tangents", SUBSETS, ids=lambda names: "+".join(names) or "none")
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_every_subset_of_tangents_matches_autodiff(tangents: tuple[str, ...], rms: bool) -> None:
    """Check that a tangent that is not there is zero, in value and in all gradients."""
    check(Case(rms=rms, tangents=tangents, dtype="fp64"))


@pytest.mark.parametrize("modulation", [(3, 1), (3, 7), (1, 7), (1, 1)])
@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
def test_every_modulation_matches_autodiff(modulation: tuple[int, int], dtype: str) -> None:
    """Check a scale and shift for each image, each token, each position, and one for all."""
    check(Case(modulation=modulation, dtype=dtype, parts=("scale", "shift"), tangents=("x", "scale", "shift")))


@pytest.mark.parametrize("modulation", [(3, 1), (3, 7), (1, 7), (1, 1)])
@pytest.mark.parametrize("size", [1, 120, 300], ids=lambda size: f"blocks of {size}")
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("least", [1, 1 << 14], ids=["samples", "across samples"])
def test_several_blocks_match_autodiff(
    modulation: tuple[int, int], size: int, rms: bool, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check blocks of a row, of three rows of one sample, of several samples, and kernels for each large sample."""
    monkeypatch.setattr(row_blocks, "block_size", lambda device: size)
    monkeypatch.setattr(eager, "LEAST_SAMPLE", least)
    check(Case(rms=rms, modulation=modulation, dtype="fp64"))
    check(Case(rms=rms, modulation=modulation, dtype="bf16", parts=("scale", "shift")))
    check(Case(rms=rms, parts=(), transposed=True))


@pytest.mark.parametrize("parts", [(), ("weight", "bias"), ("scale", "shift")], ids=lambda names: "+".join(names))
def test_gradients_of_rows_with_a_large_mean_keep_their_digits(parts: tuple[str, ...]) -> None:
    """Check means of 1000 spreads, where PyTorch's kernel alone is 1e-5 off in dx: we centre the rows for it."""
    primals, _ = problem(Case(parts=parts, width=384), offset=0.0)
    x = primals["x"]
    assert x is not None
    primals["x"] = 30 + 0.03 * x
    dy, fn = torch.randn(x.shape), specification(False)
    truths = reference_vjp(fn, cast(primals, torch.float64), {}, dy.double(), None)
    dx = backward(dy, None, primals, dict.fromkeys(NAMES), False)["x"]
    assert dx is not None and relative_error(dx, truths["x"]) < 3e-6


@pytest.mark.parametrize("width", [1, 33, 1152])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_every_width_matches_autodiff(width: int, rms: bool) -> None:
    """Check one channel (whose LayerNorm is zero), an odd number, and DiT-XL's."""
    check(Case(rms=rms, width=width))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_a_transposed_input_matches_autodiff(rms: bool) -> None:
    """Check an x with channels first in memory, and that what comes back is contiguous."""
    case = Case(rms=rms, transposed=True)
    check(case)
    primals, tangents = problem(case)
    y, t_y, *_ = forward(primals, tangents, rms)
    gradients = backward(y, t_y, primals, tangents, rms).values()
    assert all(x.is_contiguous() for x in (y, t_y, *gradients) if x is not None)


@pytest.mark.parametrize(("dtype", "cap"), [("fp64", 1e-12), ("fp32", 5e-6), ("bf16", 3e-3), ("fp16", 4e-4)])
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_errors_stay_under_absolute_caps(dtype: str, cap: float, rms: bool) -> None:
    """Check caps that PyTorch's own error doesn't move: 16-bit results carry hardly more than the output's rounding."""
    case = Case(rms=rms, dtype=dtype, parts=("scale", "shift"), tangents=("x", "scale", "shift"), width=384)
    primals, tangents = problem(case)
    fn, exact = specification(rms), (cast(primals, torch.float64), cast(tangents, torch.float64))
    y, t_y, *_ = forward(primals, tangents, rms)
    for actual, truth in zip((y, t_y), reference_jvp(fn, *exact), strict=True):
        assert relative_error(actual, truth) < cap
    truths = reference_vjp(fn, *exact, y.double(), t_y.double())
    for name, x in backward(y, t_y, primals, tangents, rms).items():
        if x is not None:
            assert relative_error(x, truths[name]) < cap, name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_large_common_mode_matches_autodiff(dtype: str) -> None:
    """Check a mean of 100 spreads: what it costs comes from rounding x, not from us."""
    primals, tangents = problem(Case(dtype=dtype, tangents=("x",)), offset=100.0)
    fn, exact = specification(False), (cast(primals, torch.float64), cast(tangents, torch.float64))
    y, t_y, *_ = forward(primals, tangents, False)
    for name, actual, truth, baseline in zip(
        ("y", "t_y"), (y, t_y), reference_jvp(fn, *exact), reference_jvp(fn, primals, tangents), strict=True
    ):
        assert_accurate(actual, truth, baseline, name=name)


def test_parameters_of_another_dtype_keep_it_in_their_gradients() -> None:
    """Check a bfloat16 x with float32 parameters and conditioning, as autocast and mixed precision have it."""
    primals, tangents = problem(Case())
    narrow = primals["x"], tangents["x"]
    primals["x"], tangents["x"] = (None if x is None else x.bfloat16() for x in narrow)
    y, t_y, *_ = forward(primals, tangents, False)
    assert y.dtype == t_y.dtype == torch.bfloat16
    for name, gradient in backward(y, t_y, primals, tangents, False).items():
        assert gradient is not None
        assert gradient.dtype == (torch.bfloat16 if name in ("x", "t_x") else torch.float32)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_only_needed_gradients_are_computed(name: str) -> None:
    """Check that each is the same as among all of them; `backward` asserts that the others are None."""
    primals, tangents = problem(Case(dtype="fp64"))
    dy, dt_y = torch.randn(2, 3, 7, 40, dtype=torch.float64)
    one = backward(dy, dt_y, primals, tangents, False, needs=tuple(other == name for other in ALL_NAMES))
    torch.testing.assert_close(one[name], backward(dy, dt_y, primals, tangents, False)[name], rtol=0, atol=1e-13)


def test_the_mixed_backward_goes_without_a_cotangent_of_the_value() -> None:
    """Check a loss of the tangent alone: dy = None is zeros, with tangents and without."""
    for names in (NAMES, ()):
        primals, tangents = problem(Case(dtype="fp64", tangents=names))
        dt_y = torch.randn(3, 7, 40, dtype=torch.float64)
        without, zeros = (backward(dy, dt_y, primals, tangents, False) for dy in (None, torch.zeros_like(dt_y)))
        for name, x in without.items():
            torch.testing.assert_close(x, zeros[name], rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match=r"^dy: expected a tensor"):
        backward(None, None, primals, tangents, False)


@pytest.mark.parametrize("tangents", [NAMES, ("shift",), ("bias",)], ids=lambda names: "+".join(names))
@pytest.mark.parametrize("parts", [(), ("bias",), ("shift",), NAMES[1:]], ids=lambda names: "+".join(names) or "plain")
def test_arguments_are_neither_changed_nor_returned(parts: tuple[str, ...], tangents: tuple[str, ...]) -> None:
    """Check that a tangent that is only t_shift, or a gradient that is only dy, is a copy of it, in the right shape."""
    primals, directions = problem(Case(parts=parts, tangents=tangents, modulation=(3, 7)))
    dy, dt_y = torch.randn(2, 3, 7, 40)
    arguments = [x for x in (*primals.values(), *directions.values(), dy, dt_y) if x is not None]
    copies = [x.clone() for x in arguments]
    y, t_y, *_ = forward(primals, directions, False)
    assert t_y is None or t_y.shape == y.shape
    gradients = backward(dy, dt_y, primals, directions, False).values()
    assert all(torch.equal(x, copy) for x, copy in zip(arguments, copies, strict=True))
    taken = {x.untyped_storage().data_ptr() for x in arguments}
    returned = [x.untyped_storage().data_ptr() for x in (y, t_y, *gradients) if x is not None]
    assert taken.isdisjoint(returned)
    assert len(set(returned)) == len(returned)


def test_a_tangent_of_zeros_is_no_tangent_and_the_tangent_is_linear() -> None:
    """Check that None and zeros agree, and that t_y(2 t) = 2 t_y(t) to the last bit."""
    primals, tangents = problem(Case())
    only_x: Tensors = {"x": tangents["x"]}
    zeros: Tensors = {name: torch.zeros_like(x) for name, x in tangents.items() if x is not None and name != "x"}
    torch.testing.assert_close(
        forward(primals, only_x | zeros, False)[1], forward(primals, only_x, False)[1], rtol=0, atol=1e-6
    )
    twice: Tensors = {name: 2 * x for name, x in tangents.items() if x is not None}
    assert torch.equal(forward(primals, twice, False)[1], 2 * forward(primals, tangents, False)[1])
