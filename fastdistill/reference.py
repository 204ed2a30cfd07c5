"""Gather the specification of every op, in plain PyTorch, from the ops' rooms."""

from __future__ import annotations

from fastdistill.ops.activation.reference import geglu, gelu, silu, swiglu
from fastdistill.ops.attention.reference import attention, attention_lse, band, varlen_attention
from fastdistill.ops.gated_norm.reference import gated_residual_ada_norm
from fastdistill.ops.linear.reference import linear
from fastdistill.ops.norm.reference import ada_layer_norm, ada_rms_norm, layer_norm, norm, rms_norm
from fastdistill.ops.qk_norm_rope.reference import head_norm, qk_norm_rope, rotary
from fastdistill.ops.time_embedding.reference import timestep_embedding

__all__ = [
    "ada_layer_norm",
    "ada_rms_norm",
    "attention",
    "attention_lse",
    "band",
    "gated_residual_ada_norm",
    "geglu",
    "gelu",
    "head_norm",
    "layer_norm",
    "linear",
    "norm",
    "qk_norm_rope",
    "rms_norm",
    "rotary",
    "silu",
    "swiglu",
    "timestep_embedding",
    "varlen_attention",
]
