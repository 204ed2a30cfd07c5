"""A run folder: made, locked against a second process, and read again as a network.

config.yaml  env.json  metrics.jsonl  events/  samples/step_*.png  checkpoints/step_*.pt  export/ema.safetensors
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import fastdistill
from fastdistill import models
from fastdistill.train.checkpoint import CheckpointError, list_checkpoints, read_newest_checkpoint
from fastdistill.train.config import TrainConfig, changed_fields, model_arguments, parse_config, read_yaml, to_yaml
from fastdistill.train.environment import describe_environment
from fastdistill.train.files import DamagedFileError, verify, write_checked, write_text
from fastdistill.train.settings import ConfigError

SHOWN = 4  # how many settings that differ an error lists


@contextmanager
def open_run(config: TrainConfig) -> Iterator[Path]:
    """Make or reopen the run folder `config.out` and hold its lock; a killed process leaves no lock behind.

    Raises:
        ConfigError: the folder is something else, another process trains there, or it holds a run of other settings.
    """
    run = config.out
    if run.is_dir() and any(run.iterdir()) and not any((run / name).exists() for name in (".lock", "config.yaml")):
        raise ConfigError(f"out: {run} is not empty and no run folder; choose another")
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"out: another process is training in {run}; stop it, or choose another --out") from error
        _refuse_other_settings(config)
        write_text(run / "config.yaml", to_yaml(config))
        write_text(run / "env.json", json.dumps(describe_environment(), indent=2) + "\n")
        for name in ("checkpoints", "samples", "export"):
            (run / name).mkdir(exist_ok=True)
        for unfinished in run.rglob(".*.tmp"):  # what a killed process was writing
            unfinished.unlink()
        yield run


def _refuse_other_settings(config: TrainConfig) -> None:
    if not list_checkpoints(config.out):
        return  # nothing was learnt yet, so there is nothing to mix up
    file = config.out / "config.yaml"
    changed = changed_fields(parse_config({"out": config.out} | read_yaml(file), str(file)), config)
    if changed:
        more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise ConfigError(
            f"out: {config.out} holds a run with other settings ({'; '.join(changed[:SHOWN])}{more}). Start it with "
            f"the same settings to go on, or choose another --out"
        )


def export_network(run: Path, net: nn.Module, config: TrainConfig, step: int) -> Path:
    """Write `export/ema.safetensors`: the weights, and in its metadata what rebuilds the network without this run."""
    path = run / "export" / "ema.safetensors"
    metadata = {
        "format": "pt",
        "fastdistill": fastdistill.__version__,
        "step": str(step),
        "preset": config.model.preset,
        "network": json.dumps(net.config),
        "config": to_yaml(config),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    write_checked(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata))
    return path


def build_network(config: TrainConfig) -> nn.Module:
    """The network that a configuration describes, freshly initialised."""
    return models.create(config.model.preset, **model_arguments(config))


def load_run(
    run: str | Path, ema: bool = True, device: torch.device | str | None = None
) -> tuple[nn.Module, TrainConfig]:
    """The network of a run, frozen and in eval mode, and the run's configuration.

    Args:
        run: a run folder.
        ema: the averaged weights, from the export of a finished run, else from its newest checkpoint; False: the last
            weights themselves, from the newest checkpoint.
        device: where to; None: the GPU if there is one.

    Raises:
        ConfigError: no run folder.
        CheckpointError: nothing was saved there yet, or what was is damaged; it names the file.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: expected a run folder, and it has no config.yaml")
    config = parse_config(read_yaml(run / "config.yaml") | {"out": str(run)}, str(run / "config.yaml"))
    with torch.random.fork_rng(devices=[]):  # the initial weights drawn here are thrown away
        net = build_network(config)
    net.load_state_dict(_read_weights(run, ema))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return net.requires_grad_(False).eval().to(device), config


def _read_weights(run: Path, ema: bool) -> dict[str, Any]:
    export = run / "export" / "ema.safetensors"
    if ema and export.exists():
        try:
            verify(export)
        except DamagedFileError as error:
            raise CheckpointError(f"{error}; start the run again to write it anew") from error
        return safetensors.torch.load_file(export)
    state = read_newest_checkpoint(run)
    if state is None:
        raise CheckpointError(f"{run} has no checkpoint and no export yet: train it first")
    return averaged_weights(state["ema"]) if ema else state["net"]


def averaged_weights(ema: dict[str, Any]) -> dict[str, Any]:
    """The network's own state dict out of an AveragedModel's."""
    return {name.removeprefix("module."): value for name, value in ema.items() if name.startswith("module.")}
