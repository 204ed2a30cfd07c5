"""Steps of a run as methods take them: warm-ups, stages, grids, and the times of a distillation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdistill.data import Batch, generator_at
from fastdistill.objectives.settings import Context, ramp
from fastdistill.paths import LINEAR
from fastdistill.times import LogNormalLevel, ect_times
from fastdistill.train.methods import METHODS

STEPS = 1000


def at(step: int, steps: int = STEPS) -> Context:
    """Return eight rows in one step of a run, without a network."""
    x = torch.zeros(8, 2)
    batch = Batch(x, x, None, 0)
    return Context(None, batch, generator_at(0, "times", step), 0, step, steps, LINEAR)  # type: ignore[arg-type]


def method(name: str, **fields: Any) -> Any:
    """Return the settings of a method."""
    return METHODS[name](name=name, **fields)


def test_a_ramp_grows_linearly_and_stays() -> None:
    """Check that it goes from 0 to its limit, which it has at once where there is no warm-up."""
    assert [ramp(at(step), 200) for step in (0, 50, 200, 900)] == [0.0, 0.25, 1.0, 1.0]
    assert [ramp(at(step), 200, 0.99) for step in (0, 100, 198, 200)] == [0.0, 0.5, 0.99, 0.99]
    assert ramp(at(0), 0) == 1.0 and ramp(at(0), 0, 0.99) == 0.99


@pytest.mark.parametrize(("name", "limit"), [("scm", 1.0), ("ayf_emd", 0.99), ("ayf_lmd", 0.99)])
def test_the_tangent_enters_over_the_warm_up(name: str, limit: float) -> None:
    """Check that it is the objective's keyword, by `tangent_warmup` steps."""
    settings = method(name, tangent_warmup=400)
    assert [settings.keywords(at(step))["warmup"] for step in (0, 100, 400, 999)] == [0.0, 0.25, limit, limit]


def test_ect_draws_nearer_from_stage_to_stage() -> None:
    """Check stage k's own times, and that the gap of levels is ever smaller."""
    settings, gaps = method("ect", stages=4), []
    law = LogNormalLevel(LINEAR, settings.levels.mean, settings.levels.std)
    for stage, step in enumerate((0, 250, 500, 999)):
        t, r = settings.draw_times(at(step))
        expected = ect_times(8, stage, q=settings.q, law=law, generator=generator_at(0, "times", step))
        assert torch.equal(t, expected[0]) and torch.equal(r, expected[1])
        gaps.append(float((t - r).div(t).mean()))
    assert gaps[-1] < 0.5 * gaps[0]


def test_the_grid_of_consistency_grows() -> None:
    """Check that it doubles for iCT, grows by a root for CT, and is all there at once where it is fixed."""
    points = {grid: [method("consistency", grid=grid, intervals=(10, 80)).points(at(step)) for step in (0, 500, 999)]
              for grid in ("ict", "ct", "fixed")}  # fmt: skip
    assert points["ict"] == [11, 41, 81] and points["fixed"] == [81, 81, 81]
    assert points["ct"][0] < points["ct"][1] < points["ct"][2] <= 82


def test_alpha_flow_goes_from_flow_matching_to_meanflow() -> None:
    """Check 1 at the start, a half half-way, 0 at the end."""
    settings = method("alpha_flow")
    assert [settings.alpha(at(step)) for step in (0, 500, 1000)] == [1.0, 0.5, 0.0]


def test_a_distillation_trains_at_t_1_alone() -> None:
    """Check that the rounds of ReFlow before it train at all times."""
    (times,) = method("reflow", distil=True, sample_steps=1).draw_times(at(0))
    assert torch.equal(times, torch.ones(8))
    (times,) = method("reflow").draw_times(at(0))
    assert len(times.unique()) == 8 and times.max() < 1
