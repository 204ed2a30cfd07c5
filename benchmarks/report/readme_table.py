"""Write the README's tables from the files in benchmarks/results/, so that none is made by hand.

    python -m fastdistill.benchmarks.report.readme_table            # rewrite the block in README.md
    python -m fastdistill.benchmarks.report.readme_table --check    # status 1 if it differs from what would be written

The block lies between two comments, <!-- benchmarks:begin --> and <!-- benchmarks:end -->. A table whose file is
missing says that it is not yet measured. Files of `fastdistill bench` count if they come from a GPU; where several have
the same entry, the newest counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdistill.benchmarks.ops.timed_op import OURS, PEER, BenchError
from fastdistill.benchmarks.report.records import LOST, Machine, Record, by_device, load
from fastdistill.benchmarks.run.environment import RESULTS, ROOT
from fastdistill.benchmarks.run.numbers import errors, seconds, size

README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
COMMAND = "python -m fastdistill.benchmarks.report.readme_table"
MADE = f"<!-- Made by `{COMMAND}` from benchmarks/results/: change nothing here. -->"
NOT_MEASURED = "not yet measured"

# Maps an implementation's name in driver_memory.json and cpu_attention.json to its name in the README, which leaves out
# the other implementations.
DRIVERS = {
    "plain": "plain forward, no tangent",
    "torch.func.jvp, math SDPA": "`torch.func.jvp`, math attention",
    "torch.func.jvp, fastdistill ops": "`torch.func.jvp`, fastdistill's ops",
    "fastdistill.jvp": "**`fd.jvp`, fastdistill's ops**",
}
ATTENTIONS = {
    "torch.func.jvp of math SDPA": "`torch.func.jvp`, math attention",
    "fd.jvp of fd.scaled_dot_product_attention": "`fd.jvp`",
}
BASELINE, FD = ATTENTIONS
# Names the models of the GPU suites that the README shows; the report shows all.
SHOWN = {"dit": "DiT-XL", "video": "Wan", "mmdit": "FLUX.1", "block": "DiT-XL", "step": "xl"}
MODES = {"forward": "forward with tangent", "primal": "backward", "mixed": "backward of both", "step": "step"}
LOST_PEERS = {"oom": "peers out of memory", "failed parity": "peers failed parity", "error": "peers failed"}


class ReadmeError(BenchError):
    """Report a README without the block, or a result file that can't be read; the message says which."""


def block(results: Path = RESULTS) -> str:
    """Return the text between the two comments, from the files of a folder.

    Raises:
        BenchError: a file there can't be read.
    """
    tables = [_memory(results / "driver_memory.json"), _attention(results / "cpu_attention.json"), _gpus(results)]
    return "\n\n".join([MADE, *tables])


def replaced(readme: str, text: str) -> str:
    """Return a README whose block is replaced by this text.

    Raises:
        ReadmeError: the README doesn't have each comment once, in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ReadmeError(f"README: expected {BEGIN} and then {END}, once each")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReadmeError(f"{path}: can't be read: {error}") from None


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head, *lines = (f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in (heads, *rows))
    return "\n".join([head, "|" + "---|" * len(heads), *lines])


def _memory(path: Path) -> str:
    if not path.exists():
        return f"Memory of one forward with tangent: {NOT_MEASURED}."
    try:
        table = _read(path)
        rows, setting = table["rows"], table["setting"]
        lengths = list(dict.fromkeys(row["tokens"] for row in rows))
        by_way = {(row["way"], row["tokens"]): row for row in rows}
        lines = []
        for way in (way for way in DRIVERS if any(row["way"] == way for row in rows)):
            cells = [DRIVERS[way]]
            for tokens in lengths:
                row = by_way[way, tokens]
                held = f"{row['held_mib']:.0f} MiB"
                if way != "plain":
                    held += f" ({row['held_over_plain']:.2g}x)"
                bold = "**" * (way == "fastdistill.jvp")
                cells += [f"{bold}{held}{bold}", f"{bold}{row['peak_mib']:.0f} MiB{bold}"]
            lines.append(cells)
        said = f"{setting['depth']} blocks, width {setting['width']}, {setting['dtype']}"
    except (KeyError, TypeError) as error:
        raise ReadmeError(f"{path}: not what benchmarks/count/driver_memory.py writes: {error!r}") from None
    heads = ["", *(head for n in lengths for head in (f"N = {n}: held afterwards", "peak"))]
    intro = (
        f"Memory of one forward with tangent, against the plain forward of the same network ({said}; bytes of\n"
        "tensors alive, [benchmarks/count/driver_memory.py](benchmarks/count/driver_memory.py)):"
    )
    return f"{intro}\n\n{_table(heads, lines)}"


def _attention(path: Path) -> str:
    if not path.exists():
        return f"Attention and its tangent on a CPU: {NOT_MEASURED}."
    try:
        table = _read(path)
        environment, found = table["environment"], {}
        for row in table["results"]:
            found[_case(row["case"]), row["implementation"], row["mode"]] = row
        cases = list(dict.fromkeys(case for case, _, _ in found))
        lines = []
        for case in cases:
            for name, words in ATTENTIONS.items():
                forward, training = (found[case, name, mode] for mode in ("forward", "training"))
                lines.append([f"{case}: {words}", *map(_cell, (forward, training)), _mib(training)])
        threads = environment["threads"]
        said = f"{'one thread' if threads == 1 else f'{threads} threads'} of an {environment['processor']}"
    except (KeyError, TypeError) as error:
        raise ReadmeError(f"{path}: not what benchmarks/run/cpu_attention.py writes: {error!r}") from None
    intro = (
        f"And on a CPU, attention and its tangent alone (float32, head dim 64, {said}, least CPU time of\n"
        "interleaved rounds; [benchmarks/run/cpu_attention.py](benchmarks/run/cpu_attention.py)). "
        '"Training" adds the gradients of the\noutput:'
    )
    heads = ["", "forward + tangent", "training", "peak memory, training"]
    return f"{intro}\n\n{_table(heads, lines)}"


def _case(case: Mapping[str, int]) -> str:
    heads = f"{case['heads']} heads" if case["batch"] == 1 else f"{case['batch']} × {case['heads']} heads"
    return f"N = {case['n']}, {heads}"


def _cell(row: Mapping[str, Any]) -> str:
    time = f"{row['cpu_ms_min']:.0f} ms"
    return time if row["implementation"] == BASELINE else f"**{time}** ({row['speedup']:.1f}x)"


def _mib(row: Mapping[str, Any]) -> str:
    memory = f"{row['peak_mib']:.0f} MiB"
    return memory if row["implementation"] == BASELINE else f"**{memory}**"


def _gpus(results: Path) -> str:
    """Return a table for each GPU."""
    files = []
    for path in sorted(results.glob("*.json")):
        content = _read(path)
        if isinstance(content, dict) and "benchmarks" in content and (content.get("machine_info") or {}).get("gpu"):
            files.append(load(path))
    tables = [text for machine in by_device(files) if (text := _gpu(machine))]
    return "\n\n".join(tables) if tables else f"On a GPU: {NOT_MEASURED}."


def _gpu(machine: Machine) -> str:
    """Return the table of one GPU: ours in each mode, against the fastest peer and the floor; empty without records."""
    cases: dict[tuple[str, str, str], dict[str, list[Record]]] = {}
    for record in machine.records.values():
        if _is_shown(record):
            place = (record.key.suite, record.key.case, record.key.dtype)
            cases.setdefault(place, {}).setdefault(record.key.mode, []).append(record)
    if not cases:
        return ""
    modes = [mode for mode in MODES if any(mode in by_mode for by_mode in cases.values())]
    lines = []
    for (suite, case, dtype), by_mode in cases.items():
        first = by_mode[next(mode for mode in modes if mode in by_mode)]
        ours = _best(first, OURS)
        floor = None if ours is None else ours.number("ratio_to_floor")
        peak = None if ours is None else ours.number("peak_memory_bytes")
        cells = [f"{suite}: {case}, {dtype}", *(_against(by_mode.get(mode, [])) for mode in modes)]
        cells.append("–" if floor is None else f"{floor:.2f}x")
        cells.append("–" if peak is None else size(peak))
        lines.append([*cells, "–" if ours is None else errors(ours.info.get("error")) or "–"])
    newest = machine.files[-1]
    when, commit = newest.date[:10] or "undated", newest.commit[:10] or "unknown"
    names = ", ".join(f"[{each.path.name}](benchmarks/results/{each.path.name})" for each in machine.files)
    intro = (
        f"On one {machine.device} ({when}, commit {commit}; {names}).\n"
        "In parentheses how many times as long the fastest peer takes that agrees with float64; the floor computes no\n"
        "tangent; floor, memory and errors (output / tangent, against float64) are of the first mode:"
    )
    heads = ["", *(MODES[mode] for mode in modes), "time / floor", "peak memory", "error"]
    return f"{intro}\n\n{_table(heads, lines)}"


def _is_shown(record: Record) -> bool:
    named = SHOWN.get(record.key.suite)
    return (
        named is not None
        and named in f"{record.key.case} {record.shape.get('model', '')}"
        and not record.info.get("quick")
    )


def _best(records: Iterable[Record], kind: str) -> Record | None:
    """Return the fastest timed record of a kind."""
    timed = [record for record in records if record.kind == kind and record.median is not None]
    return min(timed, key=lambda record: record.median or 0, default=None)


def _against(records: Sequence[Record]) -> str:
    """Compare ours with the fastest peer in words, or say why ours has no time."""
    ours, peer = _best(records, OURS), _best(records, PEER)
    if ours is None or ours.median is None:
        return next(
            (record.status for record in records if record.kind == OURS and record.status in LOST), NOT_MEASURED
        )
    if peer is not None and peer.median is not None:
        return f"**{seconds(ours.median)}** ({peer.median / ours.median:.1f}x)"
    lost = {record.status for record in records if record.kind == PEER}
    why = next((words for status, words in LOST_PEERS.items() if status in lost), "no peer")
    return f"**{seconds(ours.median)}** ({why})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check the README, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if something would change")
    parser.add_argument("--readme", type=Path, default=README, help="(default: the checkout's)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="(default: benchmarks/results)")
    args = parser.parse_args(arguments)
    try:
        before = args.readme.read_text(encoding="utf-8")
        after = replaced(before, block(args.results))
    except (OSError, BenchError) as error:
        print(f"readme_table: {error}", file=sys.stderr)
        return 2
    if args.check:
        if before != after:
            print(f"{args.readme}: its tables are not those of {args.results}: run the same without --check")
        return int(before != after)
    args.readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
