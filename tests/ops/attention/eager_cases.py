"""Problems for the blockwise attention, and its two functions called by name of argument."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill import reference
from fastdistill.ops.attention import eager
from fastdistill.ops.protocol.pair import Pair, flat, paired
from fastdistill.testing import assert_accurate, cast, make_qkv, reference_jvp, reference_vjp

NAMES = ("q", "k", "v", "attn_mask", "t_q", "t_k", "t_v", "t_attn_mask")
SUBSETS = ["".join(names) for r in range(4) for names in itertools.combinations("qkv", r)]
COTANGENTS = [names for r in range(1, 5) for names in itertools.combinations(("do", "dt_o", "d_lse", "d_mu"), r)]
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CAUSAL = (-1, 0)
Tensors = dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    """Problem, whose `mask` names a maker in MASKS, and `tangents` the primals that have one."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 4
    n: int = 33
    m: int = 33
    d: int = 32
    dv: int = 32
    dtype: str = "fp32"
    layout: str = "bhnd"
    window: tuple[int, int] = (-1, -1)
    lower_right: bool = False
    mask: str = ""
    tangents: str = "qkv"

    def __str__(self) -> str:
        shape = f"B{self.batch}-H{self.heads}/{self.kv_heads}-N{self.n}-M{self.m}-D{self.d}-Dv{self.dv}-{self.dtype}"
        band = "" if self.window == (-1, -1) else f"W{self.window[0]},{self.window[1]}"
        parts = [self.layout, band, "lower_right" if self.lower_right else "", self.mask, self.tangents or "none"]
        return "-".join([shape, *filter(None, parts)])

    def band(self) -> dict[str, Any]:
        """Return which keys a query sees, as the functions take it."""
        return {"window": self.window, "lower_right": self.lower_right}


def bool_mask(*shape: int) -> Tensor:
    return torch.rand(*shape) < 0.6


def with_dead_rows(*shape: int) -> Tensor:
    mask = bool_mask(*shape)
    mask[..., ::5, :] = False
    return mask


def dead_by_infinity(*shape: int) -> Tensor:
    return torch.zeros(shape).masked_fill_(~with_dead_rows(*shape), -math.inf)


MASKS: dict[str, Callable[[Case], Tensor]] = {
    "bool_bnm": lambda c: with_dead_rows(c.batch, 1, c.n, c.m),
    "bool_full": lambda c: with_dead_rows(c.batch, c.heads, c.n, c.m),
    "bool_nm": lambda c: bool_mask(c.n, c.m),
    "key_padding": lambda c: bool_mask(c.batch, 1, 1, c.m),
    "float_full": lambda c: torch.randn(c.batch, c.heads, c.n, c.m),
    "float_hnm": lambda c: torch.randn(1, c.heads, c.n, c.m),
    "float_m": lambda c: torch.randn(c.m),
    "float_dead": lambda c: dead_by_infinity(c.n, c.m),
}


def problem(case: Case) -> tuple[Tensors, Tensors]:
    """Return primals and tangents of a case; masks are expanded as the ops hand them over."""
    sizes: dict[str, Any] = {"kv_heads": case.kv_heads, "m": case.m, "dv": case.dv, "layout": case.layout}
    tensors = [
        make_qkv(case.batch, case.heads, case.n, case.d, dtype=DTYPES[case.dtype], seed=seed, **sizes)
        for seed in (0, 1)
    ]
    primals: Tensors = dict(zip("qkv", tensors[0], strict=True))
    tangents: Tensors = {name: x if name in case.tangents else None for name, x in zip("qkv", tensors[1], strict=True)}
    mask = MASKS[case.mask](case) if case.mask else None
    primals["attn_mask"] = prepared(mask, case)
    if mask is not None and "m" in case.tangents:
        tangents["attn_mask"] = prepared(torch.randn(mask.shape), case)
    return primals, tangents


def prepared(mask: Tensor | None, case: Case) -> Tensor | None:
    if mask is None:
        return None
    mask = mask.to(DTYPES[case.dtype]) if mask.is_floating_point() else mask
    return mask.expand(case.batch, case.heads, case.n, case.m)


def forward(primals: Tensors, tangents: Tensors, *, tangent_grad: bool = False, **band: Any) -> Any:
    """Return o, t_o, lse, mu, o_rest and t_o_rest."""
    q, k, v, mask = (primals.get(name) for name in NAMES[:4])
    assert q is not None
    assert k is not None
    assert v is not None
    inputs = paired((q, k, v, mask), map(tangents.get, NAMES[:4]))
    options: dict[str, Any] = {"window": (-1, -1), "lower_right": False, "cu_seqlens": None} | band
    outputs, rests = eager.attention_forward(inputs, scale=q.shape[-1] ** -0.5, tangent_grad=tangent_grad, **options)
    return [*(x for pair in outputs for x in pair), *rests]


def backward(
    primals: Tensors,
    tangents: Tensors,
    do: Tensor | None = None,
    dt_o: Tensor | None = None,
    d_lse: Tensor | None = None,
    d_mu: Tensor | None = None,
    *,
    needs: tuple[bool, ...] | None = None,
    **band: Any,
) -> Tensors:
    """Return gradients by name; by default all those that autodiff would give."""
    q, k, v, mask = (primals.get(name) for name in NAMES[:4])
    assert q is not None
    assert k is not None
    assert v is not None
    moving = [tangents.get(name) for name in NAMES[:4]]
    if needs is None:
        needs_mask, mixed = mask is not None and mask.is_floating_point(), dt_o is not None or d_mu is not None
        needs = (True, True, True, needs_mask, *(mixed and t is not None for t in moving))
    options: dict[str, Any] = {"window": (-1, -1), "lower_right": False, "cu_seqlens": None} | band
    o, t_o, lse, mu, *rests = forward(primals, tangents, **band)
    gradients = flat(
        eager.attention_backward(
            (Pair(do, dt_o), Pair(d_lse, d_mu)),
            paired((q, k, v, mask), moving),
            ((Pair(o, t_o), Pair(lse, mu)), rests),
            scale=q.shape[-1] ** -0.5,
            needs=list(zip(needs[:4], needs[4:])),
            **options,
        )
    )
    assert [x is not None for x in gradients] == list(needs)
    return dict(zip(NAMES, gradients, strict=True))


def specification(cu_seqlens: tuple[Tensor, Tensor, int, int] | None = None, **band: Any) -> Callable[..., Tensor]:
    """Return a function of q, k, v and mask: [o | lse] side by side, (B, H, N, Dv + 1), with 0 for an lse of -inf."""

    def one(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        lse = reference.attention_lse(q, k, attn_mask, **band)
        return torch.cat([reference.attention(q, k, v, attn_mask, **band), finite(lse)[..., None]], dim=-1)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert cu_seqlens is not None
        starts_n, starts_m = (x.tolist() for x in cu_seqlens[:2])
        bounds = zip(itertools.pairwise(starts_n), itertools.pairwise(starts_m))
        parts = [one(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d]) for (a, b), (c, d) in bounds]
        return F.pad(torch.cat(parts, dim=2), (0, 0, starts_n[0], q.shape[2] - starts_n[-1]))

    return one if cu_seqlens is None else packed


def finite(lse: Tensor) -> Tensor:
    """Replace infinities by 0, which is the lse of a query that sees no key."""
    return lse.masked_fill(lse == -math.inf, 0.0)


def beside(wide: Tensor | None, column: Tensor | None, like: Tensor) -> Tensor | None:
    """Return [wide | column] as the specification has it, absent parts being zeros of the shape of `like`."""
    if wide is None and column is None:
        return None
    wide = torch.zeros_like(like) if wide is None else wide
    column = torch.zeros(like.shape[:-1]) if column is None else column
    return torch.cat([wide, column[..., None].to(wide.dtype)], dim=-1)


def check_forward(primals: Tensors, tangents: Tensors, **band: Any) -> None:
    """Check o, t_o, lse and mu by the tolerance rule."""
    fn, exact = specification(**band), (cast(primals, torch.float64), cast(tangents, torch.float64))
    truths, baselines = reference_jvp(fn, *exact), reference_jvp(fn, primals, tangents)
    o, t_o, lse, mu, *_ = forward(primals, tangents, **band)
    q = primals["q"]
    assert q is not None
    assert o.dtype == q.dtype
    if all(t is None for t in tangents.values()):
        assert t_o is mu is None
        t_o, mu = torch.zeros_like(o), torch.zeros_like(lse)
    assert ((lse == -math.inf) == (truths[0][..., -1] == 0)).all()
    for name, i, wide, column in (("", 0, o, finite(lse)), ("t_", 1, t_o, mu)):
        for part, actual, at in ((f"{name}o", wide, slice(-1)), (f"{name}lse", column[..., None], slice(-1, None))):
            assert_accurate(actual, truths[i][..., at], baselines[i][..., at], name=part)


def check_backward(
    primals: Tensors,
    tangents: Tensors,
    do: Tensor | None = None,
    dt_o: Tensor | None = None,
    d_lse: Tensor | None = None,
    d_mu: Tensor | None = None,
    **band: Any,
) -> None:
    """Check all gradients, from some of the cotangents, by the tolerance rule."""
    fn, exact = specification(**band), (cast(primals, torch.float64), cast(tangents, torch.float64))
    like = forward(primals, tangents, **band)[0]
    d_out, dt_out = beside(do, d_lse, like), beside(dt_o, d_mu, like)
    d_out = beside(torch.zeros_like(like), None, like) if d_out is None else d_out
    assert d_out is not None
    truths = reference_vjp(fn, *exact, d_out.double(), None if dt_out is None else dt_out.double())
    baselines = reference_vjp(fn, primals, tangents, d_out, dt_out)
    gradients = backward(primals, tangents, do, dt_o, d_lse, d_mu, **band)
    found = {name: x for name, x in gradients.items() if x is not None}
    assert found.keys() == truths.keys()
    for name, actual in found.items():
        kind, order = ("primal", 1) if dt_out is None else ("mixed", 2)
        assert_accurate(actual, truths[name], baselines[name], name=f"{kind} d{name}", order=order)


def cotangents(primals: Tensors) -> list[Tensor]:
    """Return do, dt_o, d_lse and d_mu, representable in the dtype of q, the latter two in that of lse."""
    q, v = primals["q"], primals["v"]
    assert q is not None
    assert v is not None
    wide, columns = torch.randn(2, *q.shape[:-1], v.shape[-1]).to(q.dtype), torch.randn(2, *q.shape[:-1]).to(q.dtype)
    return [*wide, *columns.to(torch.promote_types(q.dtype, torch.float32))]
