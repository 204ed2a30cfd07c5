"""GELU, SiLU, SwiGLU and GEGLU, whose primal and tangent run as one kernel.

    y = phi(x) up      t_y = phi' t_x up + phi t_up      without up: up = 1, t_up = 0

All of them are one op, `torch.ops.fastdistill.activation`. Derivation and backward passes: kernels/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.eager import activation as eager  # now, not when first used: see `_functional`
from fastdistill.ops import _choice
from fastdistill.ops._dual import DualOp, Spec, Tensors

KINDS = {"none": "gelu", "tanh": "gelu_tanh"}


@_choice.accepts_x
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


@_choice.accepts_x
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
    _choice.check_tensor("input", input)
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
        _choice.check_tensor(first, x)
        for name, other in others:
            _choice.check_tensor(name, other)
            _choice.check_like(name, other, first, x)
            if other.shape != x.shape:
                raise ValueError(f"{name}: expected shape {tuple(x.shape)} as {first}, got {tuple(other.shape)}")
        _choice.check_impl(impl, x.device)
        self.named, self.x, self.attrs = named, x, (kind, impl)

    def run(self) -> Tensor:
        (y,) = ACTIVATION(self._canonical([x for _, x in self.named]), self.attrs, _choice.tangent_grad())
        assert y is not None
        return y.reshape(self.x.shape)

    def pair(self, given: Sequence[Tensor | None], tangent_grad: bool) -> tuple[Tensor, Tensor]:
        tangents = _choice.checked_tangents([(name, x, t) for (name, x), t in zip(self.named, given)], tangent_grad)
        primals = self._canonical([x for _, x in self.named])
        (y,), (t_y,) = ACTIVATION.pair(primals, self._canonical(tangents), self.attrs, tangent_grad)
        return y.reshape(self.x.shape), t_y.reshape(self.x.shape)

    def _canonical(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        lead = (None,) * max(0, 2 - self.x.dim())
        canonical = [x if x is None or not lead else x[lead] for x in tensors]
        return canonical + [None] * (2 - len(canonical))


def choose(x: Tensor, impl: str) -> str:
    """The implementation that runs: "torch" or "triton"."""
    if impl != "auto":
        return impl
    triton_runs = x.device.type == "cuda" and x.dtype != torch.float64
    return "triton" if triton_runs and _choice.triton_problem(x.device) is None else "torch"


def _forward(
    primals: Tensors, tangents: Tensors, attrs: Sequence[Any], tangent_grad: bool
) -> tuple[Tensors, Tensors, Tensors]:
    (x, up), (t_x, t_up), (kind, impl) = primals, tangents, attrs
    assert x is not None
    module = _choice.implementation("activation", choose(x, impl))
    y, t_y = module.activation_forward(x, t_x, up, t_up, kind=kind)
    return (y,), (t_y,), ()


def _backward(
    d_outs: Tensors,
    dt_outs: Tensors,
    primals: Tensors,
    tangents: Tensors,
    outs: Tensors,
    t_outs: Tensors,
    residuals: Tensors,
    attrs: Sequence[Any],
    needs: Sequence[bool],
) -> Tensors:
    (dy,), (dt_y,), (x, up), (t_x, t_up), (kind, impl) = d_outs, dt_outs, primals, tangents, attrs
    assert x is not None
    module = _choice.implementation("activation", choose(x, impl))
    grads: Tensors = module.activation_backward(dy, dt_y, x, t_x, up, t_up, kind=kind, needs=tuple(needs))
    return grads


def _native(primals: Tensors, attrs: Sequence[Any]) -> Tensors | None:
    """PyTorch's own activation, where no implementation was asked for by name.

    The gated forms are not among them where ours is one kernel, or rounds once and PyTorch twice.
    """
    (x, up), (kind, impl) = primals, attrs
    assert x is not None
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    if impl != "auto" or (up is not None and (narrow or choose(x, impl) == "triton")):
        return None
    y = eager.phi(x, kind)
    return (y if up is None else y * up,)


def _specs(
    primals: Tensors, tangents: Tensors, attrs: Sequence[Any], tangent_grad: bool
) -> tuple[Sequence[Spec], Sequence[Spec]]:
    x = primals[0]
    assert x is not None
    return [(tuple(x.shape), x.dtype)], []


def _math(primals: Any, tangents: Any, attrs: Sequence[Any]) -> tuple[Tensors, Tensors]:
    """The formulas of the forward, differentiable any number of times."""
    dtype = primals[0].dtype
    (x, up), (t_x, t_up) = _wide(primals), _wide(tangents)
    phi, slope, _ = _derivatives(x, attrs[0])
    t_y = _times(_times(slope, t_x), 1.0 if up is None else up)
    t_y = _add(t_y, _times(phi, t_up))
    y = phi if up is None else phi * up
    return (y.to(dtype),), (None if t_y is None else t_y.to(dtype),)


def _math_backward(
    d_outs: Tensors, dt_outs: Tensors, primals: Any, tangents: Any, attrs: Sequence[Any], needs: list[bool]
) -> Tensors:
    """The formulas of both backward passes; g and h are the cotangents of phi and of phi' t_x."""
    like = primals[0]
    (dy, dt_y), (x, up), (t_x, t_up) = _wide((d_outs[0], dt_outs[0])), _wide(primals), _wide(tangents)
    phi, slope, curvature = _derivatives(x, attrs[0])
    factor = 1.0 if up is None else up
    g, h = _add(_times(dy, factor), _times(dt_y, t_up)), _times(dt_y, factor)
    grads = [
        _add(_times(slope, g), _times(_times(curvature, t_x), h)),
        _add(_times(phi, dy), _times(_times(slope, t_x), dt_y)),
        _times(slope, h),
        _times(phi, dt_y),
    ]
    return [
        None if not need else torch.zeros_like(like) if grad is None else grad.to(like.dtype)
        for grad, need in zip(grads, needs, strict=True)
    ]


def _derivatives(x: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """phi, phi' and phi'' at x. With v = x for SiLU, phi = x logistic(v) and GELU's tanh is one of these, too."""
    if kind == "gelu":
        p = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))
        density = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        return x * p, p + x * density, density * (2 - x * x)
    v, v1, v2 = x, torch.ones_like(x), torch.zeros_like(x)
    if kind == "gelu_tanh":
        spread, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
        v, v1, v2 = spread * (x + cubic * x**3), spread * (1 + 3 * cubic * x * x), 6 * cubic * spread * x
    p, q = torch.sigmoid(v), torch.sigmoid(-v)
    return x * p, p + x * p * q * v1, p * q * (2 * v1 + x * (v2 + (q - p) * v1 * v1))


def _wide(tensors: Any) -> Any:
    """16-bit tensors in float32; absent ones as they are."""
    return tuple(None if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _times(a: Tensor | None, b: Tensor | float | None) -> Tensor | None:
    return None if a is None or b is None else a * b


ACTIVATION = DualOp(
    name="activation",
    primals=("x", "up?"),
    outputs=("y",),
    attrs="str kind, str impl",
    residuals=(),
    forward=_forward,
    backward=_backward,
    math=_math,
    math_backward=_math_backward,
    native=_native,
    specs=_specs,
    saves_outputs=False,
)
