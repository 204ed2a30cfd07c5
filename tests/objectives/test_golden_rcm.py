"""Check rCM against numbers of its official code: both terms, the warm-up, and the balance of the preset."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import objectives
from fastdistill.objectives import adapters, dmd_gradient
from fastdistill.objectives.settings import Context
from fastdistill.paths import LINEAR, Path
from fastdistill.samplers import Net
from fastdistill.train.methods import METHODS
from tests.objectives.golden_cases import NAMES, Golden, agree, agree_in_gradient, agree_in_loss, off


@pytest.fixture(autouse=True)
def float64() -> None:
    """Set the default dtype of these tests, restored by the suite's own fixture."""
    torch.set_default_dtype(torch.float64)


def on_circle(net: Net, path: Path, to: Callable[[Tensor, Tensor], Tensor]) -> Net:
    """Return rCM's networks on the linear path, with a time and a scale of TrigFlow's; `to` says to which end."""
    carried = adapters.on_path(lambda x, t, s, **rest: net(x, t, s), LINEAR, path)
    return lambda x, t, s, **rest: carried(x, t, to(t, s))


def to_end(t: Tensor, s: Tensor) -> Tensor:
    return s


def to_itself(t: Tensor, s: Tensor) -> Tensor:
    return t


def rcm_loss(one: Golden, net: Net, weight: float | None = None) -> tuple[Tensor, dict[str, Any]]:
    """Return the loss at the file's weight of the score, or another, and its metrics."""
    path, options = one.path, one.options
    teacher = on_circle(one.networks["_teacher"], path, to_itself)
    return objectives.rcm(
        on_circle(net, path, to_end), one["x0"], one["x1"], one["t"], path=path, teacher=teacher, c=options["c"],
        warmup=options["warmup"], score_gradient=lambda samples, y: score(one, samples),
        score_weight=options["score_weight"] if weight is None else weight,
    )  # fmt: skip


def score(one: Golden, samples: Tensor) -> Tensor:
    """Return DMD's direction at the file's noise and levels."""
    teacher, fake = (on_circle(one.networks[end], one.path, to_itself) for end in ("_teacher", "_fake"))
    return dmd_gradient(samples, one["noise"], one["tau"], teacher=teacher, fake=fake, path=one.path)


@pytest.mark.parametrize("case", [name for name in NAMES if name.startswith("rcm")])
def test_rcm_s_consistency_with_its_own_warm_up(case: str) -> None:
    """Check it by its terms; at r = 1 it is sCM's, and at any other r it isn't."""
    golden = Golden(case)

    def consistency(one: Golden, net: Net) -> Tensor:
        return rcm_loss(one, net, weight=0.0)[0]

    loss = consistency(golden, golden.net)
    agree(golden.factor * loss, golden["loss_scm"], "loss")
    agree_in_gradient(loss, golden, term="_scm")
    rows = torch.stack([consistency(one, one.net).detach() for one in golden.single_rows()])
    agree(golden.factor * rows, golden["loss_rows_scm"], "loss_rows_scm")
    teacher = on_circle(golden.networks["_teacher"], golden.path, to_itself)
    plain, _ = objectives.scm(
        on_circle(golden.net, golden.path, to_end), golden["x0"], golden["x1"], golden["t"], path=golden.path,
        teacher=teacher, c=golden.options["c"], warmup=golden.options["warmup"],
    )  # fmt: skip
    assert (off(golden.factor * plain, golden["loss_scm"]) < 1e-8) == (golden.options["warmup"] == 1)


def test_rcm() -> None:
    """Check both terms, and their sum at the official weights."""
    golden = Golden("rcm")
    agree_in_loss(golden, lambda one, net: rcm_loss(one, net)[0])
    loss, metrics = rcm_loss(golden, golden.net)
    one = torch.ones_like(golden["t"])
    student = on_circle(golden.net, golden.path, to_end)
    samples = golden["x1"] - student(golden["x1"], one, 0 * one)
    agree(samples, golden["samples"], "samples")
    agree(score(golden, samples.detach()), golden["delta"], "delta")
    agree(golden.factor * metrics["terms"]["score"], golden["loss_dmd"], "score's loss")
    agree_in_gradient(metrics["terms"]["score"], golden, term="_dmd")
    agree(metrics["loss"], loss.detach(), "metric")


def rcm_ratio(golden: Golden, **changes: Any) -> float:
    """Return the norm of the score's gradient over that of consistency's, in the preset with these settings.

    A learned weight stands at its optimum, the logarithm of each row's error.
    """

    class Preset(METHODS["rcm"]):  # type: ignore[misc]
        """Preset at the file's times and noise."""

        def draw_times(self, context: Context) -> tuple[Tensor, ...]:
            return (golden["t"],)

        def score_gradient(self, context: Context, samples: Tensor, y: Tensor | None) -> Tensor:
            return score(golden, samples)

    preset, path = Preset(**changes), golden.path
    optimum = (golden["loss_rows_scm"] / golden.factor).log()
    late: Any = {"step": 10**6, "steps": 10**6, "seed": 0, "generator": torch.Generator()}
    context = Context(
        net=on_circle(golden.net, path, to_end), path=path, teacher=on_circle(golden.networks["_teacher"], path,
        to_itself), batch=SimpleNamespace(x0=golden["x0"], x1=golden["x1"], y=None, null=0),
        weighting=(lambda t, s: optimum) if preset.learned_weight else None, critic=SimpleNamespace(fake=None), **late,
    )  # type: ignore[arg-type]  # fmt: skip
    terms = preset.loss(context)[1]["terms"]
    weights = [golden.net.w1, golden.net.w2]
    norms = {
        name: torch.cat([g.flatten() for g in torch.autograd.grad(term, weights, retain_graph=True)]).norm()
        for name, term in terms.items()
    }
    return (norms["score"] / norms["distillation"]).item()


def test_rcm_s_preset_gives_the_score_its_official_share_of_the_gradient() -> None:
    """Check it to one per cent; a learned weight takes most of it away, as does the former default's weight."""
    golden = Golden("rcm")
    assert rcm_ratio(golden) == pytest.approx(golden["ratio"].item(), rel=1e-2)
    assert rcm_ratio(golden, learned_weight=True, score_weight=0.01) < 0.1 * golden["ratio"].item()
