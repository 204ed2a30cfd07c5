"""Define a run's configuration: its fields and what they mean. load.py reads one, combinations.py checks it whole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from fastdistill import models, paths
from fastdistill.objectives.settings import Run
from fastdistill.settings import ConfigError, nearest, short
from fastdistill.train.data_settings import ChosenData
from fastdistill.train.methods import Method
from fastdistill.train.settings import Settings, explain
from fastdistill.train.yaml_file import load_yaml

MOST = 10**12  # of steps: more than any machine makes
Count = Annotated[int, Field(ge=1, le=MOST)]
UNNAMED = frozenset({"gaussian"})  # paths that a configuration can't name: they take functions


class ModelSettings(Settings):
    """Network: a preset, with any of its sizes changed. Channels and classes follow from the data."""

    preset: str
    """A name of fastdistill.models.PRESETS."""
    width: Count | None = None
    depth: Annotated[int, Field(ge=1, le=1024)] | None = None
    heads: Count | None = None
    patch_size: Count | None = None
    mlp_ratio: Annotated[float, Field(gt=0)] | None = None
    qk_norm: bool | None = None
    """RMS-normalise queries and keys."""
    pos: Literal["sincos", "rope"] | None = None
    """Position embedding."""
    guidance: bool | None = None
    """Take a guidance scale as input: for methods that learn many scales at once."""


class PathSettings(Settings):
    """Probability path from data to noise: a name, and the numbers that it takes."""

    name: str = "linear"
    """A name of fastdistill.paths.PATHS."""
    sigma: float | None = None
    """Of fm, icfm, ot_cfm and vp_si: the noise at the data's end, or on top of the pair."""
    sigma_data: float | None = None
    """Of trig: the standard deviation of the data."""
    sigma_min: float | None = None
    """Of edm and ve: the least noise."""
    sigma_max: float | None = None
    """Of edm and ve: the most noise."""
    rho: float | None = None
    """Of edm: the warp of the noise levels."""

    def build(self) -> paths.Path:
        """Build the path itself; ConfigError names what doesn't fit."""
        known = {name: None for name in paths.PATHS if name not in UNNAMED}
        if self.name not in known:
            raise ConfigError(
                f"path.name: expected one of {', '.join(known)}, got {short(self.name)}; {nearest(self.name, known)}"
            )
        try:
            return paths.get(self.name, **self.model_dump(exclude={"name"}, exclude_none=True))
        except (ValueError, ArithmeticError) as error:
            raise ConfigError(f"path: {error}") from error


class OptimSettings(Settings):
    """AdamW, with a linear warm-up, gradient clipping and an average of the weights."""

    lr: float = Field(1e-3, gt=0)
    """Learning rate after the warm-up."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(100, ge=0, le=MOST)
    """Steps over which the learning rate grows linearly to `lr`."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest norm of the gradient; a larger one is scaled down."""
    ema: float = Field(0.999, ge=0, lt=1)
    """Decay of the average of the weights; it starts lower, min(ema, (1 + k) / (10 + k)) at update k."""


class LogSettings(Settings):
    """Log: what a run writes, and how often. Changing these never changes the weights."""

    log_every: Count = 50
    """Steps between lines of metrics.jsonl and TensorBoard points."""
    sample_every: Count = 500
    """Steps between sample grids."""
    checkpoint_every: Count = 500
    """Steps between checkpoints."""
    keep_checkpoints: Count = 3
    """How many checkpoints stay."""


class DiagnosticsSettings(Settings):
    """Diagnostics besides the metrics. Changing these never changes the weights."""

    every: int = Field(500, ge=0, le=MOST)
    """Steps between looks, which go into metrics.jsonl with the metrics; 0: never."""
    bins: int = Field(4, ge=1, le=16)
    """The raw error is given by bins of (t, s), so many on either axis."""
    gradients: bool = False
    """Also the cosine between the gradients of a composed loss's terms: one more backward pass each, at those steps. A
    loss of a single term has none, and the run says so at its first look."""


class TrainConfig(Settings):
    """Configuration of a run: everything that defines it."""

    out: Path
    """The run folder. Started again with the same settings, the run goes on from its newest checkpoint."""
    seed: int = Field(0, ge=0, lt=2**64)
    steps: Count
    """Training steps in all; a finished run goes on if this is raised, unless its method has a curriculum over them."""
    data: ChosenData
    model: ModelSettings
    method: Method
    """What is learnt: the objective, its times, its guidance."""
    path: PathSettings = PathSettings()
    """From data to noise."""
    coupling: Literal["auto", "independent", "optimal_transport"] = "auto"
    """Which noise belongs to which row of data: any, or the nearest within a batch. auto: as the path says."""
    teacher: Path | None = None
    """A finished run folder, whose network gives the velocity to follow."""
    weak_teacher: Path | None = None
    """A finished run folder of a worse network, for autoguidance: the teacher is led away from it."""
    init_from_teacher: bool = False
    """Start from the teacher's weights, as ECT does; a method that follows no teacher makes no other use of it."""
    optim: OptimSettings = OptimSettings()
    log: LogSettings = LogSettings()
    diagnostics: DiagnosticsSettings = DiagnosticsSettings()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the matmuls; weights are fp32. auto: bf16 on a GPU that has it, else fp32."""
    resume_from: Path | None = Field(None, exclude=True)
    """An older checkpoint of this run to go back to, by its name or its path; newer ones are set aside. Given again
    after a kill, the same command goes on from where it was."""


# The rest decides the weights: a run that goes on with another value of it would be a mixture of two runs.
FREE_TO_CHANGE = (
    "out", "steps", "log", "diagnostics", "teacher", "weak_teacher", "device", "precision", "resume_from",
)  # fmt: skip


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file."""
    content = load_yaml(path)
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected fields and their values, got {short(content)}")
    return content


def parse_config(given: Mapping[str, Any], source: str) -> TrainConfig:
    """Parse a mapping as a TrainConfig; `source` names it in errors."""
    try:
        return TrainConfig.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"{source}:\n{explain(error, given)}") from error


def run_of(config: TrainConfig) -> Run:
    """Return what a method's own checks may know of the run."""
    return Run(
        path=config.path.build(),
        path_name=config.path.name,
        rows=config.data.batch,
        label_dropout=config.data.label_dropout,
        has_teacher=config.teacher is not None,
    )


def couples(config: TrainConfig) -> bool:
    """Return whether noise is matched to data within a batch."""
    coupling = config.path.build().coupling if config.coupling == "auto" else config.coupling
    return coupling == "optimal_transport"


def model_arguments(config: TrainConfig) -> dict[str, Any]:
    """Return the network's constructor arguments: the preset's, the user's, and what the data says."""
    dataset = config.data.build()
    fitted = {"dim": math.prod(dataset.shape), "channels": dataset.shape[0], "num_classes": dataset.num_classes}
    preset = models.PRESETS[config.model.preset].arguments
    chosen = config.model.model_dump(exclude={"preset"}, exclude_none=True)
    return preset | chosen | {name: value for name, value in fitted.items() if name in preset}


def model_differences(a: TrainConfig, b: TrainConfig) -> list[str]:
    """Return the constructor arguments in which two networks differ."""
    first, second = model_arguments(a), model_arguments(b)
    return sorted(f"model.{name}" for name in first | second if first.get(name) != second.get(name))


def changed_fields(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Return the dotted names of the fields that decide the weights and differ, with both values.

    Another method comes first, and its own fields last. The number of steps is one of them where the method has a
    curriculum over the whole run.
    """
    free = set(FREE_TO_CHANGE) - ({"steps"} if old.method.depends_on_steps else set())
    before, after = (flat(config.model_dump(mode="json", exclude=free)) for config in (old, new))
    missing, switched = "nothing", old.method.name != new.method.name
    order = sorted(before | after, key=lambda n: (n != "method.name", switched and n.startswith("method."), n))
    return [
        f"{name}: {short(before.get(name, missing))} -> {short(after.get(name, missing))}"
        for name in order
        if before.get(name, missing) != after.get(name, missing)
    ]


def to_yaml(config: TrainConfig) -> str:
    """Write the resolved configuration, every field of it, as YAML that `load_config` reads."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested fields by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found
