"""Check that no test depends on a machine's speed: none waits for some seconds, and none compares wall times."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAST = 600  # In seconds; a shorter limit fails on a busy machine.
CLOCKS = {"time.time", "time.monotonic", "time.perf_counter", "time.process_time"}


def clocks(code: str) -> list[str]:
    """Return the calls that give up within ten minutes, or that read a clock."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [
        f"{call.lineno}: {ast.unparse(call)[:80]}"
        for call in calls
        if any(keyword.arg == "timeout" and _is_short(keyword.value) for keyword in call.keywords)
        or ast.unparse(call.func) in CLOCKS
        or (
            isinstance(call.func, ast.Attribute)
            and call.func.attr in ("wait", "join", "acquire")
            and any(
                isinstance(argument, ast.Constant) and isinstance(argument.value, int | float) for argument in call.args
            )
        )
    ]


def _is_short(limit: ast.expr) -> bool:
    return not (isinstance(limit, ast.Constant) and (limit.value is None or limit.value >= LEAST))


def test_no_test_reads_a_clock_or_gives_up() -> None:
    """Check that tests receive time as an argument, and move it themselves."""
    paths = [path for path in sorted((ROOT / "tests").rglob("*.py")) if path != Path(__file__)]
    found = [f"{path.relative_to(ROOT)}:{line}" for path in paths for line in clocks(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "line",
    [
        "run(command, timeout=60)",
        "event.wait(10)",
        "process.join(120.0)",
        "now = time.monotonic()",
        "time.time() - now",
    ],
)
def test_a_planted_clock_is_found(line: str) -> None:
    assert len(clocks(line)) == 1


def test_waiting_for_an_event_is_no_clock() -> None:
    """Check that pauses between two looks, and a stand-in for the real clock, are allowed too."""
    assert (
        clocks(
            "run(command, timeout=600); event.wait(); thread.join(); time.sleep(0.05); ', '.join(names); time = Time()"
        )
        == []
    )
