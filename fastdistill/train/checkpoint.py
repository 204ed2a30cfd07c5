"""Checkpoints of a run: everything that continuing needs, checked when written and when read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from fastdistill.settings import ConfigError
from fastdistill.train.files import (
    CheckpointError,
    DamagedFileError,
    checksum_path,
    set_aside,
    verify,
    write_checked,
    writing,
)

__all__ = [
    "CheckpointError",
    "list_checkpoints",
    "named_checkpoint",
    "read_checkpoint",
    "read_newest_checkpoint",
    "save_checkpoint",
    "set_aside_newer",
    "step_of",
]

NAME = re.compile(r"step_(\d{8,})\.pt")


def save_checkpoint(run: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `checkpoints/step_<step>.pt` and remove all but the newest `keep` of those that `save_checkpoint` wrote.

    Args:
        run: the run folder.
        step: how many steps are done.
        state: tensors, numbers, strings, lists and dicts of them: what `torch.load(weights_only=True)` reads.
        keep: how many checkpoints stay, this one included.

    Raises:
        WriteError: the disk is full, or the folder can't be written to.
    """
    path = run / "checkpoints" / f"step_{step:08d}.pt"
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_checked(path, lambda temporary: torch.save(state, temporary))
    written = [old for old in list_checkpoints(run) if step_of(old) <= step and checksum_path(old).is_file()]
    for old in written[keep:]:
        with writing(old):
            old.unlink()
            checksum_path(old).unlink(missing_ok=True)
    return path


def list_checkpoints(run: Path) -> list[Path]:
    """Return the run's checkpoints, newest first, unread; files of other names than the trainer's are none."""
    return sorted((path for path in (run / "checkpoints").glob("step_*.pt") if step_of(path) >= 0), key=step_of)[::-1]


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name, or -1 for a name that the trainer doesn't give."""
    found = NAME.fullmatch(path.name)
    step = int(found[1]) if found else -1
    return step if path.name == f"step_{step:08d}.pt" else -1


def named_checkpoint(run: Path, given: Path) -> Path:
    """Return the run's checkpoint that `--resume-from` names: by its name alone, or by a path that leads to it.

    Raises:
        ConfigError: the path leads elsewhere, or the name is none of a checkpoint.
    """
    folder = run / "checkpoints"
    own = folder / given.name
    is_bare = given == Path(given.name)
    if is_bare and given.is_file() and own.is_file() and not own.samefile(given):
        raise ConfigError(f"resume_from: {given} lies here too, beside that of the run; expected the whole path, {own}")
    if not is_bare and given.resolve() != own.resolve():
        raise ConfigError(
            f"resume_from: {given} is no checkpoint of {run}; expected a file in {folder}, for a run goes back "
            f"only to what it was itself"
        )
    if step_of(own) < 0:
        there = ", ".join(path.name for path in list_checkpoints(run)[:4]) or "none"
        raise ConfigError(
            f"resume_from: expected a name as step_00000500.pt, got {given}; in {folder} there are {there}"
        )
    return own


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU.

    Raises:
        CheckpointError: it is missing, truncated, corrupt, or not one of ours.
    """
    try:
        verify(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except DamagedFileError as error:
        raise CheckpointError(f"checkpoint {error}") from error
    except Exception as error:  # the bytes are the ones written, so another torch wrote what this one can't read
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"checkpoint {path} can't be read by torch {torch.__version__}: {reason}") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise CheckpointError(f"checkpoint {path} holds no run's state: expected a dict with its step")
    if step_of(path) not in (-1, state["step"]):
        raise CheckpointError(f"checkpoint {path} holds step {state['step']}: it was renamed, or is another's")
    return state


def read_newest_checkpoint(run: Path) -> dict[str, Any] | None:
    """Read the newest checkpoint, or None where there is none.

    Raises:
        CheckpointError: the newest is damaged. It is never passed over in silence: the message names it and the
            newest good one before it.
    """
    paths = list_checkpoints(run)
    if not paths:
        return None
    try:
        return read_checkpoint(paths[0])
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n{_offer_older(paths[1:])}") from error


def set_aside_newer(run: Path, chosen: Path) -> list[Path]:
    """Rename the checkpoints newer than `chosen` to `*.abandoned`, so that the run goes on from the chosen one.

    Their checksums go with them, and what was set aside before stays: see `fastdistill.train.files.set_aside`.
    """
    newer = [path for path in list_checkpoints(run) if step_of(path) > step_of(chosen)]
    for path in newer:
        set_aside(path, "abandoned")
        if checksum_path(path).is_file():
            set_aside(checksum_path(path), "abandoned")
    return newer


def _offer_older(paths: list[Path]) -> str:
    for path in paths:
        try:
            read_checkpoint(path)
        except CheckpointError:
            continue
        return f"The one before it, {path}, is good: start again with --resume-from {path.name}"
    return "No good checkpoint is left: remove the folder, or choose another --out, to start afresh."
