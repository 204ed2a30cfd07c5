"""Queries and keys on their way to attention: a norm of each head, and rotary embedding, in one kernel for both.

    y = R n(x)      t_y = R t_n      x: q and k; n a norm over the head's channels, R a rotation of their pairs

One op with two outputs, `torch.ops.fastdistill.qk_norm_rope`. Derivation and backward passes: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.eager.qk_norm_rope import rotate
from fastdistill.ops import _choice, _dense
from fastdistill.ops._dual import DualOp, Spec, Tensors

NORMS = ("rms", "layer", "none")
MAX_TRITON_HEAD = 512


def rope_angles(
    positions: Sequence[int] | Tensor,
    head_dim: int,
    *,
    dims: Sequence[int] | None = None,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The angles of a rotary embedding over one or more axes (RoFormer, arXiv:2104.09864, on each axis).

    Args:
        positions: sizes of a grid, (N,), (rows, columns) or (frames, rows, columns), whose tokens are numbered with
            the last axis fastest; or the positions themselves, (N, axes) or (B, N, axes).
        head_dim: D, even.
        dims: channels that turn with each axis, even numbers with a sum of at most D; what is left never turns. Without
            it all axes get the same even number, and the first one also what is left.
        theta: pair i of an axis with d channels has the frequency theta^(-2i / d).
        device: where to put the angles of a grid; those of positions stay with them.
        dtype: of the result; the angles themselves are taken in float64.

    Returns:
        cos, sin: (N, D/2), or (B, N, D/2).

    Raises:
        ValueError: `head_dim` or `dims` break these rules.
    """
    if head_dim % 2 or head_dim <= 0:
        raise ValueError(f"head_dim: expected a positive even number, got {head_dim}")
    if not isinstance(positions, Tensor):
        ticks = [torch.arange(size, dtype=torch.float64, device=device) for size in positions]
        positions = torch.stack(torch.meshgrid(*ticks, indexing="ij"), dim=-1).flatten(0, -2)
    axes = positions.shape[-1]
    if dims is None:
        each = head_dim // 2 // axes * 2
        dims = [head_dim - (axes - 1) * each] + [each] * (axes - 1)
    if len(dims) != axes or any(d % 2 or d < 0 for d in dims) or sum(dims) > head_dim:
        raise ValueError(
            f"dims: expected {axes} even numbers, one an axis, with a sum of at most {head_dim}; got {tuple(dims)}"
        )
    angles = positions.new_zeros((*positions.shape[:-1], head_dim // 2), dtype=torch.float64)
    start = 0
    for axis, d in enumerate(dims):
        exponents = torch.arange(d // 2, dtype=torch.float64, device=positions.device) * (-2 / max(d, 1))
        angles[..., start : start + d // 2] = positions[..., axis, None].double() * theta**exponents
        start += d // 2
    return angles.cos().to(dtype), angles.sin().to(dtype)


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
    """Norm over each head's channels, then rotary embedding, of queries and keys at once.

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
    constants = _check(named, cos, sin, norm, impl)
    primals = [x for _, x in named] + constants
    q_out, k_out = QK_NORM_ROPE(primals, (norm, _choice.number("eps", eps), interleaved, impl), _choice.tangent_grad())
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
    """`qk_norm_rope` and its directional derivative: ((q, k), (t_q, t_k)).

    Tangents have their primals' shapes, None is zero. With `tangent_grad=False` gradients flow through q and k only.

    Equivalent to:
        torch.func.jvp(lambda q, k: qk_norm_rope(q, k, cos, sin, q_weight, k_weight), (q, k), (t_q, t_k))
    """
    named = _named(q, k, q_weight, k_weight, q_bias, k_bias)
    constants = _check(named, cos, sin, norm, impl)
    given = (t_q, t_k, t_q_weight, t_k_weight, t_q_bias, t_k_bias)
    tangents = _choice.checked_tangents([(name, x, t) for (name, x), t in zip(named, given)], tangent_grad)
    primals, attrs = [x for _, x in named] + constants, (norm, _choice.number("eps", eps), interleaved, impl)
    outs, t_outs = QK_NORM_ROPE.pair(primals, [*tangents, None, None], attrs, tangent_grad)
    return (outs[0], outs[1]), (t_outs[0], t_outs[1])


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
    named: Sequence[tuple[str, Tensor | None]], cos: Tensor | None, sin: Tensor | None, norm: str, impl: str
) -> list[Tensor | None]:
    """Refuse by name what doesn't fit. Returns cos and sin as (B or 1, L, D/2)."""
    for name, x in named[:2]:
        _choice.check_tensor(name, x)
        if x is not None and x.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions (B, H, N, D), got {tuple(x.shape)}")
    q, k = named[0][1], named[1][1]
    assert q is not None and k is not None
    _choice.check_like("k", k, "q", q)
    if q.shape[-1] % 2 or q.shape[-1] == 0:
        raise ValueError(f"q: expected an even head dim, got {q.shape[-1]}")
    if (k.shape[0], k.shape[-1]) != (q.shape[0], q.shape[-1]):
        raise ValueError(f"k: expected the batch and head dim of q {tuple(q.shape)}, got {tuple(k.shape)}")
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))}, got {norm!r}")
    for name, x in named[2:]:
        if x is None:
            continue
        _choice.check_tensor(name, x)
        _choice.check_like(name, x, "q", q, dtype=False)
        if norm == "none":
            raise ValueError(f"{name}: expected None with norm='none', got a tensor of {tuple(x.shape)}")
        if x.shape != q.shape[-1:]:
            raise ValueError(f"{name}: expected shape {tuple(q.shape[-1:])}, got {tuple(x.shape)}")
    _choice.check_impl(impl, q.device)
    if (cos is None) != (sin is None):
        got = type(sin).__name__
        raise ValueError(f"sin: expected {'None as cos is' if cos is None else 'a tensor as cos is'}, got {got}")
    return [None if x is None else _angles(name, x, q, k) for name, x in (("cos", cos), ("sin", sin))]


def _angles(name: str, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    _choice.check_tensor(name, x)
    _choice.check_like(name, x, "q", q, dtype=False)
    rows = (max(q.shape[2], k.shape[2]), q.shape[-1] // 2)
    if tuple(x.shape) not in (rows, (1, *rows), (q.shape[0], *rows)):
        raise ValueError(
            f"{name}: expected {rows} or {(q.shape[0], *rows)}, a row for each token and a column for each pair of "
            f"channels; got {tuple(x.shape)}"
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"{name} requires grad, but the angles are constants here: pass {name}.detach()")
    return x if x.dim() == 3 else x[None]


def choose(q: Tensor, impl: str) -> str:
    """The implementation that runs: "torch" or "triton"."""
    if impl != "auto":
        return impl
    triton_runs = q.device.type == "cuda" and q.dtype != torch.float64 and q.shape[-1] <= MAX_TRITON_HEAD
    return "triton" if triton_runs and _choice.triton_problem(q.device) is None else "torch"


def _pairs(primals: Tensors, tangents: Tensors) -> list[Tensor | None]:
    """Arguments of an implementation: primals with their tangents, cos and sin, which have none."""
    for name, t in zip(("cos", "sin"), tangents[6:]):
        if t is not None:
            raise ValueError(f"{name}: expected a constant, got a tensor with a tangent")
    return [*(x for pair in zip(primals[:6], tangents[:6]) for x in pair), *primals[6:]]


def _forward(
    primals: Tensors, tangents: Tensors, attrs: Sequence[Any], tangent_grad: bool
) -> tuple[Tensors, Tensors, Tensors]:
    norm, eps, interleaved, impl = attrs
    assert primals[0] is not None
    implementation = _choice.implementation("qk_norm_rope", choose(primals[0], impl))
    q, t_q, k, t_k = implementation.qk_norm_rope_forward(
        *_pairs(primals, tangents), norm=norm, eps=eps, interleaved=interleaved
    )
    return (q, k), (t_q, t_k), ()


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
    norm, eps, interleaved, impl = attrs
    assert primals[0] is not None
    cotangents = [d for pair in zip(d_outs, dt_outs) for d in pair]
    implementation = _choice.implementation("qk_norm_rope", choose(primals[0], impl))
    grads = implementation.qk_norm_rope_backward(
        *cotangents,
        *_pairs(primals, tangents),
        norm=norm,
        eps=eps,
        interleaved=interleaved,
        needs=(*needs[:6], *needs[8:14]),
    )
    return [*grads[:6], None, None, *grads[6:], None, None]


def _native(primals: Tensors, attrs: Sequence[Any]) -> Tensors | None:
    """PyTorch has no such op."""
    return None


def _specs(
    primals: Tensors, tangents: Tensors, attrs: Sequence[Any], tangent_grad: bool
) -> tuple[Sequence[Spec], Sequence[Spec]]:
    return [(tuple(x.shape), x.dtype) for x in primals[:2] if x is not None], []


def _math(primals: Any, tangents: Any, attrs: Sequence[Any]) -> tuple[Tensors, Tensors]:
    """The formulas of the forward, differentiable any number of times."""
    norm, eps, interleaved, _ = attrs
    dtype = primals[0].dtype
    _pairs(primals, tangents)
    outs, t_outs = [], []
    for side in range(2):
        y, t_y = _wide(primals[side]), _wide(tangents[side])
        if norm != "none":
            (weight, bias), (t_weight, t_bias) = ((_wide(x[2 + side]), _wide(x[4 + side])) for x in (primals, tangents))
            y, t_y = _dense.norm_dual(
                (y, weight, bias, None, None), (t_y, t_weight, t_bias, None, None), eps, norm == "rms"
            )
        assert y is not None
        outs.append(_turned(y, primals, interleaved).to(dtype))
        t_outs.append(None if t_y is None else _turned(t_y, primals, interleaved).to(dtype))
    if any(t is not None for t in t_outs):
        t_outs = [torch.zeros_like(y) if t is None else t for y, t in zip(outs, t_outs)]
    return outs, t_outs


def _math_backward(
    d_outs: Tensors, dt_outs: Tensors, primals: Any, tangents: Any, attrs: Sequence[Any], needs: list[bool]
) -> Tensors:
    """The formulas of both backward passes."""
    norm, eps, interleaved, _ = attrs
    grads: list[Tensor | None] = [None] * 16
    for side in range(2):
        wide = (_wide(d_outs[side]), _wide(dt_outs[side]))
        dy, dt_y = (None if d is None else _turned(d, primals, interleaved, back=True) for d in wide)
        at = [side, 2 + side, 4 + side]
        if norm == "none":
            grads[side], grads[8 + side] = dy, dt_y
            continue
        point, direction = ((*(_wide(x[i]) for i in at), None, None) for x in (primals, tangents))
        wanted = [*(needs[i] for i in at), False, False, *(needs[8 + i] for i in at), False, False]
        found = _dense.norm_dual_backward(dy, dt_y, point, direction, eps, norm == "rms", wanted)
        for i, of_primal, of_tangent in zip(at, found[:3], found[5:8]):
            grads[i], grads[8 + i] = of_primal, of_tangent
    return [
        None if not need or like is None else torch.zeros_like(like) if grad is None else grad.to(like.dtype)
        for grad, like, need in zip(grads, [*primals, *primals], needs, strict=True)
    ]


def _turned(x: Tensor, primals: Any, interleaved: bool, back: bool = False) -> Tensor:
    cos, sin = (None if a is None else a.to(x.dtype) for a in primals[6:])
    return x if cos is None or sin is None else rotate(x, cos, -sin if back else sin, interleaved)


def _wide(x: Tensor | None) -> Tensor | None:
    """16-bit tensors in float32."""
    return None if x is None else x.to(torch.promote_types(x.dtype, torch.float32))


QK_NORM_ROPE = DualOp(
    name="qk_norm_rope",
    primals=("q", "k", "q_weight?", "k_weight?", "q_bias?", "k_bias?", "cos?", "sin?"),
    outputs=("q_out", "k_out"),
    attrs="str norm, float eps, bool interleaved, str impl",
    residuals=(),
    forward=_forward,
    backward=_backward,
    math=_math,
    math_backward=_math_backward,
    native=_native,
    specs=_specs,
    broadcastable=frozenset({"cos", "sin"}),
    unfoldable=frozenset({"q_weight", "k_weight", "q_bias", "k_bias"}),
    saves_outputs=False,
)
