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
from fastdistill.ops.protocol import autocast, compat, dispatch
from fastdistill.ops.protocol import torch_functions as F
from fastdistill.ops.protocol.dual_op import DualOp, Spec, Tensors

MAX_TRITON_HEAD_DIM = 256
WIDE_FLOAT32 = 130 << 10  # bytes of shared memory that the mixed backward of float32 heads wider than 128 takes
UNLIMITED = (-1, -1)


class _Call(NamedTuple):
    """What both ops boil down to: q (B, H, N, D), k, v and a mask, or packed sequences in a batch of one."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    tangents: Tensors
    cu_seqlens: tuple[Tensor, Tensor, int, int] | None
    window: tuple[int, int]
    lower_right: bool
    scale: float
    with_lse: bool
    grad: bool
    impl: str

    @property
    def masks(self) -> list[Tensor | None]:
        """The mask and its tangent, expanded to (B, H, N, M)."""
        full = (*self.q.shape[:3], self.k.shape[2])
        return [None if x is None else x.expand(full) for x in (self.mask, self.tangents[3])]

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that every implementation takes."""
        return {
            "window": self.window,
            "lower_right": self.lower_right,
            "cu_seqlens": self.cu_seqlens,
            "scale": self.scale,
        }


def _call(primals: Any, tangents: Tensors, attrs: Sequence[Any]) -> _Call:
    q, k, v, *rest = primals
    if len(rest) == 1:
        (mask,), cu_seqlens = rest, None
    else:
        mask, cu_seqlens = None, (*(cu.to(torch.int32) for cu in rest), *attrs[:2])
    left, right, lower_right, scale, with_lse, grad, impl = attrs[-7:]
    four = [*tangents[:3], tangents[3] if mask is not None else None]
    return _Call(q, k, v, mask, four, cu_seqlens, (left, right), lower_right, scale, with_lse, grad, impl)


def choose(q: Tensor, v: Tensor, impl: str) -> str:
    """The implementation that runs under forward AD: "torch" or "triton"."""
    if impl != "auto":
        return impl
    return "triton" if triton_problem(q, v) is None else "torch"


def triton_problem(q: Tensor, v: Tensor) -> str | None:
    """Why "auto" doesn't take the Triton kernels for these tensors, or None where it does."""
    if q.device.type != "cuda":
        return f"no triton: tensors are on {q.device.type!r}"
    problem = unfit_for_triton(q, v) or dispatch.triton_problem(q.device) or _short_of_memory(q, v)
    return problem and f"no triton: {problem}"


def _short_of_memory(q: Tensor, v: Tensor) -> str | None:
    if q.dtype != torch.float32 or max(q.shape[-1], v.shape[-1]) <= 128:
        return None
    available = int(getattr(torch.cuda.get_device_properties(q.device), "shared_memory_per_block_optin", 0))
    return (
        None if available >= WIDE_FLOAT32 else f"float32 heads wider than 128 in {available >> 10} KiB of shared memory"
    )


def unfit_for_triton(q: Tensor, v: Tensor) -> str | None:
    """What about the tensors the Triton kernels can't take on any device, or None."""
    if q.dtype == torch.float64:
        return "float64"
    widest = max(q.shape[-1], v.shape[-1])
    return f"head dim {widest} > {MAX_TRITON_HEAD_DIM}" if widest > MAX_TRITON_HEAD_DIM else None


def _forward(
    primals: Tensors, tangents: Tensors, attrs: Sequence[Any], tangent_grad: bool
) -> tuple[Tensors, Tensors, Tensors]:
    call = _call(primals, tangents, attrs)
    _check_sequences(primals, attrs)
    mask, t_mask = call.masks
    differentiated = tangent_grad and any(t is not None for t in tangents)
    module = dispatch.implementation("attention", choose(call.q, call.v, call.impl))
    o, t_o, lse, mu, *residuals = module.attention_forward(
        call.q, call.k, call.v, *call.tangents[:3], mask, t_mask, **call.options,
        tangent_grad=differentiated, grad=call.grad,
    )  # fmt: skip
    return (o, lse), (t_o, mu), residuals


def _check_sequences(primals: Any, attrs: Sequence[Any]) -> None:
    """Refuse bounds that would have a kernel read or leave out the wrong rows; on a GPU without waiting for it.

    They are read as int64, as they may have come: narrower, bounds and differences could wrap to what fits.
    """
    if len(primals) != len(PACKED):
        return
    q, k, _, cu_n, cu_m = primals
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
    call = _call(primals, tangents, attrs)
    (do, d_lse), (dt_o, d_mu), (o, lse), (t_o, mu), (o_rest, t_o_rest) = d_outs, dt_outs, outs, t_outs, residuals
    mask, t_mask = call.masks
    half = len(primals)
    eight = [*needs[:3], needs[3] and mask is not None, *needs[half : half + 3], needs[half + 3] and mask is not None]
    grads = list(
        dispatch.implementation("attention", choose(call.q, call.v, call.impl)).attention_backward(
            do, dt_o, d_lse, d_mu, call.q, call.k, call.v, *call.tangents[:3], mask, t_mask,
            o, t_o, lse, mu, **call.options, needs=tuple(eight), rests=(o_rest, t_o_rest),
        )
    )  # fmt: skip
    return _as_given(grads, call, half)


def _as_given(grads: list[Tensor | None], call: _Call, half: int) -> Tensors:
    """Gradients of (q, k, v, mask) and their tangents in the order of the op's arguments, masks in their own shape."""
    for i, like in ((3, call.mask), (7, call.tangents[3])):  # under vmap the two may differ
        if like is not None and (grad := grads[i]) is not None:
            grads[i] = grad.sum_to_size(like.shape)
    rest: list[Tensor | None] = [None] * (half - 4)
    return [*grads[:4], *rest, *grads[4:], *rest]


def _math(primals: Any, tangents: Any, attrs: Sequence[Any]) -> tuple[Tensors, Tensors]:
    call = _call(primals, tangents, attrs)
    if call.impl != "torch":
        raise NotImplementedError(
            "attention: expected one level of forward AD, got a tangent of a tangent, which has no fused form. "
            "impl='torch' computes it exactly, with memory that grows with N M."
        )
    if not torch.compiler.is_compiling() and not any(map(compat.is_batched, primals[3:] if call.cu_seqlens else ())):
        _check_sequences(primals, attrs)
    return second_order.attention_dual(
        (call.q, call.k, call.v, call.mask),
        tuple(call.tangents),
        window=call.window,
        lower_right=call.lower_right,
        cu_seqlens=call.cu_seqlens,
        scale=call.scale,
    )


def _math_backward(
    d_outs: Tensors, dt_outs: Tensors, primals: Any, tangents: Any, attrs: Sequence[Any], needs: list[bool]
) -> Tensors:
    call, half = _call(primals, tangents, attrs), len(primals)
    grads = second_order.attention_dual_backward(
        d_outs[0], dt_outs[0], d_outs[1], dt_outs[1], (call.q, call.k, call.v, call.mask), tuple(call.tangents),
        **call.options, needs=[*needs[:4], *needs[half : half + 4]],
    )  # fmt: skip
    return _as_given(list(grads), call, half)


def _native(primals: Tensors, attrs: Sequence[Any]) -> Tensors | None:
    """PyTorch's own op, where no implementation was asked for by name and it can do what is asked.

    Not where a gradient in 16 bits may follow on a CPU: from rounded outputs its kernel there makes gradients that with
    large logits and a mean of v are off by ten times what the plain formula's are. Nor with a scale of zero or
    less: its causal kernel there multiplies what it hid, minus infinity, by it, and gives NaN.
    """
    call = _call(primals, [None] * len(primals), attrs)
    if not call.scale > 0:
        return None
    if call.grad and call.q.device.type == "cpu" and call.q.dtype.itemsize == 2:
        return None
    causal = call.window == (-1, 0) and not call.lower_right and call.mask is None
    if call.impl != "auto" or call.with_lse or call.cu_seqlens or not (causal or call.window == UNLIMITED):
        return None
    if call.mask is not None and call.q.device.type != "cpu" and call.mask.dtype not in (torch.bool, call.q.dtype):
        return None  # PyTorch's fused kernels for GPUs refuse a float32 mask beside 16-bit queries
    gqa = call.q.shape[1] != call.k.shape[1]
    with autocast.without_autocast(call.q.device):
        out = F.scaled_dot_product_attention(
            call.q, call.k, call.v, call.masks[0], is_causal=causal, scale=call.scale, enable_gqa=gqa
        )
    return out, None


def _specs(
    primals: Tensors, tangents: Tensors, attrs: Sequence[Any], tangent_grad: bool
) -> tuple[Sequence[Spec], Sequence[Spec]]:
    q, v, grad, impl = primals[0], primals[2], *attrs[-2:]
    assert q is not None and v is not None
    shape = (*q.shape[:3], v.shape[-1])
    statistic = torch.float64 if q.dtype == torch.float64 else torch.float32
    kept = grad and q.dtype.itemsize == 2 and choose(q, v, impl) == "triton"
    rests = [kept, kept and tangent_grad and any(t is not None for t in tangents)]
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
