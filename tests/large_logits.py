"""Check attention's plain gradients in 16 bits, with large logits, for whichever implementation runs.

rowsum(dP∘P) = rowsum(do∘o) is subtracted from dP. Where logits are large or values have a mean, the difference is small
against both. With a rounded o, which PyTorch's own kernels take, dq and dk are wrong by some percent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdistill import reference
from fastdistill.testing import assert_accurate, make_qkv, relative_error

# These come from rounding P and dS; a rounded o would give ten times as much.
CAPS = {torch.bfloat16: 3.6e-3, torch.float16: 5e-4}


class Case(NamedTuple):
    """Describe logits of deviation `std`, the mean `common` of v, and a mask: None, "causal", "bool" or "float"."""

    d: int
    std: float
    common: float = 3.0
    mask: str | None = None
    kv_heads: int = 2


# The cases have head dims of one and of two parts, logits that are ordinary, large and nearly one-hot, each mask, and
# grouped queries.
CASES = [
    Case(64, 1.0),
    Case(64, 16.0),
    Case(72, 64.0, mask="causal"),
    Case(72, 16.0, mask="bool"),
    Case(128, 4.0, mask="float"),
    Case(128, 64.0, mask="causal"),
    Case(64, 16.0, common=100.0),
    Case(64, 64.0, common=0.0, kv_heads=1),
]


def check_gradients(attention: Callable[..., Tensor], case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Assert that the gradients keep the rule beside those of PyTorch's math attention, and a cap.

    attention takes q, k, v and the keywords attn_mask, is_causal and enable_gqa.
    """
    q, k, v = make_qkv(1, 2, 40, case.d, kv_heads=case.kv_heads, dtype=torch.float64, device=device)
    inputs = [x.to(dtype) for x in (q * case.std, k, v + case.common)]
    options: dict[str, Any] = {"is_causal": case.mask == "causal", "enable_gqa": case.kv_heads == 1}
    if case.mask in ("bool", "float"):
        mask = torch.randn(1, 1, 40, 40, generator=torch.Generator().manual_seed(2)).to(device)
        options["attn_mask"] = mask > -1 if case.mask == "bool" else 4 * mask.to(dtype)
    do = torch.randn(1, 2, 40, case.d, generator=torch.Generator().manual_seed(3)).to(device, dtype)

    def gradients(op: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        return torch.autograd.grad(op(*leaves, **options), leaves, do.to(dtype))

    def exact(*qkv: Tensor, attn_mask: Tensor | None = None, is_causal: bool, enable_gqa: bool) -> Tensor:
        mask = attn_mask.double() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
        return reference.attention(*qkv, mask, window=(-1, 0) if is_causal else (-1, -1))

    truths = gradients(exact, torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        baselines = gradients(F.scaled_dot_product_attention, dtype)
    for name, found, truth, baseline in zip("qkv", gradients(attention, dtype), truths, baselines):
        assert_accurate(found, truth, baseline, name=f"gradient of {name}")
        assert relative_error(found, truth) < CAPS[dtype], name
