"""Collect what the methods' test files say of each, its gates and its cases of descent, for the tests of all.

TAUGHT     name -> keywords of the gate with the exact teacher
FROM_DATA  name -> keywords of the gate with data in one point
DESCENT    label -> `tests.objectives.descent.Case`
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from fastdistill import objectives
from fastdistill.objectives.registry import HELPERS, METHODS
from tests.objectives.descent import Case


def collect(attribute: str) -> dict[str, Any]:
    """Return the entries of this name in the test file of each method's file."""
    found: dict[str, Any] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        name = path.stem.removeprefix("test_")
        if name not in HELPERS and (Path(objectives.__path__[0]) / f"{name}.py").is_file():
            entries = getattr(importlib.import_module(f"tests.objectives.{path.stem}"), attribute, {})
            assert not found.keys() & entries.keys(), f"{path.name}: {attribute} repeats an entry of another file"
            found |= entries
    return found


TAUGHT: dict[str, dict[str, Any]] = collect("TAUGHT")
FROM_DATA: dict[str, dict[str, Any]] = collect("FROM_DATA")
DESCENT: dict[str, Case] = collect("DESCENT")
# Their tangents: along (w, 1, 0), and along (0, 0, 1).
LAGRANGIAN = [name for name in TAUGHT if METHODS[name].identity == "lagrangian"]
EULERIAN = [name for name in TAUGHT if "jvp" in METHODS[name].takes and name not in LAGRANGIAN]
