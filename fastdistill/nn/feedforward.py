"""Define the networks between attentions, plain and gated, with the parameter names of timm and diffusers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from fastdistill import ops
from fastdistill.nn.basic import Linear

# Maps an activation to the op that multiplies it with the other half.
GATES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": ops.swiglu,
    "gelu": ops.geglu,
    "gelu-tanh": partial(ops.geglu, approximate="tanh"),
}


def gate_of(activation: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the op (gate, up) -> activation(gate) * up for "silu", "gelu" or "gelu-tanh"; refuse other names."""
    if activation not in GATES:
        raise ValueError(f"activation: expected one of {', '.join(map(repr, GATES))}, got {activation!r}")
    return GATES[activation]


class Mlp(nn.Module):
    """Apply two linear layers with a tanh-approximated GELU between them; state dict of timm's Mlp.

    Equivalent to: ``fc2(torch.nn.functional.gelu(fc1(x), approximate="tanh"))``.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(ops.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Multiply two projections, one through SiLU, and project: timm's SwiGLU, state dict ``fc1_g``, ``fc1_x``, ``fc2``.

    Args:
        width: C, in and out.
        hidden: width of the product.
        bias: whether the projections have a bias.

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
    """Multiply the halves of one projection, and project: timm's GluMlp and SwiGLUPacked, state dict ``fc1``, ``fc2``.

    Args:
        width: C, in and out.
        hidden: width of the first projection, of both halves together, as timm counts: even.
        activation: activation of the gate, "silu", "gelu" or "gelu-tanh".
        gate_last: whether the gate is the second half (timm's GluMlp) or the first (its SwiGLUPacked).
        bias: whether both projections have a bias.

    Equivalent to: ``a, b = fc1(x).chunk(2, -1)``, then ``fc2(a * act(b))``, or ``fc2(act(a) * b)`` if not `gate_last`.

    Raises:
        ValueError: `hidden` is odd, or the activation is unknown.
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
    """Gate the first half of a projection by the second: diffusers' GEGLU and SwiGLU, state dict ``proj``.

    Args:
        dim_in, dim_out: channels in and out; the projection has twice as many as come out.
        activation: "gelu" (GEGLU), "silu" (SwiGLU) or "gelu-tanh".
        bias: whether the projection has a bias.

    Equivalent to: ``x, gate = proj(x).chunk(2, -1)``, then ``x * act(gate)``.

    Raises:
        ValueError: the activation is unknown.
    """

    def __init__(self, dim_in: int, dim_out: int, activation: str = "gelu", bias: bool = True) -> None:
        super().__init__()
        self.gated = gate_of(activation)
        self.proj = Linear(dim_in, 2 * dim_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return self.gated(gate, x)


class ActivatedProjection(nn.Module):
    """Apply a projection and an activation: diffusers' GELU and LinearActivation, state dict ``proj``.

    Args:
        dim_in, dim_out: channels in and out.
        activation: "gelu", "gelu-tanh" or "silu".
        bias: whether the projection has a bias.

    Equivalent to: ``act(proj(x))``.

    Raises:
        ValueError: the activation is unknown.
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
    """Apply diffusers' FeedForward, with its names of activations and its state dict (``net.0.proj``, ``net.2``).

    Dropout is left out; it is off by default in diffusers.

    Args:
        dim: C, the channels in; also those out unless `dim_out` is given.
        dim_out: channels out.
        mult: hidden width over `dim`.
        activation_fn: "geglu", "swiglu", "gelu", "gelu-approximate" or "linear-silu".
        inner_dim: the hidden width itself, instead of `mult`.
        bias: whether the projections have a bias.

    Raises:
        ValueError: the activation is unknown.
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
                # diffusers has its dropout here, and the next index is part of a name in the state dict.
                nn.Identity(),
                Linear(hidden, dim if dim_out is None else dim_out, bias=bias),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x
