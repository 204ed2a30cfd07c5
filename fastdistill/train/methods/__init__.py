"""How each objective is trained and sampled: one class a method, `METHODS` by name, and their union."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from fastdistill.train.methods.base import Context, GuidanceSettings, MethodSettings, Metrics, Share
from fastdistill.train.methods.consistency import ECT, FACM, SCM, Consistency
from fastdistill.train.methods.distribution import DMD, IMM, RCM, CriticSettings, ScoreMethod
from fastdistill.train.methods.flow_maps import AYFEMD, AYFLMD, ESD, LSD, PSD, TVM, Shortcut
from fastdistill.train.methods.regression import AlphaFlow, FlowMatching, ImprovedMeanFlow, MeanFlow, ReFlow
from fastdistill.train.methods.times import LogitNormalTimes, Times, UniformTimes

__all__ = [
    "METHODS",
    "Context",
    "CriticSettings",
    "FlowMatching",
    "GuidanceSettings",
    "LogitNormalTimes",
    "MeanFlow",
    "Method",
    "MethodSettings",
    "Metrics",
    "ReFlow",
    "ScoreMethod",
    "Share",
    "Times",
    "UniformTimes",
]

_Kinds = (
    FlowMatching
    | ReFlow
    | MeanFlow
    | ImprovedMeanFlow
    | AlphaFlow
    | Consistency
    | ECT
    | SCM
    | FACM
    | AYFEMD
    | AYFLMD
    | Shortcut
    | ESD
    | LSD
    | PSD
    | TVM
    | IMM
    | DMD
    | RCM
)
Method = Annotated[_Kinds, Field(discriminator="name")]
METHODS: dict[str, type[MethodSettings]] = {kind.model_fields["name"].default: kind for kind in get_args(_Kinds)}
