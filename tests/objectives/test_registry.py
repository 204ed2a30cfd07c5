"""Check the table of methods: complete, true to the functions, and refused by name where something is missing."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import objectives
from fastdistill.objectives import OBJECTIVES, Autoguidance, Guidance, Objective
from fastdistill.objectives.registry import collect
from fastdistill.paths import EDM, ICFM, PATHS, VE
from fastdistill.samplers import SAMPLERS
from tests.objectives.cases import ROWS, WIDTH, SmallNet, draw_times
from tests.objectives.collected import FROM_DATA, TAUGHT

REGRESSION = [name for name, row in OBJECTIVES.items() if row.identity not in ("moment", "score")]
ONE_LABEL = torch.zeros(ROWS, dtype=torch.int64)


def run(name: str, **keywords: Any) -> tuple[Tensor, dict[str, Any]]:
    """Run the method on random rows, with what it needs unless it is among the keywords."""
    objective, times = objectives.get(name), draw_times()
    for key in [key for key in times if key in keywords]:
        times[key] = keywords.pop(key)
    x0, x1 = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
    needed: dict[str, Any] = {"teacher": SmallNet(), "score_gradient": torch.zeros_like(x1)}
    given = {key: needed[key] for key in objective.needs} | keywords
    return objective.function(given.pop("net", SmallNet()), x0, x1, *(times[key] for key in objective.times), **given)


def test_every_regression_method_has_its_gates() -> None:
    """Check the tables over which tier 0 and tier 1 are parametrised."""
    assert set(REGRESSION) == set(TAUGHT) | set(FROM_DATA)
    assert {name for name in REGRESSION if "teacher" in OBJECTIVES[name].takes} == set(TAUGHT)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_row_agrees_with_its_function(name: str) -> None:
    row = OBJECTIVES[name]
    parameters = inspect.signature(row.function).parameters
    assert list(parameters)[: 3 + len(row.times)] == ["net", "x0", "x1", *row.times]
    assert row.takes == {key for key, item in parameters.items() if item.kind is item.KEYWORD_ONLY}
    assert row.needs <= row.takes
    assert all(parameters[key].default == value for key, value in row.options.items())
    assert row.sampler in SAMPLERS
    assert row.paths is None or row.paths <= set(PATHS)
    assert all("arXiv" in source for source in row.sources)
    assert (row.tangent.startswith("none")) == ("jvp" not in row.takes) or name == "alpha_flow"
    assert "Source:" in (row.function.__doc__ or "") and row.formula and "rows" in row.reduction


@pytest.mark.parametrize("name", REGRESSION)
def test_metrics_are_detached_scalars_and_rows(name: str) -> None:
    loss, metrics = run(name)
    rows = metrics.pop("rows")
    metrics.pop("terms", None)
    assert loss.ndim == 0 and loss.requires_grad
    assert {"loss", "raw_error"} <= set(metrics)
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    assert {"t", "s", "raw_error"} <= set(rows)
    assert all(value.shape == (ROWS,) and not value.requires_grad for value in rows.values())
    torch.testing.assert_close(rows["raw_error"].mean(), metrics["raw_error"])
    assert ("tangent_norm" in metrics) == ("jvp" in OBJECTIVES[name].takes and name != "alpha_flow")
    assert ("distinct_share" in metrics) == ("distinct_rows" in OBJECTIVES[name].takes and name != "alpha_flow")


@pytest.mark.parametrize("name", [name for name in REGRESSION if "distinct_rows" in OBJECTIVES[name].takes])
def test_counted_rows_agree_with_found_rows(name: str) -> None:
    """Check rows sorted so that those with s != t lead, as the laws of times arrange them."""
    times = draw_times()
    order = (times["s"] == times["t"]).to(torch.int8).argsort(stable=True)
    net, keywords = SmallNet(), {key: value[order] for key, value in times.items() if key in OBJECTIVES[name].times}
    losses = []
    for count in (None, ROWS * 3 // 4):
        torch.manual_seed(7)
        losses.append(run(name, net=net, distinct_rows=count, **keywords)[0])
    torch.testing.assert_close(*losses, rtol=1e-13, atol=0)
    with pytest.raises(ValueError, match=r"^distinct_rows: .* \[0, 48\], got 49"):
        run(name, distinct_rows=ROWS + 1, **keywords | ({"alpha": 0.0} if name == "alpha_flow" else {}))


@pytest.mark.parametrize("name", [name for name in REGRESSION if "weighting" in OBJECTIVES[name].takes])
def test_learned_weight_enters_the_loss(name: str) -> None:
    """Check that a constant log-variance a turns a loss into exp(-a) loss + a; the score term is not weighed."""
    net, seeds, losses = SmallNet(), [], []
    for weighting in (None, lambda t, s: torch.full_like(t, 0.7)):
        torch.manual_seed(7)
        loss, metrics = run(name, net=net, weighting=weighting)
        seeds.append(metrics["raw_error"])
        losses.append(loss - metrics.get("anchor_error", 0))
    torch.testing.assert_close(losses[1], losses[0] * torch.tensor(-0.7, dtype=torch.float64).exp() + 0.7)
    torch.testing.assert_close(*seeds)
    with pytest.raises(ValueError, match=r"^weighting: expected it to return shape \(48,\), got \(48, 1\)"):
        run(name, weighting=lambda t, s: t[:, None])


@pytest.mark.parametrize("name", [name for name in REGRESSION if "target" in OBJECTIVES[name].takes])
def test_target_stands_on_the_stopped_side(name: str) -> None:
    """Check that another target changes the loss and gets no gradient, and that the network itself changes nothing."""
    net, other, losses = SmallNet(), SmallNet(), []
    options: dict[str, Any] = {"alpha": 0.5} if name == "alpha_flow" else {}
    for target in (None, net, other):
        torch.manual_seed(7)
        losses.append(run(name, net=net, target=target, **options)[0])
    losses[2].backward()
    assert all(weight.grad is None for weight in other.parameters())
    assert losses[0] == losses[1]
    assert abs(losses[0] - losses[2]) > 1e-5


# Refusals, by the argument's name


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("meanflow", {"s": torch.ones(ROWS)}, r"s: expected times in \[0, t\], got 1"),
    ("ayf_emd", {"teacher": None}, "teacher: expected a network, which ayf_emd needs, got None"),
    ("ayf_lmd", {"teacher": None}, "teacher: expected a network, which ayf_lmd needs, got None"),
    ("rcm", {"score_gradient": None}, "score_gradient: expected a tensor like x1 .*, which rcm needs, got None"),
    ("rcm", {"score_gradient": torch.zeros(1)}, r"score_gradient: expected shape \(48, 3\), got \(1,\)"),
    ("rcm", {"score_weight": -1.0}, "score_weight: expected a finite number >= 0, got -1"),
    ("consistency", {"r": torch.ones(ROWS)}, r"r: expected times in \[0, t\], got 1"),
    ("consistency", {"distance": "l1"}, "distance: expected one of l2, huber, lpips, got 'l1'"),
    ("consistency", {"distance": "lpips"}, "perceptual: expected a network .*, which distance='lpips' needs"),
    ("consistency", {"teacher": SmallNet(), "solver": "rk4"}, "solver: expected one of heun, euler, .*, got 'rk4'"),
    ("consistency", {"guidance": Autoguidance(2.0)}, "guidance: expected a teacher with it"),
    ("consistency", {"path": ICFM(0.1)}, "path: consistency training expects states that share .*; give a teacher"),
    ("ect", {"path": ICFM(0.1)}, "path: ect expects states that share their noise, .*; use path 'edm' or 'linear'"),
    ("ect", {"t": torch.ones(ROWS, dtype=torch.float64)}, "t: expected times at which the path holds some data"),
    ("ect", {"c": 0.0}, "c: expected a finite number > 0, got 0"),
    ("scm", {"t": torch.zeros(ROWS)}, r"t: expected times in \(0, 1\], got 0"),
    ("scm", {"path": EDM()}, "path: parameterization='velocity' expects x_0 to be the data, got EDM .*; use 'average'"),
    ("rcm", {"path": VE()}, "path: parameterization='velocity' expects x_0 to be the data, got VE"),
    ("scm", {"parameterization": "x0"}, "parameterization: expected one of velocity, average, got 'x0'"),
    ("scm", {"warmup": 1.5}, r"warmup: expected a number in \[0, 1\], got 1.5"),
    ("ayf_emd", {"warmup": -0.1}, r"warmup: expected a number in \[0, 1\], got -0.1"),
    ("ayf_lmd", {"warmup": float("nan")}, r"warmup: expected a number in \[0, 1\], got nan"),
    ("alpha_flow", {"alpha": 2.0}, r"alpha: expected a number in \[0, 1\], got 2"),
    ("facm", {"clamp": 0.0}, "clamp: expected a finite number > 0, got 0"),
    ("shortcut", {"delta": torch.ones(ROWS, dtype=torch.float64) * 0.09}, r"delta: expected times in \[0, t/2\]"),
    ("psd", {"midpoint": 1.0}, r"midpoint: expected in \(0, 1\), got 1"),
    ("psd", {"midpoint": torch.ones(3)}, r"midpoint: expected a number or shape \(48,\), got \(3,\)"),
    ("flow_matching", {"weight": "snr"}, "weight: expected one of velocity, data, noise, min_snr, edm, got 'snr'"),
    ("tvm", {"guidance": Guidance(2.0, null=3)}, "y: expected labels for guidance, got None"),
    ("lsd", {"guidance": Autoguidance(2.0)}, "teacher: expected a network for autoguidance, got None"),
    (
        "esd",
        {"teacher": SmallNet(), "guidance": Autoguidance(2.0)},
        "weak_teacher: expected a network for autoguidance",
    ),
    ("meanflow", {"weak_teacher": SmallNet()}, r"weak_teacher: expected guidance=Autoguidance\(...\) with it"),
]


@pytest.mark.parametrize(("name", "keywords", "message"), BAD, ids=[f"{name}-{'-'.join(k)}" for name, k, _ in BAD])
def test_bad_input_is_refused_by_name(name: str, keywords: dict[str, Any], message: str) -> None:
    keywords = dict(keywords)
    if name == "shortcut":
        keywords["t"] = torch.full((ROWS,), 0.1, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"^{message}"):
        run(name, **keywords)


@pytest.mark.parametrize("warmup", [torch.tensor(0.5), torch.ones(ROWS), "0.5", True])
def test_a_warmup_that_is_no_number_is_refused(warmup: Any) -> None:
    for name in ("scm", "ayf_emd", "ayf_lmd", "rcm"):
        with pytest.raises(TypeError, match=r"^warmup: expected a number in \[0, 1\], got"):
            run(name, warmup=warmup)


@pytest.mark.parametrize("name", [name for name in REGRESSION if "guidance" in OBJECTIVES[name].takes])
def test_guidance_without_labels_is_refused_by_every_method(name: str) -> None:
    with pytest.raises(ValueError, match=r"^y: expected labels for guidance, got None"):
        run(name, teacher=SmallNet(), guidance=Guidance(2.0, null=3))


def test_an_unknown_objective_or_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^objective: expected one of flow_matching, .*, got 'mean_flow'"):
        objectives.get("mean_flow")
    texts: dict[str, Any] = {"tangent": "", "formula": "", "sources": (), "reduction": "", "sampler": "euler"}
    with pytest.raises(ValueError, match=r"^identity: expected one of fm, .*, got 'other'"):
        Objective(objectives.meanflow, "other", ("t", "s"), **texts)
    with pytest.raises(ValueError, match=r"^needs: expected keywords of meanflow, got fake"):
        Objective(objectives.meanflow, "eulerian", ("t", "s"), **texts, needs=frozenset({"fake"}))
    with pytest.raises(ValueError, match=r"^anywhere: expected an option of meanflow, got 'parameterization'"):
        Objective(objectives.meanflow, "eulerian", ("t", "s"), **texts, anywhere=("parameterization", "average"))


def test_a_file_that_holds_no_whole_method_is_refused() -> None:
    row = OBJECTIVES["esd"]
    bad: list[tuple[Any, str]] = [
        (objectives.esd, "expected METHOD to be an Objective with settings, got <function"),
        (replace(row, settings=None), "expected METHOD to be an Objective with settings, got Objective"),
        (OBJECTIVES["psd"], "expected METHOD of a function esd, got psd"),
        ((row, row), "expected METHOD of a function esd, got esd"),
    ]
    assert list(collect({"esd": row})) == ["esd"]
    for held, said in bad:
        with pytest.raises(ImportError, match=rf"^fastdistill\.objectives\.esd: {said}"):
            collect({"esd": held})
