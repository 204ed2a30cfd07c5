"""Check that the report shows every record of its files, timed or not, and needs nothing beside it."""

from __future__ import annotations

import base64
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from fastdistill.benchmarks.ops.timed_op import BenchError
from fastdistill.benchmarks.report.page import read_records, write_report
from fastdistill.benchmarks.report.records import load
from fastdistill.cli import main
from tests.benchmarks.report import made_up


def reported(folder: Path, *tables: dict[str, Any]) -> str:
    """Return the page of these files."""
    files = [made_up.written(folder / f"{i}.json", table) for i, table in enumerate(tables)]
    return write_report(files, folder / "page.html")[0].read_text(encoding="utf-8")


def said(table: dict[str, Any], folder: Path) -> str:
    """Return the sentences above the pictures."""
    return " ".join(read_records(load(made_up.written(folder / "x.json", table)).records))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page of the made-up file, by the command line."""
    folder = tmp_path_factory.mktemp("report")
    path = made_up.written(folder / "made-up.json", made_up.document())
    out = folder / "new" / "page.html"
    assert main(["report", "--bench", str(path), "--out", str(out)]) == 0
    return out


def test_every_timed_row_is_there_with_its_error(page: Path) -> None:
    """Check the line of each: time, memory, errors, and ratio to the floor."""
    tables = page.read_text(encoding="utf-8").partition("What was not timed")[0]
    lines = re.findall(r"<tr><td[^>]*>(.*?)</td>\n((?:<td>.*?</td>)+)</tr>", tables)
    assert len(lines) == len(made_up.document()["benchmarks"])
    name, cells = lines[0]
    assert name == "ours triton"
    assert re.findall(r"<td>(.*?)</td>", cells) == [
        *("1.063 ms", "1.042 ms – 1.106 ms", "97", "568", "576 MiB", "2.1e-03 / 3.4e-03", "5.5e-03 / 8.6e-03", "1.5"),
        *("", "1755 MHz", "0.68 J"),
    ]


def test_everything_that_was_not_timed_is_there_with_its_reason(page: Path) -> None:
    """Check that lost records are in their cases' tables, and that the list has all, absent providers included."""
    html = page.read_text(encoding="utf-8")
    infos = made_up.document()["not_timed"]
    in_tables = re.findall(r'<td class="why bad"[^>]*>(.*?)</td>', html)
    assert len(in_tables) == sum(info["status"] in ("oom", "failed parity") for info in infos)
    listed = html[html.index("What was not timed") :]
    for info in infos:
        assert info["status"] in listed and info["reason"] in unescape(listed)
    assert listed.count("N16384-D64, bfloat16, mixed") == 2
    assert "tried to allocate 256.00 GiB &lt;of&gt; 80 GiB" in listed


def test_throttling_clocks_ceilings_and_environment_are_there(page: Path) -> None:
    """Check that the file's name stands beside the environment in which it was measured."""
    html = page.read_text(encoding="utf-8")
    assert html.count('title="software power cap">throttled</span>') == 3
    for text in (
        "SM clock under load 1410 to 1755 MHz in 44 runs; throttled in 3 runs (software power cap).",
        "Ceilings, measured on this device in the same run: 700 TFLOP/s of a large matmul, 2,900 GB/s of a copy.",
        "made-up.json",
        "<dt>triton</dt><dd>3.9.0</dd>",
        "<dt>gpu: driver</dt><dd>1.2.3</dd>",
        "<dt>commit</dt><dd>0123456789abcdef</dd>",
    ):
        assert text in html


def test_the_page_asks_for_nothing_from_outside(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    assert not re.findall(r"https?://|<script|<link(?! rel=\"icon\" href=\"data:)|@import|url\(", html)
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)="([^"]*)"', html))


def test_the_pictures_lie_beside_the_page_too(page: Path) -> None:
    """Check that the files have the same bytes, under names that say what they show."""
    inlined = re.findall(r'src="data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)"', page.read_text(encoding="utf-8"))
    beside = {path.name: path.read_bytes() for path in page.parent.glob("*.svg")}
    assert beside.keys() == {
        "page-scaling-attention-lengths-heads-16-head-dim-64-bfloat16.svg",
        "page-roofline.svg",
    }
    assert sorted(base64.b64decode(text) for text in inlined) == sorted(beside.values())


def test_devices_are_kept_apart(tmp_path: Path) -> None:
    """Check that each device has a heading and pictures, and that of a repeated record the newest counts."""
    again = made_up.document(speed=2.0) | {"datetime": "2026-11-26T00:00:00"}
    html = reported(tmp_path, made_up.document(), made_up.document(gpu="Other GPU"), again)
    assert re.findall(r"<h2>(.*?)</h2>", html) == [made_up.GPU, "Other GPU"]
    assert len(list(tmp_path.glob("page-other-gpu-*.svg"))) == len(list(tmp_path.glob("page-made-up-gpu-*.svg"))) == 2
    assert html.count("were measured more than once") == 1 and "the peer's time is 4.00 to" in unescape(html)


def test_the_sentences_follow_from_the_numbers(tmp_path: Path) -> None:
    """Check the sentences for faster, slower, and wrong results."""
    assert "in 13 of 13 cases: the peer's time is 2.00 to 13.33 times ours" in said(made_up.document(), tmp_path)
    assert "throttled in 3 of 44 runs" in said(made_up.document(), tmp_path)
    slow = said(made_up.document(speed=0.1), tmp_path)
    assert "in 3 of 13 cases: the peer's time is 0.20 to 1.33 times ours" in slow
    table = made_up.document()
    info = table["benchmarks"].pop(0)["extra_info"]
    table["not_timed"].append(info | {"status": "failed parity", "reason": "t_o: error 1"})
    assert said(table, tmp_path).startswith("1 runs of ours failed the comparison with float64")


def test_tiny_shapes_claim_nothing(tmp_path: Path) -> None:
    """Check that a `--quick` file says only that everything runs."""
    table = made_up.document()
    for entry in table["benchmarks"]:
        entry["extra_info"]["quick"] = True
    assert "say nothing about speed" in said(table, tmp_path) and "times ours" not in said(table, tmp_path)


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    """Check that a CPU's file without clocks and ceilings says so, and that empty columns are left out."""
    table = made_up.document(gpu=None, ceilings=None)
    for entry in table["benchmarks"]:
        entry["extra_info"] |= dict.fromkeys(("sm_clock_mhz", "throttle", "power_w", "energy_j"))
    table["not_timed"] = []
    html = reported(tmp_path, table)
    assert "<h2>Made-up CPU, 1 thread</h2>" in html
    assert "Clocks, power and throttling: not measured." in html
    assert "The ceilings of this device were not measured, so none is drawn." in html
    assert "<th>SM clock</th>" not in html and "<th>energy</th>" not in html and "<th>median</th>" in html
    assert "Nothing: every provider ran on every case." in html


def test_a_damaged_file_ends_in_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Check that the command returns status 2, names the file, and writes no page."""
    path = made_up.written(tmp_path / "x.json", {"results": []})
    assert main(["report", "--bench", str(path), "--out", str(tmp_path / "page.html")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("fastdistill: ") and "x.json: no 'benchmarks' in it" in message
    assert not (tmp_path / "page.html").exists()


def test_requests_that_make_no_page_are_refused(tmp_path: Path) -> None:
    """Check that the message names the argument."""
    path = made_up.written(tmp_path / "x.json", made_up.document())
    with pytest.raises(BenchError, match=r"--out: expected a name in .html, got .*page.pdf"):
        write_report([path], tmp_path / "page.pdf")
    with pytest.raises(BenchError, match="--bench: expected one file or more"):
        write_report([], tmp_path / "page.html")
