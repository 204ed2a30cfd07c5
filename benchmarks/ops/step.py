"""Define the benchmark of a training step of each objective: the loss and its gradient, without the optimiser."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdistill import models, objectives
from fastdistill.benchmarks.ops import torch_functions
from fastdistill.benchmarks.ops.block import ATTENTIONS, LINEARS
from fastdistill.benchmarks.ops.common_providers import DIFFERENCES, JVP, WRITTEN_OUT
from fastdistill.benchmarks.ops.timed_op import FLOOR, OURS, PEER, Cost, Provider, Run, Tensors, TimedCase

# The share of samples with s != t, where an objective allows a split; MeanFlow takes this share on ImageNet.
DISTINCT_SHARE = 0.25
OPTIONS = {"alpha_flow": {"alpha": 0.0}}  # At this value the objective takes a tangent.
SMALL_DEPTH, SMALL_BATCH = 2, 4  # These are for the parity gate; the width stays.
Jvp = Callable[..., Any]


@dataclass(frozen=True)
class Batch:
    """Hold a network, a frozen network to learn from, and the data of a step.

    For objectives that split the batch, the first `distinct` samples have s < t and the others s = t. In s_far all
    samples have s_far < t.
    """

    net: nn.Module
    teacher: nn.Module
    x0: Tensor
    x1: Tensor
    t: Tensor
    s: Tensor
    s_far: Tensor
    y: Tensor
    distinct: int

    def double(self) -> Batch:
        """Return the batch in float64."""
        net, teacher = (copy.deepcopy(net).double() for net in (self.net, self.teacher))
        x0, x1, t, s, s_far = (x.double() for x in (self.x0, self.x1, self.t, self.s, self.s_far))
        return Batch(net, teacher, x0, x1, t, s, s_far, self.y, self.distinct)


def loss_of(name: str, batch: Batch, jvp: Jvp | None) -> Tensor:
    """Compute the loss of an objective by its name, with all its arguments; x0 stands in for a score's direction."""
    objective = objectives.get(name)
    splits = "distinct_rows" in objective.takes
    times = {"t": batch.t, "s": batch.s if splits else batch.s_far}
    needed = {"teacher": batch.teacher, "fake": batch.teacher, "score_gradient": batch.x0}
    options: dict[str, Any] = {"y": batch.y, **{key: needed[key] for key in objective.needs}, **OPTIONS.get(name, {})}
    if splits:
        options["distinct_rows"] = batch.distinct
    if jvp is not None and takes_jvp(name):
        options["jvp"] = jvp
    return objective.function(batch.net, batch.x0, batch.x1, *(times[key] for key in objective.times), **options)[0]


def takes_jvp(name: str) -> bool:
    """Return whether an objective differentiates the network in forward mode."""
    return "jvp" in objectives.get(name).takes


def measured_objectives() -> list[str]:
    """Return the objectives with a tangent, and flow matching; a step of the others is only some plain passes."""
    return [name for name in objectives.OBJECTIVES if takes_jvp(name) or name == "flow_matching"]


def step(case: TimedCase, batch: Batch, jvp: Jvp | None, functions: Any = None, *, context: Any = nullcontext) -> Run:
    """Return a run of one step, on our ops or on the given functions, under autocast if the case has 16 bits."""
    parameters = tuple(batch.net.parameters())
    name = str(case.shape["objective"])
    autocast = case.torch_dtype.itemsize == 2 and batch.x0.dtype == torch.float32

    def run() -> Tensors:
        with (
            _surroundings(functions, context),
            torch.autocast(batch.x0.device.type, case.torch_dtype, enabled=autocast),
        ):
            loss = loss_of(name, batch, jvp)
        with _surroundings(functions, context):
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        zeros = (torch.zeros_like(x) if g is None else g for x, g in zip(parameters, gradients, strict=True))
        return (loss.detach(), *zeros)

    return run


@contextmanager
def _surroundings(functions: Any, context: Any) -> Iterator[None]:
    with torch_functions.instead_of_ours(functions) if functions else nullcontext(), context():
        yield


def _math() -> Any:
    return sdpa_kernel(SDPBackend.MATH)


class StepOp:
    """Implement `Op` for a preset network, a batch of images, and the objective that the case names."""

    name = "step"

    def data(self, case: TimedCase, device: torch.device) -> Batch:
        """Draw a network and a batch; parameters leave the zeros of adaLN-Zero, where every tangent is trivial."""
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), device:
            torch.manual_seed(0)
            overrides = {key: case.size(key) for key in ("depth", "width", "heads") if key in case.shape}
            net = models.create(str(case.shape["preset"]), **overrides)
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
            b, side = case.size("batch"), case.size("px")
            config: Any = net.config
            x0, x1 = torch.randn(2, b, config["channels"], side, side).unbind(0)
            t = torch.rand(b) * 0.8 + 0.1
            s_far = t * torch.rand(b)
            y = torch.randint(config["num_classes"], (b,))
        distinct = max(1, round(DISTINCT_SHARE * b))
        s = torch.cat([s_far[:distinct], t[distinct:]])
        return Batch(net, copy.deepcopy(net).requires_grad_(False), x0, x1, t, s, s_far, y, distinct)

    def exact(self, data: Batch) -> Batch:
        """Return the batch in float64."""
        return data.double()

    def plain(self, case: TimedCase, data: Batch) -> Run:
        """Return a run of the step on decomposed ops, by `torch.func.jvp`."""
        return step(case, data, torch_functions.jvp, torch_functions.DECOMPOSED)

    def named(self, case: TimedCase, results: Tensors) -> dict[str, Tensor]:
        """Return the loss and one gradient of all parameters together.

        In some parameters alone, rounding is as large as the gradient.
        """
        return {"loss": results[0], "dtheta": torch.cat([x.flatten() for x in results[1:]])}

    def part(self, data: Batch, results: Tensors) -> None:
        """Return None, because a gradient depends on every sample."""

    def small(self, case: TimedCase) -> TimedCase:
        """Shrink the case to two blocks, a smaller image, and few images."""
        side = case.size("px") if case.quick else min(16, case.size("px"))
        return case.resized(batch=min(SMALL_BATCH, case.size("batch")), depth=SMALL_DEPTH, px=side)

    def cost(self, case: TimedCase, data: Batch, kind: str) -> Cost:
        """Return the cost of the blocks where the objective's passes are known: for flow matching and MeanFlow."""
        config: Any = data.net.config
        b, n = len(data.t), (case.size("px") // config["patch_size"]) ** 2
        linears, attentions = 24.0 * config["width"] ** 2 * n, 4.0 * config["width"] * n**2

        def flops(*passes: int) -> float:
            return config["depth"] * sum(LINEARS[i] * linears + ATTENTIONS[i] * attentions for i in passes)

        name, plain_step = case.shape["objective"], flops(0, 2)
        with_tangent = flops(1, 2)
        if kind == FLOOR or name == "flow_matching":
            return Cost(b * plain_step, None)
        if name == "meanflow":
            return Cost(data.distinct * with_tangent + (b - data.distinct) * plain_step, None)
        return Cost(None, None)

    def providers(self, device: torch.device) -> list[Provider]:
        """Return ours, the same network on PyTorch's ops, and a plain flow-matching step as the floor."""

        def none_taken(case: TimedCase) -> str | None:
            takes = takes_jvp(str(case.shape["objective"]))
            return None if takes else "the objective takes no tangent: see the floor"

        def refuses_compiled(case: TimedCase) -> str | None:
            return "left out by --quick: Inductor takes minutes" if case.quick else none_taken(case)

        def by(jvp: Jvp, functions: Any, context: Any = nullcontext) -> Callable[[TimedCase, Batch], Run]:
            return lambda case, data: step(case, data, jvp, functions, context=context)

        def by_compiled(case: TimedCase, data: Batch) -> Run:
            torch.compiler.reset()
            compiled = torch.compile(torch_functions.jvp, dynamic=False)
            return step(case, data, compiled, torch_functions.DECOMPOSED)

        def flow_matching(functions: Any) -> Callable[[TimedCase, Batch], Run]:
            return lambda case, data: step(
                replace(case, shape={**case.shape, "objective": "flow_matching"}), data, None, functions
            )

        return [
            Provider("fastdistill", OURS, lambda case, data: step(case, data, None)),
            Provider(f"{JVP}, math", PEER, by(torch_functions.jvp, torch_functions.OWN, _math), refuses=none_taken),
            Provider(
                WRITTEN_OUT, PEER, by(torch_functions.jvp, torch_functions.WRITTEN_OUT, _math), refuses=none_taken
            ),
            Provider(f"{JVP}, compiled", PEER, by_compiled, refuses=refuses_compiled),
            Provider(DIFFERENCES, PEER, by(torch_functions.difference, torch_functions.OWN), refuses=none_taken),
            Provider(
                "plain flow-matching step",
                FLOOR,
                flow_matching(torch_functions.OWN),
                plain=flow_matching(torch_functions.DECOMPOSED),
            ),
        ]


STEP = StepOp()
