"""Checkpoints of a run: everything that continuing needs, checked when written and when read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastdistill.train.files import DamagedFileError, checksum_path, verify, write_checked


class CheckpointError(RuntimeError):
    """A checkpoint that can't be used. The message names it, and the one before it where that is good."""


def save_checkpoint(run: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `checkpoints/step_<step>.pt` and remove all but the newest `keep`.

    Args:
        run: the run folder.
        step: how many steps are done.
        state: tensors, numbers, strings, lists and dicts of them: what `torch.load(weights_only=True)` reads.
        keep: how many checkpoints stay, this one included.
    """
    path = run / "checkpoints" / f"step_{step:08d}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checked(path, lambda temporary: torch.save(state, temporary))
    for old in list_checkpoints(run)[keep:]:
        old.unlink()
        checksum_path(old).unlink(missing_ok=True)
    return path


def list_checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, newest first, unread."""
    return sorted((run / "checkpoints").glob("step_*.pt"), reverse=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint onto the CPU.

    Raises:
        CheckpointError: it is missing, truncated, corrupt, or not one of ours.
    """
    try:
        verify(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except DamagedFileError as error:
        raise CheckpointError(f"checkpoint {error}") from error
    except Exception as error:  # the bytes are the ones written, so another torch wrote what this one can't read
        raise CheckpointError(f"checkpoint {path} can't be read by torch {torch.__version__}: {error}") from error


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
    """Rename the checkpoints newer than `chosen` to `*.abandoned`, so that the run goes on from the chosen one."""
    newer = [path for path in list_checkpoints(run) if path.name > chosen.name]
    for path in newer:
        path.rename(path.with_name(f"{path.name}.abandoned"))
    return newer


def _offer_older(paths: list[Path]) -> str:
    for path in paths:
        try:
            read_checkpoint(path)
        except CheckpointError:
            continue
        return f"The one before it, {path}, is good: start again with --resume-from {path.name}"
    return "No good checkpoint is left: remove the folder, or choose another --out, to start afresh."
