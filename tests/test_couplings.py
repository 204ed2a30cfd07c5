"""Test couplings: the least cost, whichever library finds it, and rows of data that stay where they were."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import Tensor

from fastdistill import couplings, paths
from fastdistill.couplings import optimal_transport

SOLVERS = pytest.mark.parametrize("solver", [None, "pot", "scipy"])


def cost(x0: Tensor, x1: Tensor) -> float:
    return (x0 - x1).square().sum().item()


@SOLVERS
def test_no_other_pairing_costs_less(solver: str | None) -> None:
    """Compare with all 720 orders of six rows."""
    x0, x1 = torch.randn(2, 6, 3)
    same, coupled = optimal_transport(x0, x1, solver)
    assert same is x0
    best = min(cost(x0, x1[list(order)]) for order in itertools.permutations(range(6)))
    assert cost(x0, coupled) == pytest.approx(best)
    assert cost(x0, coupled) < cost(x0, x1)


@SOLVERS
@pytest.mark.parametrize("shape", [(1, 2), (64, 2), (40, 1, 8, 8)])
def test_noise_is_reordered_and_nothing_else(solver: str | None, shape: tuple[int, ...]) -> None:
    """Check that every noise row is used once, bit for bit, and that x0 is the caller's own, to which labels belong."""
    x0, x1 = torch.randn(shape) + 1, torch.randn(shape)
    before = x0.clone()
    same, coupled = optimal_transport(x0, x1, solver)
    assert same is x0
    assert torch.equal(x0, before)
    assert sorted(map(tuple, coupled.flatten(1).tolist())) == sorted(map(tuple, x1.flatten(1).tolist()))
    assert cost(x0, coupled) <= cost(x0, x1)
    assert cost(x0, coupled.roll(1, 0)) >= cost(x0, coupled)


def test_both_libraries_find_one_cost_and_keep_dtype() -> None:
    x0, x1 = torch.randn(2, 128, 5, dtype=torch.bfloat16)
    by_pot, by_scipy = (optimal_transport(x0, x1, solver)[1] for solver in ("pot", "scipy"))
    assert by_pot.dtype == torch.bfloat16
    assert cost(x0.double(), by_pot.double()) == pytest.approx(cost(x0.double(), by_scipy.double()))


def test_on_a_line_the_coupling_sorts() -> None:
    x0, x1 = torch.randn(2, 50, 1)
    coupled = optimal_transport(x0, x1)[1]
    assert torch.equal(coupled[x0.argsort(0)[:, 0]], x1.sort(0).values)


def test_every_path_names_a_coupling_that_exists() -> None:
    assert {path.coupling for path in paths.PATHS.values()} == set(couplings.COUPLINGS)
    x0, x1 = torch.randn(2, 3, 2)
    assert couplings.COUPLINGS["independent"](x0, x1) == (x0, x1)


def test_without_a_library_the_coupling_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x0, x1 = torch.randn(2, 4, 2)
    monkeypatch.setitem(sys.modules, "ot", None)
    assert cost(x0, optimal_transport(x0, x1)[1]) <= cost(x0, x1)
    with pytest.raises(ImportError, match=r"expected POT, which isn't installed: pip install"):
        optimal_transport(x0, x1, "pot")
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"^optimal_transport: expected POT or scipy"):
        optimal_transport(x0, x1)


def test_bad_arguments_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match=r"^x1: expected the shape of x0"):
        optimal_transport(x, x[:3])
    with pytest.raises(ValueError, match=r"^x0, x1: expected finite"):
        optimal_transport(x, x / 0)
    with pytest.raises(ValueError, match=r"^solver: expected one of pot, scipy or None, got 'sinkhorn'"):
        optimal_transport(x, x, "sinkhorn")

    class Splitting:
        @staticmethod
        def linear_sum_assignment(matrix: object) -> tuple[object, object]:
            return None, torch.zeros(4, dtype=torch.int64).numpy()

    monkeypatch.setattr(couplings, "import_module", lambda name: Splitting)
    with pytest.raises(RuntimeError, match=r"^solver scipy: expected a pairing"):
        optimal_transport(x, x, "scipy")
