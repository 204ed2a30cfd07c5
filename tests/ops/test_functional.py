"""Ops that PyTorch has too, as their users call those: by PyTorch's names, on any shape, in PyTorch's place."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap

import fastdistill as fd
from fastdistill import reference
from fastdistill.testing import make_qkv

X, W, B = torch.randn(2, 5, 8), torch.randn(8, 8), torch.randn(8)
Q, K, V = make_qkv(n=5, d=8)

# Every argument of PyTorch's, by PyTorch's name.
NAMED: dict[str, dict[str, Any]] = {
    "gelu": {"input": X, "approximate": "tanh"},
    "silu": {"input": X, "inplace": False},
    "layer_norm": {"input": X, "normalized_shape": [8], "weight": B, "bias": B, "eps": 1e-3},
    "rms_norm": {"input": X, "normalized_shape": [8], "weight": B, "eps": 1e-3},
    "linear": {"input": X, "weight": W, "bias": B},
    "scaled_dot_product_attention": {
        "query": Q,
        "key": K,
        "value": V,
        "attn_mask": torch.randn(5, 5),
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": 0.3,
        "enable_gqa": False,
    },
}


@pytest.mark.parametrize("name", NAMED)
def test_pytorchs_own_names_are_ours(name: str) -> None:
    """Check all of them, in PyTorch's order where PyTorch takes them by position."""
    ours, plain, given = getattr(fd, name), getattr(F, name), NAMED[name]
    torch.testing.assert_close(ours(**given), plain(**given), rtol=0, atol=0)
    first, *rest = given
    pushed = jvp(lambda x: ours(**{**given, first: x}), (given[first],), (given[first],))
    torch.testing.assert_close(pushed[0], plain(**given))
    parameters = list(inspect.signature(ours).parameters.values())
    assert [p.name for p in parameters[: len(given)]] == [first, *rest]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters[: len(given)])


@pytest.mark.parametrize("name", ["gelu", "silu", "layer_norm", "rms_norm", "linear"])
def test_the_first_argument_is_still_called_x_by_those_who_do(name: str) -> None:
    given = {**NAMED[name]}
    expected = getattr(fd, name)(**given)
    x = given.pop("input")
    torch.testing.assert_close(getattr(fd, name)(x=x, **given), expected, rtol=0, atol=0)
    with pytest.raises(TypeError, match=f"x: {name} takes it as another name of input, got both"):
        getattr(fd, name)(x, **given, x=x)


def test_compiled_ops_take_the_names_too() -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 8, dtype=torch.float64)
    push = lambda x: jvp(lambda x: fd.gelu(input=x) + fd.silu(x=x) + fd.layer_norm(input=x, normalized_shape=(8,)), (x,), (x,))  # noqa: E731, E501  # fmt: skip
    torch.testing.assert_close(torch.compile(push, fullgraph=True, backend="aot_eager")(x), push(x))


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_silu_in_place_overwrites_value_and_tangent(impl: str) -> None:
    """Check also that gradients are taken at the old value, and that the tensor itself comes back, as from PyTorch."""
    x, t_x = torch.randn(2, 3, 5, dtype=torch.float64).unbind(0)
    ours = lambda x: fd.silu(x, inplace=True, impl=impl)  # noqa: E731
    leaves = [x.clone().requires_grad_(), t_x.clone().requires_grad_()]

    def mixed(op: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        y, t_y = jvp(lambda x: op(x * 1.0), (leaves[0],), (leaves[1],))
        return (y, t_y, *torch.autograd.grad((y.sin() * t_y).sum(), leaves))

    torch.testing.assert_close(mixed(ours), mixed(F.silu))
    for old in (x.clone(), x.clone()[:, ::2]):
        truth = F.silu(old)
        assert ours(old) is old
        torch.testing.assert_close(old, truth)
    with torch.no_grad():
        assert ours(x) is x
    torch.testing.assert_close(vmap(lambda x: ours(x * 1.0))(x), F.silu(x))
    torch.testing.assert_close(fd.jvp(lambda x: ours(x * 1.0), (x,), (t_x,)), jvp(F.silu, (x,), (t_x,)))
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        ours(leaves[0])
    with pytest.raises(TypeError, match="input: expected a tensor, got float"):
        fd.silu(1.0, inplace=True)


# Shapes of x, weight and bias: vectors for matrices, bias of every kind that broadcasts, and nothing at all.
LINEAR: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]] = [
    ((8,), (4, 8), None),
    ((8,), (4, 8), (4,)),
    ((8,), (4, 8), (1,)),
    ((8,), (8,), None),
    ((8,), (8,), ()),
    ((2, 3, 8), (8,), None),
    ((2, 3, 8), (8,), ()),
    ((2, 3, 8), (4, 8), (1,)),
    ((2, 3, 8), (4, 8), ()),
    ((2, 3, 8), (4, 8), (3, 4)),
    ((2, 3, 8), (4, 8), (2, 1, 4)),
    ((3, 8), (4, 8), (3, 1)),
    ((0, 8), (4, 8), (4,)),
    ((3, 0), (4, 0), (4,)),
    ((3, 8), (0, 8), (0,)),
    ((2, 3, 8), (1, 8), (1,)),
]


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x @ weight.mT if weight.dim() == 2 else x @ weight
    return y if bias is None else y + bias


@pytest.mark.parametrize(("x", "weight", "bias"), LINEAR, ids=str)
def test_linear_takes_the_shapes_that_pytorchs_does(x: Any, weight: Any, bias: Any) -> None:
    """Compare values, tangents and gradients, by the op, by its pair, compiled, and under vmap."""
    shapes = [shape for shape in (x, weight, bias) if shape is not None]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in (*shapes, *shapes)]
    half = len(shapes)

    def graded(y: Tensor, t_y: Tensor) -> tuple[Tensor, ...]:
        return (y, t_y, *torch.autograd.grad((y.sin() * t_y).sum(), leaves))

    def mixed(op: Any) -> tuple[Tensor, ...]:
        return graded(*jvp(op, tuple(leaves[:half]), tuple(leaves[half:])))

    ours = mixed(fd.linear)
    torch.testing.assert_close(ours, mixed(plain_linear))
    t_x, t_weight, *t_bias = leaves[half:]
    more = {"t_weight": t_weight, "t_bias": t_bias[0] if t_bias else None, "tangent_grad": True}
    torch.testing.assert_close(graded(*fd.linear_jvp(leaves[0], t_x, *leaves[1:half], **more)), ours)
    torch.testing.assert_close(fd.linear(*leaves[:half]), F.linear(*leaves[:half]))
    many = torch.randn(4, *x, dtype=torch.float64)
    rest = leaves[1:half]
    torch.testing.assert_close(
        vmap(lambda x: fd.linear(x, *rest))(many), torch.stack([F.linear(x, *rest) for x in many])
    )


@pytest.mark.parametrize("shape", [(8,), (0, 8), (3, 0), (2, 0, 8), (1, 8)], ids=str)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norms_of_vectors_and_of_nothing(name: str, shape: tuple[int, ...]) -> None:
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def mixed(op: Any) -> tuple[Tensor, ...]:
        y, t_y = jvp(lambda x: op(x, shape[-1:]), (leaves[0],), (leaves[1],))
        return (y, t_y, *torch.autograd.grad((y.sin() * t_y).sum(), leaves))

    plain = partial(reference.norm, eps=1e-5, rms=name == "rms_norm")  # F.layer_norm's mixed gradients are wrong
    torch.testing.assert_close(mixed(partial(getattr(fd, name), eps=1e-5)), mixed(lambda x, shape: plain(x)))


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", NAMED)
def test_what_has_no_tangent_here_is_refused_by_name(name: str, dtype: torch.dtype) -> None:
    first = next(iter(NAMED[name]))
    with pytest.raises(TypeError, match=f"{first}: expected .*got {dtype}"):
        getattr(fd, name)(**{**NAMED[name], first: NAMED[name][first].to(dtype)})


REPLACED = """
import torch, torch.nn.functional as F
import fastdistill as fd
from fastdistill import reference
from torch import nn

torch.manual_seed(0)

class Block(nn.Module):
    def __init__(self, norm, act, mask, causal):
        super().__init__()
        self.norm, self.act, self.mask, self.causal = norm, act, mask, causal
        self.heads = nn.MultiheadAttention(16, 2, batch_first=True)
        self.qkv, self.out, self.up = (nn.Linear(16, n) for n in (48, 16, 32))
        self.down = nn.Linear(32, 16)

    def forward(self, x):
        h = self.norm(x)
        x = x + self.heads(h, h, h, attn_mask=self.mask, need_weights=False)[0]
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        return x + self.down(self.act(self.up(self.norm(x))))

net = nn.Sequential(
    Block(nn.LayerNorm(16), nn.GELU(), None, True),
    Block(nn.RMSNorm(16), nn.SiLU(inplace=True), torch.randn(5, 5).double(), False),
    Block(nn.LayerNorm(16, bias=False), nn.GELU("tanh"), torch.ones(5, 5).tril() == 0, False),
).double()
x, t_x = torch.randn(2, 3, 5, 16, dtype=torch.float64).unbind(0)
weights = dict(net.named_parameters())

def results(push):
    found = []
    y = net(x)
    found += [y, *torch.autograd.grad(y.sin().sum(), list(weights.values()), allow_unused=True)]
    for grad in (False, True):
        y, t_y = push(net, grad)
        loss = y.sin().sum() if not grad else (y.sin() * t_y).sum()
        found += [y, t_y, *torch.autograd.grad(loss, list(weights.values()), allow_unused=True)]
    with torch.no_grad():
        found.append(net.eval()(x))
        net.train()
    q = torch.randn(2, 2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found += [reference.attention(q, q, q), reference.ada_layer_norm(x, x, x), reference.linear(x, x[0, :, :16])]
    found += [reference.gelu(x), reference.silu(x), fd.swiglu(x, x), fd.geglu(x, x), fd.ada_rms_norm(x, x)]
    found += [*fd.gated_residual_ada_norm(x, x, x, x, x), fd.varlen_attention(*[q[0].mT.mT] * 3, *BOUNDS)]
    return found

BOUNDS = (torch.tensor([0, 2], dtype=torch.int32), None, 2, 2)

def plain(net, grad):  # math attention, the one form with tangents of its own
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        y, t_y = torch.func.jvp(net, (x,), (t_x,))
    return y, t_y

# PyTorch's own layer_norm is wrong in the reverse mode of its forward mode.
F.layer_norm = lambda x, shape, weight=None, bias=None, eps=1e-5: reference.norm(x, weight, bias, eps=eps)
expected = results(plain)
for name in ("scaled_dot_product_attention", "layer_norm", "rms_norm", "gelu", "silu", "linear"):
    setattr(F, name, getattr(fd, name))
for push in (
    lambda net, grad: fd.jvp(net, (x,), (t_x,), tangent_grad=grad),
    lambda net, grad: torch.func.jvp(net, (x,), (t_x,)),
):
    found = results(push)
    assert len(found) == len(expected)
    for ours, truth in zip(found, expected):
        torch.testing.assert_close(ours, truth)
print("the same", len(found))
"""


def test_ours_may_stand_in_pytorchs_place() -> None:
    """Check all six at once in a process of their own: plain, backward, both drivers, our other ops beside them."""
    done = subprocess.run([sys.executable, "-c", REPLACED], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "the same" in done.stdout


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (2, 3, 4, 8)], ids=str)
@pytest.mark.parametrize("name", ["gelu", "silu", "layer_norm", "rms_norm", "linear"])
def test_results_may_be_changed_in_place(name: str, shape: tuple[int, ...]) -> None:
    """Check that they may as PyTorch's may, under forward AD with gradients too."""
    more = {key: x for key, x in NAMED[name].items() if key not in ("input", "inplace")}
    more = {key: x.double() if isinstance(x, Tensor) else x for key, x in more.items()}
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def mixed(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        y, t_y = jvp(lambda x: change(getattr(fd, name)(x, **more)), (leaves[0],), (leaves[1],))
        return (y, t_y, *torch.autograd.grad((y.sin() * t_y).sum(), leaves))

    torch.testing.assert_close(mixed(lambda y: y.mul_(2.0)), mixed(lambda y: y * 2.0))


def test_recursion_is_no_fault_of_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that what goes wrong inside a check passes as it is."""

    def deep(*args: object, **kwargs: object) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr(torch, "broadcast_shapes", deep)
    fd.scaled_dot_product_attention(Q, K, V, torch.randn(5, 5))
    with pytest.raises(ValueError, match="attn_mask: expected a shape that broadcasts"):
        fd.scaled_dot_product_attention(Q, K, V, torch.randn(5, 4))
