"""Define the benchmarks of memory-bound ops: norms, modulation, QK-norm with RoPE, and activations.

They work on tokens (B, N, C) or heads (B, H, N, D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill import ops, reference
from fastdistill.benchmarks.ops import packages
from fastdistill.benchmarks.ops.common_providers import common_providers, plain_floor
from fastdistill.benchmarks.ops.timed_op import Dual, DualOp, Provider, Tensors, TimedCase, as_tuple, few, last_tokens

EPS = 1e-6
SMALL = 128  # Number of tokens at the parity gate; widths stay.

# Floating-point operations an element, counted from the formulas: of the primal, of the tangent beside it, of the
# primal backward, and of the mixed backward. Memory bounds these ops, so only the order of magnitude matters.
OPERATIONS = {
    "layer_norm": (7, 9, 11, 30),
    "rms_norm": (5, 8, 9, 25),
    "ada_layer_norm": (9, 13, 13, 36),
    "gated_residual_ada_norm": (11, 16, 17, 44),
    "qk_norm_rope": (8, 11, 12, 31),
    "gelu_tanh": (9, 14, 14, 30),
    "swiglu": (5, 9, 9, 24),
}


def _pair(
    function: Callable[..., Any], order: Callable[[Tensors, Sequence[Any]], tuple[Any, ...]], **options: Any
) -> Callable[[TimedCase, str], Dual]:
    """Return one of our explicit pairs as a dual function; `order` arranges primals and tangents as its arguments."""

    def of_case(case: TimedCase, impl: str) -> Dual:
        def dual(primals: Tensors, tangents: Sequence[Tensor | None], mixed: bool) -> tuple[Tensors, Tensors]:
            outs, t_outs = function(*order(primals, tangents), tangent_grad=mixed, impl=impl, **options)
            return as_tuple(outs), as_tuple(t_outs)

        return dual

    return of_case


def _op(
    name: str,
    primals: Sequence[str],
    results: Sequence[str],
    make: Callable[[TimedCase, Callable[..., Tensor]], Tensors],
    reference: Callable[..., Any],
    own: Callable[..., Any],
    pair: Callable[..., Dual],
    *,
    still: Sequence[str] = (),
    constants: tuple[str, ...] = (),
    like: Sequence[str] | None = None,
    more: Callable[[torch.device], list[Provider]] = lambda device: [],
) -> DualOp:
    """Build an op whose formulas don't depend on the case.

    Args:
        still: names of the primals without a tangent.
        constants: see `DualOp`.
    """
    counts = OPERATIONS[name]

    def flops(case: TimedCase, floor: bool) -> float:
        elements = float(case.size("batch") * case.size("n") * case.size("width"))
        each = {"forward": counts[0] + (0 if floor else counts[1]), "primal": counts[2], "mixed": counts[3]}
        return each[case.mode] * elements

    def small(case: TimedCase) -> TimedCase:
        return case.resized(batch=min(2, case.size("batch")), n=few(case.size("n"), SMALL))

    return DualOp(
        name=name,
        primals=tuple(primals),
        moving=tuple(x for x in primals if x not in still),
        results=tuple(results),
        like=tuple(like or [primals[0]] * len(results)),
        make=make,
        reference=lambda case: reference,
        own=lambda case: own,
        pair=pair,
        flops=flops,
        small=small,
        last=last_tokens,
        common=common_providers,
        more=more,
        constants=constants,
    )


def _tokens(case: TimedCase, draw: Callable[..., Tensor]) -> Tensor:
    return draw(case.size("batch"), case.size("n"), case.size("width"))


def _modulation(case: TimedCase, draw: Callable[..., Tensor]) -> Tensor:
    return 0.3 * draw(case.size("batch"), 1, case.size("width"))


def _weight(width: int, draw: Callable[..., Tensor]) -> Tensor:
    return 1 + 0.3 * draw(width)


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=EPS)


def _ada(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return _layer_norm(x) * (1 + scale) + shift


def _gated(x: Tensor, gate: Tensor, h: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    r = x + gate * h
    return r, _ada(r, scale, shift)


def _qk_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor
) -> tuple[Tensor, Tensor]:
    rotated = reference.qk_norm_rope(q, k, cos, sin, q_weight, k_weight, eps=EPS)
    return rotated[0].to(q.dtype), rotated[1].to(k.dtype)


def _qk_own(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor, k_weight: Tensor
) -> tuple[Tensor, Tensor]:
    q, k = F.rms_norm(q, q.shape[-1:], q_weight, EPS), F.rms_norm(k, k.shape[-1:], k_weight, EPS)
    return reference.rotary(q, cos, sin).to(q.dtype), reference.rotary(k, cos, sin).to(k.dtype)


def _qk_make(case: TimedCase, draw: Callable[..., Tensor]) -> Tensors:
    q, k = _heads(case, draw), _heads(case, draw)
    cos, sin = ops.rope_angles((case.size("n"),), case.size("d"), device=q.device)
    return q, k, cos, sin, _weight(case.size("d"), draw), _weight(case.size("d"), draw)


def _heads(case: TimedCase, draw: Callable[..., Tensor]) -> Tensor:
    return draw(case.size("batch"), case.size("heads"), case.size("n"), case.size("d"))


def _norm_floors(rms: bool) -> Callable[[torch.device], list[Provider]]:
    """Return the providers of NVIDIA apex's and Liger's fused norms, which compute no tangents."""

    def floors(device: torch.device) -> list[Provider]:
        apex = packages.find("apex.normalization.fused_layer_norm", device)
        liger = packages.find("liger_kernel.transformers.functional", device)

        def by_apex(case: TimedCase) -> Callable[..., Tensor]:
            if rms:
                return lambda x, weight: apex.module.fused_rms_norm_affine(x, weight, (x.shape[-1],), EPS)
            return lambda x: apex.module.fused_layer_norm(x, (x.shape[-1],), EPS)

        def by_liger(case: TimedCase) -> Callable[..., Tensor]:
            if rms:  # In place, Liger would overwrite the cotangent, which a repeated backward needs again.
                return lambda x, weight: liger.module.liger_rms_norm(x, weight, EPS, in_place=False)
            return lambda x: liger.module.liger_layer_norm(x, torch.ones_like(x[0, 0]), torch.zeros_like(x[0, 0]), EPS)

        return [
            plain_floor("apex, no tangent", by_apex, absent=apex.absent),
            plain_floor("Liger, no tangent", by_liger, absent=liger.absent),
        ]

    return floors


POINTWISE = {
    op.name: op
    for op in (
        _op(
            "layer_norm",
            ("x",),
            ("y",),
            lambda case, draw: (_tokens(case, draw),),
            lambda x: reference.norm(x, eps=EPS),
            _layer_norm,
            _pair(ops.layer_norm_jvp, lambda p, t: (p[0], t[0], p[0].shape[-1:]), eps=EPS),
            more=_norm_floors(rms=False),
        ),
        _op(
            "rms_norm",
            ("x", "weight"),
            ("y",),
            lambda case, draw: (_tokens(case, draw), _weight(case.size("width"), draw)),
            lambda x, weight: reference.norm(x, weight, eps=EPS, rms=True),
            lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, EPS),
            _pair(ops.rms_norm_jvp, lambda p, t: (p[0], t[0], p[0].shape[-1:], p[1]), eps=EPS),
            still=("weight",),
            more=_norm_floors(rms=True),
        ),
        _op(
            "ada_layer_norm",
            ("x", "scale", "shift"),
            ("y",),
            lambda case, draw: (_tokens(case, draw), _modulation(case, draw), _modulation(case, draw)),
            lambda x, scale, shift: reference.ada_layer_norm(x, scale, shift, eps=EPS),
            _ada,
            _pair(ops.ada_layer_norm_jvp, lambda p, t: (*p, *t), eps=EPS),
        ),
        _op(
            "gated_residual_ada_norm",
            ("x", "gate", "h", "scale", "shift"),
            ("r", "y"),
            lambda case, draw: (
                _tokens(case, draw),
                _modulation(case, draw),
                _tokens(case, draw),
                _modulation(case, draw),
                _modulation(case, draw),
            ),
            partial(reference.gated_residual_ada_norm, eps=EPS),
            _gated,
            _pair(ops.gated_residual_ada_norm_jvp, lambda p, t: (*p, *t), eps=EPS),
        ),
        _op(
            "qk_norm_rope",
            ("q", "k", "cos", "sin", "q_weight", "k_weight"),
            ("q_turned", "k_turned"),
            _qk_make,
            _qk_reference,
            _qk_own,
            _pair(ops.qk_norm_rope_jvp, lambda p, t: (p[0], p[1], t[0], t[1], *p[2:]), eps=EPS),
            still=("cos", "sin", "q_weight", "k_weight"),
            constants=("cos", "sin"),
            like=("q", "k"),
        ),
        _op(
            "gelu_tanh",
            ("x",),
            ("y",),
            lambda case, draw: (_tokens(case, draw),),
            lambda x: reference.gelu(x, "tanh"),
            lambda x: F.gelu(x, approximate="tanh"),
            _pair(ops.gelu_jvp, lambda p, t: (p[0], t[0], "tanh")),
        ),
        _op(
            "swiglu",
            ("gate", "up"),
            ("y",),
            lambda case, draw: (_tokens(case, draw), _tokens(case, draw)),
            reference.swiglu,
            lambda gate, up: F.silu(gate) * up,
            _pair(ops.swiglu_jvp, lambda p, t: (*p, *t)),
        ),
    )
}
