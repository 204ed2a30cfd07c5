"""Train every method on the ring and on digits, three seeds each, and judge it against exact solutions.

    python -m fastdistill.benchmarks.methods.evidence                             # train what is missing, and write
    python -m fastdistill.benchmarks.methods.evidence --data ring --seeds 0 --budget-minutes 20 --train-only
    python -m fastdistill.benchmarks.methods.evidence --collect                   # measure and write what there is

This is `make evidence`. Runs are claimed one by one, so that several processes with the same folder share the work:
start one a core, with OMP_NUM_THREADS=1. A stopped run goes on where it was, and a finished one is never trained again.
It writes docs/evidence (summary.json, evidence.md, plots) and the marked blocks of docs/methods.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdistill import compare, objectives
from fastdistill.benchmarks.methods import evidence_tables as tables
from fastdistill.benchmarks.methods.method_figures import save_png
from fastdistill.data import generator_at
from fastdistill.eval import comparison, comparison_figures
from fastdistill.eval.digits import DigitJudge
from fastdistill.eval.evaluate import MEASURING, evaluate
from fastdistill.eval.exact import Ring
from fastdistill.eval.judges import Judge, make_judge_of
from fastdistill.eval.metrics import sliced_wasserstein
from fastdistill.eval.ring import RingJudge, exact_flow
from fastdistill.jvp import jvp
from fastdistill.objectives import OBJECTIVES
from fastdistill.train import NonFiniteError, TrainConfig, train
from fastdistill.train.files import write_text
from fastdistill.train.methods import METHODS

CONTROL = "flow_matching"  # Trained first: the others' teacher, and the control that must fail in one step.
GATE, CONTROL_GATE = 0.45, 0.6  # Map error in one step: every method must be below, the control and every mutant above.
# These methods compare laws and may pair points anew, so SW2 is gated; real draws differ by .04, one Euler step by 1.
MATCH_LAWS, LAW_GATE = [row.name for row in OBJECTIVES.values() if row.exponent is None], 0.45


def wrong_sign(fn: Any, primals: Any, tangents: Any, **options: Any) -> Any:
    """Turn the sign of the derivative along the flow; this is the driver of a mutant."""
    u, du_dt = jvp(fn, primals, tangents, **options)
    return u, -du_dt


def no_time_tangent(fn: Any, primals: Any, tangents: Any, **options: Any) -> Any:
    """Keep time still while x moves; this is the driver of a mutant."""
    return jvp(fn, primals, (tangents[0], None, None), **options)


def swapped_times(fn: Any, primals: Any, tangents: Any, **options: Any) -> Any:
    """Move the end instead of the start; this is the driver of a mutant."""
    x, t, s = primals
    return fn(x, t, s), jvp(fn, primals, (tangents[0], None, tangents[1]), **options)[1]


MUTANTS = {
    "meanflow, wrong sign": ("meanflow", wrong_sign),
    "meanflow, no time tangent": ("meanflow", no_time_tangent),
    "meanflow, s for t": ("meanflow", swapped_times),
    "scm, wrong sign": ("scm", wrong_sign),
    "ayf_emd, wrong sign": ("ayf_emd", wrong_sign),
}


@dataclass(frozen=True)
class Job:
    """Describe one run: a method, or a mutant of one, on one data set from one seed."""

    data: str
    seed: int
    name: str

    @property
    def method(self) -> str:
        """Return the name of the method that is trained."""
        return MUTANTS[self.name][0] if self.name in MUTANTS else self.name

    def configure(self, out: Path, overrides: Sequence[str] = ()) -> TrainConfig:
        """Return the run's settings, those of `fastdistill compare`; a mutant gets a folder of its own."""
        folder = out / self.data / f"seed{self.seed}"
        budget = [*compare.budget_of(self.data), "--seed", str(self.seed), *overrides]
        config = compare.configure(self.method, self.data, folder, budget)
        if self.name not in MUTANTS:
            return config
        return config.model_copy(update={"out": folder / self.name.replace(", ", "-").replace(" ", "-")})


def main(arguments: Sequence[str] | None = None) -> None:
    """Train within the budget, then measure and write."""
    args = parse(arguments)
    jobs = list_jobs(args.data, args.seeds, args.methods)
    if not args.collect:
        work(jobs, args.out, 60 * args.budget_minutes, args.overrides)
    if not args.train_only:
        summary = collect(jobs, args.out, args.overrides)
        write(summary, args.evidence, args.out)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fastdistill.benchmarks.methods.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", nargs="+", choices=tables.DATA, default=tables.DATA)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *MUTANTS], default=[*METHODS, *MUTANTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), help="start no run after this")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="the runs (default: %(default)s)")
    parser.add_argument("--evidence", type=Path, default=tables.EVIDENCE, help="results (default: %(default)s)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--train-only", action="store_true", help="leave measuring to another call")
    only.add_argument("--collect", action="store_true", help="train nothing, measure what is finished")
    parser.add_argument("overrides", nargs="*", metavar="-- --field value", help="more fields for every run, after --")
    return parser.parse_args(arguments)


def list_jobs(data: Sequence[str], seeds: Sequence[int], names: Sequence[str]) -> list[Job]:
    """List all runs in the order of work: controls first, then seed by seed; mutants take the ring's first seed."""
    ordered = [name for name in (CONTROL, *names) if name == CONTROL or name not in MUTANTS]
    ordered = list(dict.fromkeys(ordered))
    jobs = [Job(kind, seed, CONTROL) for kind in data for seed in seeds]
    jobs += [Job(kind, seed, name) for seed in seeds for kind in data for name in ordered[1:]]
    return jobs + [Job("ring", seeds[0], name) for name in names if name in MUTANTS and "ring" in data]


def work(jobs: Sequence[Job], out: Path, seconds: float, overrides: Sequence[str] = ()) -> None:
    """Train every run that nobody has trained or is training, until the time is up."""
    started = time.monotonic()
    for number, job in enumerate(jobs, start=1):
        spent = time.monotonic() - started
        if spent > seconds:
            tell(f"the budget is used: {len(jobs) - number + 1} runs not looked at")
            return
        config = job.configure(out, overrides)
        if finished(config) or failure(config):
            continue
        if job.name != CONTROL and config.teacher is not None:
            wait_for(Job(job.data, job.seed, CONTROL).configure(out, overrides))
        with claim(config.out) as mine:
            if not mine:
                continue
            begun = time.monotonic()
            tell(f"[{number}/{len(jobs)}] {job.data}, seed {job.seed}: {job.name}")
            run(job, config)
            if finished(config):
                steps = (1,) if job.name in MUTANTS else compare.numbers_of(config)
                stored_or_evaluated(config.out, steps, seed=config.seed)
            tell(f"[{number}/{len(jobs)}] {job.name}: {time.monotonic() - begun:.0f} s, {spent / 60:.0f} min in all")


def run(job: Job, config: TrainConfig) -> None:
    """Train one run; if it diverges, write a note that says why."""
    with mutated(job):
        try:
            train(config)
        except NonFiniteError as error:
            write_text(config.out / "failed.txt", f"{error}\n")


@contextlib.contextmanager
def mutated(job: Job) -> Iterator[None]:
    """Put the mutant's driver in the registry in place of the method's own, for the time of a run."""
    if job.name not in MUTANTS:
        yield
        return
    right = objectives.OBJECTIVES[job.method]

    @functools.wraps(right.function)  # The trainer reads from the signature which arguments the function takes.
    def function(*arguments: Any, **keywords: Any) -> Any:
        return right.function(*arguments, **keywords | {"jvp": MUTANTS[job.name][1]})

    objectives.OBJECTIVES[job.method] = replace(right, function=function)
    try:
        yield
    finally:
        objectives.OBJECTIVES[job.method] = right


def finished(config: TrainConfig) -> bool:
    """Return whether a run has its result."""
    return (config.out / "export" / "ema.safetensors").is_file()


def stored_or_evaluated(
    run: Path, steps: Sequence[int], *, n: int | None = None, judge: Judge | None = None, seed: int = 0
) -> dict[str, Any]:
    """Return `evaluate`'s result for a finished run: the stored one if it still holds, otherwise a new one.

    A run is measured anew if the network is newer, other steps are asked for, or the way of measuring has changed.
    """
    stored = run / "summary.json"
    if stored.is_file() and stored.stat().st_mtime > (run / "export" / "ema.safetensors").stat().st_mtime:
        found: dict[str, Any] = json.loads(stored.read_text(encoding="utf-8"))
        if found.get("measuring") == MEASURING and {str(number) for number in steps} <= set(found["steps"]):
            return found
    return evaluate(run, steps, n=n, judge=judge or judge_in(run.parents[1], run.parts[-3]), seed=seed)


@functools.lru_cache(maxsize=2)
def judge_in(folder: Path, data: str) -> Judge:
    """Return the judge of a data set, which all runs share, and a classifier with it."""
    return make_judge_of(data, folder)


def failure(config: TrainConfig) -> str | None:
    """Return why a run diverged, or None."""
    path = config.out / "failed.txt"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def wait_for(teacher: TrainConfig) -> None:
    """Wait until another process has trained the teacher; raise RuntimeError if nobody trains it."""
    while not finished(teacher):
        if not is_claimed(lock_of(teacher.out)):
            raise RuntimeError(f"{teacher.out}: the teacher isn't trained, and nobody is training it")
        time.sleep(2)


@contextlib.contextmanager
def claim(run: Path) -> Iterator[bool]:
    """Claim a run, and say whether it is ours to train; a claim whose process is gone counts for nothing."""
    lock = lock_of(run)
    lock.parent.mkdir(parents=True, exist_ok=True)
    if lock.exists() and not is_claimed(lock):
        lock.unlink(missing_ok=True)
    try:
        with lock.open("x", encoding="utf-8") as file:
            file.write(str(os.getpid()))
    except FileExistsError:
        yield False
        return
    try:
        yield True
    finally:
        lock.unlink(missing_ok=True)


def lock_of(run: Path) -> Path:
    """Return the path of the file that claims a run."""
    return run.with_name(f"{run.name}.lock")


def is_claimed(lock: Path) -> bool:
    """Return whether a living process holds the claim."""
    try:
        owner = lock.read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return not owner or Path(f"/proc/{owner}").exists()


def collect(jobs: Sequence[Job], out: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measure all finished runs; return the content of summary.json."""
    summary: dict[str, Any] = {}
    for data in dict.fromkeys(job.data for job in jobs):
        runs: dict[str, list[TrainConfig]] = {}
        failed: dict[str, str] = {}
        mutants: dict[str, float] = {}
        for job in (job for job in jobs if job.data == data):
            config = job.configure(out, overrides)
            if why := failure(config):
                failed[job.name] = why
            if job.name in MUTANTS:
                mutants |= measure_mutant(job, config)
            elif finished(config):
                runs.setdefault(job.name, []).append(config)
            elif why:
                runs.setdefault(job.name, [config])
        if any(name not in failed for name in runs):
            judge = judge_in(out / data, data)
            failed = {name: why for name, why in failed.items() if name in runs}
            summary[data] = compare.summarise(runs, failed, judge, measure=stored_or_evaluated) | {"mutants": mutants}
            add_checks(summary[data], runs)
            if isinstance(judge, DigitJudge):
                add_references(summary[data]["references"], judge)
            if isinstance(judge, RingJudge):
                summary[data]["references"] |= distances_between_laws()
                summary[data]["gates"] = judge_gates(summary[data])
    return summary


def measure_mutant(job: Job, config: TrainConfig) -> dict[str, float]:
    """Return a mutant's map error in one step, by its name: infinite if it diverged, nothing if it didn't run."""
    if failure(config):
        return {job.name: float("inf")}
    if not finished(config):
        return {}
    return {job.name: stored_or_evaluated(config.out, (1,), seed=config.seed)["steps"]["1"]["map_error"]}


def add_checks(result: dict[str, Any], runs: Mapping[str, Sequence[TrainConfig]]) -> None:
    """Add the checks of `evaluate` (C2ST, precision, recall, neighbours) to the qualities of each method."""
    for name, configs in runs.items():
        stored = [json.loads((config.out / "summary.json").read_text(encoding="utf-8")) for config in configs]
        if not all("checks" in each for each in stored):
            continue
        for steps, quality in result["methods"][name].get("quality", {}).items():
            quality |= compare.spread([each["checks"][steps] for each in stored])


def add_references(references: dict[str, dict[str, float]], judge: DigitJudge) -> None:
    """Add references that give the numbers their meaning: the training digits, each class's mean, and unseen digits.

    Copies of the training set have the best possible Fréchet distance; their C2ST and neighbour ratio give them away.
    Each reference has as many images as every method.
    """
    digits = judge.digits
    means = torch.stack([digits.x[digits.y == label].mean(0) for label in range(digits.num_classes)])
    labels = judge.labels()
    for name, (x, y) in (("training_digits", judge.training_digits()), ("class_mean", (means[labels], labels))):
        references[name] = judge.measure(x, y, 0.0) | judge.check(x)
    references["held_out"] = references["held_out"] | judge.check(digits.held_out_x)


def distances_between_laws(count: int = 4096) -> dict[str, dict[str, float]]:
    """Return the floors of SW2 on the ring: two draws of the data, and the exact map of noise against the data."""
    ring = Ring()
    (first, _), (second, _) = (ring.sample(count, generator_at(0, name)) for name in ("real", "real again"))
    mapped = exact_flow(torch.randn(count, 2, generator=generator_at(0, "evaluate")))
    return {
        "real_real": {"sliced_wasserstein": sliced_wasserstein(first, second)},
        "exact_map_against_data": {"sliced_wasserstein": sliced_wasserstein(mapped, first)},
    }


def judge_gates(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each gate with its number, and whether it is passed."""

    def gate(words: str, value: float, passed: bool, metric: str = "map error") -> dict[str, Any]:
        return {"gate": words, "passed": passed, "found": f"{metric} {value:.3f}"}

    gates = []
    for name, row in comparison.ranked(result).items():
        error, law = (row["quality"]["1"][metric]["mean"] for metric in ("map_error", "sliced_wasserstein"))
        if name == CONTROL:
            gates.append(gate(f"{name}, the control, above {CONTROL_GATE} in one step", error, error > CONTROL_GATE))
        elif name in MATCH_LAWS:
            gates.append(gate(f"{name} below SW2 {LAW_GATE} in one step", law, law < LAW_GATE, "SW2"))
        else:
            gates.append(gate(f"{name} below {GATE} in one step", error, error < GATE))
    return gates + [
        gate(f"the mutant {name} above {GATE}", value, value > GATE) for name, value in result["mutants"].items()
    ]


def write(summary: dict[str, Any], folder: Path, out: Path) -> None:
    """Write summary.json, evidence.md and plots; in the repository's own folder, write the article's blocks too."""
    folder.mkdir(parents=True, exist_ok=True)
    for data, result in summary.items():
        metric, words, _ = tables.HEADLINE[data]
        rows = comparison.ranked(result)
        plots = {
            "quality": comparison_figures.draw_quality(rows, metric, words, result["references"]),
            "cost": comparison_figures.draw_cost(rows, metric, words),
            "samples": comparison_figures.draw_samples(grids(rows, out / data)),
        }
        result["plots"] = {f"{data}, {name}": f"{data}_{name}.png" for name in plots}
        for name, png in plots.items():
            save_png(png, folder / f"{data}_{name}.png")
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_text(folder / "evidence.md", tables.evidence_page(summary))
    if folder == tables.EVIDENCE:
        write_text(tables.ARTICLE, tables.fill_article(tables.ARTICLE.read_text(encoding="utf-8"), summary))
    for result in summary.values():
        for gate in result.get("gates", []):
            tell(tables.gate_line(gate))


def grids(names: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return samples of the first finished seed of each method, by number of steps."""
    found = {}
    for name in names:
        seeds = sorted(path.parents[1] for path in folder.glob(f"seed*/{name}/export/ema.safetensors"))
        found[name] = compare.draw_grids(seeds[0])
    return found


def tell(message: str) -> None:
    """Print progress to stderr."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
