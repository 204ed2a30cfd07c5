"""Evaluate a finished run: `fastdistill eval RUN`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdistill.data import generator_at
from fastdistill.eval.judges import Judge, judge_maker_of, make_judge
from fastdistill.objectives.reflow import straightness
from fastdistill.train import TrainConfig, load_run
from fastdistill.train.files import write_text
from fastdistill.train.sampling import NUMBERS, Sampling

MEASURING = 2  # Raise this when the way of measuring changes: stored results of another number are stale.
HEADINGS = {
    "frechet": "Fréchet",
    "accuracy": "accuracy",
    "map_error": "map error",
    "sliced_wasserstein": "sliced W2",
    "seconds_per_sample": "ms/sample",
}


def evaluate(
    run: str | Path,
    steps: Sequence[int] | None = None,
    *,
    n: int | None = None,
    sampler: str | None = None,
    guidance: float | None = None,
    seed: int = 0,
    judge: Judge | None = None,
    device: torch.device | str | None = None,
    **parameters: float | None,
) -> dict[str, Any]:
    """Generate with each number of steps, measure, and write `summary.json` in the run folder.

    The same noise serves every number of steps, and everything but the timings is a function of the arguments.

    Args:
        run: a run folder.
        steps: the numbers of sampling steps. None takes 1, 2, 4, 8, and for samplers of velocities 32, as far as the
            run learnt the times at which these steps start (DMD learns only some). If noise was matched to data and the
            sampler adds noise, None takes 1 alone.
        n: the number of samples; None leaves it to the judge. The judge of digits takes six sets of 296, the number of
            held-out digits, with labels in the real frequencies; that of the ring takes 4096 points.
        sampler, guidance: see `fastdistill.train.sampling.Sampling`; None takes the run's own.
        seed: the seed of all noise.
        judge: a judge to share between calls. None makes the judge of the run's data set, which keeps its files in the
            run folder, such as the classifier of digits.
        device: the device of the network; None takes the GPU if there is one. Metrics are computed on the CPU.
        parameters: parameters of the sampler, such as gamma; see `fastdistill.samplers.PARAMETERS`.

    Returns:
        The content of `summary.json`: `data`, `method`, `sampler`, `measuring`, and `straightness` if the network knows
        a velocity. The judge adds `samples`, `set` (the number of samples behind each number), and `steps` and
        `references`, both {name: {metric: value}}. The ring's judge adds `coupled` (whether noise was matched to data),
        that of digits `checks`. `fastdistill.eval.digits` and `fastdistill.eval.ring` describe the metrics.

    Raises:
        ValueError: An argument breaks these rules; the message names it.
        ConfigError, CheckpointError: There is no run, it can't be read (see `load_run`), or its data set has no judge.
    """
    if n is not None and n < 64:
        raise ValueError(f"n: expected at least 64 samples, got {n}")
    if steps is not None and (not steps or min(steps) < 1):
        raise ValueError(f"steps: expected positive numbers, got {list(steps)}")
    run = Path(run)
    net, config = load_run(run, device=device)
    judge = judge or make_judge(config, run)
    how = Sampling(sampler, guidance, **parameters).resolve(config)
    in_steps = how.spec.follows_velocity and how.spec.evaluations is not None
    usual = (*NUMBERS, 32) if in_steps else NUMBERS
    steps = steps or how.measured_steps(config, usual)
    result: dict[str, Any] = {"data": config.data.name, "method": config.method.name, "sampler": how.sampler}
    result["measuring"] = MEASURING
    if "velocity" in config.method.learns:
        result["straightness"] = measure_straightness(net, config, seed)
    result |= judge.evaluate(net, config, steps, count=n, how=how, seed=seed)
    write_text(run / "summary.json", json.dumps(result, indent=2) + "\n")
    return result


def after_training(run: Path, config: TrainConfig) -> list[str]:
    """Measure a run that has just ended, if its judge does so at once, and return the lines to print."""
    if getattr(config.data.build(), "judge", None) is None or not getattr(judge_maker_of(config), "at_once", False):
        return []
    judge: Any = make_judge(config, run)
    told = f"{describe(evaluate(run, judge=judge))}\n\n{run / 'summary.json'}"
    return [told, str(judge.plot(run))] if hasattr(judge, "plot") else [told]


def measure_straightness(net: nn.Module, config: TrainConfig, seed: int = 0, count: int = 512) -> float:
    """Return how far a network's flow is from straight lines at constant speed; 0 means that it is straight.

    This is S of `fastdistill.objectives.reflow.straightness`, divided by the number of elements of a row.
    """
    dataset, device = config.data.build(), next(net.parameters()).device
    x1 = torch.randn(count, *dataset.shape, generator=generator_at(seed, "straightness")).to(device)
    y = torch.arange(count, device=device) % dataset.num_classes if dataset.num_classes else None
    return float(straightness(net, x1, y, 32, path=config.path.build())) / x1[0].numel()


def describe(result: Mapping[str, Any]) -> str:
    """Return the result of `evaluate` as a text table with its references."""
    text = format_table({result["method"]: result["steps"], "references": result["references"]})
    if result.get("coupled"):
        text += "\n\nThis run matched its noise to its data, and its flow is not the one that map error is measured by."
    straight = result.get("straightness")
    return text if straight is None else f"{text}\n\nstraightness of its flow (0: straight lines): {straight:.3f}"


def format_table(groups: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return a text table of {group: {row: {metric: value}}}, e.g. {"meanflow": {"1": {...}}, "references": {...}}."""
    metrics = list(next(iter(next(iter(groups.values())).values())))
    lines = [["", *map(heading, metrics)]]
    for group, rows in groups.items():
        for name, row in rows.items():
            lines.append([row_name(group, name), *(format_value(metric, row[metric]) for metric in metrics)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )


def heading(metric: str) -> str:
    """Return the name of a metric for tables and figures."""
    return HEADINGS.get(metric, metric.replace("_", " "))


def row_name(group: str, name: str) -> str:
    """Return the name of a row, such as `meanflow, 1 step`, or the name of a reference in words."""
    if not name.isdigit():
        return name.replace("_", " ")
    return f"{group}, {name} step{'' if name == '1' else 's'}"


def format_value(metric: str, value: float) -> str:
    """Return a metric's value as text for tables."""
    if metric == "seconds_per_sample":
        return f"{1000 * value:.3f}"
    return f"{value:.1f}" if metric == "frechet" else f"{value:.3f}"
