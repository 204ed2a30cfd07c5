"""Make a run folder, lock it against a second process, and read it again as a network.

config.yaml  env.json  metrics.jsonl  events/  samples/step_*.png  checkpoints/step_*.pt  export/ema.safetensors
"""

from __future__ import annotations

import fcntl
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import yaml
from torch import nn

import fastdistill
from fastdistill import models
from fastdistill.settings import ConfigError, short
from fastdistill.train.checkpoint import CheckpointError, list_checkpoints, read_newest_checkpoint
from fastdistill.train.config import TrainConfig, changed_fields, model_arguments, parse_config, read_yaml, to_yaml
from fastdistill.train.data_settings import changed_fingerprint
from fastdistill.train.environment import describe_environment
from fastdistill.train.files import DamagedFileError, verify, write_checked, write_text, writing

SHOWN = 4  # how many settings that differ an error lists
MOVABLE = ("method.perceptual:",)  # a module of the user's, which config.yaml may be edited to follow
# What `fastdistill.train.files.replacing` calls a run's own files while it writes them; others' are left alone.
UNFINISHED = re.compile(
    r"\.(config\.yaml|env\.json|metrics\.jsonl|summary\.json)\.tmp"
    r"|(samples/\.(step_\d+|flow_map)\.png|checkpoints/\.step_\d+\.pt(\.sha256)?)\.tmp"
    r"|(export/\.ema\.safetensors|pairs/\.pairs_\d+\.safetensors)(\.sha256)?\.tmp"
)


@contextmanager
def open_run(config: TrainConfig) -> Iterator[Path]:
    """Make or reopen the run folder `config.out` and hold its lock; a killed process leaves no lock behind.

    Nothing but the lock is written: `begin_run` does that, once all that may be refused is checked.

    Raises:
        ConfigError: the folder is something else, another process trains there, or it holds a run of other settings.
        WriteError: the folder can't be made or written to.
    """
    run = config.out
    with writing(run):
        if run.is_dir() and any(run.iterdir()) and not any((run / name).exists() for name in (".lock", "config.yaml")):
            raise ConfigError(f"out: {run} is not empty and no run folder; choose another")
        run.mkdir(parents=True, exist_ok=True)
    with writing(run / ".lock"):
        lock = (run / ".lock").open("a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"out: another process is training in {run}; stop it, or choose another --out") from error
        except OSError as error:
            raise ConfigError(
                f"out: {run} can't be locked: {error.strerror}; choose a folder on another disk"
            ) from error
        _refuse_other_settings(config)
        yield run


def refuse_foreign_folder(out: Path, runs: str, written: Sequence[str]) -> None:
    """Refuse a folder that is to hold several runs and what is written about them, where others' files would be lost.

    Args:
        out: the folder.
        runs: a pattern of the runs in it, of which one is there as soon as the first was started.
        written: the names of the files that will be written there.
    """
    with naming_what_is_read(out):
        if out.exists() and not out.is_dir():
            raise ConfigError(f"out: {out} is a file; expected a folder")
        there = [name for name in written if (out / name).exists()]
        if there and not any(out.glob(runs)):
            raise ConfigError(
                f"out: {out} holds {', '.join(there)}, and no runs of this command ({runs}), so these are something "
                f"else's; choose another"
            )


def begin_run(run: Path, config: TrainConfig) -> None:
    """Write what a run is described by, make its folders, and remove what a killed process was writing.

    Raises:
        WriteError: something can't be written.
    """
    for name in ("checkpoints", "samples", "export"):
        with writing(run / name):
            (run / name).mkdir(exist_ok=True)
    write_text(run / "config.yaml", to_yaml(config))
    write_text(run / "env.json", json.dumps(describe_environment(), indent=2) + "\n")
    for pattern in (".*.tmp", "*/.*.tmp"):
        for unfinished in run.glob(pattern):
            if UNFINISHED.fullmatch(str(unfinished.relative_to(run))):
                with writing(unfinished):
                    unfinished.unlink()


def _refuse_other_settings(config: TrainConfig) -> None:
    file = config.out / "config.yaml"
    if not list_checkpoints(config.out) or not file.exists():
        return  # nothing was learnt yet, so there is nothing to mix up; or the checkpoint itself will tell
    try:
        found = parse_config({"out": config.out} | read_yaml(file), str(file))
    except ConfigError as error:
        raise ConfigError(f"{error}; move it away to go on by the configuration that the checkpoint holds") from error
    advice = "Start it with the same settings to go on"
    refuse_changes(found, config, f"out: {config.out} holds, by its config.yaml, a run with other settings", advice)


def refuse_changes(
    found: TrainConfig,
    config: TrainConfig,
    what: str,
    advice: str,
    *,
    ignored: tuple[str, ...] = (),
    data: Any = None,
) -> None:
    """Raise a ConfigError that says `what` where a run's settings differ from those that it is to go on with.

    Args:
        ignored: how the lines of fields begin that may differ.
        data: the fingerprint of the data set as it was; None where nobody wrote it down.
    """
    changed = changed_fingerprint(data, config.data.fingerprint()) if isinstance(data, dict) else []
    changed += [line for line in changed_fields(found, config) if not line.startswith(ignored)]
    if changed:
        more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise ConfigError(f"{what} ({'; '.join(changed[:SHOWN])}{more}). {advice}, or choose another --out")


def _with_module_moved(given: Mapping[str, Any], config: TrainConfig) -> dict[str, Any]:
    """Return a stored configuration that follows config.yaml to where a data set of the user's own lies by now."""
    data = given.get("data")
    if isinstance(data, Mapping) and ":" in str(data.get("name")) and ":" in config.data.name:
        return {**given, "data": {**data, "name": config.data.name}}
    return dict(given)


def refuse_foreign_checkpoint(state: dict[str, Any], config: TrainConfig, path: Path, whose: str) -> None:
    """Raise a ConfigError where a checkpoint holds a configuration of other settings than `config`, which is `whose`.

    One from before checkpoints held any is taken for what the folder's config.yaml says.
    """
    if "config" in state:
        given, source = state["config"], f"the configuration in {path}"
        if not isinstance(given, dict):
            raise ConfigError(f"{source}: expected fields and their values, got {short(given)}")
        found = parse_config({"out": config.out} | _with_module_moved(given, config), source)
        advice = "Move it away to go on from the one before it"
        what = f"out: the checkpoint {path} is of a run with other settings than {whose}"
        refuse_changes(found, config, what, advice, ignored=MOVABLE, data=state.get("data"))
    elif not (config.out / "config.yaml").is_file():
        raise ConfigError(
            f"out: {config.out} has no config.yaml, and its checkpoint is from before checkpoints held one; put the "
            f"file back, or choose another --out"
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
        "data": json.dumps(config.data.fingerprint()),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    with writing(path.parent):
        path.parent.mkdir(exist_ok=True)
    write_checked(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata))
    return path


def build_network(config: TrainConfig) -> nn.Module:
    """Build the network that a configuration describes, freshly initialised."""
    return models.create(config.model.preset, **model_arguments(config))


def load_run(
    run: str | Path, ema: bool = True, device: torch.device | str | None = None
) -> tuple[nn.Module, TrainConfig]:
    """Load the network of a run, frozen and in eval mode, and the run's configuration.

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
    file = run / "config.yaml"
    with naming_what_is_read(file):
        if not file.is_file():
            raise ConfigError(f"{run}: expected a run folder, and it has no config.yaml")
    config = parse_config(read_yaml(file) | {"out": str(run)}, str(file))
    with torch.random.fork_rng(devices=[]):  # the initial weights drawn here are thrown away
        try:
            net = build_network(config)
        except (KeyError, ValueError, ArithmeticError, RuntimeError, TypeError, MemoryError) as error:
            raise ConfigError(f"{file}: model: the network can't be built: {_first_line(error)}") from error
    weights, source = _read_weights(run, ema, config)
    load_weights(net, weights, source)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return net.requires_grad_(False).eval().to(device), config


def load_weights(part: Any, weights: Any, source: str) -> None:
    """Load a state dict from a file into a network, or into whatever else takes one.

    Raises:
        CheckpointError: it doesn't fit; `source` names the file.
    """
    try:
        part.load_state_dict(weights)
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{source} doesn't fit what config.yaml describes: {_first_line(error)}") from error


def _read_weights(run: Path, ema: bool, config: TrainConfig) -> tuple[dict[str, Any], str]:
    """Read the weights, and return the name of the file that they are from."""
    export = run / "export" / "ema.safetensors"
    if ema and export.exists():
        try:
            verify(export)
            with safetensors.safe_open(export, "pt") as file:
                metadata = file.metadata() or {}
            weights = safetensors.torch.load_file(export)
        except DamagedFileError as error:
            raise CheckpointError(f"{error}; start the run again to write it anew") from error
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(f"{export} can't be read: {_first_line(error)}; start the run again") from error
        _refuse_foreign_export(metadata, config, export)
        return weights, str(export)
    state = read_newest_checkpoint(run)
    if state is None:
        raise CheckpointError(f"{run} has no checkpoint and no export yet: train it first")
    path = list_checkpoints(run)[0]
    refuse_foreign_checkpoint(state, config, path, "config.yaml beside it")
    try:
        return averaged_weights(state["ema"]) if ema else state["net"], f"checkpoint {path}"
    except (KeyError, AttributeError) as error:
        raise CheckpointError(f"checkpoint {path} holds no run's state: expected weights by name") from error


def _refuse_foreign_export(metadata: dict[str, str], config: TrainConfig, path: Path) -> None:
    """Refuse an export that says it is of another run: one of the same sizes would else be taken in silence."""
    try:
        given = yaml.safe_load(metadata["config"])
        found = parse_config({"out": config.out} | _with_module_moved(given, config), str(path))
        data = json.loads(metadata.get("data", "{}"))
    except (AttributeError, KeyError, TypeError, ValueError, yaml.YAMLError, ConfigError):
        return  # from another version, whose settings are other ones: the sizes decide
    advice = "Put back the file that belongs there"
    try:
        what = f"{path} is of a run with other settings than config.yaml has"
        refuse_changes(found, config, what, advice, ignored=MOVABLE, data=data)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


@contextmanager
def naming_what_is_read(path: Path) -> Iterator[None]:
    """Turn an OSError, or a path that can't be one, into a ConfigError that names the path."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{short(str(path))} can't be read: {error.strerror or error}") from error


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def averaged_weights(ema: dict[str, Any]) -> dict[str, Any]:
    """Return the network's own state dict out of an AveragedModel's."""
    return {name.removeprefix("module."): value for name, value in ema.items() if name.startswith("module.")}
