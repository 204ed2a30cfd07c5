"""Count the instructions of the torch path by valgrind, where it is installed; each count takes a minute.

    python -m fastdistill.benchmarks.count.callgrind --problems attention rms_norm --out runs/before.json
    python -m fastdistill.benchmarks.report.regressions OLD.json NEW.json --metric instructions --ratio 1.02

This sees a slower kernel behind the same op, or more Python around it, which a count of ops can't see. Two runs of the
same code differ by about 0.3 %, and other processors choose other kernels, so compare files of one machine. CI relies
on `fastdistill.benchmarks.count.op_counts` instead, which needs nothing installed and is exact.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.utils.benchmark import Timer

from fastdistill.benchmarks.count import op_problems
from fastdistill.benchmarks.count.op_counts import document, entry_of, write
from fastdistill.benchmarks.run.environment import processor

CALLS = 3
Counter = Callable[[str, str], int]


def instructions(name: str, mode: str) -> int:
    """Count the instructions of one call of a problem, in a process of its own; earlier calls have filled the caches.

    Raises:
        OSError: valgrind failed; the message has its output.
    """
    timer: Any = Timer(
        f"op_problems.run_mode(task, {mode!r})",
        setup=f"from fastdistill.benchmarks.count import op_problems\ntask = op_problems.problem({name!r})",
    )
    return int(timer.collect_callgrind(number=CALLS, collect_baseline=False).counts()) // CALLS


def main(arguments: Sequence[str] | None = None, counter: Counter = instructions) -> int:
    """Count, print a line for each problem and mode, write the file after each, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=op_problems.NAMES, default=op_problems.NAMES, metavar="NAME")
    parser.add_argument("--modes", nargs="+", choices=op_problems.MODES, default=op_problems.MODES, metavar="MODE")
    parser.add_argument("--out", type=Path, default=Path("runs/callgrind.json"), help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    if shutil.which("valgrind") is None:
        print("callgrind: there is no valgrind here (on Debian: apt-get install valgrind)", file=sys.stderr)
        return 2
    # PyTorch's timer calls the first `python` on the path. A fixed seed makes strings hash alike in all processes.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    os.environ |= {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    entries: list[dict[str, Any]] = []
    for name in args.problems:
        for mode in args.modes:
            entries.append(entry_of("callgrind", name, mode, {"instructions": counter(name, mode)}))
            print(f"{name:24} {mode:16} {entries[-1]['instructions']:>14,} instructions", flush=True)
            write(
                args.out, document(entries, "python -m fastdistill.benchmarks.count.callgrind", processor=processor())
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
