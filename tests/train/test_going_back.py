"""Resumes that are refused leave everything as it was; others take what was named and lose nothing of the user's."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill.train import CheckpointError, ConfigError, load_run, train
from fastdistill.train.checkpoint import list_checkpoints, read_checkpoint, save_checkpoint
from fastdistill.train.files import checksum_path, write_checked
from tests.train.conftest import MakeConfig
from tests.train.test_resume import assert_same_state

Tree = dict[str, tuple[int, int, bytes]]


def tree(folder: Path) -> Tree:
    """Return the inode, the time of the last change and the bytes of every file below a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def names(folder: Path) -> set[str]:
    """Return the names of the files in a folder."""
    return {path.name for path in folder.iterdir()}


def hand_over(source: Path, target: Path, step: int) -> None:
    """Copy a checkpoint with its checksum from one run to another."""
    for path in (source / "checkpoints").glob(f"step_{step:08d}.pt*"):
        shutil.copy(path, target / "checkpoints")


def rewrite(path: Path, **changes: Any) -> None:
    """Write a checkpoint again with changed entries and a right checksum; None removes one."""
    state = read_checkpoint(path) | changes
    kept = {name: value for name, value in state.items() if value is not None or name not in changes}
    write_checked(path, lambda temporary: torch.save(kept, temporary))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 4}, "steps: .* has done 12 already"),
        ({"resume_from": ""}, r"resume_from: expected a name as step_00000500\.pt, got \.; .*12\.pt"),
        ({"steps": 6, "resume_from": "step_00000008.pt"}, "steps: .* has done 8 already"),
        ({"resume_from": "step_00000005.pt"}, r"step_00000005\.pt does not exist"),
        ({"resume_from": "elsewhere/step_00000008.pt"}, "resume_from: elsewhere/.* is no checkpoint of"),
        ({"resume_from": "step_8.pt"}, r"resume_from: expected a name as step_00000500\.pt, got step_8\.pt; .*12\.pt"),
        ({"resume_from": "step_00000008.pt", "optim": {"lr": 0.5}}, "optim.lr: 0.001 -> 0.5"),
        ({"resume_from": "step_00000008.pt", "precision": "bf16"}, "the precision changed"),
        ({"model": {"width": 16}}, "model.width: 8 -> 16"),
        ({"teacher": "nowhere"}, "teacher: expected a run folder"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_refused_resume_changes_no_file(changes: dict[str, Any], message: str, tiny: MakeConfig) -> None:
    """Check config.yaml, env.json, the checkpoints' names and the time of every file."""
    run = train(tiny())
    before = tree(run)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        train(tiny(**changes))
    assert tree(run) == before


@pytest.mark.parametrize("missing", ["net", "rng", "optimizer"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_no_file(missing: str, tiny: MakeConfig) -> None:
    """Check one whose bytes are whole, and in which something isn't what this version reads."""
    run = train(tiny())
    rewrite(run / "checkpoints" / "step_00000012.pt", **{missing: None})
    before = tree(run)
    with pytest.raises(CheckpointError, match=r"checkpoint .*step_00000012\.pt .*(fit|random state)"):
        train(tiny(steps=14))
    assert tree(run) == before


def test_another_folders_file_is_refused_and_the_own_is_taken_by_name_or_path(tiny: MakeConfig) -> None:
    """Check that the path decides, not the name in it."""
    run, other = train(tiny()), train(tiny("other", seed=7))
    with pytest.raises(ConfigError, match="is no checkpoint of"):
        train(tiny(resume_from=other / "checkpoints" / "step_00000008.pt"))
    for given in (run / "checkpoints" / "step_00000008.pt", Path("step_00000004.pt")):
        train(tiny(resume_from=given))
        assert (run / "checkpoints" / "step_00000012.pt").is_file()
    assert "step_00000012.pt.abandoned.2" in names(run / "checkpoints")


def test_a_bare_name_that_lies_here_too_is_refused(
    tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that the name is ambiguous where one starts within another run's checkpoints."""
    train(tiny())
    other = train(tiny("other", seed=7))
    monkeypatch.chdir(other / "checkpoints")
    with pytest.raises(ConfigError, match="lies here too"):
        train(tiny(resume_from="step_00000008.pt"))


def test_what_was_abandoned_first_stays(tiny: MakeConfig) -> None:
    """Check that a second going back takes other names, for checkpoints, checksums and metrics."""
    run = train(tiny())
    train(tiny(steps=14, resume_from="step_00000008.pt"))
    first = tree(run / "checkpoints")["step_00000012.pt.abandoned"]
    train(tiny(steps=16, resume_from="step_00000008.pt"))
    assert tree(run / "checkpoints")["step_00000012.pt.abandoned"] == first
    ends = ("", ".2")
    assert {f"step_00000012.pt.abandoned{end}" for end in ends} <= names(run / "checkpoints")
    assert {f"step_00000012.pt.sha256.abandoned{end}" for end in ends} <= names(run / "checkpoints")
    assert {f"metrics.jsonl.abandoned{end}" for end in ends} <= names(run)


def test_an_abandoned_branch_can_be_taken_up_again(tiny: MakeConfig) -> None:
    """Check that file and checksum, renamed back, are whole."""
    run = train(tiny())
    train(tiny(steps=14, resume_from="step_00000008.pt"))
    folder = run / "checkpoints"
    for name in ("step_00000012.pt", "step_00000012.pt.sha256"):
        (folder / f"{name}.abandoned").rename(folder / name)
    assert read_checkpoint(folder / "step_00000012.pt")["step"] == 12


@pytest.mark.parametrize("keep", [3, 1])
def test_a_killed_command_that_goes_back_goes_on_when_given_again(keep: int, tiny: MakeConfig) -> None:
    """Check that it doesn't go back twice, even where the checkpoint that it went back to was rotated away."""
    whole = train(tiny("whole", steps=20))
    log = {"keep_checkpoints": 5}
    run = train(tiny(steps=16, log=log))
    command = {"steps": 20, "resume_from": "step_00000008.pt", "log": {"keep_checkpoints": keep}}
    train(tiny(**command))
    for path in (run / "checkpoints").glob("step_00000020.pt*"):  # as if it had been killed before step 20
        path.unlink()
    if keep == 1:  # its only checkpoint then was that of step 16
        hand_over(whole, run, 16)
        rewrite(run / "checkpoints" / "step_00000016.pt", went_back={"to": "step_00000008.pt", "steps": 20})
    before = names(run / "checkpoints")
    train(tiny(**command))
    assert {name for name in names(run / "checkpoints") if "abandoned" in name} == {
        name for name in before if "abandoned" in name
    }
    assert_same_state(load_run(run)[0].state_dict(), load_run(whole)[0].state_dict())


def test_a_command_that_went_back_goes_back_again_where_what_followed_is_damaged(tiny: MakeConfig) -> None:
    """Check the way out that the message offers, which would lead nowhere otherwise."""
    run = train(tiny())
    command = {"steps": 14, "resume_from": "step_00000008.pt"}
    train(tiny(**command))
    os.truncate(run / "checkpoints" / "step_00000014.pt", 100)
    with pytest.raises(CheckpointError, match=r"step_00000014\.pt is truncated"):
        train(tiny(steps=14))
    train(tiny(**command))
    assert read_checkpoint(list_checkpoints(run)[0])["step"] == 14


USERS = (
    "checkpoints/step_00000002.backup.pt",
    "checkpoints/step_2.pt",
    "checkpoints/step_zzz.pt",
    "checkpoints/step_00000001.pt",  # a name as ours, without the checksum that ours have
    "checkpoints/.mine.tmp",
    "samples/best.png",
    "samples/.best.png.tmp",
    "export/mine.safetensors",
    "export/.mine.safetensors.tmp",
    ".notes.tmp",
    "notes/.step_00000001.png.tmp",
)


def test_the_users_files_stay(tiny: MakeConfig) -> None:
    """Check, whatever their names resemble, that only the trainer's own files are rotated, swept up and read."""
    run = train(tiny(steps=4))
    for name in USERS:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(name.encode())
    before = {name: tree(run)[name] for name in USERS}
    train(tiny(steps=12, log={"keep_checkpoints": 1}))
    train(tiny(steps=14, resume_from="step_00000012.pt", log={"keep_checkpoints": 1}))
    assert {name: tree(run)[name] for name in USERS} == before
    own = [path.name for path in list_checkpoints(run) if checksum_path(path).exists()]
    assert own == ["step_00000014.pt"]


def test_an_export_that_is_not_the_trainers_is_set_aside(tiny: MakeConfig) -> None:
    """Check that weights that the user put in its place aren't written over."""
    run = train(tiny())
    export = run / "export" / "ema.safetensors"
    export.write_bytes(b"mine")
    train(tiny())
    assert (run / "export" / "ema.safetensors.damaged").read_bytes() == b"mine"
    load_run(run)


def test_a_checkpoint_of_another_run_is_refused_by_field_and_values(tiny: MakeConfig) -> None:
    """Check that both are named before it goes on as a mixture, or doesn't fit."""
    run, other = train(tiny()), train(tiny("other", steps=16, seed=7, optim={"lr": 0.5}))
    wide = train(tiny("wide", steps=16, model={"width": 12}))
    for source, said in ((other, "optim.lr: 0.5 -> 0.001; seed: 7 -> 0"), (wide, "model.width: 12 -> 8")):
        hand_over(source, run, 16)
        with pytest.raises(ConfigError, match=rf"checkpoint .*step_00000016\.pt is of a run.*{re.escape(said)}"):
            train(tiny(steps=20))
        (run / "export" / "ema.safetensors").unlink(missing_ok=True)
        with pytest.raises(ConfigError, match=re.escape(said)):
            load_run(run)


def test_what_may_change_may_change(tiny: MakeConfig, tmp_path: Path) -> None:
    """Check steps, logging, diagnostics and the folder's place, as before checkpoints held them."""
    run = train(tiny())
    run.rename(tmp_path / "moved")
    changes = {"log": {"log_every": 1, "keep_checkpoints": 2}, "diagnostics": {"every": 0}}
    moved = train(tiny("moved", steps=14, **changes))
    assert_same_state(load_run(moved)[0].state_dict(), load_run(train(tiny("whole", steps=14)))[0].state_dict())


def test_a_renamed_checkpoint_is_refused(tiny: MakeConfig) -> None:
    """Check a file that says another step than its name."""
    folder = train(tiny()) / "checkpoints"
    for end in ("", ".sha256"):
        shutil.copy(folder / f"step_00000008.pt{end}", folder / f"step_00000010.pt{end}")
    with pytest.raises(CheckpointError, match=r"step_00000010\.pt holds step 8"):
        train(tiny(resume_from="step_00000010.pt"))


def test_a_checkpoint_from_before_they_held_a_configuration_goes_on(tiny: MakeConfig) -> None:
    """Check that config.yaml speaks for it, and that it is refused without that file."""
    run, whole = train(tiny()), train(tiny("whole", steps=16))
    rewrite(run / "checkpoints" / "step_00000012.pt", config=None, went_back=None)
    kept = (run / "config.yaml").read_bytes()
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no config\.yaml, and its checkpoint is from before"):
        train(tiny(steps=16))
    (run / "config.yaml").write_bytes(kept)
    train(tiny(steps=16))
    assert_same_state(load_run(run)[0].state_dict(), load_run(whole)[0].state_dict())


def test_a_missing_configuration_is_written_again_from_the_command(tiny: MakeConfig) -> None:
    """Check that the checkpoint says whether the command is the run's own."""
    run = train(tiny())
    kept = (run / "config.yaml").read_bytes()
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="seed: 0 -> 3"):
        train(tiny(seed=3))
    assert not (run / "config.yaml").exists()
    train(tiny())
    assert (run / "config.yaml").read_bytes() == kept


def test_an_export_of_another_run_is_refused(tiny: MakeConfig) -> None:
    """Check one of the same sizes with its own checksum: only what it says of itself tells."""
    run, other = train(tiny()), train(tiny("other", seed=7))
    for path in (other / "export").iterdir():
        shutil.copy(path, run / "export")
    with pytest.raises(CheckpointError, match=r"ema\.safetensors is of a run with other settings.*seed: 7 -> 0"):
        load_run(run)


def test_rotation_never_removes_what_was_just_written(tmp_path: Path) -> None:
    """Check it even where checkpoints of later steps lie there."""
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, {"step": step}, keep=3)
    save_checkpoint(tmp_path, 15, {"step": 15}, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step_00000030.pt",
        "step_00000020.pt",
        "step_00000015.pt",
    ]
