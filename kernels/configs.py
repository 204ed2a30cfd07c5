"""How the kernels are launched: tile sizes, warps and pipeline stages, by GPU architecture, dtype and width.

The attention table was searched for large tiles that compile without register spills within the shared memory there is;
benchmarks/aot_table.py compiles every entry and says which keep to that. They are NOT yet measured on a GPU: which of
those that fit is fastest is unknown.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Config(NamedTuple):
    """One launch of the attention kernel: BLOCK_N queries by BLOCK_M keys."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int


class NormConfig(NamedTuple):
    """One launch of the norm kernel: ROWS rows of BLOCK_C channels."""

    rows: int
    block_c: int
    num_warps: int


INTERPRETER = 0  # the architecture of a CPU
INTERPRETED = Config(32, 32, 1, 1)  # small enough that short tests have several tiles

# Kind of call: the logits move (by t_q, t_k, a mask's tangent), move under a mask or causally, or stand still.
MOVING, MASKED, STILL = "moving", "masked", "still"

# Heads up to the key, by architecture and kind. sm_90 serves 9.x, sm_100 serves 10.x, sm_80 all others, so its tiles
# keep to the 99 KiB of shared memory that 8.6, 8.9 and 12.x have. For heads wider than 128, 64 rows do not fit into the
# registers; these go without the matmul instructions of 9.x and 10.x, which need 64 rows, and use those of 8.x.
ATTENTION: dict[tuple[int, str], dict[int, Config]] = {
    (80, MOVING): {
        96: Config(128, 32, 8, 2),
        112: Config(64, 32, 4, 2),
        128: Config(64, 32, 8, 2),
        256: Config(32, 16, 8, 2),
    },
    (80, MASKED): {
        80: Config(128, 32, 8, 2),
        96: Config(64, 32, 4, 2),
        112: Config(128, 16, 8, 2),
        128: Config(64, 32, 8, 2),
        256: Config(32, 16, 8, 2),
    },
    (80, STILL): {
        80: Config(128, 32, 8, 2),
        96: Config(64, 32, 4, 2),
        128: Config(128, 32, 8, 2),
        256: Config(64, 16, 16, 2),
    },
    (90, MOVING): {
        64: Config(128, 64, 8, 3),
        80: Config(128, 64, 8, 2),
        128: Config(128, 32, 8, 4),
        256: Config(32, 32, 8, 2),
    },
    (90, MASKED): {
        32: Config(128, 64, 8, 3),
        64: Config(128, 64, 8, 2),
        80: Config(128, 32, 8, 4),
        96: Config(128, 32, 8, 3),
        112: Config(128, 16, 8, 3),
        128: Config(128, 32, 8, 3),
        256: Config(32, 32, 8, 2),
    },
    (90, STILL): {
        96: Config(128, 64, 8, 3),
        112: Config(64, 32, 8, 2),
        128: Config(128, 64, 8, 2),
        256: Config(32, 32, 8, 2),
    },
    (100, MOVING): {
        80: Config(128, 64, 8, 3),
        128: Config(128, 32, 8, 3),
        256: Config(32, 32, 8, 2),
    },
    (100, MASKED): {
        112: Config(128, 32, 8, 3),
        128: Config(64, 32, 8, 2),
        256: Config(32, 32, 8, 2),
    },
    (100, STILL): {
        112: Config(128, 64, 8, 3),
        128: Config(128, 32, 8, 3),
        256: Config(64, 16, 16, 2),
    },
}

# float32 runs on the ordinary cores, with exact products instead of TF32's, and each thread holds operands, too.
ATTENTION_FLOAT32: dict[int, Config] = {
    64: Config(32, 32, 8, 2),
    128: Config(32, 16, 8, 2),
    256: Config(16, 16, 8, 2),
}


def arch_of(device: torch.device) -> int:
    """The row of the table that serves a device."""
    if device.type != "cuda":
        return INTERPRETER
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)


def attention_config(arch: int, dtype: torch.dtype, d: int, kind: str) -> Config:
    """The shipped config for heads of width `d`, the larger of that of the keys and that of the values."""
    if arch == INTERPRETER:
        return INTERPRETED
    table = ATTENTION_FLOAT32 if dtype == torch.float32 else ATTENTION[arch, kind]
    return table[min(width for width in table if width >= d)]


def norm_config(length: int, width: int) -> NormConfig:
    """Whole rows, about 2048 elements and 16 a thread; several short rows share a program, of one sample only."""
    block_c = 1 << (width - 1).bit_length()
    rows = min(max(1, 2048 // block_c), 16, 1 << (length - 1).bit_length())
    return NormConfig(rows, block_c, num_warps=min(16, max(1, rows * block_c // 512)))
