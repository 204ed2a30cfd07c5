"""LayerNorm, RMSNorm and their modulated forms, whose primal and tangent run as one kernel.

    xh = (x - mean) rstd                 t_xh = rstd (t_x - mean t_x - xh mean(xh∘t_x))      RMSNorm: without the means
    y = (xh∘w + b)∘(1 + scale) + shift   t_y by the product rule

All of them are one op, `torch.ops.fastdistill.norm`. Derivation and backward passes: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastdistill.ops.norm.arguments import Call, default_eps
from fastdistill.ops.protocol.checks import accepts_x


@accepts_x
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    impl: str = "auto",
) -> Tensor:
    """Apply `torch.nn.functional.layer_norm`, as one kernel for primal and tangent under forward AD.

    Args:
        input: (..., *normalized_shape), float64, float32, bfloat16 or float16; statistics are taken in float32 or
            better.
        normalized_shape: the trailing dimensions to normalise over.
        weight, bias: of shape `normalized_shape`, or None.
        eps: added to the variance.
        impl: "auto" | "torch" | "triton"; an explicit choice never falls back.

    Returns:
        input's shape and dtype.

    Equivalent to:
        F.layer_norm(input, normalized_shape, weight, bias, eps)
    """
    return Call(input, normalized_shape, weight, bias, None, None, eps, False, impl, "input").run()


def layer_norm_jvp(
    x: Tensor,
    t_x: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    t_weight: Tensor | None = None,
    t_bias: Tensor | None = None,
    tangent_grad: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute LayerNorm and its directional derivative; tangents have their primals' shapes, None is zero.

    With `tangent_grad=False` gradients flow through `y` only and nothing is saved for `t_y`.

    Returns:
        (y, t_y), both of x's shape and dtype.

    Equivalent to:
        torch.func.jvp(lambda x, w, b: F.layer_norm(x, normalized_shape, w, b, eps), (x, w, b), (t_x, t_w, t_b))
    """
    call = Call(x, normalized_shape, weight, bias, None, None, eps, False, impl)
    return call.pair(t_x, t_weight, t_bias, None, None, tangent_grad)


@accepts_x
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Apply `torch.nn.functional.rms_norm`, as one kernel for primal and tangent under forward AD.

    Arguments as in `layer_norm`; `eps=None` is the machine epsilon of input's dtype, as in PyTorch.

    Equivalent to:
        F.rms_norm(input, normalized_shape, weight, eps)
    """
    eps = default_eps(input, eps, "input")
    return Call(input, normalized_shape, weight, None, None, None, eps, True, impl, "input").run()


def rms_norm_jvp(
    x: Tensor,
    t_x: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    t_weight: Tensor | None = None,
    tangent_grad: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute RMSNorm and its directional derivative; tangents have their primals' shapes, None is zero.

    Equivalent to:
        torch.func.jvp(lambda x, w: F.rms_norm(x, normalized_shape, w, eps), (x, w), (t_x, t_w))
    """
    call = Call(x, normalized_shape, weight, None, None, None, default_eps(x, eps), True, impl)
    return call.pair(t_x, t_weight, None, None, None, tangent_grad)


def ada_layer_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    impl: str = "auto",
) -> Tensor:
    """Apply LayerNorm over the last dimension, then the modulation of adaptive LayerNorm (DiT, arXiv:2212.09748).

    Args:
        x: (..., C).
        scale, shift: as many dimensions as x, each broadcastable to it: (B, 1, C) for one vector per example.
        weight, bias: (C,), or None.
        eps: added to the variance.
        impl: "auto" | "torch" | "triton"; an explicit choice never falls back.

    Returns:
        x's shape and dtype.

    Equivalent to:
        F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + scale) + shift
    """
    return Call(x, x.shape[-1:], weight, bias, scale, shift, eps, False, impl).run()


def ada_layer_norm_jvp(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    t_x: Tensor | None,
    t_scale: Tensor | None = None,
    t_shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    t_weight: Tensor | None = None,
    t_bias: Tensor | None = None,
    tangent_grad: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `ada_layer_norm` and its directional derivative; tangents have their primals' shapes, None is zero.

    Equivalent to:
        torch.func.jvp(ada_layer_norm, (x, scale, shift, weight, bias), (t_x, t_scale, t_shift, t_weight, t_bias))
    """
    call = Call(x, x.shape[-1:], weight, bias, scale, shift, eps, False, impl)
    return call.pair(t_x, t_weight, t_bias, t_scale, t_shift, tangent_grad)


def ada_rms_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    impl: str = "auto",
) -> Tensor:
    """Apply RMSNorm over the last dimension, then a modulation, as `ada_layer_norm`; the shift may be None.

    Equivalent to:
        F.rms_norm(x, x.shape[-1:], weight, eps) * (1 + scale) + shift
    """
    return Call(x, x.shape[-1:], weight, None, scale, shift, eps, True, impl).run()


def ada_rms_norm_jvp(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    t_x: Tensor | None,
    t_scale: Tensor | None = None,
    t_shift: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    t_weight: Tensor | None = None,
    tangent_grad: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `ada_rms_norm` and its directional derivative; tangents have their primals' shapes, None is zero.

    Equivalent to:
        torch.func.jvp(ada_rms_norm, (x, scale, shift, weight), (t_x, t_scale, t_shift, t_weight))
    """
    call = Call(x, x.shape[-1:], weight, None, scale, shift, eps, True, impl)
    return call.pair(t_x, t_weight, None, t_scale, t_shift, tangent_grad)
