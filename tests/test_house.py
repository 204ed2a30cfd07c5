"""Check that the counts that say whether the house works stay within limits; `house_counts.py` prints them."""

from __future__ import annotations

import pytest

from tests import house_counts
from tests.house_counts import calls_to_the_launch, wide_functions


@pytest.mark.parametrize("requires_grad", [False, True], ids=["without a graph", "with a graph"])
def test_a_call_reaches_its_launch_in_few_python_calls(requires_grad: bool) -> None:
    """Check attention, from the public function; with a graph, autograd's function is a file more."""
    calls = calls_to_the_launch(requires_grad)
    assert calls.total <= 120, calls
    assert len(calls.files) <= (8 if requires_grad else 7), calls
    assert "kernels/attention.py" in calls.files


def test_no_function_wants_more_than_ten_arguments() -> None:
    assert wide_functions() == {}


def test_the_counts_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    house_counts.main()
    assert "Python calls from the public attention to the launch, without a graph: " in capsys.readouterr().out
