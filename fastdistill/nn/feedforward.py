"""The networks between attentions, plain and gated, under the names that timm and diffusers give their parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from fastdistill import ops
from fastdistill.nn.basic import Linear

# What multiplies the other half, by the name of its activation.
GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": ops.swiglu,
    "gelu": ops.geglu,
    "gelu-tanh": partial(ops.geglu, approximate="tanh"),
}


def gate_of(activation: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The op activation(gate) * up of (gate, up) for "silu", "gelu" or "gelu-tanh"; ValueError for another name."""
    if activation not in GATES:
        raise ValueError(f"activation: expected one of {', '.join(map(repr, GATES))}, got {activation!r}")
    return GATES[activation]


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them; state dict of timm's Mlp.

    Equivalent to: ``fc2(torch.nn.functional.gelu(fc1(x), approximate="tanh"))``.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ops.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """timm's SwiGLU: two projections, whose product goes through a third; state dict ``fc1_g``, ``fc1_x``, ``fc2``.

    Args:
        width: C, in and out.
        hidden: width of the product.
        bias: whether the projections have one.

    Equivalent to: ``fc2(torch.nn.functional.silu(fc1_g(x)) * fc1_x(x))``.
    Source: Shazeer, "GLU Variants Improve Transformer" (arXiv:2002.05202), its SwiGLU.
    """

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1_g = Linear(width, hidden, bias=bias)
        self.fc1_x = Linear(width, hidden, bias=bias)
        self.fc2 = Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ops.swiglu(self.fc1_g(x), self.fc1_x(x)))


class GluMlp(nn.Module):
    """timm's GluMlp and SwiGLUPacked: one projection, whose halves are multiplied; state dict ``fc1``, ``fc2``.

    Args:
        width: C, in and out.
        hidden: width of the first projection, of both halves together, as timm counts: even.
        activation: of the gate, "silu", "gelu" or "gelu-tanh".
        gate_last: whether the gate is the second half (timm's GluMlp) or the first (its SwiGLUPacked).
        bias: whether both projections have one.

    Equivalent to: ``a, b = fc1(x).chunk(2, -1)``, then ``fc2(a * act(b))``, or ``fc2(act(a) * b)`` if not `gate_last`.

    Raises:
        ValueError: an odd `hidden`, or another activation.
    """

    def __init__(
        self, width: int, hidden: int, activation: str = "silu", *, gate_last: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        if hidden % 2:
            raise ValueError(f"hidden: expected an even number, the width of both halves together, got {hidden}")
        self.gated, self.gate_last = gate_of(activation), gate_last
        self.fc1 = Linear(width, hidden, bias=bias)
        self.fc2 = Linear(hidden // 2, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.gated(b, a) if self.gate_last else self.gated(a, b))


class GatedProjection(nn.Module):
    """diffusers' GEGLU and SwiGLU: a projection whose second half gates the first; state dict ``proj``.

    Args:
        dim_in, dim_out: channels in and out; the projection has twice as many as come out.
        activation: "gelu" (GEGLU), "silu" (SwiGLU) or "gelu-tanh".
        bias: whether the projection has one.

    Equivalent to: ``x, gate = proj(x).chunk(2, -1)``, then ``x * act(gate)``.

    Raises:
        ValueError: another activation.
    """

    def __init__(self, dim_in: int, dim_out: int, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        self.gated = gate_of(activation)
        self.proj = Linear(dim_in, 2 * dim_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return self.gated(gate, x)


class ActivatedProjection(nn.Module):
    """diffusers' GELU and LinearActivation: a projection and an activation; state dict ``proj``.

    Args:
        dim_in, dim_out: channels in and out.
        activation: "gelu", "gelu-tanh" or "silu".
        bias: whether the projection has one.

    Equivalent to: ``act(proj(x))``.

    Raises:
        ValueError: another activation.
    """

    def __init__(self, dim_in: int, dim_out: int, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        acts: dict[str, Callable[[Tensor], Tensor]] = {
            "gelu": ops.gelu,
            "gelu-tanh": partial(ops.gelu, approximate="tanh"),
            "silu": ops.silu,
        }
        if activation not in acts:
            raise ValueError(f"activation: expected one of {', '.join(map(repr, acts))}, got {activation!r}")
        self.act = acts[activation]
        self.proj = Linear(dim_in, dim_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.proj(x))


class FeedForward(nn.Module):
    """diffusers' FeedForward, with its names of activations and its state dict (``net.0.proj``, ``net.2``).

    Its dropout is left out, as it is by default there.

    Args:
        dim: C, in and, unless told otherwise, out.
        dim_out: channels out.
        mult: hidden width over `dim`.
        activation_fn: "geglu", "swiglu", "gelu", "gelu-approximate" or "linear-silu".
        inner_dim: the hidden width itself, instead of `mult`.
        bias: whether the projections have one.

    Raises:
        ValueError: another activation.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        mult: float = 4,
        activation_fn: str = "geglu",
        inner_dim: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden = int(dim * mult) if inner_dim is None else inner_dim
        kinds: dict[str, tuple[type[GatedProjection] | type[ActivatedProjection], str]] = {
            "geglu": (GatedProjection, "gelu"),
            "swiglu": (GatedProjection, "silu"),
            "gelu": (ActivatedProjection, "gelu"),
            "gelu-approximate": (ActivatedProjection, "gelu-tanh"),
            "linear-silu": (ActivatedProjection, "silu"),
        }
        if activation_fn not in kinds:
            raise ValueError(f"activation_fn: expected one of {', '.join(map(repr, kinds))}, got {activation_fn!r}")
        project, activation = kinds[activation_fn]
        self.net = nn.ModuleList(
            [
                project(dim, hidden, activation, bias=bias),
                nn.Identity(),  # where diffusers has its dropout: the next index is a part of the state dict's names
                Linear(hidden, dim if dim_out is None else dim_out, bias=bias),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x
