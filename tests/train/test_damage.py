"""Damaged run folders, full disks, read-only folders: one message that names the file, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from fastdistill import cli
from fastdistill.eval.classifier import cached_classifier
from fastdistill.eval.records import describe_machine, read_metrics, training_seconds
from fastdistill.train import CheckpointError, ConfigError, load_config, load_run, train
from fastdistill.train.checkpoint import list_checkpoints
from fastdistill.train.files import WriteError, replacing
from tests.train.conftest import MakeConfig
from tests.train.test_resume import assert_same_state, lines

DAMAGES = ("missing", "empty", "truncated", "NULs", "random bytes", "a folder")
FILES = (
    "config.yaml",
    "env.json",
    "metrics.jsonl",
    "summary.json",
    ".lock",
    "events",
    "samples",
    "checkpoints/step_00000012.pt",
    "checkpoints/step_00000012.pt.sha256",
    "export/ema.safetensors",
    "export/ema.safetensors.sha256",
)


def damage(path: Path, how: str) -> None:
    """Damage a file or a folder in one of the `DAMAGES`; the random bytes are always the same."""
    content = path.read_bytes() if path.is_file() else b"a folder was here"
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if how == "a folder":
        (path / "within").mkdir(parents=True)
    elif how != "missing":
        noise = random.Random(0).randbytes(200)
        damaged = {"empty": b"", "truncated": content[: len(content) // 2], "NULs": bytes(64), "random bytes": noise}
        path.write_bytes(damaged[how])


def told(action: Callable[[], object], place: str) -> str | None:
    """Return what an action said when it was refused, or None where it succeeded; any other error is a failure."""
    try:
        action()
    except (ConfigError, CheckpointError) as error:
        message = str(error)
        assert len(message.splitlines()) <= 2 and max(map(len, message.splitlines())) < 500, message
        assert Path(place).name.removesuffix(".sha256") in message, message
        return message
    return None


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a finished run, which `eval` has measured, to be copied."""
    from tests.train.conftest import tiny_fields

    folder = tmp_path_factory.mktemp("finished")
    fields = tiny_fields(folder / "run", method={"name": "flow_matching", "sample_steps": 1})
    (folder / "tiny.yaml").write_text(json.dumps(fields), encoding="utf-8")  # JSON is YAML
    train(load_config(folder / "tiny.yaml"))
    (folder / "run" / "summary.json").write_text("{}\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("place", FILES)
def test_every_damage_ends_well_or_in_a_message_that_names_the_file(
    place: str, how: str, finished: Path, tmp_path: Path
) -> None:
    """Check reading the run as `sample`, `eval` and `compare` do, going on with it, and drawing its curves."""
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    damage(run / place, how)
    told(lambda: load_run(run, device="cpu"), place)
    told(lambda: load_run(run, ema=False, device="cpu"), place)
    told(lambda: (read_metrics(run), describe_machine(run)), place)
    said = told(lambda: train(load_config(finished / "tiny.yaml", ["--out", str(run), "--steps", "13"])), place)
    if how == "missing" and not place.startswith("checkpoints"):
        assert said is None
    if place.startswith("checkpoints") and how != "missing":
        assert said is not None
    if said is None:
        assert load_run(run, device="cpu")[1].steps == 13


@pytest.mark.parametrize("command", ["sample", "eval"])
def test_the_command_line_says_it_in_a_line_and_ends_with_status_2(
    command: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that there is no traceback."""
    run = tmp_path / "run"
    shutil.copytree(finished / "run", run)
    damage(run / "export" / "ema.safetensors", "truncated")
    assert cli.main([command, str(run), "--n", "64"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastdistill: ") and "ema.safetensors is truncated" in said
    assert len(said.splitlines()) == 1


LINES = {
    "NULs before the next line": lambda good: [good[0], b"\0" * 512 + good[1], *good[2:]],
    "a line of NULs": lambda good: [*good, b"\0" * 64],
    "half a line": lambda good: [*good[:-1], good[-1][:9], good[-1]],
    "no object": lambda good: [*good, b"[1, 2]"],
    "no step": lambda good: [*good, b'{"loss": 1.0}'],
    "words": lambda good: [*good, b'{"step": 9, "loss": "low"}'],
    "no UTF-8": lambda good: [*good, b"\xff\xfe"],
    "brackets": lambda good: [*good, b"[" * 100_000],
}


@pytest.mark.parametrize("how", LINES)
def test_damaged_lines_of_metrics_are_left_out_and_kept_beside(
    how: str, tiny: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that the run goes on and says so, and that good lines stay, the one behind NULs too."""
    run = train(tiny())
    path, expected = run / "metrics.jsonl", lines(run)
    damaged = b"\n".join(LINES[how](path.read_bytes().splitlines())) + b"\n"
    path.write_bytes(damaged)
    assert [point["step"] for point in read_metrics(run)] == [point["step"] for point in expected]
    assert training_seconds(tiny()) > 0
    capsys.readouterr()
    train(tiny(steps=14))
    assert "metrics.jsonl: 1 damaged lines are left out" in capsys.readouterr().err
    assert lines(run)[:-1] == expected
    assert (run / "metrics.jsonl.damaged").read_bytes() == damaged


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse to write more than `size` bytes into any file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("size", "named"),
    [
        (200, "config.yaml"),
        (2500, "step_00000004.pt"),
        (15_000, "step_00000004.pt"),
    ],
)
def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(
    size: int, named: str, tiny: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check each file that may meet it: no traceback, no half file, and the same weights in the end."""
    monkeypatch.setattr(tqdm, "write", lambda *words, **options: None)  # pytest keeps what is said in a file too
    log = {"log_every": 12, "sample_every": 12, "checkpoint_every": 4}
    whole = train(tiny("whole", log=log))
    with files_of_at_most(size), pytest.raises(WriteError, match=rf"{named} can't be written: .*free"):
        train(tiny(log=log))
    assert not any((tmp_path / "run").rglob(".*.tmp"))
    run = train(tiny(log=log))
    assert_same_state(load_run(run)[0].state_dict(), load_run(whole)[0].state_dict())


@pytest.mark.parametrize("name", ["metrics.jsonl", "events", "samples", "export"])
def test_a_full_disk_is_named_for_whatever_meets_it(
    name: str, tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Check logs and pictures as well as weights."""
    from fastdistill.train import logging, loop, run

    def fails(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if name == "metrics.jsonl":
        sync = os.fsync

        def fails_there(number: int) -> None:
            return fails() if os.readlink(f"/proc/self/fd/{number}").endswith("/metrics.jsonl") else sync(number)

        monkeypatch.setattr(os, "fsync", fails_there)
    elif name == "samples":
        write = Path.write_bytes

        def fails_among_samples(path: Path, content: bytes) -> int:
            return fails() if path.parent.name == "samples" else write(path, content)  # type: ignore[func-returns-value]

        monkeypatch.setattr(Path, "write_bytes", fails_among_samples)
    else:
        place, attribute = {
            "events": (logging.Events, "_flush"),
            "export": (run.safetensors.torch, "save_file"),
        }[name]
        monkeypatch.setattr(place, attribute, fails)
    with pytest.raises(WriteError, match=r"No space left") as caught:
        train(tiny())
    assert name in str(caught.value) or name == "events"  # patched beneath what names it
    monkeypatch.undo()
    assert loop.train(tiny()) == tmp_path / "run"


def test_a_read_only_folder_is_named(tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that it is named before anything of the run changes."""
    run = train(tiny())
    newest = list_checkpoints(run)[0].stat()
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target).is_relative_to(run):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(WriteError, match=r"config\.yaml can't be written: Read-only.*choose a folder"):
        train(tiny(steps=14))
    assert list_checkpoints(run)[0].stat().st_mtime_ns == newest.st_mtime_ns
    assert cli.main(["sample", str(run), "--n", "3"]) == 2


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """Check that it leaves no trace beside it, either."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    message = r"a\.bin can't be written: File too large; free some"
    with files_of_at_most(10), pytest.raises(WriteError, match=message), replacing(path) as temporary:
        temporary.write_bytes(bytes(100))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_of_the_users_is_no_place_for_a_comparison_or_the_demo(tmp_path: Path) -> None:
    """Check the places of both reports, whose fixed names may be the user's there."""
    (tmp_path / "report.html").write_text("mine", encoding="utf-8")
    for command in (["compare", "--methods", "meanflow", "--steps", "1"], ["demo"]):
        assert cli.main([*command, "--out", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_classifier_is_trained_again_or_named(how: str, tmp_path: Path) -> None:
    """Check that only what can't be replaced is refused; a classifier costs seconds."""
    x, y = torch.zeros(20, 1, 8, 8), torch.arange(20) % 10
    path = tmp_path / "classifier.safetensors"
    path.write_bytes(b"x" * 100)
    damage(path, how)
    if how == "a folder":
        with pytest.raises(WriteError, match=r"classifier\.safetensors can't be written: .*move away"):
            cached_classifier(path, x, y)
    else:
        expected = cached_classifier(path, x, y).state_dict()
        assert_same_state(cached_classifier(path, x, y).state_dict(), expected)
