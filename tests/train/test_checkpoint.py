"""Checkpoints: kept, refused, offered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastdistill.train import CheckpointError
from fastdistill.train.checkpoint import (
    list_checkpoints,
    read_checkpoint,
    read_newest_checkpoint,
    save_checkpoint,
    set_aside_newer,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Make a run folder with checkpoints at steps 10, 20 and 30."""
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, {"step": step, "weights": torch.full((1000,), float(step))}, keep=3)
    return tmp_path


def damage(path: Path, how: str) -> None:
    """Cut a file in half, or change one byte in its middle."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    if how == "truncated":
        del content[middle:]
    else:
        content[middle] ^= 255
    path.write_bytes(content)


def test_the_newest_is_read(run: Path) -> None:
    """Check that it is the newest by step."""
    state = read_newest_checkpoint(run)
    assert state is not None
    assert state["step"] == 30
    assert torch.equal(state["weights"], torch.full((1000,), 30.0))


def test_a_new_run_has_none(tmp_path: Path) -> None:
    """Check that no folder is no checkpoint and no error."""
    assert read_newest_checkpoint(tmp_path) is None


def test_only_the_newest_are_kept(run: Path) -> None:
    """Check that their checksums stay with them, and nothing else."""
    save_checkpoint(run, 40, {"step": 40}, keep=2)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    stems = ["step_00000030.pt", "step_00000040.pt"]
    assert names == sorted(stems + [f"{stem}.sha256" for stem in stems])


@pytest.mark.parametrize("how", ["truncated", "corrupt"])
def test_a_damaged_one_is_refused_by_name_and_the_one_before_is_offered(run: Path, how: str) -> None:
    """Check that none is passed over in silence: the user decides."""
    damage(run / "checkpoints" / "step_00000030.pt", how)
    with pytest.raises(CheckpointError) as caught:
        read_newest_checkpoint(run)
    message = str(caught.value)
    assert "step_00000030.pt is truncated or corrupt" in message
    assert "step_00000020.pt, is good: start again with --resume-from step_00000020.pt" in message


def test_a_damaged_one_before_is_not_offered(run: Path) -> None:
    """Check that the newest good one is offered, and none where none is good."""
    damage(run / "checkpoints" / "step_00000030.pt", "truncated")
    damage(run / "checkpoints" / "step_00000020.pt", "corrupt")
    with pytest.raises(CheckpointError, match=r"--resume-from step_00000010\.pt"):
        read_newest_checkpoint(run)
    damage(run / "checkpoints" / "step_00000010.pt", "corrupt")
    with pytest.raises(CheckpointError, match="No good checkpoint is left"):
        read_newest_checkpoint(run)


def test_a_missing_one_is_named(run: Path) -> None:
    """Check that one is named that is missing, as --resume-from may ask for it."""
    with pytest.raises(CheckpointError, match=r"step_00000011\.pt does not exist"):
        read_checkpoint(run / "checkpoints" / "step_00000011.pt")


def test_code_in_a_checkpoint_is_not_run(run: Path) -> None:
    """Check that only tensors and plain values are read, even with a matching checksum."""
    path = save_checkpoint(run, 50, {"step": 50, "loss": print}, keep=9)
    with pytest.raises(CheckpointError, match=r"step_00000050\.pt can't be read"):
        read_checkpoint(path)


def test_newer_ones_are_set_aside_not_removed(run: Path) -> None:
    """Check that going back keeps the abandoned branch on disk, out of the way."""
    chosen = run / "checkpoints" / "step_00000010.pt"
    assert len(set_aside_newer(run, chosen)) == 2
    assert list_checkpoints(run) == [chosen]
    assert (run / "checkpoints" / "step_00000030.pt.abandoned").exists()
