"""Train a teacher on digits, distil it to one step, measure both, and write a report: `make demo`.

Every stage resumes. An interrupted demo goes on where it was, and a finished one measures and reports again without
training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill.data import Digits
from fastdistill.eval.digits import SETS, DigitJudge, Row
from fastdistill.eval.evaluate import evaluate, format_table
from fastdistill.eval.records import describe_machine, read_metrics, training_seconds
from fastdistill.eval.report import write_report
from fastdistill.train import TrainConfig, generate, load_config, load_run, train
from fastdistill.train.files import write_text
from fastdistill.train.run import refuse_foreign_folder

TEACHER_STEPS, STUDENT_STEPS = (1, 2, 4, 8, 32), (1, 2, 4, 8)
GRID_ROWS = 8


def main(out: str | Path = "runs/demo") -> Path:
    """Run the demo in the folder `out`, print its table and where the report is, and return the report's path.

    It writes `teacher/` and `meanflow/` (run folders), `summary.json`, `report.html`, `grid.png` and the classifier
    that measures.

    Raises:
        ConfigError: `out` holds a demo with other settings.
    """
    out = Path(out)
    refuse_foreign_folder(out, "teacher", ("report.html", "summary.json", "grid.png"))
    teacher = load_config("digits-flow", out=out / "teacher")
    _train("teacher", teacher)
    student = load_config("digits-meanflow", ["--teacher", str(teacher.out)], out=out / "meanflow")
    _train("MeanFlow", student)
    configs = {"teacher": teacher, "meanflow": student}
    _tell(f"evaluation: {SETS} sets of samples for each number of steps")
    summary = summarise(configs)
    write_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    report = out / "report.html"
    curves = {name: read_metrics(config.out) for name, config in configs.items()}
    write_report(report, summary, draw_samples(configs), curves)
    print(format_table({name: summary[name] for name in ("teacher", "meanflow", "references")}))
    print()
    for goal in summary["goals"]:
        print(f"{'reached' if goal['reached'] else 'NOT reached'}: {goal['goal']} {goal['numbers']}")
    print(f"\nThe report: {report.resolve().as_uri()}")
    return report


def summarise(configs: Mapping[str, TrainConfig]) -> dict[str, Any]:
    """Measure both runs, and return the content of summary.json."""
    started = time.perf_counter()
    judge = DigitJudge(configs["teacher"].out.parent)
    teacher = evaluate(configs["teacher"].out, TEACHER_STEPS, judge=judge)
    student = evaluate(configs["meanflow"].out, STUDENT_STEPS, judge=judge)
    timings = {f"training, {name}": training_seconds(config) for name, config in configs.items()}
    return {
        "teacher": teacher["steps"],
        "meanflow": student["steps"],
        "references": student["references"],
        "goals": judge_goals(teacher["steps"], student["steps"]),
        "checks": {"teacher": teacher["checks"], "meanflow": student["checks"]},
        "samples": student["samples"],
        "held_out": len(judge.digits.held_out_y),
        "settings": {name: describe_run(config) for name, config in configs.items()},
        "timings": timings | {"evaluation": time.perf_counter() - started},
        "environment": describe_machine(configs["meanflow"].out),
    }


def judge_goals(teacher: Mapping[str, Row], student: Mapping[str, Row]) -> list[dict[str, Any]]:
    """Return what the demo should show, and for each goal whether the numbers reach it."""

    def beats(steps: str, teacher_steps: str, words: str) -> dict[str, Any]:
        ours, theirs = student[steps]["frechet"], teacher[teacher_steps]["frechet"]
        return {"goal": words, "reached": ours < theirs, "numbers": f"(Fréchet {ours:.1f} against {theirs:.1f})"}

    accuracy = min(row["accuracy"] for row in student.values())
    return [
        beats("1", "2", "MeanFlow's one step beats the teacher's two."),
        beats("2", "4", "MeanFlow's two steps beat the teacher's four."),
        {
            "goal": "At every number of steps at least 90 % of MeanFlow's digits are the class asked for.",
            "reached": accuracy >= 0.9,
            "numbers": f"(lowest {accuracy:.1%})",
        },
    ]


def draw_samples(configs: Mapping[str, TrainConfig]) -> dict[str, dict[str, Tensor]]:
    """Draw images for the grids: every class in turn, from the same noise for each network and number of steps."""
    digits = Digits()
    count = digits.num_classes * GRID_ROWS
    samples: dict[str, dict[str, Tensor]] = {}
    for name, steps in (("teacher", TEACHER_STEPS), ("meanflow", STUDENT_STEPS)):
        net, config = load_run(configs[name].out)
        samples[name] = {str(number): generate(net, config, count, steps=number).cpu() for number in steps}
    by_class = [digits.x[digits.y == label][:GRID_ROWS] for label in range(digits.num_classes)]
    return samples | {"real": {"": torch.stack(by_class, dim=1).flatten(0, 1)}}


def describe_run(config: TrainConfig) -> str:
    """Return a run's settings in a line."""
    net, _ = load_run(config.out, device="cpu")  # The network is frozen, so none of its parameters counts as trainable.
    parameters = sum(parameter.numel() for parameter in net.parameters())
    optim = config.optim
    method: Any = config.method
    if method.name == "meanflow":
        scale, own = (
            method.guidance.scale,
            f"s ≠ t in {method.distinct:.0%} of rows, p = {method.p:g}, c = {method.c:g}, ",
        )
    else:
        scale, own = method.sample_guidance, ""
    return (
        f"{config.model.preset}, {parameters:,} parameters, {config.steps} steps of {config.data.batch}, "
        f"learning rate {optim.lr:g}, EMA {optim.ema:g}, {own}guidance scale {scale:g}"
    )


def _train(name: str, config: TrainConfig) -> None:
    _tell(f"{name}: {config.steps} steps in {config.out}")
    train(config)


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m fastdistill.demo", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (default: %(default)s)")
    main(parser.parse_args().out)
