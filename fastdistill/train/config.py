"""The configuration of a run: typed, checked as a whole before anything is built, from YAML and the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import tyro
import yaml
from pydantic import Field, ValidationError

from fastdistill import models
from fastdistill.train.data import DATASETS
from fastdistill.train.methods import FlowMatching, MeanFlow, Method, Share
from fastdistill.train.settings import ConfigError, Settings, explain

SHIPPED = Path(__file__).parents[1] / "configs"
Count = Annotated[int, Field(ge=1)]


class DataSettings(Settings):
    """What is learnt."""

    name: Literal["digits", "ring"]
    """digits: scikit-learn's 1,797 images of 8 x 8 pixels; ring: eight Gaussians in the plane."""
    batch: Count = 128
    """Rows in a step."""
    label_dropout: Share = 0.0
    """Share of the labels replaced by "no label": the training of classifier-free guidance."""


class ModelSettings(Settings):
    """The network: a preset, with any of its sizes changed. Channels and classes follow from the data."""

    preset: str
    """A name of fastdistill.models.PRESETS."""
    width: Count | None = None
    depth: Count | None = None
    heads: Count | None = None
    patch_size: Count | None = None
    mlp_ratio: Annotated[float, Field(gt=0)] | None = None
    qk_norm: bool | None = None
    """RMS-normalise queries and keys."""
    pos: Literal["sincos", "rope"] | None = None
    """Position embedding."""


class OptimSettings(Settings):
    """AdamW, with a linear warm-up, gradient clipping and an average of the weights."""

    lr: float = Field(1e-3, gt=0)
    """Learning rate after the warm-up."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(100, ge=0)
    """Steps over which the learning rate grows linearly to `lr`."""
    clip_norm: float = Field(1.0, gt=0)
    """Largest norm of the gradient; a larger one is scaled down."""
    ema: float = Field(0.999, ge=0, lt=1)
    """Decay of the average of the weights; it starts lower, min(ema, (1 + k) / (10 + k)) at update k."""


class LogSettings(Settings):
    """What a run writes, and how often. Changing these never changes the weights."""

    log_every: Count = 50
    """Steps between lines of metrics.jsonl and TensorBoard points."""
    sample_every: Count = 500
    """Steps between sample grids."""
    checkpoint_every: Count = 500
    """Steps between checkpoints."""
    keep_checkpoints: Count = 3
    """How many checkpoints stay."""


class TrainConfig(Settings):
    """Everything that defines a run."""

    out: Path
    """The run folder. Started again with the same settings, the run goes on from its newest checkpoint."""
    seed: int = Field(0, ge=0)
    steps: Count
    """Training steps in all; a finished run goes on if this is raised."""
    data: DataSettings
    model: ModelSettings
    method: Method
    """What is learnt: the objective, its times, its guidance."""
    teacher: Path | None = None
    """A finished run folder, whose network gives the velocity to follow."""
    init_from_teacher: bool = False
    """Start from the teacher's weights."""
    optim: OptimSettings = OptimSettings()
    log: LogSettings = LogSettings()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the matmuls; weights are fp32. auto: bf16 on a GPU that has it, else fp32."""
    resume_from: Path | None = Field(None, exclude=True)
    """An older checkpoint of this run to go back to; newer ones are set aside."""


# The rest decides the weights: a run that goes on with another value of it would be a mixture of two runs.
FREE_TO_CHANGE = ("out", "steps", "log", "teacher", "device", "precision", "resume_from")


def shipped_configs() -> list[str]:
    """The names of the configurations that come with fastdistill."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def load_config(source: str | Path, overrides: Sequence[str] = (), *, out: Path | None = None) -> TrainConfig:
    """Read a configuration, apply command line overrides and check it all.

    Args:
        source: a YAML file, or the name of a shipped one (`shipped_configs()`).
        overrides: command line arguments, e.g. ["--optim.lr", "3e-4"]; "--help" prints them all and exits.
        out: the run folder, before overrides; None: the file's own, or runs/<its name>.

    Raises:
        ConfigError: naming each field that is unknown, missing or wrong.
        SystemExit: with status 2, by tyro, for a wrong override, which it explains on stderr.
    """
    path = find_config(source)
    given = read_yaml(path)
    given = {"out": f"runs/{path.stem}"} | given | ({"out": str(out)} if out else {})
    config = parse_config(given, str(path))
    if overrides:
        config = tyro.cli(
            TrainConfig,
            args=list(overrides),
            default=config,
            prog=f"fastdistill train {source}",
            description=f"Train as {path.name} says, with any of its fields changed:",
            config=(tyro.conf.AvoidSubcommands,),
        )
    check_config(config)
    return config


def find_config(source: str | Path) -> Path:
    """The file of a configuration, given by path or by shipped name."""
    for path in (Path(source), SHIPPED / f"{source}.yaml"):
        if path.is_file():
            return path
    raise ConfigError(f"{source}: no such file, and no shipped configuration; there are {', '.join(shipped_configs())}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected fields and their values, got {content!r}")
    return content


def parse_config(given: Mapping[str, Any], source: str) -> TrainConfig:
    """A mapping as a TrainConfig; `source` names it in errors."""
    try:
        return TrainConfig.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"{source}:\n{explain(error, given)}") from error


def check_config(config: TrainConfig) -> None:
    """Refuse what each field allows by itself and all of them together don't. Builds nothing.

    Raises:
        ConfigError: naming the fields.
    """
    classes = DATASETS[config.data.name].num_classes
    if config.data.label_dropout and not classes:
        raise ConfigError(f"data.label_dropout: {config.data.name} has no labels to drop, so expected 0")
    if config.init_from_teacher and config.teacher is None:
        raise ConfigError("init_from_teacher: needs `teacher`, the run folder to start from")
    if config.teacher is not None and isinstance(config.method, FlowMatching):
        raise ConfigError("teacher: flow_matching learns from data alone; remove it, or choose method.name meanflow")
    _check_guidance(config, classes)
    _check_model(config)
    _check_device(config)
    if config.out.exists() and not config.out.is_dir():
        raise ConfigError(f"out: {config.out} is a file; expected a folder")


def _check_guidance(config: TrainConfig, classes: int) -> None:
    method = config.method
    if isinstance(method, MeanFlow):
        name, active = "method.guidance", method.guidance.active
        if method.guidance.kappa and config.teacher is not None:
            raise ConfigError("method.guidance.kappa: a teacher guides itself, so expected 0 with `teacher`")
    else:
        name, active = "method.sample_guidance", method.sample_guidance != 1
    if active and not classes:
        raise ConfigError(f"{name}: {config.data.name} has no labels to guide by, so expected scale 1")
    if active and not config.data.label_dropout and config.teacher is None:
        raise ConfigError(f"{name}: needs data.label_dropout > 0, or the network never learns what no label means")


def _check_model(config: TrainConfig) -> None:
    shape: tuple[int, ...] = DATASETS[config.data.name].shape
    if config.model.preset not in models.PRESETS:
        raise ConfigError(f"model.preset: expected one of {', '.join(models.PRESETS)}, got {config.model.preset!r}")
    if ("channels" in models.PRESETS[config.model.preset].arguments) != (len(shape) == 3):
        raise ConfigError(f"model.preset: {config.model.preset} can't take {config.data.name}, whose rows are {shape}")
    try:
        with torch.device("meta"):  # shapes without numbers: a billion parameters cost nothing
            net = models.create(config.model.preset, **model_arguments(config))
    except ValueError as error:
        raise ConfigError(f"model.{error}".replace("model.overrides", "model")) from error
    patch_size = cast(dict[str, Any], net.config).get("patch_size", 1)
    if any(side % patch_size for side in shape[1:]):
        raise ConfigError(f"model.patch_size: expected a divisor of the sides of {shape}, got {patch_size}")


def _check_device(config: TrainConfig) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, and torch finds no GPU (see `fastdistill doctor`)")
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    if config.precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision: this GPU has no bf16; expected auto or fp32")


def check_teacher(config: TrainConfig) -> None:
    """Refuse a teacher that isn't there, isn't finished, or doesn't fit. Reads its configuration; builds nothing.

    Apart from `check_config`, so that a student can be described, and checked, before its teacher is trained.

    Raises:
        ConfigError: naming the fields.
    """
    if config.teacher is None:
        return
    run = config.teacher
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"teacher: expected a run folder with a config.yaml, got {run}; train it first")
    if not (run / "export" / "ema.safetensors").is_file():
        raise ConfigError(f"teacher: {run} has no export/ema.safetensors: finish its training first")
    teacher = parse_config(read_yaml(run / "config.yaml"), f"teacher: {run}")
    if teacher.data.name != config.data.name:
        raise ConfigError(f"teacher: {run} learnt {teacher.data.name}, and data.name is {config.data.name}")
    guided = isinstance(config.method, MeanFlow) and config.method.guidance.active
    if guided and not teacher.data.label_dropout:
        raise ConfigError(f"method.guidance: {run} can't guide, for it was trained without data.label_dropout")
    if config.init_from_teacher and model_differences(config, teacher):
        raise ConfigError(
            f"init_from_teacher: the student must have the teacher's network; different: "
            f"{', '.join(model_differences(config, teacher))}"
        )


def model_arguments(config: TrainConfig) -> dict[str, Any]:
    """The network's constructor arguments: the preset's, the user's, and what the data says."""
    dataset = DATASETS[config.data.name]
    fitted = {"dim": dataset.shape[0], "channels": dataset.shape[0], "num_classes": dataset.num_classes}
    preset = models.PRESETS[config.model.preset].arguments
    chosen = config.model.model_dump(exclude={"preset"}, exclude_none=True)
    return preset | chosen | {name: value for name, value in fitted.items() if name in preset}


def model_differences(a: TrainConfig, b: TrainConfig) -> list[str]:
    """The constructor arguments in which two networks differ."""
    first, second = model_arguments(a), model_arguments(b)
    return sorted(f"model.{name}" for name in first | second if first.get(name) != second.get(name))


def changed_fields(old: TrainConfig, new: TrainConfig) -> list[str]:
    """The dotted names of the fields that decide the weights and differ, with both values."""
    before, after = (_flat(config.model_dump(mode="json", exclude=set(FREE_TO_CHANGE))) for config in (old, new))
    missing = "nothing"
    return [
        f"{name}: {before.get(name, missing)!r} -> {after.get(name, missing)!r}"
        for name in sorted(before | after)
        if before.get(name, missing) != after.get(name, missing)
    ]


def to_yaml(config: TrainConfig) -> str:
    """The resolved configuration, every field of it, as YAML that `load_config` reads."""
    return yaml.safe_dump(json.loads(config.model_dump_json()), sort_keys=False)


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
