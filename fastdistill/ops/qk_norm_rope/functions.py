"""Queries and keys on their way to attention: a norm of each head, and rotary embedding, in one kernel for both.

    y = R n(x)      t_y = R t_n      x: q and k; n a norm over the head's channels, R a rotation of their pairs

One op with two outputs, `torch.ops.fastdistill.qk_norm_rope`. Derivation and backward passes: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.ops.protocol import checks, context, dispatch
from fastdistill.ops.protocol.pair import paired
from fastdistill.ops.qk_norm_rope.op import QK_NORM_ROPE

NORMS = ("rms", "layer", "none")


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    *,
    norm: str = "rms",
    eps: float = 1e-6,
    interleaved: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalise each head's channels and apply the rotary embedding, of queries and keys at once.

    Args:
        q: (B, H, N, D), any strides, such as a view of a packed projection (B, N, 3, H, D); D is even.
        k: (B, Hkv, M, D), of q's dtype.
        cos, sin: (L, D/2) or (B or 1, L, D/2), with L = max(N, M); token i of q and of k takes row i. `rope_angles`
            makes them; they are constants. None for no rotation.
        q_weight, k_weight, q_bias, k_bias: (D,), or None.
        norm: "rms" | "layer" | "none", the last without weights and biases.
        eps: added to the mean square or variance.
        interleaved: the pairs that turn are channels 2i and 2i + 1 (FLUX, Wan), else i and i + D/2 (GPT-NeoX, Llama).
        impl: "auto" | "torch" | "triton"; an explicit choice never falls back.

    Returns:
        (q, k), contiguous, in the shapes and the dtype of the arguments. Nothing is rounded between norm and rotation.

    Equivalent to:
        rotate(F.rms_norm(q, (D,), q_weight, eps)), rotate(F.rms_norm(k, (D,), k_weight, eps))
        where rotate(x) = cat([u * cos - v * sin, u * sin + v * cos], -1) with u, v = x.chunk(2, -1)
    """
    named = _named(q, k, q_weight, k_weight, q_bias, k_bias)
    constants = _check(named, cos, sin, norm, interleaved, impl)
    primals = [x for _, x in named] + constants
    q_out, k_out = QK_NORM_ROPE(primals, (norm, checks.number("eps", eps), interleaved, impl), context.tangent_grad())
    assert q_out is not None and k_out is not None
    return q_out, k_out


def qk_norm_rope_jvp(
    q: Tensor,
    k: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    *,
    t_q_weight: Tensor | None = None,
    t_k_weight: Tensor | None = None,
    t_q_bias: Tensor | None = None,
    t_k_bias: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    interleaved: bool = False,
    tangent_grad: bool = False,
    impl: str = "auto",
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Compute `qk_norm_rope` and its directional derivative: ((q, k), (t_q, t_k)).

    Tangents have their primals' shapes, None is zero. With `tangent_grad=False` gradients flow through q and k only.

    Equivalent to:
        torch.func.jvp(lambda q, k: qk_norm_rope(q, k, cos, sin, q_weight, k_weight), (q, k), (t_q, t_k))
    """
    named = _named(q, k, q_weight, k_weight, q_bias, k_bias)
    constants = _check(named, cos, sin, norm, interleaved, impl)
    given = (t_q, t_k, t_q_weight, t_k_weight, t_q_bias, t_k_bias)
    tangents = checks.checked_tangents([(name, x, t) for (name, x), t in zip(named, given)], tangent_grad)
    primals, attrs = [x for _, x in named] + constants, (norm, checks.number("eps", eps), interleaved, impl)
    inputs = paired(primals, [*tangents, None, None])
    (q, t_q), (k, t_k) = QK_NORM_ROPE.pair(inputs, attrs, tangent_grad)
    return (q, k), (t_q, t_k)


def _named(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
) -> list[tuple[str, Tensor | None]]:
    names = ("q", "k", "q_weight", "k_weight", "q_bias", "k_bias")
    return list(zip(names, (q, k, q_weight, k_weight, q_bias, k_bias)))


def _check(
    named: Sequence[tuple[str, Tensor | None]],
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    interleaved: bool,
    impl: str,
) -> list[Tensor | None]:
    """Refuse by name what doesn't fit. Returns cos and sin as (B or 1, L, D/2)."""
    checks.check_bool("interleaved", interleaved)
    for name, x in named[:2]:
        checks.check_tensor(name, x)
        if x is not None and x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions (B, H, N, D), got {tuple(x.shape)}")
    q, k = named[0][1], named[1][1]
    assert q is not None and k is not None
    checks.check_like("k", k, "q", q)
    if q.shape[-1] % 2 or q.shape[-1] == 0:
        raise ValueError(f"q: expected an even head dim, got {q.shape[-1]}")
    if (k.shape[0], k.shape[-1]) != (q.shape[0], q.shape[-1]):
        raise ValueError(f"k: expected the batch and head dim of q {tuple(q.shape)}, got {tuple(k.shape)}")
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))}, got {norm!r}")
    for name, x in named[2:]:
        if x is None:
            continue
        checks.check_tensor(name, x)
        checks.check_like(name, x, "q", q, dtype=False)
        if norm == "none":
            raise ValueError(f"{name}: expected None with norm='none', got a tensor of {tuple(x.shape)}")
        if x.shape != q.shape[-1:]:
            raise ValueError(f"{name}: expected shape {tuple(q.shape[-1:])}, got {tuple(x.shape)}")
    dispatch.check_impl(impl, q.device)
    if (cos is None) != (sin is None):
        got = type(sin).__name__
        raise ValueError(f"sin: expected {'None as cos is' if cos is None else 'a tensor as cos is'}, got {got}")
    return [None if x is None else _angles(name, x, q, k) for name, x in (("cos", cos), ("sin", sin))]


def _angles(name: str, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    checks.check_tensor(name, x)
    checks.check_like(name, x, "q", q, dtype=False)
    rows = (max(q.shape[2], k.shape[2]), q.shape[-1] // 2)
    if tuple(x.shape) not in (rows, (1, *rows), (q.shape[0], *rows)):
        raise ValueError(
            f"{name}: expected {rows} or {(q.shape[0], *rows)}, a row for each token and a column for each pair of "
            f"channels; got {tuple(x.shape)}"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"{name} requires grad, but the angles are constants here: pass {name}.detach()")
    return x if x.dim() == 3 else x[None]
