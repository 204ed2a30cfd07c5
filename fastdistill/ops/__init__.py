"""Ops under the dual protocol: the public functions and their explicit pairs."""

from __future__ import annotations

from fastdistill.ops.attention import attention_jvp, explain, scaled_dot_product_attention
from fastdistill.ops.merge import merge_attention, merge_attention_jvp
from fastdistill.ops.norm import (
    ada_layer_norm,
    ada_layer_norm_jvp,
    layer_norm,
    layer_norm_jvp,
    rms_norm,
    rms_norm_jvp,
)
from fastdistill.ops.varlen import varlen_attention, varlen_attention_jvp

__all__ = [
    "ada_layer_norm",
    "ada_layer_norm_jvp",
    "attention_jvp",
    "explain",
    "layer_norm",
    "layer_norm_jvp",
    "merge_attention",
    "merge_attention_jvp",
    "rms_norm",
    "rms_norm_jvp",
    "scaled_dot_product_attention",
    "varlen_attention",
    "varlen_attention_jvp",
]
