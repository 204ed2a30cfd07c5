"""Count what the torch path dispatches: a regression gate for the CPU that no noise can move.

    python -m fastdistill.benchmarks.count.op_counts              # count, and write benchmarks/results/op_counts.json
    python -m fastdistill.benchmarks.count.op_counts --out FILE   # write another file, for a comparison

Seconds on a shared machine scatter by tens of percent. Instructions can't be counted on every machine: `perf stat`
needs hardware counters, which virtual machines hide, and valgrind is a package that a bare machine lacks, slows
everything fifty times, and still differs by 0.3 % from run to run. So CI counts exactly what the code alone decides,
for every op of the torch path, with our own dispatcher ops opened up:

    aten_ops       dispatched operations: the cost of Python and the dispatcher, which is most of a small problem
    matmul_flops   floating-point operations of the matmuls: most of a large attention or linear layer
    bytes_moved    read and written by everything that isn't a view: the cost of elementwise work. Each tensor counts
                   whole, expanded dimensions once, once when it is read and once when it is written
    peak_bytes     the most that new tensors hold at once

These counts can't see a slower kernel behind the same op; `fastdistill.benchmarks.count.callgrind` can, with valgrind.
They depend a little on the version of PyTorch, which the file names.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from fastdistill.benchmarks.count import op_problems
from fastdistill.benchmarks.run.environment import RESULTS
from fastdistill.testing import MemoryRecorder

RECORDED = RESULTS / "op_counts.json"
COUNTS = ("aten_ops", "matmul_flops", "bytes_moved", "peak_bytes")
MATMULS = frozenset({"mm", "addmm", "bmm", "baddbmm"})
FILLED_LATER = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
ONLY_WRITTEN = frozenset({"copy_", "zero_", "fill_"})  # These work in place without reading the old values.
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class OpCounter(MemoryRecorder):
    """Count what is dispatched inside; `counts()` returns the four numbers that the module's docstring explains.

    Ops of the namespace `fastdistill`, and composite ops of PyTorch, are replaced by what they dispatch themselves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.aten_ops = self.matmul_flops = self.bytes_moved = 0

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:  # PyTorch switches the mode off in this method; it must see what the op dispatches itself.
            if func.namespace == "fastdistill":
                return torch.library.get_kernel(func, "CPU").call_boxed(CPU, *args, **kwargs)
            # An op that has a kernel of its own runs that kernel, even if PyTorch could compose it of others.
            own = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU")
            result = NotImplemented if own else func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.aten_ops += 1
        self.matmul_flops += _matmul_flops(func, args, kwargs, result)
        self.bytes_moved += _bytes_moved(func, args, kwargs, result)
        return result

    def counts(self) -> dict[str, int]:
        """Return the four numbers counted so far."""
        return {name: getattr(self, name) for name in ("aten_ops", "matmul_flops", "bytes_moved")} | {
            "peak_bytes": self.peak
        }


def count(run: Callable[[], object]) -> dict[str, int]:
    """Return the counts of one call, after another call that fills caches."""
    run()
    with OpCounter() as counter:
        run()
    return counter.counts()


def _matmul_flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    name = _base_name(func)
    functional = name.removesuffix("_")
    if functional not in MATMULS:
        return 0
    formula = flop_registry[getattr(torch.ops.aten, functional)]
    return int(formula(*args, **{k: v for k, v in kwargs.items() if k != "out"}, out_val=result))


def _bytes_moved(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    name = _base_name(func)
    if name in FILLED_LATER or _is_view(func, (args, kwargs), result):
        return 0
    named = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
    unread = {argument.name for argument in func._schema.arguments if argument.is_out}
    if name in ONLY_WRITTEN:
        unread.add(func._schema.arguments[0].name)
    read = {id(x): x for key, value in named.items() if key not in unread for x in _tensors(value)}
    return sum(map(_bytes, [*read.values(), *_tensors(result)]))


def _is_view(func: Any, arguments: Any, result: Any) -> bool:
    """Return whether an op writes nothing, because all results lie in the memory of its arguments."""
    there, results = ({x.untyped_storage()._cdata for x in _tensors(tree)} for tree in (arguments, result))
    return not func._schema.is_mutable and results <= there


def _base_name(func: Any) -> str:
    return str(func._schema.name).removeprefix("aten::")


def _bytes(x: Tensor) -> int:
    """Return the bytes of the stored elements; a dimension of stride 0 counts once."""
    elements = 1
    for size, stride in zip(x.shape, x.stride()):
        elements *= min(size, 1) if stride == 0 else size
    return elements * x.element_size()


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def count_all(names: Iterable[str] = op_problems.NAMES) -> Iterator[dict[str, Any]]:
    """Yield the counts of each problem and mode."""
    for name in names:
        task = op_problems.problem(name)
        for mode in op_problems.MODES:
            counts = count(partial(op_problems.run_mode, task, mode))
            yield entry_of("op_counts", name, mode, counts)


def entry_of(suite: str, name: str, mode: str, counts: Mapping[str, int]) -> dict[str, Any]:
    """Return the `extra_info` of a problem in a mode."""
    head = {"suite": suite, "op": name, "case": "small", "mode": mode, "provider": "fastdistill torch"}
    return {**head, "kind": "ours", "status": "ok", "dtype": "float32", "device": "cpu", **counts}


def document(entries: Iterable[dict[str, Any]], generator: str, **machine: Any) -> dict[str, Any]:
    """Return a benchmark file without times that `records.load` reads."""
    machine = {"device": "cpu", "torch": torch.__version__.partition("+")[0], "generator": generator, **machine}
    return {"machine_info": machine, "benchmarks": [], "not_timed": list(entries)}


def write(path: Path, table: dict[str, Any]) -> None:
    """Write a benchmark file with a line for each result, so that a diff shows each change on its line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(entry) for entry in table["not_timed"])
    head = json.dumps({key: value for key, value in table.items() if key != "not_timed"})
    path.write_text(f'{head[:-1]}, "not_timed": [\n{lines}\n]}}\n', encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Count every problem, print a line for each, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=op_problems.NAMES, default=op_problems.NAMES, metavar="NAME")
    parser.add_argument("--out", type=Path, default=RECORDED, help="(default: benchmarks/results/op_counts.json)")
    args = parser.parse_args(arguments)
    entries = []
    for entry in count_all(args.problems):
        entries.append(entry)
        print(f"{entry['op']:24} {entry['mode']:16}", *(f"{name} {entry[name]:>12,}" for name in COUNTS), flush=True)
    write(args.out, document(entries, "python -m fastdistill.benchmarks.count.op_counts"))


if __name__ == "__main__":
    main()
