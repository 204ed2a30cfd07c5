"""Ops under every PyTorch transform, against plain PyTorch in float64: the table of the dual protocol."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap
from torch.utils.checkpoint import checkpoint

import fastdistill as fd
from fastdistill import reference
from fastdistill.ops.protocol.dual_op import DualOp

Op = Callable[..., Tensor]
OPS = [vars(module) for name, module in sys.modules.items() if name.startswith("fastdistill.ops.")]
DUAL_OPS = [x for names in OPS for x in names.values() if isinstance(x, DualOp)]


class Case(NamedTuple):
    """Op as a function of tensors alone, and its plain twin."""

    ours: Op
    plain: Op
    shapes: tuple[tuple[int, ...], ...]


ANGLES = fd.rope_angles((5,), 6, dtype=torch.float64)
OF_A_CLIP = fd.rope_angles((1, 2, 2), 6, dtype=torch.float64)  # frames, rows, columns


def normed_and_turned(op: Callable[..., Any]) -> Op:
    """Return layer norms of a packed projection's (B, N, 3, H, D) queries and keys, of which neighbours turn."""

    def run(qkv: Tensor, w: Tensor, b: Tensor, **kw: Any) -> Tensor:
        q, k, _ = qkv.permute(2, 0, 3, 1, 4)
        return torch.cat(op(q, k, *OF_A_CLIP, w, w, b, b, norm="layer", interleaved=True, **kw), dim=1)

    return run


CASES = {
    "attention": Case(fd.scaled_dot_product_attention, reference.attention, ((2, 2, 5, 4),) * 3),
    "cross-causal-gqa": Case(
        lambda q, k, v, **kw: fd.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, **kw),
        lambda q, k, v: reference.attention(q, k, v, is_causal=True),
        ((2, 4, 5, 4), (2, 2, 7, 4), (2, 2, 7, 3)),
    ),
    "window-lower-right": Case(
        lambda q, k, v, **kw: fd.scaled_dot_product_attention(q, k, v, window_size=(2, 1), align="lower_right", **kw),
        lambda q, k, v: reference.attention(q, k, v, window=(2, 1), lower_right=True),
        ((2, 2, 5, 4), (2, 2, 7, 4), (2, 2, 7, 3)),
    ),
    "attention-mask": Case(fd.scaled_dot_product_attention, reference.attention, ((2, 2, 5, 4),) * 3 + ((1, 1, 5, 5),)),
    "layer_norm": Case(
        lambda x, w, b, **kw: fd.layer_norm(x, (6,), w, b, **kw),
        lambda x, w, b: reference.layer_norm(x, (6,), w, b),
        ((2, 5, 6), (6,), (6,)),
    ),
    "rms_norm": Case(
        lambda x, w, **kw: fd.rms_norm(x, (6,), w, 1e-6, **kw),
        lambda x, w: reference.rms_norm(x, (6,), w, 1e-6),
        ((2, 5, 6), (6,)),
    ),
    "gelu-tanh": Case(lambda x, **kw: fd.gelu(x, "tanh", **kw), lambda x: reference.gelu(x, "tanh"), ((2, 5, 6),)),
    "gelu": Case(fd.gelu, reference.gelu, ((2, 5, 6),)),
    "silu": Case(fd.silu, reference.silu, ((2, 5, 6),)),
    "linear": Case(  # the weight has a dimension more, since one test makes the first dimension of every matrix 1
        lambda x, w, b, **kw: fd.linear(x, w[0], b, **kw),
        lambda x, w, b: reference.linear(x, w[0], b),
        ((2, 5, 6), (1, 7, 6), (7,)),
    ),
    "swiglu": Case(fd.swiglu, reference.swiglu, ((2, 5, 6),) * 2),
    "geglu": Case(fd.geglu, reference.geglu, ((2, 5, 6),) * 2),
    "ada_layer_norm": Case(fd.ada_layer_norm, reference.ada_layer_norm, ((2, 5, 6), (2, 1, 6), (2, 1, 6))),
    "ada_layer_norm-by-token": Case(fd.ada_layer_norm, reference.ada_layer_norm, ((2, 5, 6), (2, 5, 6), (1, 5, 6))),
    "ada_rms_norm": Case(fd.ada_rms_norm, reference.ada_rms_norm, ((2, 5, 6), (2, 1, 6), (2, 1, 6), (6,))),
    "gated_residual_ada_norm": Case(
        lambda *a, **kw: torch.cat(fd.gated_residual_ada_norm(*a, **kw), dim=-1),
        lambda *a: torch.cat(reference.gated_residual_ada_norm(*a), dim=-1),
        ((2, 5, 6), (2, 1, 6), (2, 5, 6), (2, 1, 6), (2, 1, 6)),
    ),
    "qk_norm_rope": Case(
        lambda *a, **kw: torch.cat(fd.qk_norm_rope(*a[:2], *ANGLES, *a[2:], **kw), dim=1),
        lambda *a: torch.cat(reference.qk_norm_rope(*a[:2], *ANGLES, *a[2:]), dim=1),
        ((2, 2, 5, 6), (2, 1, 5, 6), (6,), (6,)),
    ),
    "qk_layer_norm_rope-3d-packed": Case(
        normed_and_turned(fd.qk_norm_rope), normed_and_turned(reference.qk_norm_rope), ((2, 4, 3, 2, 6), (6,), (6,))
    ),
}

pytestmark = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def points(case: Case, *, batch: int | None = None, seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Return primals and tangents in float64, optionally with a leading dimension to map over."""
    generator = torch.Generator().manual_seed(seed)
    lead = () if batch is None else (batch,)
    draw = lambda: [torch.randn(*lead, *s, dtype=torch.float64, generator=generator) for s in case.shapes]  # noqa: E731
    return draw(), draw()


def assert_same(ours: Any, plain: Any) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)


def pushforward(op: Op) -> Op:
    return lambda *both: jvp(op, both[: len(both) // 2], both[len(both) // 2 :])


def dual_level(op: Op) -> Op:
    def run(*both: Tensor) -> tuple[Tensor, Tensor]:
        half = len(both) // 2
        with forward_ad.dual_level():
            out = op(*map(forward_ad.make_dual, both[:half], both[half:]))
            result = forward_ad.unpack_dual(out)
        return result.primal, result.tangent

    return run


def gradients(run: Op, inputs: Sequence[Tensor], *, through_tangent: bool) -> tuple[Tensor, ...]:
    """Reverse mode over (out, t_out) = run(primals, tangents)."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, t_out = run(*leaves)
    loss = (out.sin() * t_out).sum() if through_tangent else ((out - t_out.detach()) ** 2).sum()
    return torch.autograd.grad(loss, leaves if through_tangent else leaves[: len(leaves) // 2])


@pytest.mark.parametrize("level", [pushforward, dual_level])
def test_pushforward(case: Case, level: Callable[[Op], Op]) -> None:
    x, t_x = points(case)
    assert_same(level(case.ours)(*x, *t_x), jvp(case.plain, tuple(x), tuple(t_x)))


@pytest.mark.parametrize("level", [pushforward, dual_level])
@pytest.mark.parametrize("through_tangent", [False, True], ids=["primal", "mixed"])
def test_reverse_over_forward(case: Case, level: Callable[[Op], Op], through_tangent: bool) -> None:
    x, t_x = points(case)
    ours = gradients(level(case.ours), [*x, *t_x], through_tangent=through_tangent)
    assert_same(ours, gradients(pushforward(case.plain), [*x, *t_x], through_tangent=through_tangent))


def test_reverse_without_tangents(case: Case) -> None:
    x, _ = points(case)
    value = lambda op: grad(lambda *a: op(*a).sin().sum(), argnums=tuple(range(len(x))))(*x)  # noqa: E731
    assert_same(value(case.ours), value(case.plain))
    leaves = [a.clone().requires_grad_() for a in x]
    assert_same(torch.autograd.grad(case.ours(*leaves).sin().sum(), leaves), value(case.plain))


@pytest.mark.parametrize("index", [0, 1, 2])
def test_each_single_tangent(case: Case, index: int) -> None:
    x, t_x = points(case)
    index = min(index, len(x) - 1)
    one = lambda op: jvp(lambda a: op(*x[:index], a, *x[index + 1 :]), (x[index],), (t_x[index],))  # noqa: E731
    assert_same(one(case.ours), one(case.plain))


def test_vmap_of_jvp(case: Case) -> None:
    x, t_x = points(case, batch=3)
    assert_same(vmap(pushforward(case.ours))(*x, *t_x), vmap(pushforward(case.plain))(*x, *t_x))


def test_vmap_of_jvp_with_shared_primals(case: Case) -> None:
    x, _ = points(case)
    _, t_x = points(case, batch=3)
    dims = (None,) * len(x) + (0,) * len(x)
    assert_same(vmap(pushforward(case.ours), dims)(*x, *t_x), vmap(pushforward(case.plain), dims)(*x, *t_x))


@pytest.mark.parametrize("mapped", [0, 1])
def test_vmap_of_jvp_and_grad_with_batches_of_one(case: Case, mapped: int) -> None:
    """Check one mapped primal beside shared ones with a batch of 1: a shared row must not pass for broadcast."""
    one = case._replace(shapes=tuple((1, *s[1:]) if len(s) > 1 else s for s in case.shapes))
    (x, t_x), (many, _) = points(one), points(one, batch=3)
    mapped = min(mapped, len(x) - 1)
    dims = tuple(0 if i == mapped else None for i in range(len(x)))
    x[mapped] = many[mapped]
    push = lambda op: vmap(lambda *a: jvp(op, a, tuple(t_x)), dims)(*x)  # noqa: E731
    pull = lambda op: vmap(grad(lambda *a: op(*a).sin().sum(), argnums=tuple(range(len(x)))), dims)(*x)  # noqa: E731
    assert_same(push(case.ours), push(case.plain))
    assert_same(pull(case.ours), pull(case.plain))


def test_vmap_over_an_inner_dimension(case: Case) -> None:
    x, t_x = points(case, batch=3)
    moved = [a.movedim(0, -1) for a in (*x, *t_x)]
    assert_same(vmap(pushforward(case.ours), in_dims=-1)(*moved), vmap(pushforward(case.plain))(*x, *t_x))


def test_jvp_of_vmap(case: Case) -> None:
    x, t_x = points(case, batch=3)
    assert_same(jvp(vmap(case.ours), tuple(x), tuple(t_x)), jvp(vmap(case.plain), tuple(x), tuple(t_x)))


def test_jacobians(case: Case) -> None:
    x, _ = points(case)
    last = len(x) - 1
    for jacobian in (jacfwd, jacrev):
        argnums = (0, last)[: len(x)]
        assert_same(jacobian(case.ours, argnums=argnums)(*x), jacobian(case.plain, argnums=argnums)(*x))


def test_per_example_gradients(case: Case) -> None:
    x, _ = points(case, batch=3)
    per_example = lambda op: vmap(grad(lambda *a: op(*a).sin().sum(), argnums=tuple(range(len(x)))))(*x)  # noqa: E731
    assert_same(per_example(case.ours), per_example(case.plain))


def test_grad_of_jvp(case: Case) -> None:
    x, t_x = points(case)
    value = lambda op: lambda a: (lambda o, t: (o * t).sum())(*jvp(op, (a, *x[1:]), tuple(t_x)))  # noqa: E731
    assert_same(grad(value(case.ours))(x[0]), grad(value(case.plain))(x[0]))


def test_jvp_of_grad(case: Case) -> None:
    x, t_x = points(case)
    slope = lambda op: grad(lambda *a: op(*a).pow(3).sum(), argnums=tuple(range(len(x))))  # noqa: E731
    assert_same(jvp(slope(case.ours), tuple(x), tuple(t_x)), jvp(slope(case.plain), tuple(x), tuple(t_x)))


def test_jvp_of_jvp(case: Case) -> None:
    """Check it with impl="torch", because a fused kernel has no second tangent and "auto" says so."""
    x, t_x = points(case)
    inner = lambda op: lambda *a: jvp(op, a, tuple(t_x))[1]  # noqa: E731
    assert_same(
        jvp(inner(partial(case.ours, impl="torch")), tuple(x), tuple(t_x)), jvp(inner(case.plain), tuple(x), tuple(t_x))
    )


def test_grad_of_grad(case: Case) -> None:
    """Check it with impl="torch": without tangents "auto" is PyTorch's op, whose flash has no second derivative."""
    x, _ = points(case)

    def second(op: Op) -> tuple[Tensor, ...]:
        leaves = [a.clone().requires_grad_() for a in x]
        first = torch.autograd.grad(op(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), leaves)

    assert_same(second(partial(case.ours, impl="torch")), second(case.plain))


def test_grad_of_grad_through_the_tangent(case: Case) -> None:
    x, t_x = points(case)

    def second(op: Op) -> tuple[Tensor, ...]:
        leaves = [a.clone().requires_grad_() for a in (*x, *t_x)]
        out, t_out = pushforward(op)(*leaves)
        first = torch.autograd.grad((out.sin() * t_out).sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), leaves)

    assert_same(second(case.ours), second(case.plain))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch.func.linearize itself
def test_hessian_and_linearize(case: Case) -> None:
    x, t_x = points(case)
    scalar = lambda op: lambda a: op(a, *x[1:]).sin().sum()  # noqa: E731
    assert_same(hessian(scalar(case.ours))(x[0]), hessian(scalar(case.plain))(x[0]))
    assert_same(linearize(case.ours, *x)[1](*t_x), jvp(case.plain, tuple(x), tuple(t_x))[1])


def test_gradcheck_with_forward_ad(case: Case) -> None:
    x, _ = points(case)
    leaves = [a.requires_grad_() for a in x]
    assert torch.autograd.gradcheck(case.ours, leaves, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("through_tangent", [False, True], ids=["primal", "mixed"])
def test_checkpoint_around_jvp(case: Case, through_tangent: bool) -> None:
    x, t_x = points(case)
    rerun = lambda *both: checkpoint(pushforward(case.ours), *both, use_reentrant=False)  # noqa: E731
    ours = gradients(rerun, [*x, *t_x], through_tangent=through_tangent)
    assert_same(ours, gradients(pushforward(case.plain), [*x, *t_x], through_tangent=through_tangent))


def test_tangents_are_linear_and_none_is_zero(case: Case) -> None:
    x, t_x = points(case)
    push = lambda *t: jvp(case.ours, tuple(x), t)[1]  # noqa: E731
    parts = [push(*(t if i == j else torch.zeros_like(t) for j, t in enumerate(t_x))) for i in range(len(t_x))]
    single = jvp(lambda a: case.ours(a, *x[1:]), (x[0],), (t_x[0],))[1]
    assert_same(sum(parts[1:], parts[0]), push(*t_x))
    assert_same(single, parts[0])


def test_the_driver_keeps_the_primal_gradient_and_a_constant_tangent(case: Case) -> None:
    x, t_x = points(case)
    leaves = [a.clone().requires_grad_() for a in x]
    out, t_out = fd.jvp(case.ours, tuple(leaves), tuple(t_x))
    assert not t_out.requires_grad
    assert_same((out, t_out), jvp(case.plain, tuple(x), tuple(t_x)))
    plain = gradients(pushforward(case.plain), [*x, *t_x], through_tangent=False)
    assert_same(torch.autograd.grad(((out - t_out) ** 2).sum(), leaves), plain)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("through_tangent", [False, True], ids=["primal", "mixed"])
def test_compiled_equals_eager(case: Case, through_tangent: bool, backend: str) -> None:
    torch._dynamo.reset()
    x, t_x = points(case)
    compiled = torch.compile(pushforward(case.ours), fullgraph=True, backend=backend)
    assert_same(compiled(*x, *t_x), jvp(case.plain, tuple(x), tuple(t_x)))
    ours = gradients(compiled, [*x, *t_x], through_tangent=through_tangent)
    assert_same(ours, gradients(pushforward(case.plain), [*x, *t_x], through_tangent=through_tangent))


def test_compiled_dual_level_equals_eager(case: Case) -> None:
    torch._dynamo.reset()
    x, t_x = points(case)
    compiled = torch.compile(dual_level(case.ours), fullgraph=True, backend="aot_eager")
    assert_same(compiled(*x, *t_x), jvp(case.plain, tuple(x), tuple(t_x)))


def test_compiled_driver_keeps_the_primal_gradient(case: Case) -> None:
    torch._dynamo.reset()
    x, t_x = points(case)
    run = torch.compile(lambda *b: fd.jvp(case.ours, b[: len(x)], b[len(x) :]), fullgraph=True, backend="aot_eager")
    leaves = [a.clone().requires_grad_() for a in x]
    out, t_out = run(*leaves, *t_x)
    assert not t_out.requires_grad
    plain = gradients(pushforward(case.plain), [*x, *t_x], through_tangent=False)
    assert_same(torch.autograd.grad(((out - t_out) ** 2).sum(), leaves), plain)


def test_first_derivatives_never_take_the_dense_formulas(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that asking for a graph of the gradient, as torch.func.grad does, doesn't cost a second derivative."""
    for op in DUAL_OPS:
        monkeypatch.setitem(op.__dict__, "math_backward", None)
    x, t_x = points(case)
    every = tuple(range(len(x)))
    value = lambda op: lambda *a: (lambda o, t: (o * t).sum())(*jvp(op, a, tuple(t_x)))  # noqa: E731
    assert_same(grad(value(case.ours), every)(*x), grad(value(case.plain), every)(*x))
    assert_same(jacrev(case.ours)(*x), jacrev(case.plain)(*x))
