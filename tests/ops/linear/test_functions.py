"""Linear layers: accuracy by the tolerance rule, how many matmuls run, and drop-in behaviour."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastdistill as fd
from fastdistill import reference
from fastdistill.ops.linear.eager import joins
from fastdistill.ops.linear.op import LINEAR
from fastdistill.testing import DEVICES, assert_accurate, cast, reference_jvp, reference_vjp, relative_error

NAMES = ("x", "weight", "bias")
# Few rows, where operands are stacked, and many, where they are not.
FEW, MANY = {"x": (2, 1, 24), "weight": (40, 24), "bias": (40,)}, {"x": (2, 9, 24), "weight": (40, 24), "bias": (40,)}
CAPS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
Tensors = dict[str, Tensor | None]


def draw(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: str = "cpu") -> Tensors:
    return {name: torch.randn(shape, dtype=torch.float64).to(device, dtype) for name, shape in shapes.items()}


def check(primals: Tensors, tangents: Tensors) -> None:
    """Check values, tangent, and the gradients of a loss of both, each by the rule and below its cap."""
    dtype = next(x.dtype for x in primals.values() if x is not None)
    leaves = {n: None if x is None else x.clone().requires_grad_() for n, x in primals.items()}
    t_leaves = {f"t_{n}": None if x is None else x.clone().requires_grad_() for n, x in tangents.items()}
    x, weight, bias = (leaves.get(name) for name in NAMES)
    assert x is not None and weight is not None
    out, t_out = fd.linear_jvp(x, t_leaves.pop("t_x", None), weight, bias, tangent_grad=True, **t_leaves)
    exact = (cast(primals, torch.float64), cast(tangents, torch.float64))
    dy, dt_y = torch.randn_like(out), torch.randn_like(t_out)
    given = {n: v for n, v in {**leaves, **{f"t_{n}": None for n in tangents}}.items() if v is not None}
    found = dict(zip(("y", "t_y"), (out.detach(), t_out.detach())))
    truths = dict(zip(found, reference_jvp(reference.linear, *exact)))
    baselines = dict(zip(found, reference_jvp(reference.linear, primals, tangents)))
    if tangents:
        grads = torch.autograd.grad((out, t_out), list(given.values()), (dy, dt_y))
        found |= {f"d{name}": grad for name, grad in zip(given, grads, strict=True)}
        of_truth = reference_vjp(reference.linear, *exact, dy.double(), dt_y.double())
        truths |= {f"d{name}": grad for name, grad in of_truth.items()}
        of_base = reference_vjp(reference.linear, primals, tangents, dy, dt_y)
        baselines |= {f"d{name}": grad for name, grad in of_base.items()}
    for name, actual in found.items():
        assert actual.dtype == dtype
        assert_accurate(actual, truths[name], baselines[name], name=name, order=2 if name.startswith("d") else 1)
        assert relative_error(actual, truths[name]) < CAPS[dtype], name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", CAPS, ids=str)
@pytest.mark.parametrize("shapes", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_values_tangents_and_gradients_are_accurate(
    shapes: dict[str, tuple[int, ...]], bias: bool, dtype: torch.dtype, device: str
) -> None:
    shapes = shapes if bias else {n: s for n, s in shapes.items() if n != "bias"}
    check(draw(shapes, dtype, device), draw({"x": shapes["x"]}, dtype, device))


@pytest.mark.parametrize("tangents", [s for r in range(4) for s in itertools.combinations(NAMES, r)], ids=str)
@pytest.mark.parametrize("shapes", [FEW, MANY], ids=["few", "many"])
def test_every_subset_of_tangents(shapes: dict[str, tuple[int, ...]], tangents: tuple[str, ...]) -> None:
    """Check that a missing tangent is zero, in value and in all gradients, those of the tangents included."""
    primals, moving = draw(shapes, torch.float64), draw({name: shapes[name] for name in tangents}, torch.float64)
    points = [x.requires_grad_() for x in (*primals.values(), *moving.values()) if x is not None]

    def mixed(fn: Callable[..., Any]) -> Any:
        given = dict(zip(tangents, points[3:]))
        y, t_y = fn(dict(zip(NAMES, points[:3])), given)
        grads = torch.autograd.grad((y.sin() * t_y + y).sum(), points, materialize_grads=True)
        return (y, t_y, *grads)

    def ours(primals: Tensors, moving: Tensors) -> tuple[Tensor, Tensor]:
        given = {f"t_{name}": t for name, t in moving.items() if name != "x"}
        return fd.linear_jvp(primals["x"], moving.get("x"), primals["weight"], primals["bias"], tangent_grad=True, **given)  # fmt: skip  # noqa: E501

    torch.testing.assert_close(mixed(ours), mixed(lambda p, m: reference_jvp(reference.linear, p, m)))


class Matmuls(TorchDispatchMode):
    """Collects the shapes (rows, summed, columns) of the matmuls that run inside it, also inside our own ops."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten  # linear and matmul come whole where autograd is below them
        if func.overloadpacket in (aten.mm, aten.matmul, aten.addmm, aten.addmm_):
            self.shapes.append((*args[-2].shape, args[-1].shape[1]))
        elif func.overloadpacket is aten.linear:
            self.shapes.append((*args[0].shape, args[1].shape[0]))
        if func.namespace == "fastdistill":  # a mode is off while it handles an op, so what that op calls is not seen
            kernel = {"": LINEAR._plain, "_dual": LINEAR._dual, "_backward": LINEAR._backward}
            with self:
                return kernel[func.name().removeprefix("fastdistill::linear")](*args)
        return func(*args, **(kwargs or {}))


def matmuls(fn: Callable[[], Any]) -> list[tuple[int, int, int]]:
    with Matmuls() as mode:
        fn()
    return mode.shapes


@pytest.mark.parametrize(
    ("shapes", "forward", "backward"),
    [
        (FEW, [(4, 24, 40)], [(4, 40, 24), (40, 2, 24), (40, 2, 24)]),
        (MANY, [(18, 24, 40)] * 2, [(18, 40, 24)] * 2 + [(40, 18, 24)] * 2),
    ],
    ids=["few", "many"],
)
def test_a_weight_that_stands_still_costs_nothing(
    shapes: dict[str, tuple[int, ...]], forward: list[tuple[int, ...]], backward: list[tuple[int, ...]]
) -> None:
    """Check one matmul of stacked rows or two, where torch.func.jvp runs a third by zeros, and the mixed backward's."""
    x, weight, bias = (v.requires_grad_() for v in draw(shapes, torch.float32).values() if v is not None)
    t_x = torch.randn(x.shape, requires_grad=True)
    ours, plain = (
        lambda f=f: torch.func.jvp(lambda x: f(x, weight, bias), (x,), (t_x,)) for f in (fd.linear, F.linear)
    )
    assert matmuls(ours) == forward
    assert len(matmuls(plain)) == 3
    out, t_out = ours()
    assert matmuls(lambda: (out * t_out).sum().backward()) == backward


def test_rows_are_stacked_where_the_weight_is_what_costs() -> None:
    """Check that a DiT's modulation (batches to a few hundred) is stacked, and its tokens aren't."""
    assert joins(32, 384, 6 * 384) and joins(128, 1152, 6 * 1152)
    assert not joins(256, 384, 3 * 384) and not joins(32 * 256, 1152, 4 * 1152)


def test_stacked_results_do_not_share_memory() -> None:
    """Check it, since a saved y would keep its tangent alive, and writing to one in place would be refused."""
    primals = draw(FEW, torch.float32)
    y, t_y = torch.func.jvp(lambda x: fd.linear(x, primals["weight"]), (primals["x"],), (primals["x"],))
    assert y.untyped_storage().nbytes() == t_y.untyped_storage().nbytes() == y.numel() * 4
    y.relu_()


def test_primals_equal_pytorch_with_and_without_tangents() -> None:
    for shapes in (FEW, MANY):
        x, weight, bias = (v for v in draw(shapes, torch.float32).values() if v is not None)
        for b in (None, bias):
            ours, plain = (lambda x, f=f, w=weight, b=b: f(x, w, b) for f in (fd.linear, F.linear))
            torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=0)
            torch.testing.assert_close(torch.func.jvp(ours, (x,), (x,)), torch.func.jvp(plain, (x,), (x,)))


@pytest.mark.parametrize("shape", [(24,), (0, 24), (3, 24), (2, 3, 4, 24)], ids=str)
def test_every_shape(shape: tuple[int, ...]) -> None:
    x, t_x = torch.randn(2, *shape, dtype=torch.float64, requires_grad=True).unbind(0)
    weight = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)

    def mixed(op: Callable[..., Tensor]) -> Any:
        y, t_y = torch.func.jvp(lambda x: op(x, weight), (x,), (t_x,))
        return (y, t_y, *torch.autograd.grad((y.sin() * t_y).sum(), (x, t_x, weight)))

    torch.testing.assert_close(mixed(fd.linear), mixed(reference.linear))


def test_a_transposed_input_and_expanded_cotangents() -> None:
    x, t_x = torch.randn(2, 3, 24, 5, dtype=torch.float64).mT.unbind(0)
    weight = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    total = lambda op: sum(z.sum() for z in torch.func.jvp(lambda x: op(x, weight), (x,), (t_x,)))  # noqa: E731
    ours, plain = (torch.autograd.grad(total(op), weight) for op in (fd.linear, reference.linear))
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("shapes", [FEW, MANY], ids=["few", "many"])
def test_autocast_lowers_primal_and_tangent_as_it_does_for_pytorch(shapes: dict[str, tuple[int, ...]]) -> None:
    x, weight, bias = (v.requires_grad_() for v in draw(shapes, torch.float32).values() if v is not None)
    low = F.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, t_y = torch.func.jvp(lambda x: fd.linear(x, weight, bias), (x,), (x,))
        assert fd.linear(x, weight, bias).dtype == y.dtype == t_y.dtype == torch.bfloat16
        assert fd.linear(x.double(), weight.double()).dtype == torch.float64
        torch.testing.assert_close(y, low)
    grads = torch.autograd.grad((y.float() * t_y.float()).sum(), (x, weight, bias))
    assert all(grad.dtype == torch.float32 for grad in grads)


def test_outputs_are_not_kept_for_the_backward() -> None:
    """Check that a gradient keeps x and the weight alone, as in PyTorch's own."""
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        torch.func.jvp(lambda x: fd.linear(x, weight), (x,), (x,))
        fd.linear_jvp(x, x.detach(), weight, tangent_grad=True)
    assert (4, 8) in kept and (6, 8) in kept and (4, 6) not in kept


@pytest.mark.parametrize("moving", [False, True], ids=["still", "moving"])
def test_fake_results_have_the_shapes_dtypes_and_strides_of_real_ones(moving: bool) -> None:
    x = torch.randn(2, 8, 5).mT.bfloat16()
    weight, t_x = torch.randn(8, 3).bfloat16().t(), x if moving else None
    real = LINEAR._dual(x, weight, None, t_x, None, None, "auto", False)
    with torch._subclasses.FakeTensorMode() as mode:
        x, weight = mode.from_tensor(x), mode.from_tensor(weight)
        faked = LINEAR._fake_dual(x, weight, None, x if moving else None, None, None, "auto", False)
    describe = lambda x: (tuple(x.shape), x.dtype, x.stride())  # noqa: E731
    assert [describe(a) for a in faked] == [describe(a) for a in real]


X, W = torch.ones(2, 5), torch.ones(3, 5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fd.linear(3.0, W), "input: expected a tensor, got float"),
        (lambda: fd.linear(X, W.t()), r"weight: expected .* for input \(..., K\), got \(5, 3\) for input \(2, 5\)"),
        (lambda: fd.linear(X, W[0, :4]), r"weight: expected \(N, K\) or \(K,\) for input"),
        (lambda: fd.linear(X, W[None]), r"weight: expected \(N, K\) or \(K,\) for input"),
        (lambda: fd.linear(X[0, 0], W), r"weight: expected .* got \(3, 5\) for input \(\)"),
        (lambda: fd.linear(X.long(), W.long()), "input: expected a floating-point tensor, got torch.int64"),
        (lambda: fd.linear(X, W, X[0]), r"bias: expected shape \(3,\), or one that broadcasts to \(2, 3\), got \(5,\)"),
        (lambda: fd.linear(X, W.double()), "weight: expected torch.float32 as input, got torch.float64"),
        (lambda: fd.linear(X, W, impl="quick"), "impl: expected one of"),
        (lambda: fd.linear(X, W, impl="triton"), "impl='triton'"),
        (lambda: fd.linear_jvp(X, W, W), r"t_x: expected shape \(2, 5\) as x, got \(3, 5\)"),
        (lambda: fd.linear_jvp(X, X, W, t_bias=X), "t_bias: expected None as bias is None"),
        (lambda: fd.linear_jvp(X, X.clone().requires_grad_(), W), "t_x requires grad"),
    ],
)
def test_bad_arguments_are_refused_by_name(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()
