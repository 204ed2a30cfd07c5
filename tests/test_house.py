"""Check that the counts that say whether the house works stay within limits; `house_counts.py` prints them."""

from __future__ import annotations

import ast

import pytest

from tests import house_counts
from tests.house_counts import calls_to_the_launch, import_circles, imports_of_modules, wide_functions
from tests.test_layers import imports


@pytest.mark.parametrize("requires_grad", [False, True], ids=["without a graph", "with a graph"])
def test_a_call_reaches_its_launch_in_few_python_calls(requires_grad: bool) -> None:
    """Check attention, from the public function; with a graph, autograd's function is a file more."""
    calls = calls_to_the_launch(requires_grad)
    assert calls.total <= 120, calls
    assert len(calls.files) <= (8 if requires_grad else 7), calls
    assert "kernels/attention.py" in calls.files


def test_no_function_wants_more_than_ten_arguments() -> None:
    assert wide_functions() == {}


def test_no_modules_import_each_other() -> None:
    """Check it lazily and for type checkers, too: of two that need each other's types, one is given what it reads."""
    imported = imports_of_modules()
    assert import_circles(imported) == []
    imported["fastdistill.objectives.settings.base"].add("fastdistill.train.config")
    circles = import_circles(imported)
    assert circles and all(circle[0] == circle[-1] and "fastdistill.train.config" in circle for circle in circles)


def test_an_import_for_type_checkers_is_found() -> None:
    code = "if TYPE_CHECKING:\n    from fastdistill.train.config import TrainConfig\n"
    code += "def f():\n    from fastdistill import jvp"
    named = [name for _, name in imports(ast.parse(code), "fastdistill.objectives.meanflow", False)]
    assert named == ["fastdistill.train.config", "fastdistill.jvp"]


def test_the_counts_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    house_counts.main()
    assert "Python calls from the public attention to the launch, without a graph: " in capsys.readouterr().out
