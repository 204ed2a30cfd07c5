"""Check that the README's numbers are those of the result files, and that what has no file is not yet measured."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fastdistill.benchmarks.report import readme_table
from fastdistill.benchmarks.report.readme_table import BEGIN, END, README, RESULTS, block, main, replaced
from tests.benchmarks.report import made_up


def gpu_file(folder: Path, name: str = "made-up_20261125_0123456.json", suite: str = "dit", **more: Any) -> Path:
    """Write a file of a GPU whose records are of DiT-XL."""
    table = made_up.document(**more)
    for info in [*(entry["extra_info"] for entry in table["benchmarks"]), *table["not_timed"]]:
        info |= {"suite": suite, "case": f"DiT-XL/2-{info['case']}"}
    return made_up.written(folder / name, table)


def test_the_readme_is_what_the_script_makes(capsys: pytest.CaptureFixture[str]) -> None:
    """Run `python -m fastdistill.benchmarks.report.readme_table` if this test fails."""
    assert main(["--check"]) == 0, capsys.readouterr().out


def test_a_number_changed_by_hand_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that --check names the file and writes nothing, and that without it the number is set right."""
    readme = tmp_path / "README.md"
    text = README.read_text(encoding="utf-8")
    changed = text.replace(" MiB", " KiB", 1) if text.index(" MiB") > text.index(BEGIN) else text.replace("x)", "y)", 1)
    readme.write_text(changed, encoding="utf-8")
    assert main(["--check", "--readme", str(readme)]) == 1
    assert "run the same without --check" in capsys.readouterr().out
    assert readme.read_text(encoding="utf-8") == changed != text
    assert main(["--readme", str(readme)]) == 0
    assert readme.read_text(encoding="utf-8") == text


def test_what_has_no_file_is_not_yet_measured(tmp_path: Path) -> None:
    """Check all three tables, in an empty folder."""
    assert block(tmp_path).count("not yet measured") == 3


def test_every_case_of_the_files_is_shown(tmp_path: Path) -> None:
    """Check that small cases, where the gain is small, show baseline and ours too."""
    shutil.copy(RESULTS / "cpu_attention.json", tmp_path)
    lines = [line for line in block(tmp_path).splitlines() if line.startswith("| N = ")]
    assert [line.split(":")[0] for line in lines] == [
        f"| N = {n}, {heads} heads" for n, heads in ((256, "4 × 12"), (1024, "12"), (4096, "4")) for _ in range(2)
    ]


def test_a_gpu_has_a_table_of_its_own(tmp_path: Path) -> None:
    """Check ours, the fastest peer or why there is none, the floor, memory and both errors."""
    gpu_file(tmp_path)
    gpu_file(tmp_path, "other.json", gpu="Other GPU")
    text = block(tmp_path)
    assert "On a GPU: not yet measured" not in text
    assert text.index("On one Made-up GPU 80GB (2026-11-25, commit 0123456789; [made-up_20261125") < text.index(
        "On one Other GPU"
    )
    assert (
        "| dit: DiT-XL/2-N256-D64, bfloat16 | **1.063 ms** (2.0x) | **885.8 µs** (2.0x) | **2.658 ms** (13.3x) "
        "| 1.50x | 576 MiB | 2.1e-03 / 3.4e-03 |"
    ) in text
    assert "**43.24 ms** (peers out of memory)" in text


def test_what_failed_is_not_hidden(tmp_path: Path) -> None:
    """Check that a mode that failed parity says so in its cell, and that a mode that didn't run is not yet measured."""
    path = gpu_file(tmp_path)
    table = made_up.document()
    table["benchmarks"] = [made_up.timed("ours triton", 256, suite="dit", case="DiT-XL")]
    wrong = {"status": "failed parity", "reason": "dq", "suite": "dit", "case": "DiT-XL"}
    peer = made_up.timed("jvp-flash-attention", 256, "mixed", suite="dit", case="DiT-XL")
    table["benchmarks"].append(peer)
    table["not_timed"] = [made_up.info("ours triton", 256, "primal", **wrong)]
    made_up.written(path, table)
    assert "| **1.063 ms** (no peer) | failed parity | not yet measured | 1.50x |" in block(tmp_path)


def test_cpus_tiny_shapes_and_other_models_are_left_to_the_report(tmp_path: Path) -> None:
    """Check that none of these is taken for the README's GPU."""
    gpu_file(tmp_path, "cpu.json", gpu=None)
    gpu_file(tmp_path, "scaling.json", suite="scaling")
    table = made_up.document()
    for entry in table["benchmarks"]:
        entry["extra_info"] |= {"suite": "dit", "case": "DiT-XL", "quick": True, "provider": entry["fullname"]}
    made_up.written(tmp_path / "quick.json", table | {"not_timed": []})
    assert "On a GPU: not yet measured." in block(tmp_path)


@pytest.mark.parametrize("name", ["driver_memory.json", "cpu_attention.json", "gpu.json"])
@pytest.mark.parametrize(
    "content", ["{", '{"rows": [], "results": [{}], "benchmarks": [7], "machine_info": {"gpu": 1}}']
)
def test_a_damaged_file_is_refused_by_name(
    name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that the command returns status 2, and that the README stays as it is."""
    (tmp_path / name).write_text(content, encoding="utf-8")
    before = README.read_text(encoding="utf-8")
    assert main(["--results", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("readme_table: ") and name in message
    assert README.read_text(encoding="utf-8") == before


@pytest.mark.parametrize("readme", ["", BEGIN, f"{END} {BEGIN}", f"{BEGIN} {END} {BEGIN} {END}"])
def test_a_readme_without_the_block_is_refused(readme: str) -> None:
    """Check that nothing is written where the place is a guess."""
    with pytest.raises(readme_table.ReadmeError, match="once each"):
        replaced(readme, "text")


def test_only_the_block_changes() -> None:
    """Check that the text around the block stays."""
    assert replaced(f"before\n{BEGIN}\nold\n{END}\nafter", "new") == f"before\n{BEGIN}\nnew\n{END}\nafter"
