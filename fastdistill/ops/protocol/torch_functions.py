"""PyTorch's own functions, bound when this package is imported.

A user may assign ours in their place, `torch.nn.functional.linear = fastdistill.linear`. A call by way of
`torch.nn.functional` would then come back to the op that makes it, without end.
"""

from __future__ import annotations

from torch.nn.functional import gelu, layer_norm, linear, pad, rms_norm, scaled_dot_product_attention, silu

__all__ = ["gelu", "layer_norm", "linear", "pad", "rms_norm", "scaled_dot_product_attention", "silu"]
