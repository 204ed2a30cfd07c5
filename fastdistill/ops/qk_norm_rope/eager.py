"""Per-head norm of queries and keys and then rotary embedding, with tangents and both backwards, in plain PyTorch.

    y = R n(x)      t_y = R t_n      R turns pairs of channels (u, v) into (u cos - v sin, u sin + v cos)

R is linear and its inverse is its transpose: the backward passes turn the cotangents back by -sin, and then are those
of `fastdistill.ops.norm.eager`. All is computed in float32 (float64 for float64) and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.norm.eager import fresh, norm_backward, norm_forward
from fastdistill.ops.protocol.pair import ABSENT, Needs, Pair, Pairs, cast, moves

Angles = tuple[Tensor | None, Tensor | None]


def qk_norm_rope_forward(inputs: Pairs, *, norm: str, eps: float, interleaved: bool) -> tuple[list[Pair], tuple[()]]:
    """Return normalised and turned queries and keys with their tangents: (((q_out, t_q_out), (k_out, t_k_out)), ()).

    Args:
        inputs: the pairs of q (B, H, N, D), k (B, Hkv, M, D), of any strides, of q_weight, k_weight, q_bias, k_bias
            (D,) or None, and cos, sin (B or 1, max(N, M), D/2) or None, which are constants.
        norm: "rms", "layer" or "none".
        eps: added to the variance.
        interleaved: see `rotate`.

    Returns:
        The outputs are contiguous and in the dtype of q and k. The tangents are both None without any tangent, and
        neither with one.

    Equivalent to:
        `torch.func.jvp(reference.qk_norm_rope, (q, k, cos, sin, ...), (t_q, t_k, 0, 0, ...))`
    """
    outs = [_one_forward(side, angles, norm, eps, interleaved) for side, angles in _sides(inputs)]
    if moves(outs):
        outs = [Pair(y, torch.zeros_like(y) if t_y is None else t_y) for y, t_y in outs]
    return outs, ()


def qk_norm_rope_backward(
    cotangents: Pairs, inputs: Pairs, saved: Any, *, norm: str, eps: float, interleaved: bool, needs: Needs
) -> list[Pair]:
    """Return the gradients of <dq_out, q_out> + <dt_q_out, t_q_out>, and the same of k, in pairs as `needs`.

    Args:
        cotangents: (dq_out, dt_q_out) and (dk_out, dt_k_out); None is zero.
        inputs, norm, eps, interleaved: as in `qk_norm_rope_forward`.
        saved: what it returned, which isn't read.
        needs: which gradients are wanted, in the order of the inputs; the others, and those of cos and sin, are None.

    Returns:
        (dq, dt_q), (dk, dt_k), ..., each contiguous, in the shape and dtype of its argument.
    """
    found = [
        _one_backward(of_y, side, angles, norm, eps, interleaved, needs[i:6:2])
        for i, (of_y, (side, angles)) in enumerate(zip(cotangents, _sides(inputs)))
    ]
    return [*(grad for both in zip(*found, strict=True) for grad in both), ABSENT, ABSENT]


def _sides(inputs: Pairs) -> list[tuple[Pairs, Angles]]:
    """Return the inputs of the queries and of the keys: rows, weight, bias; and the angles of a rotation."""
    angles = (inputs[6][0], inputs[7][0])
    return [(inputs[0:6:2], angles), (inputs[1:6:2], angles)]


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


def _one_forward(side: Pairs, angles: Angles, norm: str, eps: float, interleaved: bool) -> Pair:
    """Return queries or keys, and their tangent if there is any."""
    rows, weight, bias = side
    dtype, like = torch.promote_types(rows.primal.dtype, torch.float32), rows.primal
    y = Pair(rows.primal.to(dtype), cast(rows.tangent, dtype))
    if norm != "none":
        ((y,), _) = norm_forward([y, weight, bias, ABSENT, ABSENT], eps=eps, rms=norm == "rms")
    cos, sin = (cast(a, dtype) for a in angles)
    if cos is not None and sin is not None:
        y = Pair(*(None if x is None else rotate(x, cos, sin, interleaved) for x in y))
    return Pair(*(None if x is None else fresh(x, like) for x in y))


def _one_backward(
    of_y: Pair, side: Pairs, angles: Angles, norm: str, eps: float, interleaved: bool, needs: Needs
) -> list[Pair]:
    """Return the gradients of rows, weight and bias."""
    grads = [ABSENT] * 3
    if any(map(any, needs)) and (of_y.primal is not None or of_y.tangent is not None):
        x, t_x = side[0]
        dtype = torch.promote_types(x.dtype, torch.float32)
        of_y, (cos, sin) = Pair(*(cast(d, dtype) for d in of_y)), (cast(a, dtype) for a in angles)
        if cos is not None and sin is not None:
            of_y = Pair(*(None if d is None else rotate(d, cos, -sin, interleaved) for d in of_y))
        if norm == "none":
            grads[0] = of_y
        else:
            rms, rows = norm == "rms", x.to(dtype)
            if not rms:  # moves no result, but a large mean rounded to float32 would
                rows = rows - rows.mean(dim=-1, keepdim=True)
            saved = norm_forward([Pair(rows), *[ABSENT] * 4], eps=eps, rms=rms)
            wanted = [(primal, tangent and of_y.tangent is not None) for primal, tangent in needs]
            inputs, none = [Pair(rows, t_x), *side[1:], ABSENT, ABSENT], (False, False)
            grads = norm_backward([of_y], inputs, saved, rms=rms, needs=[*wanted, none, none])[:3]
    return [
        Pair(*(_filled(grad, like, need) for grad, need in zip(pair, wanted)))
        for pair, (like, _), wanted in zip(grads, side, needs, strict=True)
    ]


def _filled(grad: Tensor | None, like: Tensor | None, need: bool) -> Tensor | None:
    """Return a gradient in the form of its argument, zeros where it is None, and None where it isn't needed."""
    if not need or like is None:
        return None
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device) if grad is None else fresh(grad, like)
