"""Wrap `fastdistill.ops` in thin modules: the parts of a transformer flow map, with exact fused tangents.

They hold parameters and call ops; the mathematics is in the ops. State dicts are those of the modules that they
replace: torch.nn's for ``Linear``, norms and activations (which subclass these), timm's for ``Attention``, ``Mlp``,
``GluMlp`` and ``SwiGLU``, diffusers' for ``FeedForward`` and its projections, DiT's for ``TimestepEmbedder``.
"""

from __future__ import annotations

from fastdistill.nn.attention import Attention, Rotation
from fastdistill.nn.basic import (
    GELU,
    AdaLayerNorm,
    AdaRMSNorm,
    GatedResidualAdaNorm,
    LayerNorm,
    Linear,
    Modulation,
    RMSNorm,
    SiLU,
    full_precision,
)
from fastdistill.nn.embedding import TimestepEmbedder, TimestepEmbedding, sincos_2d, sinusoids
from fastdistill.nn.feedforward import ActivatedProjection, FeedForward, GatedProjection, GluMlp, Mlp, SwiGLU

__all__ = [
    "GELU",
    "ActivatedProjection",
    "AdaLayerNorm",
    "AdaRMSNorm",
    "Attention",
    "FeedForward",
    "GatedProjection",
    "GatedResidualAdaNorm",
    "GluMlp",
    "LayerNorm",
    "Linear",
    "Mlp",
    "Modulation",
    "RMSNorm",
    "Rotation",
    "SiLU",
    "SwiGLU",
    "TimestepEmbedder",
    "TimestepEmbedding",
    "full_precision",
    "sincos_2d",
    "sinusoids",
]
