"""Read what a run folder tells: its metrics, its training time, and its machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastdistill.train import CheckpointError, TrainConfig
from fastdistill.train.environment import describe_environment
from fastdistill.train.logging import read_points, tell


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Return the points of a run's metrics.jsonl; damaged lines are left out, with a message on stderr.

    Raises:
        CheckpointError: The file can't be read, or holds no point.
    """
    path = run / "metrics.jsonl"
    points, damaged = read_points(path)
    if damaged:
        tell(f"{path}: {damaged} damaged lines are left out")
    if not points:
        raise CheckpointError(f"{path} holds no points to draw; remove {run} and start again to train it anew")
    return points


def training_seconds(config: TrainConfig) -> float:
    """Return how many seconds a run's steps took, with all interruptions left out, from the pace that it logged."""
    seconds, done = 0.0, 0
    for point in read_metrics(config.out):
        pace = point.get("samples_per_second", 0)
        if pace <= 0:
            place = f"{config.out / 'metrics.jsonl'}, step {point['step']}"
            raise CheckpointError(f"{place}: expected samples_per_second above 0, got {pace}")
        seconds += (point["step"] - done) * config.data.batch / pace
        done = int(point["step"])
    return seconds


def describe_machine(run: Path | None = None) -> dict[str, str]:
    """Describe the machine of a run, in a few words for each thing; without a run, that of this process.

    Raises:
        CheckpointError: The run's env.json can't be read.
    """
    if run is None:
        return _describe(describe_environment())
    try:
        return _describe(json.loads((run / "env.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{run / 'env.json'} can't be read ({reason}); start the run again to write it"
        ) from error


def _describe(found: dict[str, Any]) -> dict[str, str]:
    gpu = found["gpu"]["name"] if found["gpu"] else "none"
    return {
        "python": found["python"],
        "torch": found["packages"]["torch"],
        "platform": found["platform"],
        "cores": f"{found['cpu']['cores']}, torch uses {found['cpu']['torch_threads']}",
        "gpu": gpu,
    }
