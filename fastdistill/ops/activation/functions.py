"""GELU, SiLU, SwiGLU and GEGLU, whose primal and tangent run as one kernel.

    y = phi(x) up      t_y = phi' t_x up + phi t_up      without up: up = 1, t_up = 0

All of them are one op, `torch.ops.fastdistill.activation`. Derivation and backward passes: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.ops.activation.op import ACTIVATION
from fastdistill.ops.protocol import checks, context, dispatch
from fastdistill.ops.protocol.pair import paired

KINDS = {"none": "gelu", "tanh": "gelu_tanh"}


@checks.accepts_x
def gelu(input: Tensor, approximate: str = "none", *, impl: str = "auto") -> Tensor:
    """`torch.nn.functional.gelu`, one kernel for primal and tangent under forward AD.

    Args:
        input: any shape and strides; float64, float32, bfloat16 or float16, computed in float32 or better.
        approximate: "none" | "tanh".
        impl: "auto" | "torch" | "triton"; an explicit choice never falls back.

    Returns:
        input's shape and dtype.

    Equivalent to:
        F.gelu(input, approximate=approximate)
    """
    return _Call([("input", input)], _gelu_kind(approximate), impl).run()


def gelu_jvp(
    x: Tensor, t_x: Tensor | None, approximate: str = "none", *, tangent_grad: bool = False, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """GELU and its directional derivative; a tangent of None is zero.

    With `tangent_grad=False` gradients flow through `y` only and nothing is saved for `t_y`.

    Equivalent to:
        torch.func.jvp(lambda x: F.gelu(x, approximate=approximate), (x,), (t_x,))
    """
    return _Call([("x", x)], _gelu_kind(approximate), impl).pair([t_x], tangent_grad)


@checks.accepts_x
def silu(input: Tensor, inplace: bool = False, *, impl: str = "auto") -> Tensor:
    """`torch.nn.functional.silu`, one kernel for primal and tangent under forward AD.

    Args:
        input: as in `gelu`.
        inplace: write the result, and its tangent, over input's, and return input itself.
        impl: as in `gelu`.

    Equivalent to:
        F.silu(input, inplace)
    """
    if not inplace:
        return _Call([("input", input)], "silu", impl).run()
    checks.check_tensor("input", input)
    old = input.clone() if torch.is_grad_enabled() else input  # a gradient is taken at what is overwritten
    return input.copy_(_Call([("input", old)], "silu", impl).run())


def silu_jvp(x: Tensor, t_x: Tensor | None, *, tangent_grad: bool = False, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """SiLU and its directional derivative; arguments as in `gelu_jvp`.

    Equivalent to:
        torch.func.jvp(F.silu, (x,), (t_x,))
    """
    return _Call([("x", x)], "silu", impl).pair([t_x], tangent_grad)


def swiglu(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """SiLU of the gate times the other half (Shazeer, arXiv:2002.05202), one kernel for primal and tangent.

    Args:
        gate, up: of one shape, dtype and device, any strides: the halves of a packed projection are read in place,
            `swiglu(*linear(x).chunk(2, -1))`.
        impl: "auto" | "torch" | "triton"; an explicit choice never falls back.

    Returns:
        gate's shape and dtype; 16-bit results are rounded once.

    Equivalent to:
        F.silu(gate) * up
    """
    return _Call([("gate", gate), ("up", up)], "silu", impl).run()


def swiglu_jvp(
    gate: Tensor,
    up: Tensor,
    t_gate: Tensor | None,
    t_up: Tensor | None = None,
    *,
    tangent_grad: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """SwiGLU and its directional derivative; tangents have their primals' shapes, None is zero.

    Equivalent to:
        torch.func.jvp(swiglu, (gate, up), (t_gate, t_up))
    """
    return _Call([("gate", gate), ("up", up)], "silu", impl).pair([t_gate, t_up], tangent_grad)


def geglu(gate: Tensor, up: Tensor, approximate: str = "none", *, impl: str = "auto") -> Tensor:
    """GELU of the gate times the other half (Shazeer, arXiv:2002.05202); arguments as in `swiglu` and `gelu`.

    Equivalent to:
        F.gelu(gate, approximate=approximate) * up
    """
    return _Call([("gate", gate), ("up", up)], _gelu_kind(approximate), impl).run()


def geglu_jvp(
    gate: Tensor,
    up: Tensor,
    t_gate: Tensor | None,
    t_up: Tensor | None = None,
    approximate: str = "none",
    *,
    tangent_grad: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """GEGLU and its directional derivative; tangents have their primals' shapes, None is zero.

    Equivalent to:
        torch.func.jvp(lambda gate, up: geglu(gate, up, approximate), (gate, up), (t_gate, t_up))
    """
    return _Call([("gate", gate), ("up", up)], _gelu_kind(approximate), impl).pair([t_gate, t_up], tangent_grad)


def _gelu_kind(approximate: str) -> str:
    if approximate not in KINDS:
        raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
    return KINDS[approximate]


class _Call:
    """One call: arguments checked by name and brought to two dimensions or more, the first of which may be mapped."""

    def __init__(self, named: Sequence[tuple[str, Tensor]], kind: str, impl: str) -> None:
        (first, x), *others = named
        checks.check_tensor(first, x)
        for name, other in others:
            checks.check_tensor(name, other)
            checks.check_like(name, other, first, x)
            if other.shape != x.shape:
                raise ValueError(f"{name}: expected shape {tuple(x.shape)} as {first}, got {tuple(other.shape)}")
        dispatch.check_impl(impl, x.device)
        self.named, self.x, self.attrs = named, x, (kind, impl)

    def run(self) -> Tensor:
        (y,) = ACTIVATION(self._canonical([x for _, x in self.named]), self.attrs, context.tangent_grad())
        assert y is not None
        return y.reshape(self.x.shape)

    def pair(self, given: Sequence[Tensor | None], tangent_grad: bool) -> tuple[Tensor, Tensor]:
        tangents = checks.checked_tangents([(name, x, t) for (name, x), t in zip(self.named, given)], tangent_grad)
        primals = self._canonical([x for _, x in self.named])
        ((y, t_y),) = ACTIVATION.pair(paired(primals, self._canonical(tangents)), self.attrs, tangent_grad)
        return y.reshape(self.x.shape), t_y.reshape(self.x.shape)

    def _canonical(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        lead = (None,) * max(0, 2 - self.x.dim())
        canonical = [x if x is None or not lead else x[lead] for x in tensors]
        return canonical + [None] * (2 - len(canonical))
