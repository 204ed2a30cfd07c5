"""Choose how the kernels are launched: tile sizes, warps and pipeline stages.

Attention's configs are a table, configs.json: an entry for each kernel, architecture, width of operands, head dim,
tangent set, kind of mask and length. It needn't have every entry: `attention_config` takes the one that is nearest and
sure to fit, so a new shape or length needs no tuning. Entries say where they were measured; one that was not is a
config that benchmarks/compile/aot_table.py found to fit registers and shared memory, and no more is known of it.
`python -m fastdistill.tune` measures on the GPU at hand and keeps what it finds in a file of the user's, which wins.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

KERNELS = ("forward", "backward_kv", "backward_q")
MASKS = ("none", "band", "mask")  # each takes what the one before takes, and more; a band beside a mask is a "mask"
TANGENTS = "qkvm"  # of q, k, v and the mask
SHIPPED = Path(__file__).with_name("configs.json")


class Config(NamedTuple):
    """Configuration of a launch of an attention kernel: tiles of BLOCK_N queries by BLOCK_M keys.

    stream: how many columns of a row the matmuls load at a time; 0 is all of them, once, to be held.
    """

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int
    stream: int = 0

    def options(self) -> dict[str, int]:
        """Return what a launch is told of it."""
        blocks = {"BLOCK_N": self.block_n, "BLOCK_M": self.block_m, "STREAM": self.stream}
        return {**blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


class NormConfig(NamedTuple):
    """Configuration of a launch of the norm kernel: ROWS rows of BLOCK_C channels."""

    rows: int
    block_c: int
    num_warps: int


class Entry(NamedTuple):
    """Line of the table.

    bits: of an element of q. d: the head dim, and the widest that the config fits. tangents: letters of `TANGENTS`, ""
    for plain attention and for the backward without any cotangent of a tangent. log2_length: see `bucket`; None is any.
    measured: where, and how fast; None where it was not.
    """

    kernel: str
    arch: int
    bits: int
    d: int
    tangents: str
    mask: str
    log2_length: int | None
    config: Config
    measured: str | None


class ConfigFileError(ValueError):
    """Error of a file of configs that can't be read."""


INTERPRETER = 0  # the architecture of a CPU
INTERPRETED = Config(32, 32, 1, 1)  # small enough that short tests have several tiles
ARCHITECTURES = (80, 90, 100)


# What `forced` chooses now, the innermost last; while there is anything, no launch is looked up.
FORCED: list[tuple[int, dict[str, Config]]] = []


@contextmanager
def forced(arch: int, chosen: dict[str, Config]) -> Iterator[None]:
    """Launch these kernels with these configs, as on that architecture: for tuning, and for compiling without a GPU."""
    FORCED.append((arch, chosen))
    try:
        yield
    finally:
        FORCED.pop()


def arch_of(device: torch.device) -> int:
    """Return which rows of the table serve a device: sm_90 those of 9.x, sm_100 those of 10.x, sm_80 all others.

    So sm_80's configs keep to the 99 KiB of shared memory that 8.6, 8.9 and 12.x have.
    """
    if FORCED:
        return FORCED[-1][0]
    return INTERPRETER if device.type != "cuda" else _arch_of_gpu(device.index)


@lru_cache
def _arch_of_gpu(index: int | None) -> int:
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(index)[0], 80)


def bucket(length: int) -> int:
    """Return log2 of a length, rounded to the nearest."""
    return (2 * max(length, 1) ** 2).bit_length() - 1 >> 1


def attention_config(
    kernel: str, arch: int, dtype: torch.dtype, d: int, tangents: str, mask: str, length: int
) -> Config:
    """Return the config for heads of width `d` (the larger of that of the keys and that of the values).

    tangents: the letters of those that there are, as in `Entry`. mask: one of `MASKS`. length: of the rows that the
    programs share out, queries in "forward" and "backward_q", keys in "backward_kv".
    """
    if FORCED and kernel in FORCED[-1][1]:
        return FORCED[-1][1][kernel]
    if arch == INTERPRETER:
        return INTERPRETED
    return _nearest(kernel, arch, dtype.itemsize * 8, d, tangents, mask, bucket(length))


@lru_cache(maxsize=4096)
def _nearest(kernel: str, arch: int, bits: int, d: int, tangents: str, mask: str, log2_length: int) -> Config:
    wanted = Entry(kernel, arch, bits, d, tangents, mask, log2_length, INTERPRETED, None)
    entry = nearest(wanted, users(), shipped())
    if entry is None:
        raise ValueError(f"no config of {SHIPPED} or {cache_path()} serves {wanted[:-2]}")
    return entry.config


def nearest(wanted: Entry, *tables: Iterable[Entry]) -> Entry | None:
    """Return the entry that fits and wastes least: the narrowest heads, then the fewest tangents, the simplest mask.

    Of several such it is one of the first table before one of the second, then a measured one, of the nearest length.
    """
    best: tuple[Any, Entry] | None = None
    for order, table in enumerate(tables):
        for entry in table:
            if not _fits(wanted, entry):
                continue
            far = 99 if entry.log2_length is None else abs(entry.log2_length - (wanted.log2_length or 0))
            extra = len(set(entry.tangents) - set(wanted.tangents))
            cost = (entry.d, extra, MASKS.index(entry.mask), order, entry.measured is None, far)
            if best is None or cost < best[0]:
                best = (cost, entry)
    return best and best[1]


def _fits(wanted: Entry, entry: Entry) -> bool:
    return (
        wanted[:3] == entry[:3]
        and wanted.d <= entry.d
        and set(wanted.tangents) <= set(entry.tangents)
        and MASKS.index(wanted.mask) <= MASKS.index(entry.mask)
    )


@lru_cache
def shipped() -> tuple[Entry, ...]:
    """Return the table that comes with the package."""
    return read(SHIPPED)


@lru_cache
def users() -> tuple[Entry, ...]:
    """Return what was tuned on this GPU with this version of Triton, if anything."""
    path = cache_path()
    return read(path) if path is not None and path.exists() else ()


def cache_path() -> Path | None:
    """Return the user's file for the current GPU and this version of Triton; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdistill"
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", torch.cuda.get_device_name())
    return folder / f"{gpu}-triton-{triton.__version__}.json"


def reload() -> None:
    """Forget what was read: the files may have changed."""
    for cached in (shipped, users, _nearest):
        cached.cache_clear()


def read(path: Path) -> tuple[Entry, ...]:
    """Read the entries of a file; raise ConfigFileError, with the remedy, where it is damaged."""
    try:
        return tuple(map(_parse, json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, TypeError, KeyError) as error:
        remedy = "install fastdistill anew" if path == SHIPPED else "delete it, then `python -m fastdistill.tune`"
        raise ConfigFileError(f"{path} is no table of configs ({error}); {remedy}") from error


def _parse(line: dict[str, Any]) -> Entry:
    entry = Entry(**{**line, "config": Config(*line["config"])})
    numbers = [entry.arch, entry.bits, entry.d, *(entry.config if entry.config.stream else entry.config[:-1])]
    if not all(type(x) is int and x > 0 for x in numbers):
        raise ValueError(f"expected positive integers, got {numbers}")
    if entry.kernel not in KERNELS or entry.mask not in MASKS or not set(entry.tangents) <= set(TANGENTS):
        raise ValueError(f"unknown kernel, mask or tangents in {entry[:6]}")
    if not isinstance(entry.log2_length, int | None):
        raise ValueError(f"log2_length: expected an integer or null, got {entry.log2_length!r}")
    return entry


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Write entries as a file, a line each; whoever reads meanwhile sees the old file or the new one."""
    lines = ",\n".join(json.dumps(entry._asdict()) for entry in sorted(entries, key=_order))
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    draft.replace(path)


def _order(entry: Entry) -> tuple[Any, ...]:
    length = -1 if entry.log2_length is None else entry.log2_length
    return (KERNELS.index(entry.kernel), entry.arch, entry.bits, entry.tangents, entry.mask, entry.d, length)


def norm_config(length: int, width: int) -> NormConfig:
    """Return whole rows, about 2048 elements and 16 a thread; short rows of one sample share a program."""
    block_c = 1 << (width - 1).bit_length()
    rows = min(max(1, 2048 // block_c), 16, 1 << (length - 1).bit_length())
    return NormConfig(rows, block_c, num_warps=min(16, max(1, rows * block_c // 512)))


def norm_sums_fit(width: int, sums: int, residual: bool) -> bool:
    """Return whether the norms' backward has registers for whole rows beside running sums of `sums` gradients."""
    if width <= 2048:
        return sums <= 6
    if width <= 4096:
        return sums <= (0 if residual else 4)
    return sums == 0 and not residual


def norm_backward_config(batch: int, length: int, width: int, sums: int) -> tuple[NormConfig, int]:
    """Return a launch of the norms' backward on whole rows, and how many steps a program takes."""
    block_c = 1 << (width - 1).bit_length()
    rows = min(max(1, 2048 // block_c), 16, 1 << (length - 1).bit_length())
    return _backward_tile(batch, length, rows, block_c, sums)


def norm_columns_config(batch: int, length: int, width: int, sums: int) -> tuple[NormConfig, int]:
    """Return a launch that sums columns whose rows' statistics are known, so that it need not hold whole rows."""
    rows, per_thread = (16, 8) if sums <= 6 else (8, 4)
    rows = min(rows, 1 << (length - 1).bit_length())
    return _backward_tile(batch, length, rows, min(128, 1 << (width - 1).bit_length()), sums, per_thread)


def _backward_tile(
    batch: int, length: int, rows: int, block_c: int, sums: int, per_thread: int = 8
) -> tuple[NormConfig, int]:
    """Return a tile of so many elements a thread, and steps for about 512 programs where there is something to sum."""
    tiles = -(-length // rows)
    steps = min(tiles, max(1, batch * tiles // 512), 64) if sums else 1
    return NormConfig(rows, block_c, num_warps=min(16, max(1, rows * block_c // (32 * per_thread)))), steps
