"""Merge result files of one machine and commit into one, named after both, ready to be committed.

    python -m fastdistill.benchmarks.gpu.merge runs/gpu/*.json                # into benchmarks/results/
    python -m fastdistill.benchmarks.gpu.merge a.json b.json --into elsewhere

The name is <gpu>_<date>_<commit>.json. Where two files have the same entry, the newer file's counts.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdistill.benchmarks.ops.timed_op import BenchError
from fastdistill.benchmarks.run.environment import RESULTS
from fastdistill.benchmarks.run.result_file import identity, load, save


def merged(files: Mapping[Path, dict[str, Any]]) -> dict[str, Any]:
    """Merge the contents of several files into one.

    Raises:
        BenchError: there are no files, or they differ in machine, torch or commit.
    """
    if not files:
        raise BenchError("expected result files, got none")
    contents = sorted(files.values(), key=lambda content: str(content["datetime"]))
    (first, *others) = files.items()
    for path, content in others:
        if identity(content) != identity(first[1]):
            raise BenchError(
                f"{path}: expected the setting of {first[0]}, {identity(first[1])}, got {identity(content)}"
            )
    entries: dict[str, tuple[str, Any]] = {}
    for content in contents:
        for name in ("benchmarks", "not_timed"):
            for entry in content[name]:
                entries.pop(entry["fullname"], None)
                entries[entry["fullname"]] = (name, entry)
    parts = {name: [entry for kind, entry in entries.values() if kind == name] for name in ("benchmarks", "not_timed")}
    commit = contents[-1]["commit_info"]
    dirty = any(content["commit_info"].get("dirty") for content in contents)
    return {**contents[-1], "commit_info": {**commit, "dirty": dirty}, **parts}


def file_name(content: Mapping[str, Any]) -> str:
    """Return a result file's name, <gpu>_<date>_<commit>.json."""
    machine, commit = content["machine_info"], content["commit_info"]
    device = (machine.get("gpu") or {}).get("name") or machine.get("processor") or machine.get("device") or "unknown"
    slug = re.sub(r"[^a-z0-9]+", "-", str(device).lower()).strip("-")
    date = str(content["datetime"])[:10].replace("-", "")
    return f"{slug}_{date}_{(commit.get('id') or 'unknown')[:7]}{'-dirty' if commit.get('dirty') else ''}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge, write, and print the name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--into", type=Path, default=RESULTS, metavar="FOLDER", help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        content = merged({path: load(path) for path in args.files})
    except BenchError as error:
        print(f"merge: {error}", file=sys.stderr)
        return 2
    path = args.into / file_name(content)
    save(content, path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
