"""Fuse the step between two transformer blocks: the gated residual and the modulated norm of it.

    r = x + gate∘h                       t_r = t_x + t_gate∘h + gate∘t_h
    y = (rh∘w + b)∘(1 + scale) + shift   t_y as of any norm, rh being r normalised

One op with two outputs, `torch.ops.fastdistill.gated_norm`. Derivation and backward passes: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastdistill.ops.gated_norm.op import GATED_NORM
from fastdistill.ops.norm.arguments import Call, check_modulation
from fastdistill.ops.protocol import checks, context
from fastdistill.ops.protocol.pair import paired


def gated_residual_ada_norm(
    x: Tensor,
    gate: Tensor | None,
    h: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute the gated residual of one block and the modulated norm before the next: both in one kernel.

    The residual stream x and the block's output h may differ in dtype: a float32 stream beside bfloat16 blocks halves
    the error of a network's tangent. Statistics are taken of the sum before it is rounded.

    Args:
        x: (..., C), the residual stream.
        h: x's shape, what the block adds.
        gate, scale, shift: as many dimensions as x, each broadcastable to it: (B, 1, C) for one vector per example;
            or None, for a gate of one, a scale and a shift of zero.
        weight, bias: (C,), or None.
        eps: added to the variance.
        rms: RMSNorm instead of LayerNorm.
        impl: "auto" | "torch" | "triton"; an explicit choice never falls back.

    Returns:
        (r, y): r in x's dtype, y in h's.

    Equivalent to:
        r = x + gate * h
        y = F.layer_norm(r, r.shape[-1:], weight, bias, eps) * (1 + scale) + shift
    """
    return _Call(x, h, gate, weight, bias, scale, shift, eps, rms, impl).run()


def gated_residual_ada_norm_jvp(
    x: Tensor,
    gate: Tensor | None,
    h: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    t_x: Tensor | None,
    t_gate: Tensor | None = None,
    t_h: Tensor | None = None,
    t_scale: Tensor | None = None,
    t_shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    t_weight: Tensor | None = None,
    t_bias: Tensor | None = None,
    rms: bool = False,
    tangent_grad: bool = False,
    impl: str = "auto",
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Compute `gated_residual_ada_norm` and its directional derivative: ((r, y), (t_r, t_y)).

    Tangents have their primals' shapes, None is zero. With `tangent_grad=False` gradients flow through r and y only.

    Equivalent to:
        torch.func.jvp(gated_residual_ada_norm, (x, gate, h, scale, shift), (t_x, t_gate, t_h, t_scale, t_shift))
    """
    call = _Call(x, h, gate, weight, bias, scale, shift, eps, rms, impl)
    return call.both((t_x, t_h, t_gate, t_weight, t_bias, t_scale, t_shift), tangent_grad)


class _Call(Call):
    """Call of a norm, with h like x and the gate like scale and shift."""

    def __init__(
        self,
        x: Tensor,
        h: Tensor,
        gate: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        eps: float,
        rms: bool,
        impl: str,
    ) -> None:
        checks.check_tensor("x", x)
        super().__init__(x, x.shape[-1:], weight, bias, scale, shift, eps, rms, impl)
        checks.check_tensor("h", h)
        checks.check_like("h", h, "x", x, dtype=False)
        if h.shape != x.shape:
            raise ValueError(f"h: expected shape {tuple(x.shape)} as x, got {tuple(h.shape)}")
        if gate is not None:
            checks.check_tensor("gate", gate)
            checks.check_like("gate", gate, "x", x, dtype=False)
            check_modulation("gate", gate, x)
        self.named[1:1] = [("h", h), ("gate", gate)]

    def run(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Return r and y of (possibly dual) tensors."""
        r, y = GATED_NORM(
            [self._canonical(name, value) for name, value in self.named], self.attrs, context.tangent_grad()
        )
        assert r is not None and y is not None
        return r.reshape(self.x.shape), y.reshape(self.x.shape)

    def both(
        self, given: Sequence[Tensor | None], tangent_grad: bool
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return ((r, y), (t_r, t_y)) along explicit tangents, in the order of `named`."""
        checked = checks.checked_tangents(
            [(name, value, t) for (name, value), t in zip(self.named, given)], tangent_grad
        )
        primals = [self._canonical(name, value) for name, value in self.named]
        tangents = [self._canonical(name, t) for (name, _), t in zip(self.named, checked)]
        (r, t_r), (y, t_y) = GATED_NORM.pair(paired(primals, tangents), self.attrs, tangent_grad)
        r, y, t_r, t_y = (x.reshape(self.x.shape) for x in (r, y, t_r, t_y))
        return (r, y), (t_r, t_y)
