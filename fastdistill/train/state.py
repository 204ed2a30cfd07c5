"""Make, save and bring back what a run carries from step to step.

`PARTS` names everything that learns. A part that a method doesn't use is None and is not saved.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastdistill import models
from fastdistill.objectives.metric import LogVariance
from fastdistill.objectives.scores import ScoreMethod
from fastdistill.settings import ConfigError
from fastdistill.train.checkpoint import (
    CheckpointError,
    list_checkpoints,
    named_checkpoint,
    read_checkpoint,
    read_newest_checkpoint,
    set_aside_newer,
    step_of,
)
from fastdistill.train.config import TrainConfig, run_of
from fastdistill.train.critic import Critic
from fastdistill.train.files import copy_aside, sha256
from fastdistill.train.logging import tell
from fastdistill.train.perceptual import perceptual_of
from fastdistill.train.run import build_network, load_run, load_weights, refuse_foreign_checkpoint

PARTS = ("net", "ema", "target", "weighting", "velocity_layer", "critic", "optimizer", "scheduler")
UNCHANGED = {
    "teacher_sha256": "the teacher's weights",
    "weak_teacher_sha256": "the weak teacher's weights",
    "precision": "the precision",
    "definition": "what the method computes",
}


def new_state(config: TrainConfig, device: torch.device) -> dict[str, Any]:
    """Make all that the loop carries from step to step, as it is before the first one."""
    torch.manual_seed(config.seed)
    net = build_network(config).to(device).train()
    frozen: dict[str, Any] = {}
    for role in ("teacher", "weak_teacher"):
        run = getattr(config, role)
        frozen[role] = frozen[f"{role}_path"] = frozen[f"{role}_sha256"] = None
        if run is not None:
            frozen[role], learnt = load_run(run, device=device)
            frozen[f"{role}_path"] = learnt.path.build()
            frozen[f"{role}_sha256"] = sha256(run / "export" / "ema.safetensors")
    if config.init_from_teacher:
        net.load_state_dict(frozen["teacher"].state_dict())
    method, optim = config.method, config.optim
    weighting = LogVariance().to(device) if method.learned_weight else None
    # A copy, so that it starts where u(x, t, t) does: with init_from_teacher, at the teacher's velocity.
    velocity_layer = copy.deepcopy(cast(nn.Module, net.last_layer)) if method.velocity_head else None
    learning = [part for part in (net, weighting, velocity_layer) if part is not None]
    optimizer = make_optimizer(learning, config, optim.lr)
    decay = method.target_ema
    return {
        "step": 0,
        "config": json.loads(config.model_dump_json(exclude={"out"})),  # the folder may be moved
        "data": config.data.fingerprint(),
        "went_back": None,
        "net": net,
        "ema": average_of(net, ramped_ema(optim.ema)),
        "target": average_of(net, get_ema_multi_avg_fn(decay)) if decay is not None else None,
        "weighting": weighting,
        "velocity_layer": velocity_layer,
        "perceptual": perceptual_of(config, device),
        "critic": make_critic(frozen["teacher"], config),
        "optimizer": optimizer,
        "scheduler": warm_up(optimizer, optim.warmup_steps),
        "device": device,
        "precision": pick_precision(config, device),
        "definition": method.definition(run_of(config)),
        "path": config.path.build(),
        **frozen,
    }


def make_critic(teacher: nn.Module, config: TrainConfig) -> Critic | None:
    """Make the second network of a method that has one."""
    if not isinstance(config.method, ScoreMethod):
        return None
    return Critic(teacher, config.method.critic, config.data.build().shape, config.optim.betas)


def make_optimizer(modules: Sequence[nn.Module], config: TrainConfig, lr: float) -> torch.optim.AdamW:
    """Make AdamW over the parameters of some modules, as the configuration says."""
    weights = [weight for module in modules for weight in module.parameters()]
    optim = config.optim
    return torch.optim.AdamW(weights, lr=lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)


def warm_up(optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """Make a schedule that grows linearly to the optimiser's rate."""
    return LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / (steps + 1)))


Average = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]


def average_of(net: nn.Module, average: Average) -> AveragedModel:
    """Make a frozen average of a network's weights, which starts at them."""
    return AveragedModel(net, multi_avg_fn=average).eval().requires_grad_(False)


def ramped_ema(decay: float) -> Average:
    """Make an average of decay min(decay, (1 + k) / (10 + k)) at update k, which soon forgets the initial weights."""

    def update(averages: Sequence[Tensor], weights: Sequence[Tensor], count: Tensor | int) -> None:
        k = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + k) / (10 + k)))(averages, weights, count)

    return update


def snapshot(state: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint holds. Data, times, noise follow from (seed, step); the RNG is for dropout."""
    saved: dict[str, Any] = {name: state[name].state_dict() for name in PARTS if state[name] is not None}
    saved["device"] = state["device"].type
    saved["rng"] = {"cpu": torch.get_rng_state()}
    if state["device"].type == "cuda":
        saved["rng"]["cuda"] = torch.cuda.get_rng_state(state["device"])
    return saved | {name: state[name] for name in ("step", "config", "data", "went_back", *UNCHANGED)}


def resume(state: dict[str, Any], config: TrainConfig, run: Path) -> Path | None:
    """Bring the state to the newest checkpoint, or to `config.resume_from`; leave it as it is where there is none.

    Nothing is written, so that a run that is refused stays as it was.

    Returns:
        The checkpoint that the run goes on from, or None.

    Raises:
        ConfigError: the checkpoint is of other settings, or of more steps.
        CheckpointError: it is damaged, or doesn't fit.
    """
    found = _choose_checkpoint(config, run)
    if found is None:
        count = models.count_parameters(state["net"])
        tell(f"training {count:,} parameters on {state['device'].type} in {config.out}")
        return None
    path, saved = found
    refuse_foreign_checkpoint(saved, config, path, "this command")
    if saved["step"] > config.steps:
        raise ConfigError(f"steps: {config.out} has done {saved['step']} already, so expected that or more")
    for name, meaning in UNCHANGED.items():
        if saved.get(name) != state[name]:
            raise CheckpointError(
                f"{meaning} changed since this run's checkpoint at step {saved['step']} "
                f"({saved.get(name)} -> {state[name]}): choose another --out to start afresh"
            )
    source = f"checkpoint {path}"
    for name in PARTS:
        if state[name] is not None:
            if name not in saved:
                raise CheckpointError(f"{source} doesn't fit what config.yaml describes: it holds no {name}")
            load_weights(state[name], saved[name], source)
    try:
        torch.set_rng_state(saved["rng"]["cpu"])
        if state["device"].type == "cuda" and "cuda" in saved["rng"]:
            torch.cuda.set_rng_state(saved["rng"]["cuda"], state["device"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{source} holds no random state that this torch can take: {error}") from error
    state["step"] = saved["step"]
    back = config.resume_from is not None and path.name == config.resume_from.name
    state["went_back"] = _going_back(config) if back else saved.get("went_back")
    tell(f"going on from step {state['step']} of {config.steps} in {config.out}")
    if saved.get("device") != state["device"].type:
        told = f"so far it ran on {saved.get('device')}, from here on {state['device'].type}"
        tell(f"{told}: not bit for bit the same run")
    return path


def _choose_checkpoint(config: TrainConfig, run: Path) -> tuple[Path, dict[str, Any]] | None:
    """Choose the checkpoint to go on from, and read what it holds.

    A command with --resume-from that was killed and is given again has gone back already: it goes on from where it was.
    """
    there = list_checkpoints(run)
    if config.resume_from is None:
        newest = read_newest_checkpoint(run)
        return None if newest is None else (there[0], newest)
    path = named_checkpoint(run, config.resume_from)
    if there and step_of(there[0]) > step_of(path):
        with suppress(CheckpointError):  # a damaged one is a reason to go back once more
            saved = read_checkpoint(there[0])
            if saved.get("went_back") == _going_back(config) and saved["step"] <= config.steps:
                tell(f"this command went back to {path.name} already; it goes on from where it was")
                return there[0], saved
    return path, read_checkpoint(path)


def _going_back(config: TrainConfig) -> dict[str, Any]:
    """Return what tells a command that went back: checkpoints written after it hold this."""
    assert config.resume_from is not None
    return {"to": config.resume_from.name, "steps": config.steps}


def set_aside_what_is_left(run: Path, chosen: Path) -> None:
    """Keep what a run learnt after the checkpoint that it goes back to, out of the way: checkpoints and metrics."""
    if not any(step_of(path) > step_of(chosen) for path in list_checkpoints(run)):
        return
    if (run / "metrics.jsonl").is_file():
        copy_aside(run / "metrics.jsonl", "abandoned")
    for newer in set_aside_newer(run, chosen):
        tell(f"{newer} was set aside as {newer.name}.abandoned")


def pick_device(config: TrainConfig) -> torch.device:
    """Return the device that `config.device` means here."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def pick_precision(config: TrainConfig, device: torch.device) -> str:
    """Return the precision that `config.precision` means on this device."""
    if config.precision == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return config.precision
