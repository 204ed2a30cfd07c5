"""Test the public ops between attentions with impl="triton", under every transform that training needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import jvp, vmap
from torch.utils.checkpoint import checkpoint

import fastdistill as fd
from fastdistill import reference
from tests.kernels.device import DEVICE

Op = Callable[..., Any]


class Case(NamedTuple):
    """Describe an op as a function of tensors alone, by the kernels and as plain formulas, and their shapes."""

    ours: Op
    plain: Op
    shapes: tuple[tuple[int, ...], ...]


# A clip has tokens (frames, rows, columns), whose queries and keys are views of one packed projection.
ANGLES = fd.rope_angles((1, 2, 3), 12, device=DEVICE)


def halves(qkv: Tensor) -> tuple[Tensor, Tensor]:
    q, k, _ = qkv.permute(2, 0, 3, 1, 4)
    return q, k


def joined(both: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat(both, dim=-1)


MODULATED = ((2, 5, 24), (2, 1, 24), (2, 1, 24))
CASES = {
    "layer_norm": Case(
        lambda x, w, b: fd.layer_norm(x, (24,), w, b, impl="triton"),
        lambda x, w, b: reference.layer_norm(x, (24,), w, b),
        ((2, 5, 24), (24,), (24,)),
    ),
    "rms_norm": Case(
        lambda x, w: fd.rms_norm(x, (24,), w, 1e-6, impl="triton"),
        lambda x, w: reference.rms_norm(x, (24,), w, 1e-6),
        ((2, 5, 24), (24,)),
    ),
    "ada_layer_norm": Case(
        lambda x, scale, shift: fd.ada_layer_norm(x, scale, shift, impl="triton"), reference.ada_layer_norm, MODULATED
    ),
    "ada_rms_norm": Case(
        lambda x, scale, shift: fd.ada_rms_norm(x, scale, shift, impl="triton"), reference.ada_rms_norm, MODULATED
    ),
    "gated_residual_ada_norm": Case(
        lambda *a: joined(fd.gated_residual_ada_norm(*a, impl="triton")),
        lambda *a: joined(reference.gated_residual_ada_norm(*a)),
        ((2, 5, 24), (2, 1, 24), (2, 5, 24), (2, 1, 24), (2, 1, 24)),
    ),
    "qk_norm_rope": Case(
        lambda qkv, w: joined(fd.qk_norm_rope(*halves(qkv), *ANGLES, w, interleaved=True, impl="triton")),
        lambda qkv, w: joined(reference.qk_norm_rope(*halves(qkv), *ANGLES, w, interleaved=True)),
        ((2, 6, 3, 2, 12), (12,)),
    ),
    "gelu": Case(lambda x: fd.gelu(x, impl="triton"), reference.gelu, ((2, 5, 24),)),
    "gelu-tanh": Case(lambda x: fd.gelu(x, "tanh", impl="triton"), lambda x: reference.gelu(x, "tanh"), ((2, 5, 24),)),
    "silu": Case(lambda x: fd.silu(x, impl="triton"), reference.silu, ((2, 5, 24),)),
    "swiglu": Case(lambda a, b: fd.swiglu(a, b, impl="triton"), reference.swiglu, ((2, 5, 24),) * 2),
    "geglu": Case(lambda a, b: fd.geglu(a, b, impl="triton"), reference.geglu, ((2, 5, 24),) * 2),
}
pytestmark = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def points(case: Case, *lead: int) -> list[Tensor]:
    """Draw primals, then tangents."""
    return [torch.randn(*lead, *shape, device=DEVICE) for _ in range(2) for shape in case.shapes]


def pushforward(op: Op) -> Op:
    return lambda *both: jvp(op, both[: len(both) // 2], both[len(both) // 2 :])


def mixed(run: Op, both: list[Tensor]) -> tuple[Tensor, ...]:
    """Return output, tangent, and the gradients of a loss of both with respect to primals and tangents."""
    leaves = [x.clone().requires_grad_() for x in both]
    out, t_out = run(*leaves)
    return (out, t_out, *torch.autograd.grad((out.sin() * t_out).sum(), leaves))


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=3e-5)


def test_values_tangents_and_gradients(case: Case) -> None:
    both = points(case)
    assert_same(mixed(pushforward(case.ours), both), mixed(pushforward(case.plain), both))


def test_gradients_without_tangents(case: Case) -> None:
    """Check it also under fd.jvp, whose tangent is a constant."""
    both = points(case)
    x = [a.requires_grad_() for a in both[: len(both) // 2]]
    truth = torch.autograd.grad(case.plain(*x).sin().sum(), x)
    assert_same(torch.autograd.grad(case.ours(*x).sin().sum(), x), truth)
    out, t_out = fd.jvp(case.ours, tuple(x), tuple(both[len(x) :]))
    assert not t_out.requires_grad
    assert_same(torch.autograd.grad(out.sin().sum(), x), truth)


def test_vmap_of_jvp(case: Case) -> None:
    """Check shared primals too, as a Jacobian has them."""
    both, many = points(case), points(case, 3)
    assert_same(vmap(pushforward(case.ours))(*many), vmap(pushforward(case.plain))(*many))
    half = len(both) // 2
    given, dims = (*both[:half], *many[half:]), (None,) * half + (0,) * half
    assert_same(vmap(pushforward(case.ours), dims)(*given), vmap(pushforward(case.plain), dims)(*given))


def test_forward_mode_levels(case: Case) -> None:
    both = points(case)
    half = len(both) // 2
    with torch.autograd.forward_ad.dual_level():
        dual = case.ours(*map(torch.autograd.forward_ad.make_dual, both[:half], both[half:]))
        pair = tuple(torch.autograd.forward_ad.unpack_dual(dual))
    assert_same(pair, pushforward(case.plain)(*both))


def test_compiled_with_tangents(case: Case) -> None:
    torch._dynamo.reset()
    both = points(case)
    compiled = torch.compile(pushforward(case.ours), fullgraph=True, backend="aot_eager")
    assert_same(mixed(compiled, both), mixed(pushforward(case.plain), both))


def test_checkpoint_around_the_jvp(case: Case) -> None:
    both = points(case)
    again = lambda *x: checkpoint(pushforward(case.ours), *x, use_reentrant=False)  # noqa: E731
    assert_same(mixed(again, both), mixed(pushforward(case.plain), both))


def test_autocast_leaves_them_alone(case: Case) -> None:
    """Check that they compute in float32 and return the dtypes of their inputs, as they do without it."""
    both = points(case)
    outside = pushforward(case.ours)(*both)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = pushforward(case.ours)(*both)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_a_tangent_of_a_tangent_is_refused_and_not_computed_elsewhere(case: Case) -> None:
    both = points(case)
    half = len(both) // 2
    inner = lambda *x: jvp(case.ours, x, tuple(both[half:]))[1]  # noqa: E731
    with pytest.raises(NotImplementedError, match="expected one level of forward AD with impl='triton'"):
        jvp(inner, tuple(both[:half]), tuple(both[half:]))
