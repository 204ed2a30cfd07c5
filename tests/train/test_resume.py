"""Killed at any moment and started again, a run ends as if it had never stopped, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdistill.train import CheckpointError, ConfigError, TrainConfig, load_run, loop, train
from fastdistill.train.checkpoint import list_checkpoints, read_checkpoint
from tests.train.conftest import MakeConfig

# A server process that has imported what training needs; each child is forked from it, in milliseconds.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["fastdistill.train", "torch._dynamo", "torch.utils.tensorboard"])

TIMED = {"samples_per_second", "peak_memory_bytes"}


def die() -> None:
    """Kill the process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(config: TrainConfig, moment: str, step: int) -> None:
    """Train in this process, and die by SIGKILL at a moment of the checkpoint of `step`."""
    torch.set_num_threads(1)
    name, save, replace = f"step_{step:08d}.pt", torch.save, os.replace

    def half_save(state: dict[str, Any], path: Path) -> None:
        save(state, path)
        if name in path.name:
            os.truncate(path, path.stat().st_size // 2)
            die()

    def no_replace(source: Path, target: Path) -> None:
        if target.name == name:
            die()
        replace(source, target)

    def replace_and_die(source: Path, target: Path) -> None:
        replace(source, target)
        if target.name == name:
            die()

    patch = pytest.MonkeyPatch()  # never undone: this process ends here
    if moment == "writing it":
        patch.setattr(torch, "save", half_save)
    else:
        patch.setattr(os, "replace", no_replace if moment == "before the rename" else replace_and_die)
    train(config)


def train_and_wait(config: TrainConfig, step: int) -> None:
    """Train in this process up to a step, and then wait to be killed: whoever does it may be slow."""
    torch.set_num_threads(1)
    train_step = loop.train_step

    def step_or_wait(state: dict[str, Any], *arguments: Any) -> Any:
        while state["step"] >= step:
            signal.pause()
        return train_step(state, *arguments)

    pytest.MonkeyPatch().setattr(loop, "train_step", step_or_wait)  # never undone: this process ends here
    train(config)


def killed(target: Callable[..., None], *arguments: Any, when: Callable[[], bool] | None = None) -> None:
    """Run a function in a process that gets killed: by itself, or from outside as soon as `when()` holds."""
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    while when is not None and process.is_alive() and not when():
        time.sleep(0.001)
    if when is not None:
        process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def is_larger_than(path: Path, size: int) -> bool:
    """Return whether a file is there and has more bytes."""
    return path.exists() and path.stat().st_size > size


def lines(run: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl without what a clock or the process decides."""
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in point.items() if name not in TIMED} for point in points]


def assert_same_state(a: Any, b: Any, place: str = "state") -> None:
    """Assert bit-equal tensors and equal values, all the way down."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), place
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for name in a:
            assert_same_state(a[name], b[name], f"{place}[{name!r}]")
    else:
        assert a == b, place


def assert_same_run(resumed: Path, whole: Path) -> None:
    """Assert that weights, averages, optimiser, random state, metrics and export are the uninterrupted run's."""
    assert_same_state(read_checkpoint(list_checkpoints(resumed)[0]), read_checkpoint(list_checkpoints(whole)[0]))
    assert_same_state(load_run(resumed)[0].state_dict(), load_run(whole)[0].state_dict())
    assert lines(resumed) == lines(whole)


def test_killed_three_times_around_checkpoints_a_run_ends_the_same(tiny: MakeConfig) -> None:
    """Check kills while a checkpoint is written, before it takes its place, and right after."""
    whole, config = train(tiny("whole")), tiny("killed")
    killed(train_and_die, config, "writing it", 4)
    assert not list_checkpoints(config.out)
    killed(train_and_die, config, "before the rename", 8)
    assert [path.name for path in list_checkpoints(config.out)] == ["step_00000004.pt"]
    assert [path.name for path in config.out.rglob(".*.tmp")] == [".step_00000008.pt.tmp"]
    killed(train_and_die, config, "after the rename", 8)
    assert list_checkpoints(config.out)[0].name == "step_00000008.pt"
    assert_same_run(train(config), whole)
    assert not any(config.out.rglob(".*.tmp"))


def test_killed_from_outside_at_any_moment_a_run_ends_the_same(tiny: MakeConfig) -> None:
    """Check two kills, whatever the loop was doing: the moment follows the clock."""
    changes = {"steps": 120, "log": {"log_every": 1, "sample_every": 1000, "checkpoint_every": 7}}
    whole, config = train(tiny("whole", **changes)), tiny("killed", **changes)
    metrics = config.out / "metrics.jsonl"
    for size in (4_000, 12_000):
        killed(train_and_wait, config, 110, when=partial(is_larger_than, metrics, size))
    assert list_checkpoints(config.out)
    assert_same_run(train(config), whole)


def test_a_digits_run_with_a_transformer_and_dropped_labels_resumes_the_same(tiny_digits: MakeConfig) -> None:
    """Check it with epochs, label dropout and fused ops."""
    whole = train(tiny_digits("whole", steps=4))
    run = train(tiny_digits("parts", steps=2))
    assert_same_run_but_metrics(train(tiny_digits("parts", steps=4)), whole)
    assert [line["step"] for line in lines(run)] == [1, 2, 4]


def assert_same_run_but_metrics(resumed: Path, whole: Path) -> None:
    """Assert as `assert_same_run` does, where the resumed run logged its last step at other places."""
    assert_same_state(read_checkpoint(list_checkpoints(resumed)[0]), read_checkpoint(list_checkpoints(whole)[0]))


def test_metrics_after_the_checkpoint_are_written_once(tiny: MakeConfig) -> None:
    """Check that lines that a killed run wrote after its last checkpoint, and half a line, are cut off."""
    run = train(tiny(steps=4))
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 8, "lo')
    train(tiny(steps=12))
    assert [line["step"] for line in lines(run)] == [1, 2, 4, 6, 8, 10, 12]


def test_a_finished_run_started_again_changes_nothing(tiny: MakeConfig) -> None:
    """Check that the same command gives the same weights."""
    run = train(tiny())
    before = load_run(run)[0].state_dict()
    assert train(tiny()) == run
    assert_same_state(load_run(run)[0].state_dict(), before)


def test_other_settings_are_refused_by_name(tiny: MakeConfig) -> None:
    """Check that a run is never continued as a mixture, and that the folder stays as it was."""
    run = train(tiny())
    before = (run / "config.yaml").read_text(encoding="utf-8")
    with pytest.raises(ConfigError, match=r"optim.lr: 0.001 -> 0.5"):
        train(tiny(optim={"lr": 0.5}))
    with pytest.raises(ConfigError) as caught:
        train(tiny(method={"name": "esd"}, optim={"lr": 0.5}, seed=3))
    message = str(caught.value)
    assert "other settings (method.name: 'meanflow' -> 'esd'; optim.lr: 0.001 -> 0.5; seed: 0 -> 3; method." in message
    assert message.count(" -> ") == 4 and "; and " in message and " more). Start it with the same settings" in message
    assert (run / "config.yaml").read_text(encoding="utf-8") == before


def test_fewer_steps_than_done_are_refused(tiny: MakeConfig) -> None:
    """Check that a run doesn't go back by itself."""
    train(tiny())
    with pytest.raises(ConfigError, match=r"steps: .* has done 12 already"):
        train(tiny(steps=4))


def test_a_folder_that_is_no_run_is_refused(tiny: MakeConfig, tmp_path: Path) -> None:
    """Check that nobody's files get mixed with a run's."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not empty and no run folder"):
        train(tiny())


def test_two_processes_never_train_in_one_folder(tiny: MakeConfig) -> None:
    """Check that the second is refused while the first lives, and that a killed one leaves no lock."""
    config = tiny(steps=100_000)
    process = PROCESSES.Process(target=train_and_wait, args=(config, 20))
    process.start()
    while process.is_alive() and not (config.out / "metrics.jsonl").exists():
        time.sleep(0.01)
    with pytest.raises(ConfigError, match="another process is training"):
        train(tiny(steps=100_000))
    process.kill()
    process.join()
    newest = list_checkpoints(config.out)
    train(tiny(steps=int(newest[0].stem.removeprefix("step_")) + 1 if newest else 1))


def test_a_damaged_checkpoint_stops_the_run_and_an_older_one_continues_it(tiny: MakeConfig) -> None:
    """Check that it is refused by name, and that with --resume-from the run ends as if nothing had happened."""
    whole = train(tiny("whole"))
    run = train(tiny(steps=9))
    os.truncate(run / "checkpoints" / "step_00000009.pt", 100)
    with pytest.raises(CheckpointError, match=r"step_00000009\.pt is truncated.*\n.*--resume-from step_00000008\.pt"):
        train(tiny())
    train(tiny(resume_from="step_00000008.pt"))
    assert (run / "checkpoints" / "step_00000009.pt.abandoned").exists()
    assert_same_state(load_run(run)[0].state_dict(), load_run(whole)[0].state_dict())


def test_a_teacher_that_changed_is_refused(tiny: MakeConfig) -> None:
    """Check that the student's checkpoint remembers whose weights it followed."""
    teacher = train(tiny("teacher"))
    student = {"teacher": str(teacher), "init_from_teacher": True, "steps": 2}
    train(tiny("student", **student))
    train(tiny("teacher", steps=13))
    with pytest.raises(CheckpointError, match="the teacher's weights changed"):
        train(tiny("student", **student | {"steps": 4}))
