"""Attention under the dual protocol, for padded batches and for packed sequences; its log-sum-exp is a second output.

The tangent of the log-sum-exp is mu, the mean tangent of a row's logits. Both are differentiable, so attention over
parts of the keys can be merged (`merge.py`) and differentiated in either mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdistill.ops.attention import second_order
from fastdistill.ops.attention.arguments import UNLIMITED
from fastdistill.ops.protocol import compat, context, dispatch
from fastdistill.ops.protocol import torch_functions as F
from fastdistill.ops.protocol.dual_op import DualOp, Spec, Tensors
from fastdistill.ops.protocol.pair import ABSENT, Needs, Pair, Pairs


class _Call(NamedTuple):
    """Call that both ops boil down to: q (B, H, N, D), k, v and a mask, or packed sequences in a batch of one."""

    inputs: list[Pair]
    options: dict[str, Any]  # the keyword arguments that every implementation takes
    with_lse: bool
    grad: bool
    impl: str

    def expanded(self) -> list[Pair]:
        """Return the inputs, the mask and its tangent expanded to (B, H, N, M)."""
        (q, _), (k, _), _, (mask, t_mask) = self.inputs
        if mask is None:
            return self.inputs
        full = (*q.shape[:3], k.shape[2])
        return [*self.inputs[:3], Pair(mask.expand(full), None if t_mask is None else t_mask.expand(full))]

    def module(self) -> Any:
        """Return the implementation that runs."""
        return dispatch.implementation("attention", choose(self.inputs[0][0], self.inputs[2][0], self.impl))


def _call(inputs: Pairs, attrs: Sequence[Any]) -> _Call:
    left, right, lower_right, scale, with_lse, grad, impl = attrs[-7:]
    four, cu_seqlens = inputs, None
    if len(inputs) == len(PACKED):
        cu_n, cu_m = (cu.to(torch.int32) for cu, _ in inputs[3:])
        four, cu_seqlens = (*inputs[:3], ABSENT), (cu_n, cu_m, *attrs[:2])
    options = {"window": (left, right), "lower_right": lower_right, "cu_seqlens": cu_seqlens, "scale": scale}
    return _Call(list(four), options, with_lse, grad, impl)


def choose(q: Tensor, v: Tensor, impl: str) -> str:
    """Return the implementation that runs under forward AD: "torch" or "triton"."""
    if impl != "auto":
        return impl
    return "triton" if triton_problem(q, v) is None else "torch"


def triton_problem(q: Tensor, v: Tensor) -> str | None:
    """Return why "auto" doesn't take the Triton kernels for these tensors, or None where it does."""
    if q.device.type != "cuda":
        return f"no triton: tensors are on {q.device.type!r}"
    problem = unfit_for_triton(q, v) or dispatch.triton_problem(q.device) or _short_of_memory(q, v)
    return problem and f"no triton: {problem}"


def _short_of_memory(q: Tensor, v: Tensor) -> str | None:
    if q.dtype != torch.float32 or max(q.shape[-1], v.shape[-1]) <= 128:
        return None
    available = int(getattr(torch.cuda.get_device_properties(q.device), "shared_memory_per_block_optin", 0))
    if available >= dispatch.limit("WIDE_FLOAT32"):
        return None
    return f"float32 heads wider than 128 in {available >> 10} KiB of shared memory"


def unfit_for_triton(q: Tensor, v: Tensor) -> str | None:
    """Return what about the tensors the Triton kernels can't take on any device, or None."""
    if q.dtype == torch.float64:
        return "float64"
    widest, most = max(q.shape[-1], v.shape[-1]), dispatch.limit("WIDEST_HEAD")
    return f"head dim {widest} > {most}" if widest > most else None


def _forward(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Pairs, Tensors]:
    call = _call(inputs, attrs)
    _check_sequences(inputs, attrs)
    results: tuple[Pairs, Tensors] = call.module().attention_forward(
        call.expanded(), **call.options, grad=call.grad, tangent_grad=tangent_grad
    )
    return results


def _check_sequences(inputs: Pairs, attrs: Sequence[Any]) -> None:
    """Refuse bounds that would have a kernel read or leave out the wrong rows; on a GPU without waiting for it.

    They are read as int64, as they may have come: narrower, bounds and differences could wrap to what fits.
    """
    if len(inputs) != len(PACKED):
        return
    q, k, _, cu_n, cu_m = (x for x, _ in inputs)
    for name, cu, longest, total in (("q", cu_n, attrs[0], q.shape[2]), ("k", cu_m, attrs[1], k.shape[2])):
        cu = cu.long()
        lengths = cu.diff()
        holds = (cu[0] >= 0) & (cu[-1] <= total) & ((lengths >= 0) & (lengths <= longest)).all()
        message = (
            f"cu_seq_{name}, max_{name}: expected bounds that rise from 0 or more to at most {total}, "
            f"in steps of at most max_{name}={longest}"
        )
        if cu.device.type == "cpu":
            if not holds:
                raise ValueError(f"{message}; got {cu.tolist()}")
        else:
            torch._assert_async(holds, message)


def _backward(
    cotangents: Pairs, inputs: Pairs, saved: tuple[Pairs, Tensors], attrs: Sequence[Any], needs: Needs
) -> Pairs:
    call = _call(inputs, attrs)
    of_mask = needs[3] if call.inputs[3].primal is not None else (False, False)
    grads = call.module().attention_backward(
        cotangents, call.expanded(), saved, **call.options, needs=[*needs[:3], of_mask]
    )
    return _as_given(grads, call, len(inputs))


def _as_given(grads: Sequence[tuple[Tensor | None, Tensor | None]], call: _Call, count: int) -> Pairs:
    """Return the gradients of (q, k, v, mask) as those of the op's inputs, that of the mask in its own shape."""
    of_mask = [
        grad if grad is None or like is None else grad.sum_to_size(like.shape)  # under vmap the two may differ
        for grad, like in zip(grads[3], call.inputs[3])
    ]
    return [*map(Pair._make, grads[:3]), Pair(*of_mask), *[ABSENT] * (count - 4)]


def _math(inputs: Pairs, attrs: Sequence[Any]) -> Pairs:
    call = _call(inputs, attrs)
    if call.impl != "torch":
        raise NotImplementedError(
            "attention: expected one level of forward AD, got a tangent of a tangent, which has no fused form. "
            "impl='torch' computes it exactly, with memory that grows with N M."
        )
    packed = call.options["cu_seqlens"] is not None
    if not torch.compiler.is_compiling() and not any(compat.is_batched(x) for x, _ in (inputs[3:] if packed else ())):
        _check_sequences(inputs, attrs)
    return second_order.attention_dual(call.inputs, **call.options)


def _math_backward(cotangents: Pairs, inputs: Pairs, attrs: Sequence[Any], needs: Needs) -> Pairs:
    call = _call(inputs, attrs)
    grads = second_order.attention_dual_backward(cotangents, call.inputs, **call.options, needs=needs[:4])
    return _as_given(grads, call, len(inputs))


def _native(primals: Sequence[Any], attrs: Sequence[Any]) -> Tensors | None:
    """Call PyTorch's own op, where no implementation was asked for by name and it can do what is asked.

    Not where a gradient in 16 bits may follow on a CPU: from rounded outputs its kernel there makes gradients that with
    large logits and a mean of v are off by ten times what the plain formula's are. Nor with a scale of zero or
    less: its causal kernel there multiplies what it hid, minus infinity, by it, and gives NaN.
    """
    (left, right, lower_right, scale, with_lse, grad, impl), packed = attrs[-7:], len(primals) == len(PACKED)
    if impl != "auto" or with_lse or packed or not scale > 0:
        return None
    q, k, v, mask = primals
    if grad and q.device.type == "cpu" and q.dtype.itemsize == 2:
        return None
    causal = (left, right) == (-1, 0) and not lower_right and mask is None
    if not causal and (left, right) != UNLIMITED:
        return None
    if mask is not None:
        if q.device.type != "cpu" and mask.dtype not in (torch.bool, q.dtype):
            return None  # PyTorch's fused kernels for GPUs refuse a float32 mask beside 16-bit queries
        mask = mask.expand(*q.shape[:3], k.shape[2])
    gqa = q.shape[1] != k.shape[1]
    with context.without_autocast(q.device):
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=gqa), None


def _specs(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Sequence[Spec], Sequence[Spec]]:
    (q, _), _, (v, _), *_ = inputs
    grad, impl = attrs[-2:]
    shape = (*q.shape[:3], v.shape[-1])
    statistic = torch.float64 if q.dtype == torch.float64 else torch.float32
    kept = grad and q.dtype.itemsize == 2 and choose(q, v, impl) == "triton"
    rests = [kept, kept and tangent_grad and any(t is not None for _, t in inputs)]
    return [(shape, q.dtype), (tuple(q.shape[:3]), statistic)], [(shape, q.dtype) if x else None for x in rests]


def _wanted(attrs: Sequence[Any]) -> tuple[bool, bool]:
    return True, attrs[-3]


def _op(name: str, primals: tuple[str, ...], attrs: str, **more: Any) -> DualOp:
    return DualOp(
        name=name,
        primals=primals,
        outputs=("o", "lse"),
        attrs=f"{attrs}int left, int right, bool lower_right, float scale, bool with_lse, bool grad, str impl",
        residuals=("o_rest", "t_o_rest"),
        forward=_forward,
        backward=_backward,
        math=_math,
        math_backward=_math_backward,
        native=_native,
        specs=_specs,
        wanted=_wanted,
        **more,
    )


ATTENTION = _op("attention", ("q", "k", "v", "attn_mask?"), "", broadcastable=frozenset({"attn_mask"}))
PACKED = ("q", "k", "v", "cu_n", "cu_m")
VARLEN = _op("varlen_attention", PACKED, "int max_n, int max_m, ", unfoldable=frozenset(PACKED))
