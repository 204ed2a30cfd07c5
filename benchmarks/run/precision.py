"""Measure what 16 bits cost a tangent: errors of u and t_u against float64 after 12 blocks, for each policy.

    OMP_NUM_THREADS=1 python -m fastdistill.benchmarks.run.precision  # a minute on a CPU: results/precision.json, .md

Every policy computes the same function of the same weights, which bfloat16 represents exactly, at the same point and
along the same direction. The program fails where our error is beyond the caps of the project, or where plain PyTorch in
float64 computes another function.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdistill as fd
from fastdistill.benchmarks.ops.plain_dit import PlainDiT, awakened, setting
from fastdistill.benchmarks.run.environment import RESULTS, fingerprint
from fastdistill.models import DiT, create
from fastdistill.testing import relative_error

Pushforward = tuple[Tensor, Tensor]  # u and t_u
NETWORKS: dict[str, dict[str, Any]] = {
    "sine-cosine positions": {"pos": "sincos", "qk_norm": False},
    "RoPE, QK-norm": {"pos": "rope", "qk_norm": True},
}
PRESET, SIZE, SEEDS, STD = "dit-s/2", 32, (0, 1, 2), 0.1
CAPS = {"float32": 5e-6, "bfloat16": 1.2e-2}  # The largest allowed error of t_u.
SAME = 1e-12  # The largest difference of ours and the plain network in float64.


class Way(NamedTuple):
    """Describe a way to compute (u, t_u): `storage` is the parameters' dtype, and our own ways have a `cap`."""

    words: str
    plain: bool
    storage: torch.dtype
    autocast: bool
    cap: str | None = None


WAYS = {
    "float32, plain": Way("all float32, `torch.func.jvp`, plain modules", True, torch.float32, False),
    "float32": Way("**all float32, `fd.jvp`**", False, torch.float32, False, "float32"),
    "bf16 storage, plain": Way("all bfloat16, `torch.func.jvp`, plain modules", True, torch.bfloat16, False),
    "bf16 storage": Way("all bfloat16, `fd.jvp`", False, torch.bfloat16, False, None),
    "autocast, plain": Way("bfloat16 autocast, `torch.func.jvp`, plain modules", True, torch.float32, True),
    "autocast": Way(
        "**bfloat16 autocast, `fd.jvp`: float32 residual stream and conditioning (the default)**",
        False,
        torch.float32,
        True,
        "bfloat16",
    ),
}


def network(config: dict[str, Any], seed: int) -> DiT:
    """Return a DiT in which every weight has an effect."""
    torch.manual_seed(seed)
    net = create(PRESET, num_classes=0, **config)
    assert isinstance(net, DiT)
    return awakened(net, STD)


def evaluate(net: DiT, plain: bool, dtype: torch.dtype, size: int, seed: int) -> Pushforward:
    """Compute u and t_u, with x and v in the given dtype."""
    point, direction = setting(net, size, 1, seed)
    wide = torch.promote_types(dtype, torch.float32)  # bfloat16 could not tell the times apart.
    x, v = point[0].to(dtype), direction.to(dtype)
    t, s = (a.to(wide) for a in point[1:])
    fn: Callable[..., Tensor] = PlainDiT(net) if plain else net
    with torch.no_grad():
        if plain:
            u, t_u = torch.func.jvp(lambda x, t: fn(x, t, s), (x, t), (v, torch.ones_like(t)))[:2]
        else:
            u, t_u = fd.jvp(net, (x, t, s), (v, 1.0, None))
    return u, t_u


def errors(config: dict[str, Any], seed: int, size: int = SIZE) -> dict[str, tuple[float, float]]:
    """Return the relative errors of u and of t_u for each way.

    Raises:
        SystemExit: the plain network computes another function.
    """
    net = network(config, seed).double()
    truth = evaluate(net, False, torch.float64, size, seed)
    apart = max(map(relative_error, evaluate(net, True, torch.float64, size, seed), truth))
    if not apart < SAME:
        raise SystemExit(f"parity failed: plain modules and ours differ by {apart:.1e} in float64, {config}")
    found = {}
    for name, way in WAYS.items():
        net = net.to(way.storage)
        context: AbstractContextManager[object] = (
            torch.autocast("cpu", torch.bfloat16) if way.autocast else nullcontext()
        )
        with context:
            results = evaluate(net, way.plain, way.storage, size, seed)
        u, t_u = map(relative_error, results, truth)
        found[name] = (u, t_u)
    return found


def table(measured: Sequence[dict[str, Any]]) -> str:
    """Return the table: the largest error of all seeds, with a row for each way and two columns for each network."""
    legend = (
        f"Relative errors against float64 of the 12-block {PRESET} (N = 256), the largest of {len(SEEDS)} random "
        "networks; on a CPU, by `python -m fastdistill.benchmarks.run.precision`. All weights are numbers of bfloat16. "
        "Plain modules under autocast have a float32 residual stream where positions are added to it, and a bfloat16 "
        "one with RoPE."
    )
    lines = [
        legend,
        "",
        "| | " + " | ".join(f"{network}: u | t_u" for network in NETWORKS) + " |",
        "|" + "---|" * (1 + 2 * len(NETWORKS)),
    ]
    for name, way in WAYS.items():
        cells = [way.words]
        for network_name in NETWORKS:
            of_way = [entry for entry in measured if (entry["way"], entry["network"]) == (name, network_name)]
            cells += [f"{max(entry[part] for entry in of_way):.1e}" for part in ("error_u", "error_t_u")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def beyond_caps(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each of our errors that the project does not allow."""
    return [
        f"{entry['way']}, {entry['network']}, seed {entry['seed']}: "
        f"error of t_u {entry['error_t_u']:.1e}, cap {CAPS[cap]:.1e}"
        for entry in measured
        if (cap := WAYS[entry["way"]].cap) is not None and not entry["error_t_u"] < CAPS[cap]
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write the JSON and the table, and fail if an error is beyond its cap."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=SIZE, help="side of the latents")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "precision", help="path of the results without the suffix"
    )
    args = parser.parse_args(arguments)
    measured = [
        {"network": name, "seed": seed, "way": way, "error_u": u, "error_t_u": t_u}
        for name, config in NETWORKS.items()
        for seed in SEEDS
        for way, (u, t_u) in errors(config, seed, args.size).items()
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = {"environment": fingerprint(), "preset": PRESET, "size": args.size, "std": STD, "results": measured}
    args.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".md").write_text(table(measured), encoding="utf-8")
    print(table(measured))
    if found := beyond_caps(measured):
        raise SystemExit("\n".join(found))


if __name__ == "__main__":
    main()
