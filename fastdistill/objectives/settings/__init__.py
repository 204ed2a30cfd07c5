"""Describe a method to a trainer: its settings, plain dataclasses, and what it does with one training step."""

from __future__ import annotations

from fastdistill.objectives.settings.base import Decay, MethodSettings, Metrics
from fastdistill.objectives.settings.context import Batch, Context, Critic, Run, ramp
from fastdistill.objectives.settings.guidance import GuidanceSettings
from fastdistill.objectives.settings.samplers import field_of
from fastdistill.objectives.settings.shared import (
    Instantaneous,
    PairedTimes,
    SelfDistillation,
    flat_by_normalisation,
    flat_by_weight,
)
from fastdistill.objectives.settings.times import (
    ArctanTimes,
    FakeLevels,
    GapTimes,
    KarrasLevels,
    Levels,
    LevelSettings,
    LogitNormalTimes,
    SameLevels,
    ShiftedLevels,
    TimeLevels,
    Times,
    UniformTimes,
    from_pair,
)

__all__ = [
    "ArctanTimes",
    "Batch",
    "Context",
    "Critic",
    "Decay",
    "FakeLevels",
    "GapTimes",
    "GuidanceSettings",
    "Instantaneous",
    "KarrasLevels",
    "LevelSettings",
    "Levels",
    "LogitNormalTimes",
    "MethodSettings",
    "Metrics",
    "PairedTimes",
    "Run",
    "SameLevels",
    "SelfDistillation",
    "ShiftedLevels",
    "TimeLevels",
    "Times",
    "UniformTimes",
    "field_of",
    "flat_by_normalisation",
    "flat_by_weight",
    "from_pair",
    "ramp",
]
