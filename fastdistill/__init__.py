"""fastdistill: exact fused tangents for transformer flow maps, and a lean trainer that uses them."""

from __future__ import annotations

from fastdistill import ops
from fastdistill.jvp import jvp
from fastdistill.ops import (
    ada_layer_norm,
    ada_layer_norm_jvp,
    attention_jvp,
    explain,
    layer_norm,
    layer_norm_jvp,
    rms_norm,
    rms_norm_jvp,
    scaled_dot_product_attention,
    varlen_attention,
    varlen_attention_jvp,
)

__version__ = "0.1.0"

__all__ = [
    "ada_layer_norm",
    "ada_layer_norm_jvp",
    "attention_jvp",
    "explain",
    "jvp",
    "layer_norm",
    "layer_norm_jvp",
    "ops",
    "rms_norm",
    "rms_norm_jvp",
    "scaled_dot_product_attention",
    "varlen_attention",
    "varlen_attention_jvp",
]
