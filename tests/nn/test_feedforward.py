"""Test the feed-forward modules: names of timm and diffusers, their values, and right tangents."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastdistill as fd
import fastdistill.nn as fnn


def halves(z: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and second half of the channels."""
    a, b = z.chunk(2, -1)
    return a, b


def linear(module: nn.Module, name: str, x: Tensor) -> Tensor:
    """Apply torch's own linear layer with the parameters of that name."""
    return F.linear(x, module.get_parameter(f"{name}.weight"), module.get_parameter(f"{name}.bias"))


def tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gluing(act: Callable[[Tensor], Tensor], gate_last: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return the plain lines of a GluMlp."""

    def plain(module: nn.Module, x: Tensor) -> Tensor:
        a, b = halves(linear(module, "fc1", x))
        return linear(module, "fc2", a * act(b) if gate_last else act(a) * b)

    return plain


def forwarding(act: Callable[[Tensor], Tensor], gated: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    """Return the plain lines of a FeedForward."""

    def plain(module: nn.Module, x: Tensor) -> Tensor:
        z = linear(module, "net.0.proj", x)
        if gated:
            x, gate = halves(z)
            return linear(module, "net.2", x * act(gate))
        return linear(module, "net.2", act(z))

    return plain


def split(module: nn.Module, x: Tensor) -> Tensor:
    """Compute the plain lines of timm's SwiGLU."""
    return linear(module, "fc2", F.silu(linear(module, "fc1_g", x)) * linear(module, "fc1_x", x))


def straight(module: nn.Module, x: Tensor) -> Tensor:
    """Compute the plain lines of timm's Mlp with the activation of DiT."""
    return linear(module, "fc2", tanh_gelu(linear(module, "fc1", x)))


# Each entry has a module, its plain lines on the parameters of its state dict, and the names and shapes of the
# original.
NET = {"net.0.proj": (20, 8), "net.2": (8, 20)}
GATED_NET = {"net.0.proj": (40, 8), "net.2": (8, 20)}


def forward_of(kind: str) -> fnn.FeedForward:
    return fnn.FeedForward(8, inner_dim=20, activation_fn=kind)


PACKED = {"fc1": (20, 8), "fc2": (8, 10)}
CASES: dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], dict[str, tuple[int, int]]]] = {
    "timm-Mlp": (fnn.Mlp(8, 20), straight, {"fc1": (20, 8), "fc2": (8, 20)}),
    "timm-SwiGLU": (fnn.SwiGLU(8, 20), split, {"fc1_g": (20, 8), "fc1_x": (20, 8), "fc2": (8, 20)}),
    "timm-GluMlp": (fnn.GluMlp(8, 20, "gelu"), gluing(F.gelu, True), PACKED),
    "timm-GluMlp-tanh": (fnn.GluMlp(8, 20, "gelu-tanh"), gluing(tanh_gelu, True), PACKED),
    "timm-SwiGLUPacked": (fnn.GluMlp(8, 20, gate_last=False), gluing(F.silu, False), PACKED),
    "diffusers-geglu": (fnn.FeedForward(8, mult=2.5), forwarding(F.gelu, True), GATED_NET),
    "diffusers-swiglu": (forward_of("swiglu"), forwarding(F.silu, True), GATED_NET),
    "diffusers-gelu": (forward_of("gelu"), forwarding(F.gelu, False), NET),
    "diffusers-gelu-approximate": (forward_of("gelu-approximate"), forwarding(tanh_gelu, False), NET),
    "diffusers-linear-silu": (forward_of("linear-silu"), forwarding(F.silu, False), NET),
}


@pytest.mark.parametrize("case", CASES)
def test_names_values_tangents_and_gradients(case: str) -> None:
    """Compare with the module that it replaces; each tangent runs in the ops, under fd.jvp."""
    module, plain, shapes = CASES[case]
    module = module.double()
    expected = {f"{n}.weight": s for n, s in shapes.items()} | {f"{n}.bias": s[:1] for n, s in shapes.items()}
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == expected
    x, t_x = torch.randn(2, 3, 5, 8, dtype=torch.float64).unbind(0)
    truth = torch.func.jvp(lambda x: plain(module, x), (x,), (t_x,))
    torch.testing.assert_close(fd.jvp(module, (x,), (t_x,)), truth)
    ours = fd.jvp(module, (x,), (t_x,), tangent_grad=True)
    found, wanted = (torch.autograd.grad((y.sin() * t_y).sum(), list(module.parameters())) for y, t_y in (ours, truth))
    torch.testing.assert_close(found, wanted)


def test_widths_and_biases_follow_the_arguments() -> None:
    net = fnn.FeedForward(8, 6, mult=2, bias=False)
    assert {name: tuple(x.shape) for name, x in net.state_dict().items()} == {
        "net.0.proj.weight": (32, 8),
        "net.2.weight": (6, 16),
    }
    for module in (fnn.SwiGLU(8, 20, bias=False), fnn.GluMlp(8, 20, bias=False)):
        assert not [name for name in module.state_dict() if name.endswith("bias")]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fnn.GluMlp(8, 21), "hidden: expected an even number, .* got 21"),
        (lambda: fnn.GluMlp(8, 20, "relu"), "activation: expected one of 'silu', 'gelu', 'gelu-tanh', got 'relu'"),
        (lambda: fnn.GatedProjection(8, 20, "relu"), "activation: expected one of .* got 'relu'"),
        (lambda: fnn.ActivatedProjection(8, 20, "relu"), "activation: expected one of .* got 'relu'"),
        (lambda: fnn.FeedForward(8, activation_fn="relu"), "activation_fn: expected one of 'geglu', .* got 'relu'"),
    ],
)
def test_bad_arguments_are_refused_by_name(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
