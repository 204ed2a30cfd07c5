"""Test everything by everything, for a few minutes: head dims, dtypes, tangents, masks and lengths."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from tests.kernels.attention_cases import CAUSAL, SUBSETS, Tensors, check, inputs, normal, packed_inputs
from tests.kernels.device import DEVICE, INTERPRETED

# Lengths are one below, at and above whole tiles, both ways; many tiles come only where they are quick.
LENGTHS = [(1, 65), (31, 33), (33, 31), (40, 1), (17, 63), (63, 20)]
LENGTHS += [] if INTERPRETED else [(127, 1025), (1000, 129), (777, 777)]
MASKS = ["none", "causal", "lower right", "window", "bool", "float", "padding", "packed"]


def case(tangents: str, mask: str, n: int, m: int, **shape: Any) -> tuple[Tensors, Tensors, dict[str, Any]]:
    """Return inputs under such a mask, and the options that go with it."""
    if mask == "packed":
        primals, directions, cu_seqlens = packed_inputs([n, 3, m], [m, 5, n], **shape)
        return primals, {x: directions[x] for x in tangents}, {"cu_seqlens": cu_seqlens, "window": (40, 9)}
    primals, directions = inputs(tangents, n=n, m=m, **shape)
    if mask == "bool":
        primals["attn_mask"] = normal(1, 1, n, m) > 0
    elif mask == "float":
        bias, t_bias = normal(2, 1, 1, n, m).to(primals["q"].dtype)
        primals["attn_mask"], directions["attn_mask"] = bias.masked_fill(normal(n, m) > 1, -math.inf), t_bias
    elif mask == "padding":
        primals["attn_mask"] = torch.arange(m, device=DEVICE).view(1, 1, 1, m) < m // 2 + 1
    bands = {"causal": {"window": CAUSAL}, "window": {"window": (20, 5)}}
    return (
        primals,
        directions,
        bands.get(mask, {"window": CAUSAL, "lower_right": True} if mask == "lower right" else {}),
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [32, 64, 72, 80, 96, 112, 128, 256])
def test_everything_by_everything(d: int, dtype: torch.dtype) -> None:
    """Check each mask with each set of tangents (interpreted: every third); lengths, Dv and heads take turns."""
    pairs = [*itertools.product(MASKS, SUBSETS)][d // 8 % 3 :: 3 if INTERPRETED else 1]
    turns = zip(itertools.cycle(LENGTHS), itertools.cycle([d, 40, d, 72, d]), itertools.cycle([(1, 1), (2, 1)]))
    for (mask, tangents), ((n, m), dv, (heads, kv_heads)) in zip(pairs, turns):
        primals, directions, options = case(
            tangents, mask, n, m, heads=heads, kv_heads=kv_heads, d=d, dv=dv, dtype=dtype, device=DEVICE
        )
        try:
            check(primals, directions, **options)
        except AssertionError as error:
            raise AssertionError(f"{mask}, tangents of {tangents or 'nothing'}, N {n}, M {m}, Dv {dv}") from error
