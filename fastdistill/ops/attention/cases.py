"""Say of attention, padded and packed, what its tests and benchmarks have to know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.attention import functions, reference, varlen
from fastdistill.ops.protocol import torch_functions as F
from fastdistill.ops.protocol.cases import COUNTED, PublicOp, Sizes

PAIR_NAMES = {"query": "q", "key": "k", "value": "v"}
# Matmuls of 2 B H N M D operations that a mode is credited with, whatever an implementation does.
MATMULS = {"plain": 2, "forward": 6, "primal": 5, "mixed": 15}
WINDOWS: tuple[Mapping[str, Any], ...] = (
    {},
    {"scale": 0.3},
    {"window_size": (1, 0)},
    {"window_size": (-1, 0), "align": "lower_right"},
    {"window_size": (-1, 0), "align": "upper_left"},
    {"return_lse": True},
    {"centre": True},
)
LONGER = {**COUNTED, "B": 1, "N": 256, "M": 256}
PARTS = 0.78, 0.22  # of the tokens, in each of two packed sequences


def _flops(sizes: Sizes, mode: str) -> float:
    return 2.0 * MATMULS[mode] * sizes["B"] * sizes["H"] * sizes["N"] * sizes["M"] * sizes["D"]


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    align: str = "upper_left",
    return_lse: bool = False,
    **_: Any,
) -> Any:
    """Return the formula under the pair's argument names; `centre` and the others change nothing in real numbers."""
    band = (window_size[0], 0 if is_causal else window_size[1])
    options: dict[str, Any] = {"scale": scale, "window": band, "lower_right": align == "lower_right"}
    out = reference.attention(q, k, v, attn_mask, **options)
    return (out, reference.attention_lse(q, k, attn_mask, **options)) if return_lse else out


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    align: str = "lower_right",
    return_lse: bool = False,
    **options: Any,
) -> Any:
    """Return `_attention` of each packed sequence by itself."""
    bounds_q, bounds_k = cu_seq_q.tolist(), (cu_seq_q if cu_seq_k is None else cu_seq_k).tolist()
    outs, lses = [], []
    for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:]):
        one, keys, values = (x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        out, lse = _attention(one, keys, values, align=align, return_lse=True, **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return (torch.cat(outs), torch.cat(lses, -1)) if return_lse else torch.cat(outs)


def _bounds(sizes: Sizes) -> Mapping[str, Any]:
    """Return two sequences, or for the tiniest ones three, one of them empty."""
    n = sizes["N"]
    first = n - 1 if n < 8 else round(PARTS[0] * n)
    inner = [first, first] if n < 8 else [first]
    return {"cu_seq_q": torch.tensor([0, *inner, n]), "cu_seq_k": None, "max_q": first, "max_k": first}


def _key_mask(sizes: Sizes) -> Tensor:
    return torch.arange(sizes["M"]) < round(PARTS[0] * sizes["M"])


CASES = (
    PublicOp(
        name="attention",
        op=functions.scaled_dot_product_attention,
        pair=functions.attention_jvp,
        reference=_attention,
        native=F.scaled_dot_product_attention,
        tensors={
            "query": ("B", "H", "N", "D"),
            "key": ("B", "G", "M", "D"),
            "value": ("B", "G", "M", "E"),
            "attn_mask": ("N", "M"),
        },
        outputs={"o": ("B", "H", "N", "E")},
        tiny={"B": 1, "H": 2, "G": 2, "N": 2, "M": 3, "D": 2, "E": 1},
        optional=("attn_mask",),
        options=(
            *WINDOWS,
            {"is_causal": True},
            {"dropout_p": 0.0},
            {"enable_gqa": True, "shapes": {"key": (1, 1, 3, 2), "value": (1, 1, 3, 1)}},
        ),
        variants={
            "": {},
            "causal": {"is_causal": True},
            "window": {"window_size": (64, 64)},
            "key mask": {"attn_mask": _key_mask},
            "grouped": {"enable_gqa": True, "sizes": {"G": 2}},
        },
        pair_names=PAIR_NAMES,
        op_only=("dropout_p",),
        flops=_flops,
        counted=LONGER,
    ),
    PublicOp(
        name="varlen_attention",
        op=varlen.varlen_attention,
        pair=varlen.varlen_attention_jvp,
        reference=_packed,
        native=_packed,
        tensors={"query": ("N", "H", "D"), "key": ("N", "G", "D"), "value": ("N", "G", "E")},
        outputs={"o": ("N", "H", "E")},
        tiny={"H": 2, "G": 2, "N": 3, "D": 2, "E": 1},
        options=(*WINDOWS, {"enable_gqa": True, "shapes": {"key": (3, 1, 2), "value": (3, 1, 1)}}),
        launched=(),
        constants=_bounds,
        pair_names=PAIR_NAMES,
        op_only=("centre",),
        flops=lambda sizes, mode: _flops({**sizes, "B": 1, "M": sizes["N"]}, mode),
        counted=LONGER,
    ),
)
