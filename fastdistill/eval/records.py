"""What a run folder tells afterwards: its metrics, how long it took, what it ran on."""

from __future__ import annotations

import json
from pathlib import Path

from fastdistill.train import TrainConfig
from fastdistill.train.environment import describe_environment


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def training_seconds(config: TrainConfig) -> float:
    """How long a run's steps took, over all its sittings, from the pace that it logged."""
    seconds, done = 0.0, 0
    for point in read_metrics(config.out):
        seconds += (point["step"] - done) * config.data.batch / point["samples_per_second"]
        done = int(point["step"])
    return seconds


def describe_machine(run: Path | None = None) -> dict[str, str]:
    """What a run ran on, in a few words for each thing; None: what this process runs on."""
    found = describe_environment() if run is None else json.loads((run / "env.json").read_text(encoding="utf-8"))
    gpu = found["gpu"]["name"] if found["gpu"] else "none"
    return {
        "python": found["python"],
        "torch": found["packages"]["torch"],
        "platform": found["platform"],
        "cores": f"{found['cpu']['cores']}, torch uses {found['cpu']['torch_threads']}",
        "gpu": gpu,
    }
