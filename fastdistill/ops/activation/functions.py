"""GELU, SiLU, SwiGLU and GEGLU, whose primal and tangent run as one kernel.

    y = phi(x) up      t_y = phi' t_x up + phi t_up      without up: up = 1, t_up = 0

All of them are one op, `torch.ops.fastdistill.activation`. Derivation and backward passes: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fastdistill.ops.activation.op import ACTIVATION
from fastdistill.ops.protocol import checks, context, dispatch
from fastdistill.ops.protocol.dual_op import Tensors
from fastdistill.ops.protocol.pair import paired

KINDS = {"none": "gelu", "tanh": "gelu_tanh"}


@checks.accepts_x
def gelu(input: Tensor, approximate: str = "none", *, impl: str = "auto") -> Tensor:
    """Apply GELU: `torch.nn.functional.gelu`, one kernel for primal and tangent under forward AD.

    Args:
        input: any shape and strides; float64, float32, bfloat16 or float16, computed in float32 or better.
        approximate: "none" | "tanh".
        impl: "auto" | "torch" | "triton"; an explicit choice never falls back.

    Returns:
        input's shape and dtype.

    Equivalent to:
        F.gelu(input, approximate=approximate)
    """
    return _value({"input": input}, _gelu_kind(approximate), impl)


def gelu_jvp(
    x: Tensor, t_x: Tensor | None, approximate: str = "none", *, tangent_grad: bool = False, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return GELU and its directional derivative; a tangent of None is zero.

    With `tangent_grad=False` gradients flow through `y` only and nothing is saved for `t_y`.

    Equivalent to:
        torch.func.jvp(lambda x: F.gelu(x, approximate=approximate), (x,), (t_x,))
    """
    return _value_and_tangent({"x": x}, [t_x], _gelu_kind(approximate), tangent_grad, impl)


@checks.accepts_x
def silu(input: Tensor, inplace: bool = False, *, impl: str = "auto") -> Tensor:
    """Apply SiLU: `torch.nn.functional.silu`, one kernel for primal and tangent under forward AD.

    Args:
        input: as in `gelu`.
        inplace: write the result, and its tangent, over input's, and return input itself.
        impl: as in `gelu`.

    Equivalent to:
        F.silu(input, inplace)
    """
    if not inplace:
        return _value({"input": input}, "silu", impl)
    checks.check_tensor("input", input)
    old = input.clone() if torch.is_grad_enabled() else input  # a gradient is taken at what is overwritten
    return input.copy_(_value({"input": old}, "silu", impl))


def silu_jvp(x: Tensor, t_x: Tensor | None, *, tangent_grad: bool = False, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Return SiLU and its directional derivative; arguments as in `gelu_jvp`.

    Equivalent to:
        torch.func.jvp(F.silu, (x,), (t_x,))
    """
    return _value_and_tangent({"x": x}, [t_x], "silu", tangent_grad, impl)


def swiglu(gate: Tensor, up: Tensor, *, impl: str = "auto") -> Tensor:
    """Return SiLU of the gate times the other half (Shazeer, arXiv:2002.05202), one kernel for primal and tangent.

    Args:
        gate, up: of one shape, dtype and device, any strides: the halves of a packed projection are read in place,
            `swiglu(*linear(x).chunk(2, -1))`.
        impl: "auto" | "torch" | "triton"; an explicit choice never falls back.

    Returns:
        gate's shape and dtype; 16-bit results are rounded once.

    Equivalent to:
        F.silu(gate) * up
    """
    return _value({"gate": gate, "up": up}, "silu", impl)


def swiglu_jvp(
    gate: Tensor,
    up: Tensor,
    t_gate: Tensor | None,
    t_up: Tensor | None = None,
    *,
    tangent_grad: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return SwiGLU and its directional derivative; tangents have their primals' shapes, None is zero.

    Equivalent to:
        torch.func.jvp(swiglu, (gate, up), (t_gate, t_up))
    """
    return _value_and_tangent({"gate": gate, "up": up}, [t_gate, t_up], "silu", tangent_grad, impl)


def geglu(gate: Tensor, up: Tensor, approximate: str = "none", *, impl: str = "auto") -> Tensor:
    """Return GELU of the gate times the other half (Shazeer, arXiv:2002.05202).

    Arguments are as in `swiglu` and `gelu`.

    Equivalent to:
        F.gelu(gate, approximate=approximate) * up
    """
    return _value({"gate": gate, "up": up}, _gelu_kind(approximate), impl)


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
    """Return GEGLU and its directional derivative; tangents have their primals' shapes, None is zero.

    Equivalent to:
        torch.func.jvp(lambda gate, up: geglu(gate, up, approximate), (gate, up), (t_gate, t_up))
    """
    kind = _gelu_kind(approximate)
    return _value_and_tangent({"gate": gate, "up": up}, [t_gate, t_up], kind, tangent_grad, impl)


def _gelu_kind(approximate: str) -> str:
    if approximate not in KINDS:
        raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
    return KINDS[approximate]


def _value(primals: dict[str, Tensor], kind: str, impl: str) -> Tensor:
    """Return the op of named primals, x and perhaps up."""
    x = _checked(primals, impl)
    (y,) = ACTIVATION(_operands(primals.values(), x), (kind, impl), context.tangent_grad())
    assert y is not None
    return y.reshape(x.shape)


def _value_and_tangent(
    primals: dict[str, Tensor], tangents: Tensors, kind: str, tangent_grad: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """Return the op of named primals, and its directional derivative."""
    x = _checked(primals, impl)
    named = [(name, primal, tangent) for (name, primal), tangent in zip(primals.items(), tangents, strict=True)]
    tangents = checks.checked_tangents(named, tangent_grad)
    inputs = paired(_operands(primals.values(), x), _operands(tangents, x))
    ((y, t_y),) = ACTIVATION.pair(inputs, (kind, impl), tangent_grad)
    return y.reshape(x.shape), t_y.reshape(x.shape)


def _checked(primals: dict[str, Tensor], impl: str) -> Tensor:
    """Check the primals by name, and return the first, whose shape the other has."""
    (first, x), *others = primals.items()
    checks.check_tensor(first, x)
    for name, other in others:
        checks.check_tensor(name, other)
        checks.check_like(name, other, first, x)
        if other.shape != x.shape:
            raise ValueError(f"{name}: expected shape {tuple(x.shape)} as {first}, got {tuple(other.shape)}")
    dispatch.check_impl(impl, x.device)
    return x


def _operands(tensors: Iterable[Tensor | None], x: Tensor) -> list[Tensor | None]:
    """Return x and up as the op takes them: of two dimensions or more, the first of which may be mapped."""
    lead = (None,) * max(0, 2 - x.dim())
    operands = [z if z is None or not lead else z[lead] for z in tensors]
    return operands + [None] * (2 - len(operands))
