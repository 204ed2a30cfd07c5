"""Measure the memory of a 6-block transformer by plain PyTorch, torch.func.jvp, and fastdistill.jvp.

    python -m fastdistill.benchmarks.count.driver_memory                 # N = 256 and 1024, table and JSON
    python -m fastdistill.benchmarks.count.driver_memory --lengths 256

It is the memory held after the forward, and its peak. Every way is first checked against `torch.func.jvp` in float64,
and nothing is measured that fails. Bytes are those of tensor storages alive (`fastdistill.testing.MemoryRecorder`), so
the numbers are exact, and the same on every machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdistill as fd
from fastdistill.benchmarks.run.environment import RESULTS
from fastdistill.testing import MemoryRecorder, relative_error

WIDTH, HEADS, DEPTH = 384, 6, 6
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class Block(nn.Module):
    """Run a DiT block on the attention and norm that it is given, so that each way of differentiating uses its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU("tanh"), nn.Linear(4 * WIDTH, WIDTH))
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, c: Tensor, attend: Attend, norm: Norm) -> Tensor:
        a, b, gate, d, e, gate_mlp = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)
        q, k, v = self.qkv(norm(x, a, b)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + gate * self.out(attend(q, k, v).transpose(1, 2).flatten(2))
        return x + gate_mlp * self.mlp(norm(x, d, e))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: Tensor, t: Tensor, attend: Attend, norm: Norm) -> Tensor:
        c = self.time(t[:, None])
        for block in self.blocks:
            x = block(x, c, attend, norm)
        return x


Result = tuple[Tensor, Tensor | None]


def ways(net: Network, x: Tensor, t: Tensor, v: Tensor) -> dict[str, Callable[[], Result]]:
    """Return each way to compute (u, du/dt); `plain` is the forward alone."""

    def math_jvp() -> tuple[Tensor, Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            return functorch(lambda x, t: net(x, t, F.scaled_dot_product_attention, plain_norm))

    def functorch(fn: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        u, du = torch.func.jvp(fn, (x, t), (v, torch.ones_like(t)))[:2]
        return u, du

    ours = lambda x, t: net(x, t, fd.scaled_dot_product_attention, fd.ada_layer_norm)  # noqa: E731
    return {
        "plain": lambda: (net(x, t, F.scaled_dot_product_attention, plain_norm), None),
        "torch.func.jvp, math SDPA": math_jvp,
        "torch.func.jvp, fastdistill ops": lambda: functorch(ours),
        "fastdistill.jvp": lambda: fd.jvp(ours, (x, t), (v, 1.0)),
    }


def held_and_peak(run: Callable[[], Result]) -> dict[str, float]:
    with MemoryRecorder() as recorder:
        result = run()
    entry = {"held_mib": recorder.alive / 2**20, "peak_mib": recorder.peak / 2**20}
    del result
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024], metavar="N", help="numbers of tokens")
    parser.add_argument("--out", type=Path, default=RESULTS / "driver_memory.json")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    net = Network()
    measured = []
    for length in arguments.lengths:
        batch = 2 if length <= 256 else 1
        x, v, t = torch.randn(batch, length, WIDTH), torch.randn(batch, length, WIDTH), torch.rand(batch)
        with torch.no_grad():
            exact = ways(net.double(), x.double(), t.double(), v.double())
            truth = exact["torch.func.jvp, math SDPA"]()[1]
            assert truth is not None
        candidates = ways(net.float(), x, t, v)
        plain = None
        for name, run in candidates.items():
            _, tangent = run()
            error = None if tangent is None else relative_error(tangent.detach(), truth)
            if error is not None and not error < 1e-5:
                raise SystemExit(f"parity failed: {name}, N={length}: relative error of the tangent {error:.1e}")
            entry = {"tokens": length, "batch": batch, "way": name, "tangent_error": error, **held_and_peak(run)}
            plain = plain or entry["held_mib"]
            entry["held_over_plain"] = entry["held_mib"] / plain
            measured.append(entry)
            text = "       -" if error is None else f"{error:8.1e}"
            print(
                f"N={length:5d} B={batch}  {name:32s} held {entry['held_mib']:7.1f} MiB"
                f" ({entry['held_over_plain']:.2f}x)  peak {entry['peak_mib']:7.1f} MiB  error {text}"
            )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    setting = {"width": WIDTH, "heads": HEADS, "depth": DEPTH, "dtype": "float32", "torch": torch.__version__}
    arguments.out.write_text(json.dumps({"setting": setting, "rows": measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
