"""Per-head norm of queries and keys and then rotary embedding, with tangents and both backwards, in plain PyTorch.

    y = R n(x)      t_y = R t_n      R turns pairs of channels (u, v) into (u cos - v sin, u sin + v cos)

R is linear and its inverse is its transpose: the backward passes turn the cotangents back by -sin, and then are those
of `fastdistill.ops.norm.eager`. All is computed in float32 (float64 for float64) and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops.norm.eager import _fresh, norm_backward, norm_forward


def qk_norm_rope_forward(
    q: Tensor,
    t_q: Tensor | None,
    k: Tensor,
    t_k: Tensor | None,
    q_weight: Tensor | None,
    t_q_weight: Tensor | None,
    k_weight: Tensor | None,
    t_k_weight: Tensor | None,
    q_bias: Tensor | None,
    t_q_bias: Tensor | None,
    k_bias: Tensor | None,
    t_k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    norm: str,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Normalised and turned queries and keys with their tangents: (q_out, t_q_out, k_out, t_k_out).

    q (B, H, N, D), k (B, Hkv, M, D), any strides; weights, biases (D,) or None; cos, sin (B or 1, max(N, M), D/2) or
    None. norm is "rms", "layer" or "none". The outputs are contiguous and in the dtype of q and k. The tangents are
    both None without any tangent, and neither with one.

    Equivalent to: `torch.func.jvp(reference.qk_norm_rope, (q, k, cos, sin, ...), (t_q, t_k, 0, 0, ...))`.
    """
    of_q = (q, t_q, q_weight, t_q_weight, q_bias, t_q_bias)
    of_k = (k, t_k, k_weight, t_k_weight, k_bias, t_k_bias)
    outs = [_one_forward(*side, cos, sin, norm, eps, interleaved) for side in (of_q, of_k)]
    if any(t is not None for _, t in outs):
        outs = [(y, torch.zeros_like(y) if t_y is None else t_y) for y, t_y in outs]
    return (*outs[0], *outs[1])


def qk_norm_rope_backward(
    dq_out: Tensor | None,
    dt_q_out: Tensor | None,
    dk_out: Tensor | None,
    dt_k_out: Tensor | None,
    q: Tensor,
    t_q: Tensor | None,
    k: Tensor,
    t_k: Tensor | None,
    q_weight: Tensor | None,
    t_q_weight: Tensor | None,
    k_weight: Tensor | None,
    t_k_weight: Tensor | None,
    q_bias: Tensor | None,
    t_q_bias: Tensor | None,
    k_bias: Tensor | None,
    t_k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    norm: str,
    eps: float,
    interleaved: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of <dq_out, q_out> + <dt_q_out, t_q_out>, and the same of k.

    In the order (q, k, q_weight, k_weight, q_bias, k_bias), then of their tangents; `needs` says which of the twelve,
    the others are None. Each is contiguous, in the shape and dtype of its argument. A cotangent of None is zero.
    """
    of_q = (q, t_q, q_weight, t_q_weight, q_bias, t_q_bias)
    of_k = (k, t_k, k_weight, t_k_weight, k_bias, t_k_bias)
    sides = ((dq_out, dt_q_out, of_q, needs[0::2]), (dk_out, dt_k_out, of_k, needs[1::2]))
    found = [
        _one_backward(dy, dt_y, *side, cos, sin, norm, eps, interleaved, wanted) for dy, dt_y, side, wanted in sides
    ]
    return tuple(grad for both in zip(*found, strict=True) for grad in both)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the pairs of channels of x (B, H, N, D): neighbours if interleaved, else i and i + D/2.

    cos, sin (B or 1, at least N, D/2), of which the first N rows count.
    """
    cos, sin = (a[:, None, : x.shape[2]] for a in (cos, sin))
    if interleaved:
        u, v = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((u * cos - v * sin, u * sin + v * cos), dim=-1).flatten(-2)
    u, v = x.chunk(2, dim=-1)
    return torch.cat((u * cos - v * sin, u * sin + v * cos), dim=-1)


def _one_forward(
    x: Tensor,
    t_x: Tensor | None,
    weight: Tensor | None,
    t_weight: Tensor | None,
    bias: Tensor | None,
    t_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor | None]:
    """Queries or keys, and their tangent if there is any."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y, t_y = x.to(dtype), None if t_x is None else t_x.to(dtype)
    if norm != "none":
        of_norm = (weight, t_weight, bias, t_bias, None, None, None, None)
        y, t_y, _, _ = norm_forward(y, t_y, *of_norm, eps=eps, rms=norm == "rms")
    if cos is not None and sin is not None:
        cos, sin = cos.to(dtype), sin.to(dtype)
        y = rotate(y, cos, sin, interleaved)
        t_y = None if t_y is None else rotate(t_y, cos, sin, interleaved)
    return _fresh(y, x), None if t_y is None else _fresh(t_y, x)


def _one_backward(
    dy: Tensor | None,
    dt_y: Tensor | None,
    x: Tensor,
    t_x: Tensor | None,
    weight: Tensor | None,
    t_weight: Tensor | None,
    bias: Tensor | None,
    t_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
    needs: tuple[bool, ...],
) -> list[Tensor | None]:
    """Gradients of (x, weight, bias) and of their tangents."""
    likes = [x, weight, bias] * 2
    grads: list[Tensor | None] = [None] * 6
    if any(needs) and (dy is not None or dt_y is not None):
        dtype = torch.promote_types(x.dtype, torch.float32)
        dy, dt_y = (None if d is None else d.to(dtype) for d in (dy, dt_y))
        if cos is not None and sin is not None:
            cos, back = cos.to(dtype), -sin.to(dtype)
            dy, dt_y = (None if d is None else rotate(d, cos, back, interleaved) for d in (dy, dt_y))
        if norm == "none":
            grads[0], grads[3] = dy, dt_y
        else:
            rms, none = norm == "rms", (None,) * 4
            rows = x.to(dtype)
            if not rms:  # moves no result, but a large mean rounded to float32 would
                rows = rows - rows.mean(dim=-1, keepdim=True)
            _, _, mean, rstd = norm_forward(rows, None, *none, *none, eps=eps, rms=rms)
            pairs = (rows, t_x, weight, t_weight, bias, t_bias, *none)
            wanted = (*needs[:3], False, False, *(need and dt_y is not None for need in needs[3:]), False, False)
            found = norm_backward(dy, dt_y, *pairs, mean, rstd, rms=rms, needs=wanted)
            grads = [*found[:3], *found[5:8]]
    return [
        None if not need or like is None else torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        if grad is None else _fresh(grad, like)
        for grad, like, need in zip(grads, likes, needs, strict=True)
    ]  # fmt: skip
