"""Create networks by name, from the table `PRESETS`."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastdistill.models.dit import DiT
from fastdistill.models.mlp import MLP


@dataclass(frozen=True)
class Preset:
    """Store a network class and the arguments that make it this preset."""

    network: type[nn.Module]
    arguments: dict[str, Any]


def _dit(
    channels: int, patch_size: int, width: int, depth: int, heads: int, mlp_ratio: float, num_classes: int
) -> Preset:
    arguments = {"channels": channels, "patch_size": patch_size, "width": width, "depth": depth, "heads": heads}
    return Preset(DiT, arguments | {"mlp_ratio": mlp_ratio, "num_classes": num_classes})


# S to XL are those of DiT and SiT on 32 x 32 x 4 latents: arXiv:2212.09748. Ours have a second time embedder (C² + 258
# C parameters more), and predict no variance. The preset for digits (8 x 8 x 1, 16 tokens) is for minutes on two CPU
# cores; width 128 learns less there in the same time, because it makes fewer steps.
PRESETS: dict[str, Preset] = {
    "mlp-ring": Preset(MLP, {"dim": 2, "width": 96, "depth": 3}),
    "mlp-digits": Preset(MLP, {"dim": 64, "width": 372, "depth": 5, "num_classes": 10}),
    #                  channels  patch  width  depth  heads  mlp_ratio  classes
    "dit-digits": _dit(1,        2,     96,    4,     3,     2.0,       10),
    "dit-s/2":    _dit(4,        2,     384,   12,    6,     4.0,       1000),
    "dit-b/2":    _dit(4,        2,     768,   12,    12,    4.0,       1000),
    "dit-l/2":    _dit(4,        2,     1024,  24,    16,    4.0,       1000),
    "dit-xl/2":   _dit(4,        2,     1152,  28,    16,    4.0,       1000),
}  # fmt: skip


def create(name: str, **overrides: Any) -> nn.Module:
    """Build a preset, with any of its arguments overridden.

    A checkpoint rebuilds its network by ``create(name, **net.config)``.

    Args:
        name: a key of `PRESETS`.
        overrides: arguments of the network's class, e.g. ``create("dit-digits", depth=6, pos="rope")``.

    Raises:
        ValueError: a name or an override is unknown, or the network refuses a value; the message says which.
    """
    if name not in PRESETS:
        raise ValueError(f"name: expected one of {', '.join(PRESETS)}, got {name!r}")
    preset = PRESETS[name]
    accepted = inspect.signature(preset.network).parameters
    unknown = sorted(set(overrides) - set(accepted))
    if unknown:
        raise ValueError(f"overrides: expected arguments of {name!r} ({', '.join(accepted)}), got {', '.join(unknown)}")
    return preset.network(**preset.arguments | overrides)


def count_parameters(net: nn.Module) -> int:
    """Return the number of trainable parameters of a network."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
