"""Activations in plain PyTorch against float64 autodiff of the reference: forward, tangent, both backward passes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastdistill import reference
from fastdistill.ops.activation import eager
from fastdistill.ops.protocol import row_blocks
from fastdistill.ops.protocol.pair import ABSENT, Pair, flat
from fastdistill.testing import assert_accurate, cast, reference_jvp, reference_vjp, relative_error

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": reference.silu,
    "gelu": reference.gelu,
    "gelu_tanh": lambda x: reference.gelu(x, "tanh"),
}
NAMES = ("x", "up")
Tensors = dict[str, Tensor | None]


def specification(kind: str) -> Callable[..., Tensor]:
    return lambda x, up=None: PHI[kind](x) if up is None else PHI[kind](x) * up


def problem(
    gated: bool, tangents: tuple[str, ...] = NAMES, dtype: str = "fp64", shape: tuple[int, ...] = (3, 7, 40)
) -> tuple[Tensors, Tensors]:
    """Return primals, x twice standard normal so that both tails are met, and standard normal tangents."""
    names = NAMES if gated else NAMES[:1]
    draw = lambda: torch.randn(shape, dtype=torch.float64)  # noqa: E731
    primals: Tensors = {name: (draw() * 2 if name == "x" else draw()).to(DTYPES[dtype]) for name in names}
    return primals, {name: draw().to(DTYPES[dtype]) for name in names if name in tangents}


def paired(primals: Tensors, tangents: Tensors) -> list[Pair]:
    return [Pair(primals.get(name), tangents.get(name)) for name in NAMES]


def backward(
    dy: Tensor | None,
    dt_y: Tensor | None,
    primals: Tensors,
    tangents: Tensors,
    kind: str,
    needs: tuple[bool, ...] | None = None,
) -> dict[str, Tensor]:
    """Return gradients by name; by default all those that autodiff would give."""
    if needs is None:
        moving = [dt_y is not None and name in tangents for name in NAMES]
        needs = (*(primals.get(name) is not None for name in NAMES), *moving)
    wanted, saved = list(zip(needs[:2], needs[2:], strict=True)), ([ABSENT], ())
    gradients = flat(
        eager.activation_backward([Pair(dy, dt_y)], paired(primals, tangents), saved, kind=kind, needs=wanted)
    )
    assert [x is not None for x in gradients] == list(needs)
    return {n: x for n, x in zip((*NAMES, "t_x", "t_up"), gradients, strict=True) if x is not None}


def check(kind: str, primals: Tensors, tangents: Tensors) -> None:
    """Check forward, primal backward and mixed backward by the tolerance rule, and that results are contiguous."""
    fn, exact = specification(kind), (cast(primals, torch.float64), cast(tangents, torch.float64))
    truth, baseline = reference_jvp(fn, *exact), reference_jvp(fn, primals, tangents)
    ((y, t_y),), _ = eager.activation_forward(paired(primals, tangents), kind=kind)
    assert y.dtype == baseline[0].dtype and y.is_contiguous()
    assert_accurate(y, truth[0], baseline[0], name="y")
    assert (t_y is None) == (not tangents)
    if t_y is not None:
        assert t_y.is_contiguous()
        assert_accurate(t_y, truth[1], baseline[1], name="t_y")
    dy, dt_y = (torch.randn(y.shape).to(y.dtype) for _ in range(2))
    for other in [None] if t_y is None else [None, dt_y]:
        truths = reference_vjp(fn, *exact, dy.double(), None if other is None else other.double())
        baselines = reference_vjp(fn, primals, tangents, dy, other)
        found = backward(dy, other, primals, tangents, kind)
        assert found.keys() == truths.keys()
        for name, actual in found.items():
            kind_, order = ("primal", 1) if other is None else ("mixed", 2)
            assert actual.is_contiguous() and actual.dtype == y.dtype
            assert_accurate(actual, truths[name], baselines[name], name=f"{kind_} d{name}", order=order)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("kind", PHI)
def test_every_kind_matches_autodiff(kind: str, gated: bool, dtype: str) -> None:
    """Check each kind with all tangents, in each dtype."""
    check(kind, *problem(gated, dtype=dtype))


@pytest.mark.parametrize("tangents", [s for r in range(3) for s in itertools.combinations(NAMES, r)], ids=str)
@pytest.mark.parametrize("kind", ["silu", "gelu"])
def test_every_subset_of_tangents_matches_autodiff(kind: str, tangents: tuple[str, ...]) -> None:
    """Check that a tangent that is not there is zero, in value and in all gradients."""
    check(kind, *problem(True, tangents))


def test_halves_of_a_packed_projection_and_a_transposed_tangent_match_autodiff() -> None:
    """Check views, none of which is contiguous."""
    primals, tangents = problem(True, dtype="fp32")
    primals["x"], primals["up"] = torch.randn(3, 7, 80).chunk(2, -1)
    tangents["x"] = torch.randn(3, 40, 7).mT
    check("silu", primals, tangents)


@pytest.mark.parametrize("layout", ["contiguous", "halves", "transposed"])
@pytest.mark.parametrize("kind", PHI)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_several_blocks_match_autodiff(kind: str, gated: bool, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check blocks of 100 of 840 elements: flat ones, and rows of what isn't contiguous."""
    monkeypatch.setattr(row_blocks, "block_size", lambda device: 100)
    primals, tangents = problem(gated, dtype="bf16")
    if layout == "halves":
        primals |= dict(zip(primals, torch.randn(3, 7, 80).bfloat16().chunk(2, -1)))
    if layout == "transposed":
        tangents["x"] = torch.randn(3, 40, 7).bfloat16().mT
    check(kind, primals, tangents)


@pytest.mark.parametrize(("dtype", "cap"), [("fp64", 1e-12), ("fp32", 1e-6), ("bf16", 3e-3), ("fp16", 4e-4)])
@pytest.mark.parametrize("kind", PHI)
def test_errors_stay_under_absolute_caps(kind: str, dtype: str, cap: float) -> None:
    """Check caps that PyTorch's own error doesn't move: 16-bit results carry hardly more than the output's rounding."""
    primals, tangents = problem(True, dtype=dtype, shape=(64, 64))
    fn, exact = specification(kind), (cast(primals, torch.float64), cast(tangents, torch.float64))
    ((y, t_y),), _ = eager.activation_forward(paired(primals, tangents), kind=kind)
    for actual, truth in zip((y, t_y), reference_jvp(fn, *exact), strict=True):
        assert relative_error(actual, truth) < cap
    truths = reference_vjp(fn, *exact, y.double(), t_y.double())
    for name, x in backward(y, t_y, primals, tangents, kind).items():
        assert relative_error(x, truths[name]) < cap, name


@pytest.mark.parametrize("kind", PHI)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_far_out_an_activation_is_the_identity_or_zero(kind: str, dtype: str) -> None:
    """Check that nothing overflows, to 1e15, and that y, t_y, gradients and the curvature term have their limits."""
    x = torch.tensor([1.0, -1.0]).outer(torch.tensor([50.0, 100.0, 1e3, 1e6, 1e10, 1e15])).to(DTYPES[dtype])
    one, on = torch.ones_like(x), (x > 0).to(x.dtype)
    inputs = [Pair(x, one), ABSENT]
    ((y, t_y),), _ = saved = eager.activation_forward(inputs, kind=kind)
    needs = [(True, True), (False, False)]
    (dx, dt_x), _ = eager.activation_backward([Pair(one, one)], inputs, saved, kind=kind, needs=needs)
    for actual, expected in ((y, x * on), (t_y, on), (dx, on), (dt_x, on)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["x", "up", "t_x", "t_up"])
def test_only_needed_gradients_are_computed(name: str) -> None:
    """Check that each is the same as among all of them; `backward` asserts that the others are None."""
    primals, tangents = problem(True)
    dy, dt_y = torch.randn(2, 3, 7, 40, dtype=torch.float64)
    one = backward(dy, dt_y, primals, tangents, "gelu", tuple(n == name for n in (*NAMES, "t_x", "t_up")))
    torch.testing.assert_close(one[name], backward(dy, dt_y, primals, tangents, "gelu")[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("tangents", [(), ("x",), NAMES], ids=str)
def test_the_mixed_backward_goes_without_a_cotangent_of_the_value(tangents: tuple[str, ...]) -> None:
    """Check a loss of the tangent alone: dy = None is zeros, and needed gradients exist even where they are zero."""
    primals, moving = problem(True, tangents)
    dt_y = torch.randn(3, 7, 40, dtype=torch.float64)
    needs = (True,) * 4
    without, zeros = (backward(dy, dt_y, primals, moving, "silu", needs) for dy in (None, torch.zeros_like(dt_y)))
    for name, x in without.items():
        torch.testing.assert_close(x, zeros[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_arguments_are_neither_changed_nor_returned(gated: bool) -> None:
    """Check it in float32, where a cast would copy nothing."""
    primals, tangents = problem(gated, dtype="fp32")
    dy, dt_y = torch.randn(2, 3, 7, 40)
    arguments = [x for x in (*primals.values(), *tangents.values(), dy, dt_y) if x is not None]
    copies = [x.clone() for x in arguments]
    outputs, _ = eager.activation_forward(paired(primals, tangents), kind="gelu")
    results = flat(outputs)
    results += backward(dy, dt_y, primals, tangents, "gelu").values()
    assert all(torch.equal(x, copy) for x, copy in zip(arguments, copies, strict=True))
    taken = {x.untyped_storage().data_ptr() for x in arguments}
    returned = [x.untyped_storage().data_ptr() for x in results if x is not None]
    assert taken.isdisjoint(returned) and len(set(returned)) == len(returned)
