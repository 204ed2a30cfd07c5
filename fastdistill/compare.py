"""Compare methods under one budget, and report what each costs and gives: `fastdistill compare`.

All methods have the same network, number of steps and batch. Each has its own recipe and its own sampler. One teacher
is trained for each seed, and shared. Everything resumes: an interrupted run goes on where it was, and a finished one is
only measured.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdistill.data.pictures import grid_of
from fastdistill.eval import comparison
from fastdistill.eval.budget import counting_rows, whole_budget
from fastdistill.eval.evaluate import evaluate
from fastdistill.eval.judges import Judge, judge_maker_of, judged, make_judge
from fastdistill.eval.records import describe_machine, read_metrics
from fastdistill.models import count_parameters
from fastdistill.settings import nearest
from fastdistill.testing import MemoryRecorder
from fastdistill.train import (
    ConfigError,
    NonFiniteError,
    TrainConfig,
    generate,
    load_config,
    load_run,
    shipped_configs,
    train,
)
from fastdistill.train.files import write_text
from fastdistill.train.loop import make_batch, train_step
from fastdistill.train.methods import METHODS
from fastdistill.train.reflow_pairs import ReflowPairs
from fastdistill.train.run import refuse_foreign_folder
from fastdistill.train.sampling import OWN
from fastdistill.train.state import new_state, pick_device

TEACHER = "flow_matching"  # It is compared like any other method, and also teaches those that need a teacher.
MOST_SEEDS = 1000
WRITTEN = ("report.html", "summary.json", "quality.png", "cost.png", "samples.png", "curves.png")
COST_POINTS, COST_STEPS = (0.0, 0.25, 0.5, 0.75, 1.0), 5  # shares of a run, and how many steps are timed at each


def compare(
    methods: Sequence[str] | None = None,
    data: str = "ring",
    out: str | Path | None = None,
    *,
    steps: int | None = None,
    seeds: int | Sequence[int] = 1,
    samples: int | None = None,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Train and measure methods under one budget, and write report.html, summary.json and figures.

    Args:
        methods: names of the methods; None takes all.
        data: "ring" or "digits", or the YAML file of a configuration on another set that has a judge.
        out: the folder; None takes runs/compare-<data>.
        steps: training steps of every method and of the teacher; None takes those that the set's judge names (3,000 for
            the ring, 4,000 for digits), or else the configuration's.
        seeds: the number of seeds (0, 1, ...), or the seeds themselves. Tables give mean and standard deviation over
            them.
        samples: number of samples of each measurement; None takes the default of `evaluate`.
        overrides: more fields for every run, as on the command line: ["--model.width", "32"].

    Returns:
        The content of summary.json: the budget, `methods` {name: {"quality": {steps: {metric: {"mean", "std",
            "values"}}},
        "cost", "settings", "failed"}}, `references`, `environment`.

    Raises:
        ConfigError: a name is unknown, `overrides` don't suit a method, or the folder holds a comparison of other
            settings.
    """
    if data not in comparable() and not Path(data).is_file():
        raise ConfigError(
            f"data: expected one of {', '.join(comparable())}, got {data!r}, which is no YAML file either"
        )
    chosen = list(dict.fromkeys(methods if methods is not None else METHODS))
    for name in chosen:
        if name not in METHODS:
            raise ConfigError(
                f"methods: expected names of {', '.join(METHODS)}; got {name!r}, {nearest(name, METHODS)}"
            )
    out = Path(out or f"runs/compare-{Path(data).stem}")
    if isinstance(seeds, int) and seeds > MOST_SEEDS:
        raise ConfigError(f"seeds: expected at most {MOST_SEEDS:,}, got {seeds}")
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(dict.fromkeys(seeds))
    if not numbers or not chosen:
        raise ConfigError("seeds, methods: expected at least one of each")
    refuse_foreign_folder(out, "seed*/*", WRITTEN)
    budget = [*budget_of(data, steps), *overrides]
    for name in chosen:  # A fault in any configuration must show before the first training.
        configure(name, data, out / f"seed{numbers[0]}", budget)
    runs: dict[str, list[TrainConfig]] = {name: [] for name in chosen}
    failed: dict[str, str] = {}
    for seed in numbers:
        for name in chosen:
            if name not in failed:
                arguments = [*budget, "--seed", str(seed)]
                config = configure(name, data, out / f"seed{seed}", arguments)
                if config.teacher is not None:
                    _train(configure(TEACHER, data, out / f"seed{seed}", arguments))
                runs[name].append(config)
                if (reason := _train(config)) is not None:
                    failed[name] = reason
    judge = make_judge(config, out)
    summary = summarise(runs, failed, judge, samples)
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    grids = {name: draw_grids(configs[0].out) for name, configs in runs.items() if name not in failed}
    curves = {name: read_metrics(configs[0].out) for name, configs in runs.items() if name not in failed}
    comparison.write_report(out / "report.html", summary, grids, curves)
    return summary


def comparable() -> list[str]:
    """Return the data sets that have a judge and a shipped configuration, those with small rows first."""
    shipped = [name for name in judged() if name in shipped_configs()]
    return sorted(shipped, key=lambda name: math.prod(load_config(name).data.build().shape))


def budget_of(data: str, steps: int | None = None) -> list[str]:
    """Return the option for the number of training steps: `steps`, or else the judge's number, or else no option."""
    judge = judge_maker_of(load_config(data))
    steps = steps or getattr(judge, "training_steps", None)
    return [] if steps is None else ["--steps", str(steps)]


def configure(name: str, data: str, folder: Path, overrides: Sequence[str]) -> TrainConfig:
    """Return the configuration of a method whose run is in `folder`; methods there that need a teacher share it."""
    arguments = ["--method.name", name, *overrides]
    config = load_config(data, arguments, out=folder / name)
    if config.teacher is None:
        return config
    return load_config(data, [*arguments, "--teacher", str(folder / TEACHER)], out=folder / name)


def summarise(
    runs: Mapping[str, Sequence[TrainConfig]],
    failed: Mapping[str, str],
    judge: Judge,
    samples: int | None = None,
    *,
    measure: Callable[..., dict[str, Any]] = evaluate,
) -> dict[str, Any]:
    """Measure all runs, and return the content of summary.json.

    Args:
        measure: called like `evaluate`, and returns the same; it may read stored results.
    """
    measured = [configs[0] for name, configs in runs.items() if name not in failed]
    if not measured:
        raise NonFiniteError(f"no method finished: {'; '.join(f'{name}: {why}' for name, why in failed.items())}")
    first = measured[0]
    rows: dict[str, Any] = {}
    references: dict[str, Any] = {}
    count = 0
    for name, configs in runs.items():
        rows[name] = {"settings": describe_method(configs[0]), "failed": failed.get(name)}
        if name in failed:
            continue
        _tell(f"measuring {name}")
        steps = numbers_of(configs[0])
        found = [measure(config.out, steps, n=samples, judge=judge, seed=config.seed) for config in configs]
        references |= found[0]["references"]
        count = found[0]["set"]
        rows[name] |= {
            "sampler": found[0]["sampler"],
            "quality": {str(number): spread([each["steps"][str(number)] for each in found]) for number in steps},
            "cost": spread(costs := [measure_cost(config) for config in configs]),
            "whole": spread([_measure_whole(config, cost) for config, cost in zip(configs, costs, strict=True)]),
        }
        straightness = [{"straightness": each["straightness"]} for each in found if "straightness" in each]
        if straightness:
            rows[name] |= spread(straightness)
    net, _ = load_run(first.out, device="cpu")
    return {
        "data": first.data.name,
        "headline": list(judge.headline),
        "caption": getattr(judge, "caption", ""),
        "budget": {
            "steps": first.steps,
            "batch": first.data.batch,
            "network": first.model.preset,
            "parameters": count_parameters(net.requires_grad_(True)),
            "seeds": sorted({config.seed for configs in runs.values() for config in configs}),
            "samples": count,
        },
        "methods": rows,
        "references": references,
        "environment": describe_machine(),
    }


def _measure_whole(config: TrainConfig, cost: Mapping[str, float]) -> Mapping[str, float]:
    """Measure a run's whole budget with that of its teacher, whose steps are measured like the run's own."""
    if config.teacher is None:
        return whole_budget(config, cost, None)
    net, teacher = load_run(config.teacher, device="cpu")
    return whole_budget(config, cost, (teacher, measure_cost(teacher), net))


def measure_cost(config: TrainConfig) -> dict[str, float]:
    """Measure the cost of a training step: seconds, network evaluations, and the most bytes of tensors alive in one.

    The seconds are timed now, on the run's device and from fresh weights, because the run's log depends on what else
    the machine did meanwhile. At each of `COST_POINTS` of the run, the median of a few steps is taken; the seconds are
    the mean of these medians, because late steps of a curriculum may cost more. Before each median one step isn't
    timed, nor is the run's first, where a critic warms up.

    The bytes are the larger of those of the second step and of the last, because a curriculum may end with a tangent.
    They come on top of weights and optimiser, and are the same on every machine.

    The evaluations are rows through networks (see `fastdistill.eval.budget`), the mean over `COST_POINTS` of those of
    the step that isn't timed.
    """
    device = pick_device(config)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        state = new_state(config, torch.device("cpu"))
        dataset: Any = config.data.build()
        if config.method.makes_pairs:
            batch = make_batch(dataset, config, 0, state["device"])
            dataset = ReflowPairs(dataset.num_classes, batch.x0, batch.x1, batch.y)
        train_step(state, config, dataset, config.out)  # The optimiser makes its state now, which must not count.
        peak = 0
        for step in (1, _last_step(config)):
            state["step"] = step
            with MemoryRecorder() as recorder:
                train_step(state, config, dataset, config.out)
            peak = max(peak, recorder.peak)
        if device.type != "cpu":
            state = new_state(config, device)
        timed = [_time_steps(state, config, dataset, round(share * config.steps)) for share in COST_POINTS]
    seconds, rows = (statistics.fmean(values) for values in zip(*timed, strict=True))
    return {"seconds_per_step": seconds, "evaluations_per_step": rows, "peak_bytes": peak}


def _last_step(config: TrainConfig) -> int:
    """Return the number of steps before a run's last one, but at least 1."""
    return max(config.steps - 1, 1)


def _time_steps(state: dict[str, Any], config: TrainConfig, dataset: Any, first: int) -> tuple[float, int]:
    """Return the median time of `COST_STEPS` steps after the step `first`, or of the last, and the rows of `first`."""
    last, seconds = _last_step(config), []
    first = max(min(first, last - COST_STEPS), 1)
    state["step"] = min(first, last)
    with counting_rows(state["net"]) as rows:
        train_step(state, config, dataset, config.out)
    for step in range(first + 1, first + 1 + COST_STEPS):
        state["step"] = min(step, last)
        started = time.perf_counter()
        train_step(state, config, dataset, config.out)
        if state["device"].type == "cuda":
            torch.cuda.synchronize(state["device"])
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), sum(rows)


def draw_grids(run: Path) -> dict[str, torch.Tensor]:
    """Return samples for the pictures, by number of steps, from the same noise for every method."""
    net, config = load_run(run)
    count, _ = grid_of(config.data.build())
    return {str(number): generate(net, config, count, steps=number).cpu() for number in numbers_of(config)}


def numbers_of(config: TrainConfig) -> list[int]:
    """Return the numbers of sampling steps at which a run is measured, as far as it learnt them."""
    return OWN.resolve(config).measured_steps(config)


def describe_method(config: TrainConfig) -> dict[str, Any]:
    """Return the entries of the summary that describe a method without measurements."""
    objective = config.method.objective()
    return {
        "identity": objective.identity,
        "tangent": objective.tangent,
        "teacher": config.teacher is not None,
        "second_network": config.method.has_critic,
        "path": config.path.name,
        "method": config.model_dump(mode="json")["method"],
        "learning_rate": config.optim.lr,
    }


def _train(config: TrainConfig) -> str | None:
    """Train a run to its end; return why it failed, or None."""
    started = time.perf_counter()
    try:
        train(config)
    except NonFiniteError as error:
        return str(error)
    _tell(f"{config.out}: {time.perf_counter() - started:.0f} s")
    return None


def spread(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return mean, standard deviation and values of each metric over the seeds."""
    return {
        metric: {
            "mean": statistics.fmean(row[metric] for row in rows),
            "std": statistics.stdev(row[metric] for row in rows) if len(rows) > 1 else 0.0,
            "values": [row[metric] for row in rows],
        }
        for metric in rows[0]
    }


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
