"""Run the tests of the kernels' values, on a GPU or interpreted on the CPU, in a process of their own."""

from __future__ import annotations

import pytest

from tests.kernels.device import INTERPRETED

if INTERPRETED:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    import fastdistill.kernels.launch  # noqa: F401 -- mends the interpreter, before a test patches it and undoes that

# Only the interpreter shows what kernels do, besides their results.
collect_ignore = [] if INTERPRETED else ["test_attention_work.py", "test_attention_backward_work.py"]


@pytest.fixture(autouse=INTERPRETED)
def matmuls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Collect the shape (rows, summed, columns) of each `tl.dot` of a test."""
    shapes: list[tuple[int, ...]] = []
    create_dot = InterpreterBuilder.create_dot

    def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *args: object) -> TensorHandle:
        shapes.append((*a.data.shape, b.data.shape[1]))
        return create_dot(self, a, b, *args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    return shapes
