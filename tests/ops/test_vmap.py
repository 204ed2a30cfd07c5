"""Batched maps where they are hardest: double backward, nothing to map over, PyTorch's older vmap in autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian
from torch.func import grad, jacrev, jvp, vjp, vmap

import fastdistill as fd
from tests.ops.op_cases import IMPLS, OPS, calls, draw

Op = Callable[..., Any]
RUNS = [pytest.param(name, impl, id="-".join([name, *impl.values()])) for name in OPS for impl in IMPLS[name]]


def functions(name: str, impl: dict[str, str]) -> tuple[Op, Op, dict[str, tuple[int, ...]]]:
    """Return the op and its formula as functions of all tensors, their outputs concatenated, and the shapes."""
    case = OPS[name]
    shapes, options = max(calls(name), key=lambda call: len(call[0]))
    flat = lambda outs: torch.cat([o.flatten() for o in outs])  # noqa: E731
    ours = lambda *x: flat(case.of_op(dict(zip(shapes, x)), options, **impl))  # noqa: E731
    plain = lambda *x: flat(case.of_reference(dict(zip(shapes, x)), options))  # noqa: E731
    return ours, plain, shapes


def assert_same(ours: Any, plain: Any) -> None:
    torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "mapped"])
@pytest.mark.parametrize(("name", "impl"), RUNS)
def test_double_backward_with_a_cotangent_that_is_shared(name: str, impl: dict[str, str], shared: bool) -> None:
    ours, plain, shapes = functions(name, impl)
    if "attention" in name:
        ours, plain, shapes = functions(name, {"impl": "torch"})  # flash has no second derivative
    x, u = (list(draw(shapes, seed, lead=(3,) if seed == 0 or not shared else ()).values()) for seed in (0, 1))
    every = tuple(range(len(x)))

    def run(op: Op) -> Any:
        slope = grad(lambda *a: op(*a).sin().sum(), argnums=every)
        return vmap(lambda x, u: vjp(slope, *x)[1](tuple(u)), (0, None if shared else 0))(x, u)

    assert_same(run(ours), run(plain))


@pytest.mark.parametrize("strategy", ["forward-mode", "reverse-mode"])
@pytest.mark.parametrize(("name", "impl"), RUNS)
def test_vectorized_jacobians_and_hessians(name: str, impl: dict[str, str], strategy: str) -> None:
    ours, plain, shapes = functions(name, impl)
    x = tuple(draw(shapes).values())
    assert_same(jacobian(ours, x, vectorize=True, strategy=strategy), jacrev(plain, tuple(range(len(x))))(*x))
    if "attention" in name:
        ours, *_ = functions(name, {"impl": "torch"})  # flash has no second derivative
    scalar = lambda op: lambda *a: op(*a).sin().sum()  # noqa: E731
    second = hessian(scalar(ours), x, vectorize=True, outer_jacobian_strategy=strategy)
    assert_same(second, hessian(scalar(plain), x))


@pytest.mark.parametrize("shared", [False, True], ids=["all", "first"])
@pytest.mark.parametrize(("name", "impl"), RUNS)
def test_an_empty_dimension(name: str, impl: dict[str, str], shared: bool) -> None:
    """Check forward, jvp and grad, nested too: shapes and dtypes as those of the formula."""
    ours, plain, shapes = functions(name, impl)
    lead = lambda i, *sizes: sizes if i == 0 or not shared else ()  # noqa: E731
    dims = tuple(0 if i == 0 or not shared else None for i in range(len(shapes)))

    def runs(op: Op, *sizes: int) -> list[Any]:
        x = [torch.zeros(*lead(i, *sizes), *s, dtype=torch.float64) for i, s in enumerate(shapes.values())]
        outs = []
        for f in (
            op,
            lambda *a: jvp(op, a, a),
            grad(lambda *a: op(*a).sum(), argnums=tuple(range(len(x)))),
            lambda *a: jvp(grad(lambda *b: op(*b).sin().sum()), a, a),
        ):
            mapped = f
            for _ in sizes:
                mapped = vmap(mapped, dims)
            outs.append(mapped(*x))
        return outs

    for sizes in ((0,), (2, 0), (0, 2)):
        leaves, wanted = (torch.utils._pytree.tree_leaves(runs(op, *sizes)) for op in (ours, plain))
        assert [(x.shape, x.dtype) for x in leaves] == [(x.shape, x.dtype) for x in wanted]


def test_an_empty_dimension_of_bfloat16_weights() -> None:
    x, w = torch.empty(0, 2, 3, dtype=torch.bfloat16), torch.empty(0, 4, 3, dtype=torch.bfloat16)
    y = vmap(fd.linear)(x, w)
    assert (y.shape, y.dtype) == ((0, 2, 4), torch.bfloat16)


@pytest.mark.parametrize("op", [fd.silu, fd.gelu, lambda x, **kw: fd.rms_norm(x, (3,), **kw)])
def test_an_undefined_gradient_of_the_gradient(op: Callable[..., Tensor]) -> None:
    """Check double backward where nobody needs the gradient of the output's gradient, and where it is undefined."""
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    undefined = torch._C._functions.UndefinedGrad()
    y = op(x, impl="torch")
    (g,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
    assert torch.autograd.grad(undefined(g), x, torch.ones_like(g), allow_unused=True) == (None,)
    assert torch.autograd.grad(undefined(y), x, torch.ones_like(y), allow_unused=True) == (None,)
