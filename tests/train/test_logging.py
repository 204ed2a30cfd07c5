"""Logs of a run."""

from __future__ import annotations

from pathlib import Path

import torch

from fastdistill.train.logging import RunLog, peak_memory


def test_a_log_opened_at_a_step_forgets_what_came_after(tmp_path: Path) -> None:
    """Check that later lines and half a line are cut off, and that new ones follow."""
    with RunLog(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": step / 4})
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    with RunLog(tmp_path, 2) as log:
        log.write(3, {"loss": 9.0})
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines == ['{"step": 1, "loss": 0.25}', '{"step": 2, "loss": 0.5}', '{"step": 3, "loss": 9.0}']


def test_peak_memory_is_in_bytes() -> None:
    """Check that it notices 64 MiB more than there ever were, or that the peak lies above already."""
    before = peak_memory(torch.device("cpu"))
    block = torch.ones(before // 4 + 2**24)  # float32: the peak so far again, and 64 MiB
    assert peak_memory(torch.device("cpu")) >= block.nbytes
    assert before > 2**26
