"""Refuse combinations of fields that each are allowed, before anything is built.

What a method takes and needs is read from its row in `fastdistill.objectives.OBJECTIVES`; each message says what would
work.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed

from fastdistill import models
from fastdistill.data import DATASETS, Batch, generator_at
from fastdistill.objectives.metric import LogVariance
from fastdistill.objectives.scores import ScoreMethod
from fastdistill.objectives.settings import Context
from fastdistill.settings import ConfigError, short
from fastdistill.train.config import (
    UNNAMED,
    TrainConfig,
    model_arguments,
    model_differences,
    parse_config,
    read_yaml,
    run_of,
)
from fastdistill.train.critic import Critic
from fastdistill.train.data_settings import changed_fingerprint
from fastdistill.train.environment import memory_of_machine
from fastdistill.train.methods import METHODS
from fastdistill.train.perceptual import perceptual_of
from fastdistill.train.sampling import OWN

TRIAL_ROWS = 4096
COPIES = 5  # of each weight: itself, its gradient, two moments of the optimiser, its average


def check_config(config: TrainConfig) -> None:
    """Refuse what each field allows by itself and all of them together don't.

    The objective is called once, on a network of a few numbers: nothing else is built.

    Raises:
        ConfigError: naming the fields.
    """
    _check_places(config)
    config.data.try_out()
    classes = config.data.build().num_classes
    if config.data.label_dropout and not classes:
        raise ConfigError(f"data.label_dropout: {config.data.name} has no labels to drop, so expected 0")
    _check_teachers(config)
    if config.init_from_teacher and config.teacher is None:
        raise ConfigError("init_from_teacher: needs `teacher`, the run folder to start from")
    _check_path(config)
    _check_guidance(config, classes)
    config.method.check(run_of(config))
    _check_sampling(config)
    _check_model(config)
    _check_device(config)
    _try_objective(config)


def _check_places(config: TrainConfig) -> None:
    """Refuse paths that no file can have, such as too long ones."""
    for field in ("out", "teacher", "weak_teacher", "resume_from"):
        place: Path | None = getattr(config, field)
        try:
            if place is not None:
                os.stat(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError) as error:  # too long a name, or a NUL in it
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"{field}: {short(str(place))} can't be a path here: {reason}") from error
    if config.out.exists() and not config.out.is_dir():
        raise ConfigError(f"out: {config.out} is a file; expected a folder")


def _check_teachers(config: TrainConfig) -> None:
    """Check for a teacher where the method needs one, and for none where it has no use for it, not even as a start."""
    method, objective = config.method, config.method.objective()
    for role in ("teacher", "weak_teacher"):
        given, what = getattr(config, role) is not None, role.replace("_", " ")
        takes = role in objective.takes or (role == "teacher" and (method.makes_pairs or config.init_from_teacher))
        if given and not takes:
            able = sorted(name for name, other in METHODS.items() if role in other.objective().takes)
            start = "start from its weights by --init-from-teacher, " if role == "teacher" else ""
            raise ConfigError(
                f"{role}: {method.name} learns without a {what}; remove it, {start}or choose a method.name that "
                f"follows one: {', '.join(able)}"
            )
        if not given and (role in objective.needs or (role == "teacher" and method.needs_teacher())):
            raise ConfigError(f"{role}: {method.name} needs a {what}: a finished run, {_example_of_teacher(config)}")


def _example_of_teacher(config: TrainConfig) -> str:
    name = config.data.name
    if name in DATASETS:
        return f"e.g. of `fastdistill train {name}-flow`, as --teacher runs/{name}-flow"
    return f"e.g. of method.name flow_matching on {name}, as --teacher RUN"


def _check_path(config: TrainConfig) -> None:
    method, path = config.method, config.path.build()
    fits, anywhere = method.objective().paths, method.objective().anywhere
    for field, keyword in (
        ("learned_weight", "weighting"), ("target_ema", "target"), ("velocity_head", "velocity_head"),
    ):  # fmt: skip
        if getattr(method, field) and keyword not in method.objective().takes:
            raise ConfigError(f"method.{field}: {method.name} has no use for it; remove it")
    free = fits is None or (anywhere is not None and getattr(method, anywhere[0]) == anywhere[1])
    if fits is not None and not free and config.path.name not in fits:
        otherwise = "" if anywhere is None else f"method.{anywhere[0]} {anywhere[1]}, or "
        raise ConfigError(
            f"path.name: {method.name} fits the paths {', '.join(sorted(fits - UNNAMED))}, got {config.path.name!r}; "
            f"choose one of these, or {otherwise}another method.name"
        )
    if method.makes_pairs and (config.coupling == "optimal_transport" or path.coupling != "independent"):
        raise ConfigError(f"coupling: {method.name} couples noise and data by its teacher; expected independent")


def _check_guidance(config: TrainConfig, classes: int) -> None:
    method = config.method
    guidance = method.guidance_settings
    if guidance is not None:
        name, active = "method.guidance", guidance.active and config.weak_teacher is None
        if guidance.kappa and config.teacher is not None:
            raise ConfigError("method.guidance.kappa: a teacher guides itself, so expected 0 with `teacher`")
        if config.weak_teacher is not None and not guidance.active:
            raise ConfigError(
                "weak_teacher: at method.guidance.scale 1 it has no effect; expected another scale, or scale_to, or no "
                "weak_teacher"
            )
    else:
        name, active = "method.sample_guidance", method.sample_guidance != 1
    if active and not classes:
        raise ConfigError(f"{name}: {config.data.name} has no labels to guide by, so expected scale 1")
    if active and not config.data.label_dropout and config.teacher is None:
        raise ConfigError(f"{name}: needs data.label_dropout > 0, or the network never learns what no label means")


def _check_sampling(config: TrainConfig) -> None:
    """Check that the run's own sampler fits what its network learns: else it would stop at its first samples."""
    try:
        OWN.resolve(config, config.method.sample_steps)
    except ConfigError as error:
        raise ConfigError(f"method.{'' if str(error).startswith('sampler') else 'sample_'}{error}") from error


def _check_model(config: TrainConfig) -> None:
    dataset = config.data.build()
    shape: tuple[int, ...] = dataset.shape
    if config.model.preset not in models.PRESETS:
        raise ConfigError(
            f"model.preset: expected one of {', '.join(models.PRESETS)}, got {short(config.model.preset)}"
        )
    preset = models.PRESETS[config.model.preset].arguments
    if ("channels" in preset and len(shape) != 3) or ("num_classes" in preset) != bool(dataset.num_classes):
        raise ConfigError(f"model.preset: {config.model.preset} can't take {config.data.name}, whose rows are {shape}")
    try:
        with torch.device("meta"):  # shapes without numbers: a billion parameters cost nothing
            net = models.create(config.model.preset, **model_arguments(config))
    except ValueError as error:
        raise ConfigError(f"model.{error}".replace("model.overrides", "model")) from error
    except (RuntimeError, ArithmeticError, TypeError, MemoryError) as error:  # more numbers than torch can count
        chosen = config.model.model_dump(exclude={"preset"}, exclude_none=True)
        sizes = ", ".join(f"{name} {short(value)}" for name, value in chosen.items())
        raise ConfigError(
            f"model: {config.model.preset} with {sizes} can't be built; expected smaller sizes"
        ) from error
    arguments = cast(dict[str, Any], net.config)
    _refuse_too_large(config, sum(weight.numel() for weight in net.parameters()), arguments)
    patch_size = arguments.get("patch_size", 1)
    if any(side % patch_size for side in shape[1:]):
        raise ConfigError(f"model.patch_size: expected a divisor of the sides of {shape}, got {patch_size}")
    if config.method.conditions_on_guidance and not arguments.get("guidance"):
        raise ConfigError(
            f"model.guidance: {config.method.name} gives the network a guidance scale; expected --model.guidance True"
        )


def _refuse_too_large(config: TrainConfig, weights: int, arguments: dict[str, Any]) -> None:
    """Refuse by name what surely doesn't fit, before the system kills whatever it likes for want of memory."""
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else memory_of_machine()
    needed = 4 * COPIES * weights
    if needed > memory:
        raise ConfigError(
            f"model: {weights:,} weights, their average, gradient and optimiser take {_in_gib(needed)}, and there are "
            f"{_in_gib(memory)}; expected a smaller model.width or model.depth"
        )
    tokens = 1
    if "patch_size" in arguments:
        tokens = math.prod(side // arguments["patch_size"] for side in config.data.build().shape[1:])
    needed = 2 * config.data.batch * tokens * arguments["width"] * arguments["depth"]  # one value a layer, in 16 bits
    if needed > memory:
        raise ConfigError(
            f"data.batch: a step of {config.data.batch:,} rows takes more than {_in_gib(needed)}, and there are "
            f"{_in_gib(memory)}; expected fewer rows, or a smaller model.width or model.depth"
        )


def _in_gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count < 2**80 else "more than any memory"


def _try_objective(config: TrainConfig) -> None:
    """Call the objective once, on random rows and the smallest network: what it refuses, it refuses here."""
    method, dataset, seed = config.method, config.data.build(), generator_at(config.seed, "trial")
    rows, classes = config.data.batch, dataset.num_classes
    if rows > TRIAL_ROWS:  # whole groups of them, for a method that compares groups
        group = getattr(method, "group", 1)
        rows = max(group, TRIAL_ROWS // group * group)
    with torch.random.fork_rng(devices=[]):
        net = models.MLP(
            dim=math.prod(dataset.shape), width=2, depth=1, num_classes=classes, guidance=method.conditions_on_guidance
        )
        critic = Critic(net, method.critic, dataset.shape, (0.9, 0.95)) if isinstance(method, ScoreMethod) else None
        x0, x1 = torch.randn(2, rows, *dataset.shape, generator=seed).unbind()
        y = torch.randint(classes + 1, (rows,), generator=seed) if classes else None
        context = Context(
            net=net,
            batch=Batch(x0, x1, y, classes),
            generator=seed,
            seed=config.seed,
            step=0,
            steps=config.steps,
            path=config.path.build(),
            teacher=net if config.teacher is not None else None,
            weak_teacher=net if config.weak_teacher is not None else None,
            target=net if method.target_ema is not None else None,
            weighting=LogVariance() if method.learned_weight else None,
            velocity_layer=net.last_layer if method.velocity_head else None,
            perceptual=perceptual_of(config, torch.device("cpu")),
            critic=critic,
        )
        first = method.starts if isinstance(method, ScoreMethod) else 0  # from where on all of it takes part
        last = config.steps - 1 if method.depends_on_steps else first
        try:
            for step in sorted({first, last}):
                method.loss(replace(context, step=step))
        except (ValueError, ArithmeticError, MemoryError, RuntimeError) as error:
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise ConfigError(f"method.name: {method.name} can't be trained so: {reason}") from error


def _check_device(config: TrainConfig) -> None:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, and torch finds no GPU (see `fastdistill doctor`)")
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    if config.precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision: this GPU has no bf16; expected auto or fp32")


def check_one_process() -> None:
    """Refuse to be one of several processes, as `torchrun` starts them: each would train alone, in the same folder.

    Raises:
        ConfigError: WORLD_SIZE is not 1, or torch.distributed is at work.
    """
    world = os.environ.get("WORLD_SIZE", "").strip() or "1"
    if world == "1" and torch.distributed.is_available() and torch.distributed.is_initialized():
        world = str(torch.distributed.get_world_size())
    if world != "1":
        raise ConfigError(
            f"WORLD_SIZE: expected 1, got {short(world)[1:-1]}: the trainer has no distributed training, so torchrun "
            f"and its like would train as many runs in one folder. Start it as one process; several, each with an "
            f"--out of its own, may run side by side"
        )


def check_teacher(config: TrainConfig) -> None:
    """Refuse a teacher that isn't there, isn't finished, or doesn't fit. Reads its configuration; builds nothing.

    Apart from `check_config`, so that a student can be described, and checked, before its teacher is trained.

    Raises:
        ConfigError: naming the fields.
    """
    for role in ("teacher", "weak_teacher"):
        if getattr(config, role) is not None:
            _check_one_teacher(config, role)


def _how_to_do_without(config: TrainConfig, role: str) -> str:
    """Return the command that trains the teacher, where it is the shipped one, or the option that drops it."""
    run, method = getattr(config, role), config.method
    shipped = f"{config.data.name}-flow"
    advice = f" (fastdistill train {shipped})" if run == Path("runs") / shipped else ""
    required = role in method.objective().needs or (role == "teacher" and method.needs_teacher())
    if not required and not config.init_from_teacher:
        advice += f", or learn without one: --{role.replace('_', '-')} None"
    return advice


def _check_one_teacher(config: TrainConfig, role: str) -> None:
    run = getattr(config, role)
    if not (run / "config.yaml").is_file():
        advice = _how_to_do_without(config, role)
        raise ConfigError(f"{role}: expected a run folder with a config.yaml, got {run}; train it first{advice}")
    if not (run / "export" / "ema.safetensors").is_file():
        raise ConfigError(f"{role}: {run} has no export/ema.safetensors: finish its training first")
    teacher = parse_config(read_yaml(run / "config.yaml"), f"{role}: {run}")
    if teacher.data.name != config.data.name:
        raise ConfigError(f"{role}: {run} learnt {teacher.data.name}, and data.name is {config.data.name}")
    if changed := changed_fingerprint(teacher.data.fingerprint(), config.data.fingerprint()):
        raise ConfigError(f"{role}: {run} learnt other data: {'; '.join(changed)}")
    if "velocity" not in teacher.method.learns:
        able = ", ".join(name for name, method in METHODS.items() if "velocity" in method.learns)
        raise ConfigError(
            f"{role}: {run} learnt {teacher.method.name}, whose network knows no velocity to follow; "
            f"expected a run of {able}"
        )
    if getattr(teacher.method, "distil", False):
        raise ConfigError(
            f"{role}: {run} was distilled to t = 1 (method.distil), and knows no velocity elsewhere; expected the "
            f"round before it"
        )
    if teacher.path != config.path and not config.method.makes_pairs:
        raise ConfigError(
            f"{role}: {run} learnt on the path {describe_path(teacher)}, and path is {describe_path(config)}; "
            f"a velocity holds on its own path only"
        )
    guidance = config.method.guidance_settings
    by_labels = guidance is not None and guidance.active and config.weak_teacher is None
    if by_labels and not teacher.data.label_dropout:
        raise ConfigError(f"method.guidance: {run} can't guide, for it was trained without data.label_dropout")
    if role == "teacher" and config.init_from_teacher and model_differences(config, teacher):
        raise ConfigError(
            f"init_from_teacher: the student must have the teacher's network; different: "
            f"{', '.join(model_differences(config, teacher))}"
        )


def describe_path(config: TrainConfig) -> str:
    """Return a path's name and the numbers that were given for it, e.g. `fm (sigma 0.1)`."""
    numbers = config.path.model_dump(exclude={"name"}, exclude_none=True)
    return config.path.name + (
        f" ({', '.join(f'{name} {value:g}' for name, value in numbers.items())})" * bool(numbers)
    )
