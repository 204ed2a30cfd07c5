"""Ops under the dual protocol: the public functions and their explicit pairs."""

from __future__ import annotations

from fastdistill.ops.activation.functions import geglu, geglu_jvp, gelu, gelu_jvp, silu, silu_jvp, swiglu, swiglu_jvp
from fastdistill.ops.attention.functions import attention_jvp, explain, scaled_dot_product_attention
from fastdistill.ops.attention.merge import merge_attention, merge_attention_jvp
from fastdistill.ops.attention.varlen import varlen_attention, varlen_attention_jvp
from fastdistill.ops.gated_norm.functions import gated_residual_ada_norm, gated_residual_ada_norm_jvp
from fastdistill.ops.linear.functions import linear, linear_jvp
from fastdistill.ops.norm.functions import (
    ada_layer_norm,
    ada_layer_norm_jvp,
    ada_rms_norm,
    ada_rms_norm_jvp,
    layer_norm,
    layer_norm_jvp,
    rms_norm,
    rms_norm_jvp,
)
from fastdistill.ops.qk_norm_rope.angles import rope_angles
from fastdistill.ops.qk_norm_rope.functions import qk_norm_rope, qk_norm_rope_jvp
from fastdistill.ops.time_embedding.functions import timestep_embedding, timestep_embedding_jvp

__all__ = [
    "ada_layer_norm",
    "ada_layer_norm_jvp",
    "ada_rms_norm",
    "ada_rms_norm_jvp",
    "attention_jvp",
    "explain",
    "gated_residual_ada_norm",
    "gated_residual_ada_norm_jvp",
    "geglu",
    "geglu_jvp",
    "gelu",
    "gelu_jvp",
    "layer_norm",
    "layer_norm_jvp",
    "linear",
    "linear_jvp",
    "merge_attention",
    "merge_attention_jvp",
    "qk_norm_rope",
    "qk_norm_rope_jvp",
    "rms_norm",
    "rms_norm_jvp",
    "rope_angles",
    "scaled_dot_product_attention",
    "silu",
    "silu_jvp",
    "swiglu",
    "swiglu_jvp",
    "timestep_embedding",
    "timestep_embedding_jvp",
    "varlen_attention",
    "varlen_attention_jvp",
]
