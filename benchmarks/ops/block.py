"""Define the benchmark of a DiT block: modulation, attention and mlp with their norms, in one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdistill as fd
from fastdistill.benchmarks.ops import torch_functions
from fastdistill.benchmarks.ops.attention import COMPILED_TOKENS, matrices_too_large
from fastdistill.benchmarks.ops.common_providers import (
    DIFFERENCES,
    JVP,
    WRITTEN_OUT,
    compiled,
    dual_provider,
    ours,
    plain_floor,
)
from fastdistill.benchmarks.ops.timed_op import (
    PEER,
    Dual,
    OpForms,
    Provider,
    Tensors,
    TimedCase,
    as_tuple,
    by_differences,
    by_jvp,
    few,
)

PARAMETERS = ("w_mod", "b_mod", "w_qkv", "b_qkv", "w_proj", "b_proj", "w_fc1", "b_fc1", "w_fc2", "b_fc2")
SMALL = 128  # Number of tokens at the parity gate; the width stays.
# A block has 24 C² N operations of linear layers and 4 C N² of attention. These factors are for the primal, the primal
# with its tangent, the primal backward, and the mixed backward.
LINEARS, ATTENTIONS = (1, 2, 2, 4), (1, 3, 2.5, 7.5)


def block(o: Any, heads: int, x: Tensor, c: Tensor, *parameters: Tensor) -> Tensor:
    """Compute DiT's block (arXiv:2212.09748) with the ops of the namespace o; x is (B, N, C), c is (B, C)."""
    w_mod, b_mod, w_qkv, b_qkv, w_proj, b_proj, w_fc1, b_fc1, w_fc2, b_fc2 = parameters
    modulation = o.linear(o.silu(c), w_mod, b_mod)[:, None].chunk(6, dim=-1)
    shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
    qkv = o.linear(o.ada_layer_norm(x, scale_attn, shift_attn), w_qkv, b_qkv).unflatten(-1, (3, heads, -1))
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    h = o.linear(o.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), w_proj, b_proj)
    x, y = o.gated_residual_ada_norm(x, gate_attn, h, scale_mlp, shift_mlp)
    return x + gate_mlp * o.linear(o.gelu(o.linear(y, w_fc1, b_fc1), approximate="tanh"), w_fc2, b_fc2)


def _make(case: TimedCase, draw: Callable[..., Tensor]) -> Tensors:
    b, n, c = (case.size(name) for name in ("batch", "n", "width"))

    def layer(out: int, into: int) -> Tensors:
        return draw(out, into) * into**-0.5, 0.1 * draw(out)

    return (
        draw(b, n, c),
        draw(b, c),
        *layer(6 * c, c),
        *layer(3 * c, c),
        *layer(c, c),
        *layer(4 * c, c),
        *layer(c, 4 * c),
    )


def _with(o: Any) -> Callable[[TimedCase], Callable[..., Tensor]]:
    return lambda case: lambda *primals: block(o, case.size("heads"), *primals)


def _pair(case: TimedCase, impl: str) -> Dual:
    fn = _with(torch_functions.ours_by(impl))(case)

    def dual(primals: Tensors, tangents: Sequence[Tensor | None], mixed: bool) -> tuple[Tensors, Tensors]:
        out, t_out = fd.jvp(fn, primals, tangents, tangent_grad=mixed)
        return as_tuple(out), as_tuple(t_out)

    return dual


def _flops(case: TimedCase, floor: bool) -> float:
    b, n, c = (case.size(name) for name in ("batch", "n", "width"))
    i = {"forward": 0 if floor else 1, "primal": 2, "mixed": 3}[case.mode]
    return b * (LINEARS[i] * 24.0 * c**2 * n + ATTENTIONS[i] * 4.0 * c * n**2)


def _math() -> Any:
    return sdpa_kernel(SDPBackend.MATH)


OWN = _with(torch_functions.namespace(torch_functions.OWN))
NORMS_WRITTEN_OUT = _with(torch_functions.namespace(torch_functions.WRITTEN_OUT))
DECOMPOSED = _with(torch_functions.namespace(torch_functions.DECOMPOSED))


def _common(op: OpForms, device: torch.device) -> list[Provider]:
    def too_large(case: TimedCase) -> str | None:
        return matrices_too_large(case.resized(m=case.size("n"), d=64), device)

    def refuses_compiled(case: TimedCase) -> str | None:
        return too_large(case) if case.size("n") <= COMPILED_TOKENS else f"compiled up to {COMPILED_TOKENS} tokens only"

    return [
        *ours(op, device),
        dual_provider(f"{JVP}, math", PEER, lambda case: by_jvp(OWN(case)), refuses=too_large, context=_math),
        dual_provider(
            WRITTEN_OUT, PEER, lambda case: by_jvp(NORMS_WRITTEN_OUT(case)), refuses=too_large, context=_math
        ),
        compiled(DECOMPOSED, refuses_compiled),
        dual_provider(DIFFERENCES, PEER, lambda case: by_differences(OWN(case))),
        plain_floor("PyTorch, no tangent", OWN),
    ]


BLOCK = OpForms(
    name="block",
    primals=("x", "c", *PARAMETERS),
    moving=("x", "c"),
    results=("y",),
    like=("x",),
    make=_make,
    reference=DECOMPOSED,
    own=OWN,
    pair=_pair,
    flops=_flops,
    small=lambda case: case.resized(batch=1, n=few(case.size("n"), SMALL)),
    common=_common,
)
