"""Cases that the tests of both implementations of `qk_norm_rope` share, and the check by the tolerance rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdistill import reference
from fastdistill.ops import rope_angles
from fastdistill.ops.protocol.pair import Pair
from fastdistill.testing import assert_accurate, cast, reference_jvp, reference_vjp, relative_error

NAMES = ("q", "k", "q_weight", "k_weight", "q_bias", "k_bias")
ALL_NAMES = (*NAMES, *(f"t_{name}" for name in NAMES))
CAPS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
EPS = 1e-3
Tensors = dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    """Problem with the arguments `parts` beside q and k; those in `tangents` (q, k among them) have a tangent."""

    norm: str = "rms"
    interleaved: bool = False
    parts: tuple[str, ...] = NAMES[2:]
    tangents: tuple[str, ...] = NAMES
    heads: tuple[int, int] = (4, 2)
    lengths: tuple[int, int] = (7, 7)
    d: int = 16
    dtype: torch.dtype = torch.float32
    angles: str = "shared"  # by all samples, "each" has its own, or "none"
    offset: float = 0.5  # of queries and keys, so that means matter
    spread: float = 1.0

    def __str__(self) -> str:
        parts, tangents = "+".join(self.parts) or "plain", "+".join(self.tangents) or "none"
        pairs = "neighbours" if self.interleaved else "halves"
        sizes = "H{}.{}-N{}.{}".format(*self.heads, *self.lengths)
        dtype = str(self.dtype).removeprefix("torch.")
        values = f"{self.offset}±{self.spread}"
        return "-".join([self.norm, pairs, parts, tangents, sizes, f"D{self.d}", dtype, self.angles, values])


def problem(case: Case, device: str = "cpu", batch: int = 2) -> tuple[Tensors, Tensors, list[Tensor | None]]:
    """Return primals, tangents, and [cos, sin]."""
    (h, h_kv), (n, m), d = case.heads, case.lengths, case.d
    shapes = dict(zip(NAMES, ((batch, h, n, d), (batch, h_kv, m, d), *[(d,)] * 4), strict=True))
    parts = case.parts if case.norm != "none" else ()

    def draw(names: tuple[str, ...], offset: float, spread: float) -> Tensors:
        values: Tensors = dict.fromkeys(NAMES)
        for name in ("q", "k", *parts):
            if name in names:
                x = torch.randn(shapes[name], dtype=torch.float64)
                values[name] = (offset + spread * x if x.dim() > 1 else x).to(device, case.dtype)
        return values

    angles: list[Tensor | None] = [None, None]
    if case.angles != "none":
        positions = torch.randn(batch if case.angles == "each" else 1, max(n, m), 2)
        angles = [x.to(device) for x in rope_angles(positions, d)]
    return draw(NAMES, case.offset, case.spread), draw(case.tangents, 0.0, 1.0), angles


def inputs(primals: Tensors, tangents: Tensors, angles: Any) -> list[Pair]:
    """Return pairs in the order of the implementations' inputs."""
    return [*(Pair(primals[name], tangents[name]) for name in NAMES), *map(Pair, angles)]


def forward(implementation: Any, case: Case, primals: Tensors, tangents: Tensors, angles: Any) -> tuple[Any, ...]:
    """Return (q_out, t_q_out, k_out, t_k_out)."""
    outs, _ = implementation.qk_norm_rope_forward(inputs(primals, tangents, angles), **options(case))
    return tuple(x for pair in outs for x in pair)


def backward(
    implementation: Any,
    case: Case,
    cotangents: Any,
    problem: tuple[Tensors, Tensors, Any],
    needs: Sequence[bool] = (True,) * 12,
) -> list[Tensor | None]:
    """Return the gradients of the primals and then of the tangents, from those of (q, t_q, k, t_k)."""
    of_q, of_k, none = Pair(*cotangents[:2]), Pair(*cotangents[2:]), (False, False)
    wanted = [*zip(needs[:6], needs[6:]), none, none]
    point = inputs(*problem)
    grads = implementation.qk_norm_rope_backward((of_q, of_k), point, ((), ()), **options(case), needs=wanted)
    assert [tuple(pair) for pair in grads[6:]] == [(None, None)] * 2
    primals, tangents = zip(*grads[:6])
    return [*primals, *tangents]


def flat(outputs: Any) -> Tensor:
    """Join queries and keys into one vector."""
    return torch.cat([x.flatten() for x in outputs])


def options(case: Case) -> dict[str, Any]:
    """Return the implementations' keyword arguments."""
    return {"norm": case.norm, "eps": EPS, "interleaved": case.interleaved}


def check(implementation: Any, case: Case, device: str = "cpu", *, backwards: int = 3) -> None:
    """Check that forward and the backward passes asked for keep the tolerance rule and absolute caps."""
    primals, tangents, angles = problem(case, device)
    moving = any(t is not None for t in tangents.values())
    found = forward(implementation, case, primals, tangents, angles)
    assert all(x is None or (x.dtype == case.dtype and x.is_contiguous()) for x in found)

    def at(dtype: torch.dtype) -> tuple[Any, Tensors, Tensors]:
        turn = [None if a is None else a.to(dtype) for a in angles]

        def fn(**tensors: Tensor | None) -> Tensor:
            q, k, *rest = tensors.values()
            return flat(reference.qk_norm_rope(q, k, *turn, *rest, case.norm, EPS, case.interleaved))

        return fn, cast(primals, dtype), cast(tangents, dtype)

    def compare(name: str, actual: Tensor, truth: Tensor, base: Tensor, order: int = 1) -> None:
        assert_accurate(actual, truth, base, name=name, order=order)
        if actual.numel() > 200:  # a few elements may be all cancellation
            assert relative_error(actual, truth) < CAPS[case.dtype], name

    exact, low = at(torch.float64), at(case.dtype)
    truths, bases = reference_jvp(*exact), reference_jvp(*low)
    compare("values", flat(found[0::2]), truths[0], bases[0])
    if not moving:
        assert found[1] is None and found[3] is None
        found = (found[0], torch.zeros_like(found[0]), found[2], torch.zeros_like(found[2]))
    else:
        compare("tangents", flat(found[1::2]), truths[1], bases[1])

    d = [torch.randn(x.shape, device=device).to(case.dtype) for x in found]
    kinds = [(True, True), (True, False), (False, True)] if moving else [(True, False)]
    for has_primal, has_tangent in kinds[:backwards]:
        given = [x if (has_primal, has_tangent)[i % 2] else None for i, x in enumerate(d)]
        cotangents = flat(torch.zeros_like(x) if g is None else g for x, g in zip(d[0::2], given[0::2])), flat(d[1::2])
        needs = [primals[name] is not None for name in NAMES]
        needs += [has_tangent and tangents[name] is not None for name in NAMES]
        grads = backward(implementation, case, given, (primals, tangents, angles), needs)
        assert [g is not None for g in grads] == needs
        dt = cotangents[1] if has_tangent else None
        truth = reference_vjp(*exact, cotangents[0].double(), None if dt is None else dt.double())
        base = reference_vjp(*low, cotangents[0], dt)
        named = {name: g for name, g in zip(ALL_NAMES, grads, strict=True) if g is not None}
        assert named.keys() == truth.keys()
        for name, grad in named.items():
            assert grad.dtype == case.dtype and grad.is_contiguous()
            compare(f"d{name}", grad, truth[name], base[name], order=2 if has_tangent else 1)
