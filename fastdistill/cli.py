"""Run the command line: train, sample, eval, explain, compare, demo, bench, report, doctor.

A mistake of the user ends in one message and status 2, and a diverged run in one message and status 1. Any other error
is a bug and shows its traceback. Each command imports its own heavy modules, so that help appears quickly.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fastdistill

EXAMPLES = {
    "train": """\
  fastdistill train ring                               eight Gaussians in the plane, in a minute on a CPU
  fastdistill train digits-flow                        a teacher, into runs/digits-flow
  fastdistill train digits-meanflow --steps 4000       its one-step student, with a field changed
  fastdistill train ring-flow                          a teacher of points, and a student by another method:
  fastdistill train ring --method.name facm --teacher runs/ring-flow
  fastdistill train my.yaml --optim.lr 3e-4 --out runs/a
  fastdistill train ring --help                        every field of that configuration
""",
    "sample": """\
  fastdistill sample runs/digits-meanflow              a grid of all classes, in one step
  fastdistill sample runs/digits-flow --steps 32 --guidance 2 --label 3 --n 16 --out three.png
  fastdistill sample runs/ring --n 10000 --out points.npy
  fastdistill sample runs/ring --steps 4 --gamma 0.5   with fresh noise between the steps
""",
    "eval": """\
  fastdistill eval runs/digits-meanflow                into its summary.json, and as a table
  fastdistill eval runs/ring --steps 1 16 --n 10000
  fastdistill eval runs/ring-flow --sampler heun
""",
    "explain": """\
  fastdistill explain                                  a table of all methods
  fastdistill explain meanflow                         formula, tangent, times, defaults, sources
""",
    "compare": """\
  fastdistill compare --data ring                      every method on the ring, into runs/compare-ring/report.html
  fastdistill compare --methods meanflow,facm --data digits --steps 1000 --seeds 3
""",
    "demo": """\
  fastdistill demo                                     teacher, student, runs/demo/report.html
  fastdistill demo --out runs/mine
""",
    "bench": """\
  fastdistill bench --suite dit                        attention of DiT-S to XL, on the GPU
  fastdistill bench --suite dit,norms --quick          tiny shapes on any machine: does everything run?
  fastdistill bench --suite video --json wan.json --budget 480   again with the same file: goes on where it ended
  fastdistill bench --suite norms --cases rms_norm --providers fastdistill 'no tangent'
  fastdistill bench --suite scaling --list             its cases, without running them
""",
    "report": """\
  fastdistill report --bench wan.json                  a page, report.html, and its pictures beside it
  fastdistill report --bench benchmarks/results/h100_*.json --out runs/h100/report.html
""",
    "doctor": """\
  fastdistill doctor
""",
}
GATED = "A result that is wrong against float64 is reported as failed and not timed; absences are listed with reasons."
RESUMING = "A run may be killed at any moment; the same command continues it from its newest checkpoint."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    args = build_parser().parse_args(arguments)
    try:
        return args.command(args)
    except KeyboardInterrupt:
        return fail("stopped. Training goes on from its newest checkpoint when the command is given again", status=130)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fastdistill"):
            raise
        return fail(f"{error.name} is not installed; this command needs it: pip install 'fastdistill[train]'")
    except (ValueError, RuntimeError, MemoryError) as error:
        if _is_want_of_memory(error):
            reason = (str(error).splitlines() or ["MemoryError"])[0]
            return fail(f"there is too little memory ({reason}); ask for fewer rows or samples")
        status = _status_of(error)
        if status is None:
            raise
        return fail(str(error), status)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands; each command stores the function that runs it as `command`."""
    parser = argparse.ArgumentParser(
        prog="fastdistill",
        description="Train one-step and few-step generators, sample from them and measure them.",
        epilog="examples:\n" + "".join(EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastdistill {fastdistill.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, summary: str, more: str = "") -> argparse.ArgumentParser:
        description = f"{summary[0].upper()}{summary[1:]}. {more}"
        return commands.add_parser(
            name,
            help=summary,
            description=description,
            epilog="examples:\n" + EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    command = add("train", "train as a configuration says, into a run folder", RESUMING)
    command.add_argument("config", metavar="CONFIG", help="a YAML file, or a shipped name: ring, digits-flow, ...")
    command.add_argument("overrides", metavar="--field value", nargs=argparse.REMAINDER, help="fields to change")
    command.set_defaults(command=run_train)

    command = add("sample", "draw samples from a run")
    command.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    command.add_argument("--n", type=_at_least(1), default=80, help="number of samples (default: %(default)s)")
    command.add_argument("--steps", type=_at_least(1), help="sampling steps (default: the configuration's)")
    command.add_argument("--label", type=int, help="class of all samples (default: every class in turn)")
    command.add_argument("--guidance", type=float, help="scale of guidance (default: the configuration's)")
    _add_sampler(command)
    command.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    command.add_argument("--out", type=Path, help=".png picture or .npy array (default: RUN/samples/sample.png)")
    command.set_defaults(command=run_sample)

    command = add("eval", "measure a run against its data, without any download")
    command.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    command.add_argument("--steps", type=_at_least(1), nargs="+", help="sampling steps (default: 1 2 4 8, ...)")
    command.add_argument("--guidance", type=float, help="scale of guidance (default: the configuration's)")
    _add_sampler(command)
    command.add_argument("--n", type=_at_least(64), help="number of samples (default: the judge's choice)")
    command.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    command.set_defaults(command=run_eval)

    command = add("explain", "describe a method by its formula, tangent, times, defaults and sources")
    command.add_argument("method", metavar="METHOD", nargs="?", help="name of a method (default: a table of all)")
    command.set_defaults(command=run_explain)

    command = add("compare", "train and measure methods under one budget, and report")
    command.add_argument("--methods", default="all", help="names joined by commas, or all (default: %(default)s)")
    command.add_argument("--data", default="ring", help="a shipped name, or a YAML file (default: %(default)s)")
    command.add_argument("--steps", type=_at_least(1), help="training steps (default: the judge's or configuration's)")
    command.add_argument("--seeds", type=_at_least(1), default=1, help="number of seeds (default: %(default)s)")
    command.add_argument("--n", type=_at_least(64), help="samples in each measurement (default: as in `eval`)")
    command.add_argument("--out", type=Path, help="output folder (default: runs/compare-DATA)")
    command.set_defaults(command=run_compare)

    command = add("demo", "train a teacher on digits, distil it to one step, and report")
    command.add_argument("--out", type=Path, default=Path("runs/demo"), help="output folder (default: %(default)s)")
    command.set_defaults(command=run_demo)

    command = add("bench", "measure speed, memory and error against everything else that is installed", GATED)
    command.add_argument("--suite", default="", metavar="NAME[,NAME]", help="suites to run; --list shows all")
    command.add_argument("--quick", action="store_true", help="tiny shapes, which say nothing about speed")
    command.add_argument("--json", type=Path, metavar="FILE", help="results are written here, and continued from here")
    command.add_argument(
        "--budget", type=float, default=float("inf"), metavar="SECONDS", help="start no case after this time"
    )
    command.add_argument("--device", choices=("cuda", "cpu"), help="device (default: the GPU if there is one)")
    command.add_argument("--dtype", help="dtype of inputs (default: bfloat16 on a GPU, float32 on a CPU)")
    command.add_argument("--providers", nargs="+", default=[], metavar="REGEX", help="measure matching names only")
    command.add_argument("--cases", metavar="REGEX", help="measure only cases whose suite/name/mode matches")
    command.add_argument("--commit", help="commit of the code, if there is no repository")
    command.add_argument("--list", action="store_true", help="print suites and cases, and measure nothing")
    command.set_defaults(command=run_bench)

    command = add("report", "draw benchmark files as one self-contained page, and as pictures")
    command.add_argument("--bench", metavar="FILE", type=Path, nargs="+", required=True, help="files of `bench --json`")
    command.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    command.set_defaults(command=run_report)

    command = add("doctor", "say what this machine has and which implementations run on it")
    command.set_defaults(command=run_doctor)
    return parser


def run_train(args: argparse.Namespace) -> int:
    """Train a run, and measure it if its judge does so at once."""
    from fastdistill.eval.evaluate import after_training
    from fastdistill.train import load_config, train

    config = load_config(args.config, args.overrides)
    run = train(config)
    print(f"{run}: {run / 'export' / 'ema.safetensors'} after {config.steps} steps")
    for line in after_training(run, config):
        print(line)
    return 0


def run_sample(args: argparse.Namespace) -> int:
    """Draw samples and write them as a picture or an array."""
    from fastdistill.data.pictures import NoPictureError, draw
    from fastdistill.train import ConfigError, generate, load_run
    from fastdistill.train.files import replacing
    from fastdistill.train.logging import save_picture

    out: Path = args.out or args.run / "samples" / "sample.png"
    if out.suffix not in (".png", ".npy"):
        raise ConfigError(f"--out: expected a name in .png or .npy, got {out}")
    net, config = load_run(args.run)
    if not out.parent.is_dir():
        raise ConfigError(f"--out: {out.parent} is no folder")
    with _naming_options():
        samples = generate(
            net,
            config,
            args.n,
            label=args.label,
            steps=args.steps,
            sampler=args.sampler,
            guidance=args.guidance,
            seed=args.seed,
            **_parameters(args),
        )
    if out.suffix == ".npy":
        import numpy as np

        with replacing(out) as temporary, temporary.open("wb") as file:
            np.save(file, samples.cpu().numpy())
    else:
        try:
            png = draw(config.data.build(), samples, columns=10)
        except NoPictureError as error:
            raise ConfigError(f"--out: {error}; or expected a name in .npy") from error
        save_picture(out, png)
    print(out)
    return 0


def run_eval(args: argparse.Namespace) -> int:
    """Measure a run, and print the table."""
    how = {"sampler": args.sampler, "guidance": args.guidance, **_parameters(args)}
    with _naming_options():
        print(_measure(args.run, args.steps, n=args.n, seed=args.seed, **how))
    return 0


def run_explain(args: argparse.Namespace) -> int:
    """Describe one method, or list all."""
    from fastdistill.method_notes import explain

    print(explain(args.method))
    return 0


def run_compare(args: argparse.Namespace) -> int:
    """Compare methods, and print the table and the place of the report."""
    from fastdistill.compare import compare
    from fastdistill.eval.comparison import describe

    methods = None if args.methods == "all" else [name.strip() for name in args.methods.split(",")]
    out: Path = args.out or Path(f"runs/compare-{args.data}")
    summary = compare(methods, args.data, out, steps=args.steps, seeds=args.seeds, samples=args.n)
    print(f"{describe(summary)}\n\nThe report: {(out / 'report.html').resolve().as_uri()}")
    return 0


def run_demo(args: argparse.Namespace) -> int:
    """Run the demo: train a teacher, distil it, and report."""
    from fastdistill import demo

    demo.main(args.out)
    return 0


def run_bench(args: argparse.Namespace) -> int:
    """Run benchmarks, or list their cases."""
    if importlib.util.find_spec("pytest_benchmark") is None:
        return fail("pytest-benchmark is not installed; this command needs it: pip install 'fastdistill[bench]'")
    from fastdistill.benchmarks.run import bench

    request = bench.Request(
        suites=[name for name in args.suite.split(",") if name],
        quick=args.quick,
        path=args.json,
        budget=args.budget,
        device=args.device,
        dtype=args.dtype,
        providers=args.providers,
        pattern=args.cases,
        commit=args.commit,
    )
    try:
        if not args.list:
            return bench.main(request)
        print(bench.listing(request))
    except KeyboardInterrupt:
        return fail("stopped. With --json, the same command goes on after the last case", status=130)
    except bench.LostError as error:
        return fail(str(error), status=3)
    except bench.BenchError as error:
        return fail(str(error))
    return 0


def run_report(args: argparse.Namespace) -> int:
    """Write benchmark files as a page and its pictures."""
    from fastdistill.benchmarks.ops.timed_op import BenchError
    from fastdistill.benchmarks.report import page

    try:
        return page.main(args.bench, args.out)
    except BenchError as error:
        return fail(str(error))
    except OSError as error:
        return fail(f"--out: {error.filename or args.out} can't be written: {error.strerror}")


def run_doctor(args: argparse.Namespace) -> int:
    """Print the machine's hardware and software, and the implementations that run on it."""
    from fastdistill.train.doctor import describe_machine

    print(describe_machine())
    return 0


def _measure(run: Path, steps: Sequence[int] | None = None, **options: Any) -> str:
    from fastdistill.eval.evaluate import describe, evaluate

    return f"{describe(evaluate(run, steps, **options))}\n\n{run / 'summary.json'}"


def fail(message: str, status: int = 2) -> int:
    """Print a message on stderr, and return the exit status."""
    print(f"fastdistill: {message}", file=sys.stderr)
    return status


def _add_sampler(command: argparse.ArgumentParser) -> None:
    """Add the options that replace the method's own sampler: a name, and the parameters of all samplers."""
    from fastdistill.samplers import PARAMETERS, SPECS, taking

    command.add_argument("--sampler", help=f"{', '.join(SPECS)} (default: the method's)")
    for name, of in PARAMETERS.items():
        told = f"{of.help}, {of.low:g} to {of.high:g}: samples by {' or '.join(taking({name}))}"
        command.add_argument(f"--{name.replace('_', '-')}", type=type(of.default), help=told.replace("%", "%%"))


def _parameters(args: argparse.Namespace) -> dict[str, Any]:
    """Return the values of the samplers' parameters from the options; an option that isn't given is None."""
    from fastdistill.samplers import PARAMETERS

    return {name: getattr(args, name) for name in PARAMETERS}


@contextlib.contextmanager
def _naming_options() -> Iterator[None]:
    """Rename the argument to its option in errors about sampling, as in `--gamma: expected ...`."""
    from fastdistill.samplers import PARAMETERS
    from fastdistill.train import ConfigError

    try:
        yield
    except ConfigError as error:
        name, _, rest = str(error).partition(":")
        if name not in ("label", "steps", "sampler", "guidance", *PARAMETERS):
            raise
        raise ConfigError(f"--{name.replace('_', '-')}:{rest}") from error


def _status_of(error: Exception) -> int | None:
    """Return the exit status of an error that its message explains fully, or None for a bug."""
    from fastdistill.train import CheckpointError, ConfigError, NonFiniteError

    if isinstance(error, ConfigError | CheckpointError):
        return 2
    return 1 if isinstance(error, NonFiniteError) else None


def _is_want_of_memory(error: Exception) -> bool:
    """Return whether the error says that Python or torch, on any device, ran out of memory."""
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)


def _at_least(minimum: int) -> Callable[[str], int]:
    """Make the type of an argument: a whole number from `minimum` up.

    More than 15 digits are refused, because torch can't count that far.
    """

    def parse(text: str) -> int:
        if not (text.lstrip("-").isdecimal() and len(text) < 16) or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number from {minimum} up, got {text[:40]!r}")
        return int(text)

    return parse


if __name__ == "__main__":
    sys.exit(main())
