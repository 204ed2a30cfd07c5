"""Run the same networks without us: none of our ops runs inside, and the numbers agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdistill import models, ops
from fastdistill.benchmarks.ops import torch_functions
from fastdistill.benchmarks.ops.torch_functions import DECOMPOSED, OWN, difference, instead_of_ours


class Recorder(TorchDispatchMode):
    """Record the namespaces of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.namespaces.add(func.namespace)
        return func(*args, **(kwargs or {}))


def evaluate(jvp: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output of a small DiT and its total derivative."""
    torch.manual_seed(0)
    net = models.create("dit-digits", depth=2).double()
    for parameter in net.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    x, v = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64)
    t, s = torch.rand(2, 2, dtype=torch.float64).sort(0, descending=True)[0]
    out: tuple[torch.Tensor, torch.Tensor] = jvp(lambda x, t, s: net(x, t, s), (x, t, s), (v, 1.0, None))
    return out


@pytest.mark.parametrize("functions", [OWN, DECOMPOSED], ids=["own", "decomposed"])
def test_no_op_of_ours_runs_inside(functions: dict[str, Any]) -> None:
    """Check that none of our ops runs, by name or through a module that kept one, and that all are back afterwards."""
    from fastdistill import jvp

    before = dict(vars(ops))
    with Recorder() as recorder:
        ours = evaluate(jvp)
    assert "fastdistill" in recorder.namespaces
    with instead_of_ours(functions), Recorder() as recorder:
        theirs = (
            evaluate(torch_functions.jvp)
            if functions is DECOMPOSED
            else _without_attention_tangents(torch_functions.jvp)
        )
    assert "fastdistill" not in recorder.namespaces
    assert dict(vars(ops)) == before
    torch.testing.assert_close(theirs, tuple(x.detach() for x in ours), rtol=1e-10, atol=1e-10)


def _without_attention_tangents(jvp: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        return evaluate(jvp)


def test_an_op_without_a_twin_is_refused() -> None:
    """Check that an op isn't run by our code under a peer's name."""
    with (
        instead_of_ours(OWN),
        pytest.raises(RuntimeError, match=r"fastdistill\.ops\.varlen_attention has no plain twin"),
    ):
        ops.varlen_attention()  # type: ignore[call-arg]


def test_differences_are_near_the_derivative() -> None:
    """Check differences in float64, where they are accurate, and that they broadcast numbers as the driver does."""
    with instead_of_ours(DECOMPOSED):
        (u, du), (v, dv) = evaluate(torch_functions.jvp), evaluate(difference)
    torch.testing.assert_close(u, v)
    torch.testing.assert_close(du, dv, rtol=1e-5, atol=1e-6)
