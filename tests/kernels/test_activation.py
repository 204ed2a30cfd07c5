"""Compare the activation kernels' values with float64 autodiff of the plain formula."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastdistill as fd
from fastdistill import reference
from fastdistill.kernels import activation as kernel
from fastdistill.testing import assert_accurate, cast, reference_jvp, reference_vjp, relative_error
from tests.kernels.device import DEVICE

PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": reference.silu,
    "gelu": reference.gelu,
    "gelu_tanh": lambda x: reference.gelu(x, "tanh"),
}
NAMES = ("x", "up")
CAPS = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
Tensors = dict[str, Tensor | None]


def inputs(
    names: tuple[str, ...] = NAMES,
    tangents: tuple[str, ...] = NAMES,
    *,
    shape: tuple[int, ...] = (2, 5, 72),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensors, Tensors]:
    """Draw x twice as wide as standard normal, so that it meets both tails, and all else standard normal."""
    draw = lambda: torch.randn(shape, dtype=torch.float64, device=DEVICE)  # noqa: E731
    primals: Tensors = {name: (draw() * 2 if name == "x" else draw()).to(dtype) for name in names}
    return primals, {name: draw().to(dtype) for name in names if name in tangents}


def pairs(primals: Tensors, tangents: Tensors) -> list[tuple[Any, Tensor | None]]:
    return [(primals.get(name), tangents.get(name)) for name in NAMES]


def gradients(dy: Tensor | None, dt_y: Tensor, primals: Tensors, tangents: Tensors, kind: str) -> list[Tensor]:
    """Return dx, dt_x, dup and dt_up, all of them."""
    arguments, needs = ([(dy, dt_y)], pairs(primals, tangents), ([(None, None)], ())), [(True, True)] * 2
    return [x for pair in kernel.activation_backward(*arguments, kind=kind, needs=needs) for x in pair]


def check(kind: str, primals: Tensors, tangents: Tensors, cotangents: list[Tensor] | None = None) -> None:
    """Check that y, t_y, the gradients of y and those of both keep the tolerance rule and absolute caps."""
    fn = lambda x, up=None: PHI[kind](x) if up is None else PHI[kind](x) * up  # noqa: E731
    exact = cast(primals, torch.float64), cast(tangents, torch.float64)
    saved = kernel.activation_forward(pairs(primals, tangents), kind=kind)
    ((*outputs,),) = saved[0]
    found = {name: x for name, x in zip(("y", "t_y"), outputs, strict=True) if x is not None}
    assert ("t_y" in found) == bool(tangents)
    truths = dict(zip(("y", "t_y"), reference_jvp(fn, *exact)))
    baselines = dict(zip(("y", "t_y"), reference_jvp(fn, primals, tangents)))
    dy, dt_y = cotangents or [torch.randn_like(outputs[0]) for _ in range(2)]
    for order, other in [(1, None), (2, dt_y)]:
        wants = ["x", "up"] if other is None else ["x", "up", "t_x", "t_up"]
        given = primals | {f"t_{name}": t for name, t in tangents.items()}
        needs = [tuple(n in wants and given.get(n) is not None for n in (name, f"t_{name}")) for name in NAMES]
        grads = kernel.activation_backward([(dy, other)], pairs(primals, tangents), saved, kind=kind, needs=needs)
        assert [tuple(x is not None for x in pair) for pair in grads] == needs
        named = [(n, x) for name, pair in zip(NAMES, grads, strict=True) for n, x in zip((name, f"t_{name}"), pair)]
        found |= {f"d{name}{order}": x for name, x in named if x is not None}
        for results, point, (d, dt) in (
            (truths, exact, (dy.double(), None if other is None else other.double())),
            (baselines, (primals, tangents), (dy, other)),
        ):
            results |= {f"d{name}{order}": x for name, x in reference_vjp(fn, *point, d, dt).items()}
    for name, actual in found.items():
        assert actual.is_contiguous() and actual.dtype == outputs[0].dtype, name
        assert_accurate(actual, truths[name], baselines[name], name=name, order=2 if name.endswith("2") else 1)
        if actual.numel() > 100:  # A few elements may be all cancellation.
            assert relative_error(actual, truths[name]) < CAPS[actual.dtype], name


@pytest.mark.parametrize("dtype", CAPS, ids=str)
@pytest.mark.parametrize("names", [NAMES[:1], NAMES], ids=["plain", "gated"])
@pytest.mark.parametrize("kind", kernel.KINDS)
def test_every_member_of_the_family(kind: str, names: tuple[str, ...], dtype: torch.dtype) -> None:
    """Check it with a tangent to each tensor; only inputs and outputs are rounded."""
    check(kind, *inputs(names, dtype=dtype))


@pytest.mark.parametrize("tangents", [s for r in range(3) for s in itertools.combinations(NAMES, r)], ids=str)
def test_subsets_of_tangents(tangents: tuple[str, ...]) -> None:
    """Check that a missing tangent is a structural zero; without any there is no t_y."""
    check("gelu_tanh", *inputs(tangents=tangents))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 1), (3, 1024), (1, 1025), (2100, 3), (1, 3, 1, 2)], ids=str)
def test_every_shape(shape: tuple[int, ...]) -> None:
    """Check one element, one more than a program takes, and many rows a program."""
    check("silu", *inputs(shape=shape))


def test_any_strides() -> None:
    """Check halves of a packed projection, cut out, permuted, broadcast, with every other channel, and with gaps."""
    draw = lambda *shape: torch.randn(shape, device=DEVICE)  # noqa: E731
    primals: Tensors = dict(zip(NAMES, draw(2, 3, 5, 48).chunk(2, -1)))
    tangents: Tensors = {"x": draw(24, 5, 3, 2).permute(3, 2, 1, 0), "up": draw(4, 9, 5, 48)[1:3, 2:5, :, ::2]}
    check("gelu", primals, tangents, [draw(2, 3, 1, 24).expand(2, 3, 5, 24), draw(1).expand(2, 3, 5, 24)])


def test_dimensions_that_can_be_joined_are_joined() -> None:
    """Check that contiguous tensors are one row, halves of a projection rows of a half, and a broadcast stays apart."""
    contiguous, packed = torch.empty(2, 3, 4).stride(), torch.empty(2, 3, 8)[..., :4].stride()
    assert kernel.coalesced((2, 3, 4), [contiguous, contiguous]) == ([24, 1], [(1, 0), (1, 0)])
    assert kernel.coalesced((2, 3, 4), [contiguous, packed]) == ([4, 6], [(1, 4), (1, 8)])
    assert kernel.coalesced((2, 1, 4), [(4, 99, 1), (0, 99, 1)]) == ([4, 2], [(1, 4), (1, 0)])
    assert kernel.coalesced((1, 1), [(7, 7)]) == ([1, 1], [(1, 0)])


@pytest.mark.parametrize("kind", kernel.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_far_out_an_activation_is_the_identity_or_zero(kind: str, dtype: torch.dtype) -> None:
    """Check that no exponential or power overflows, up to the largest number there is."""
    far = [50.0, 100.0, 1e3, 1e6, 1e10, 1e20, torch.finfo(dtype).max]
    x = torch.tensor([1.0, -1.0], device=DEVICE).outer(torch.tensor(far, device=DEVICE)).clamp(-far[-1], far[-1])
    x = x.to(dtype)
    one, on = torch.ones_like(x), (x > 0).to(dtype)
    inputs = [(x, one), (None, None)]
    ((y, t_y),), _ = saved = kernel.activation_forward(inputs, kind=kind)
    needs = [(True, True), (False, False)]
    (dx, dt_x), _ = kernel.activation_backward([(one, one)], inputs, saved, kind=kind, needs=needs)
    for actual, expected in ((y, x * on), (t_y, on), (dx, on), (dt_x, on)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


def test_a_loss_of_the_tangent_alone() -> None:
    """Check that a dy of None is zeros."""
    primals, tangents = inputs()
    dt_y = torch.randn(2, 5, 72, device=DEVICE)
    without, zeros = (gradients(dy, dt_y, primals, tangents, "silu") for dy in (None, torch.zeros_like(dt_y)))
    assert all(torch.equal(a, b) for a, b in zip(without, zeros, strict=True))


def test_no_elements() -> None:
    """Check that an empty tensor launches nothing."""
    ((y, t_y),), _ = kernel.activation_forward(pairs(*inputs(shape=(0, 5))), kind="silu")
    assert y.shape == t_y.shape == (0, 5)


def test_what_it_cannot_do_is_refused() -> None:
    """Check that the message names the argument."""
    x = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"x: expected float32, .* got torch.float64"):
        kernel.activation_forward([(x, None), (None, None)], kind="silu")
    with pytest.raises(ValueError, match="t_up: expected None without an up"):
        kernel.activation_forward([(x.float(), None), (None, x.float())], kind="silu")


@pytest.mark.parametrize("op", ["swiglu", "geglu"])
def test_the_public_op_runs_the_kernels_both_ways(op: str) -> None:
    """Check value, tangent, and the gradients of a loss of both with impl="triton"."""
    primals, tangents = inputs(shape=(2, 3, 8))
    leaves = [x.requires_grad_() for x in (*primals.values(), *tangents.values())]

    def mixed(fn: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        y, t_y = torch.func.jvp(fn, tuple(leaves[:2]), tuple(leaves[2:]))
        return (y, t_y, *torch.autograd.grad((y.sin() * t_y).sum(), leaves))

    ours = mixed(lambda gate, up: getattr(fd, op)(gate, up, impl="triton"))
    torch.testing.assert_close(ours, mixed(getattr(reference, op)), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, which the interpreter computes with, warns of NaN
@pytest.mark.parametrize("kind", PHI)
def test_nan_stays_nan(kind: str) -> None:
    """Check that NaN is in y, t_y and all gradients, at this entry and nowhere else."""
    primals, tangents = inputs(shape=(1, 8))
    primals["x"][0, 3] = math.nan
    ((y, t_y),), _ = kernel.activation_forward(pairs(primals, tangents), kind=kind)
    for x in (y, t_y, *gradients(torch.ones_like(y), torch.ones_like(t_y), primals, tangents, kind)):
        assert x.isnan().nonzero().tolist() == [[0, 3]]
