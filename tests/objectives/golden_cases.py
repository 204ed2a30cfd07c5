"""Golden files and what a test makes of one: networks of its weights, the loss of all rows and of each, gradients.

See golden/README.md for what a file holds. Everything is in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path as File
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from fastdistill import paths
from fastdistill.paths import Path
from fastdistill.samplers import Net

FOLDER = File(__file__).parent / "golden"
NAMES = sorted(file.stem for file in FOLDER.glob("*.npz"))
TOLERANCE = 1e-8


class Network(nn.Module):
    """Network tanh([x, t, s, (g), (one-hot y)] W1) W2, that of every file."""

    def __init__(self, w1: Tensor, w2: Tensor, classes: int, scaled: bool) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(w1.clone()), nn.Parameter(w2.clone())
        self.classes, self.scaled = classes, scaled

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None, g: Tensor | None = None) -> Tensor:
        inputs = [x, t[:, None], s[:, None]]
        if self.scaled:
            inputs.append((torch.ones_like(t) if g is None else g)[:, None])
        if self.classes:
            assert y is not None
            inputs.append(one_hot(y, self.classes + 1).to(x))
        return torch.tanh(torch.cat(inputs, 1) @ self.w1) @ self.w2


@dataclass
class Golden:
    """Golden file: its arrays by name, its options, and its networks, made once each.

    Args:
        rows: which of its rows; None is all of them.
    """

    name: str
    rows: list[int] | None = None
    options: dict[str, Any] = field(init=False)
    arrays: dict[str, Tensor] = field(init=False)
    networks: dict[str, Network] = field(init=False)

    def __post_init__(self) -> None:
        with np.load(FOLDER / f"{self.name}.npz") as file:
            self.options = json.loads(str(file["options"]))
            self.arrays = {key: torch.from_numpy(file[key]) for key in file.files if key not in ("options", "meta")}
        shape = self.options["classes"], self.options["g"]
        suffixes = [key.removeprefix("W1") for key in self.arrays if key.startswith("W1")]
        self.networks = {end: Network(self.arrays["W1" + end], self.arrays["W2" + end], *shape) for end in suffixes}

    def __getitem__(self, key: str) -> Tensor:
        value = self.arrays[key]
        by_row = not key.startswith(("W", "grad")) and value.shape[:1] == self.arrays["x0"].shape[:1]
        return value if self.rows is None or not by_row else value[self.rows]

    def get(self, key: str) -> Tensor | None:
        """Return the array, or None where the file has none."""
        return self[key] if key in self.arrays else None

    @property
    def net(self) -> Network:
        """Return the student."""
        return self.networks[""]

    def other(self, suffix: str) -> Network | None:
        """Return another network, by the suffix of its weights; None where the file has none."""
        return self.networks.get(suffix)

    @property
    def factor(self) -> float:
        """Return what our loss is multiplied by to be the official one."""
        return float(self.options["factor"])

    @property
    def path(self) -> Path:
        """Return the path with the file's numbers."""
        numbers = {"edm": ("sigma_min", "sigma_max", "rho"), "trig": ("sigma_data",)}
        taken = numbers.get(self.options["path"], ("sigma",) if "sigma" in self.options else ())
        return paths.get(self.options["path"], **{name: self.options[name] for name in taken})

    def single_rows(self) -> list[Golden]:
        """Yield the same file, one row at a time; networks aren't shared."""
        return [Golden(self.name, [row]) for row in range(len(self.arrays["x0"]))]


Loss = Callable[[Golden, Net], Tensor]  # loss(file, student) -> a scalar


def off(ours: Tensor | float, official: Tensor) -> float:
    """Return the norm of the difference over that of the official value."""
    a = torch.as_tensor(ours, dtype=torch.float64).detach()
    assert a.shape == official.shape, f"{tuple(a.shape)} for {tuple(official.shape)}"
    return ((a - official).norm() / official.norm()).item()


def agree(ours: Tensor | float, official: Tensor, what: str) -> None:
    """Fail unless the two agree to the tolerance."""
    found = off(ours, official)
    assert found < TOLERANCE, f"{what}: off by {found:.1e}, expected less than {TOLERANCE:g}"


def agree_in_gradient(loss: Tensor, case: Golden, what: str = "gradient", term: str = "", ends: Any = ("",)) -> None:
    """Fail unless the official gradient is the loss's, times the factor, by the weights of the networks `ends`."""
    for end in ends:
        net = case.networks[end]
        found = torch.autograd.grad(loss, [net.w1, net.w2], retain_graph=True)
        for weight, value in zip(("W1", "W2"), found, strict=True):
            agree(case.factor * value, case[f"grad_{weight}{end}{term}"], f"{what} by {weight}{end}")


def agree_in_loss(case: Golden, loss: Loss, rows: str = "loss_rows", ends: Any = ("",)) -> None:
    """Fail unless loss, gradient and the loss of each row by itself are the official ones."""
    whole = loss(case, case.net)
    agree(case.factor * whole, case["loss"], "loss")
    agree_in_gradient(whole, case, ends=ends)
    single = torch.stack([loss(one, one.net).detach() for one in case.single_rows()])
    agree(case.factor * single, case.arrays[rows], rows)


def agree_in_pull(case: Golden, loss: Loss, distance: Tensor, towards: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Fail unless each row's loss pulls the student's output along `distance` (B, ...), prediction less target.

    A loss by a detached target knows it in this way alone. The student gets an offset, and the loss of a row a gradient
    by it, whose direction counts: the loss's own value says how far.

    Args:
        towards: towards(t, s) -> (B,): 1 or -1 by how the prediction moves with the student's output in a call at
            (t, s), 0 in calls that are another term's.
    """
    for row, one in enumerate(case.single_rows()):
        offset = torch.zeros(distance[row].shape, dtype=torch.float64, requires_grad=True)
        pull = torch.autograd.grad(loss(one, offset_net(one.net, offset, towards)), offset)[0]
        agree(pull / pull.norm(), distance[row] / distance[row].norm(), f"row {row}: direction from the target")


def offset_net(net: Net, offset: Tensor, towards: Callable[[Tensor, Tensor], Tensor]) -> Net:
    """Return the network plus an offset, times what `towards` says of a call."""

    def moved(x: Tensor, t: Tensor, s: Tensor, *rest: Any, **named: Any) -> Tensor:
        return net(x, t, s, *rest, **named) + towards(t, s)[:, None] * offset

    return moved


def always(t: Tensor, s: Tensor) -> Tensor:
    """Say that every call of the student makes the prediction."""
    return torch.ones_like(t)


def backwards(t: Tensor, s: Tensor) -> Tensor:
    """Say that every call makes it, and that it is a jump x - (t - s) u."""
    return -torch.ones_like(t)


def to_data(t: Tensor, s: Tensor) -> Tensor:
    """Say that the calls that go to s = 0 make it."""
    return (s == 0).to(t)
