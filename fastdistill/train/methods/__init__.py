"""How each objective is trained and sampled: one class a method, `METHODS` by name, and their union."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from fastdistill.train.methods.base import Context, GuidanceSettings, MethodSettings, Metrics, Share
from fastdistill.train.methods.regression import FlowMatching, MeanFlow
from fastdistill.train.methods.times import LogitNormalTimes, Times, UniformTimes

__all__ = [
    "METHODS",
    "Context",
    "FlowMatching",
    "GuidanceSettings",
    "LogitNormalTimes",
    "MeanFlow",
    "Method",
    "MethodSettings",
    "Metrics",
    "Share",
    "Times",
    "UniformTimes",
]

_Kinds = FlowMatching | MeanFlow
Method = Annotated[_Kinds, Field(discriminator="name")]
METHODS: dict[str, type[MethodSettings]] = {kind.model_fields["name"].default: kind for kind in get_args(_Kinds)}
