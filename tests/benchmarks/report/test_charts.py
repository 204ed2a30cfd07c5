"""Test the pictures: every loss is marked, text is text, and both color schemes are there."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fastdistill.benchmarks.report import charts
from fastdistill.benchmarks.report.charts import draw_roofline, draw_series, looks
from fastdistill.benchmarks.report.records import Record, load
from fastdistill.benchmarks.report.series import gather
from tests.benchmarks.report import made_up


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, ...]:
    """Return the records of the made-up file."""
    return load(made_up.written(tmp_path_factory.mktemp("charts") / "x.json", made_up.document())).records


@pytest.fixture(scope="module")
def picture(rows: tuple[Record, ...]) -> str:
    """Draw the sweep over N."""
    (series,) = gather(rows)
    return draw_series(series, looks(rows))


def texts(svg: str) -> list[str]:
    """Return all text of a picture."""
    root = ElementTree.fromstring(svg)
    return ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_picture_says_what_it_shows(picture: str) -> None:
    """Check that axes, modes and all visible providers are named."""
    words = texts(picture)
    for word in ("TFLOP/s", "peak memory, MiB", "tokens N", "forward with tangent", "64k", "out of memory"):
        assert word in words
    assert words.count("ours triton") == 1 and "func.jvp, math SDPA" in words and "failed parity" in words
    assert "xformers" not in words and "error" not in words


def test_every_loss_is_marked(rows: tuple[Record, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that there are as many marks as records that ran out of memory or failed parity."""
    marked: list[str] = []
    plot = charts.Axes.plot

    def spying(self: charts.Axes, *arguments: object, **options: object) -> object:
        if options.get("markeredgewidth"):
            marked.append(str(options["marker"]))
        return plot(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(charts.Axes, "plot", spying)
    (series,) = gather(rows)
    draw_series(series, looks(rows))
    statuses = [row.status for row in rows]
    for status in ("oom", "failed parity"):
        assert marked.count(charts.MARKED[status][0]) == statuses.count(status) > 0
    assert len(marked) == statuses.count("oom") + statuses.count("failed parity")


def test_every_color_of_text_and_paper_turns_with_the_reader(picture: str) -> None:
    """Check that every color belongs to the curves, which suit both schemes, or has a counterpart for dark pages."""
    drawn = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", picture.split("</style>", 1)[1]))
    curves = {color for colors in charts.COLORS.values() for color in colors}
    assert drawn <= curves | set(charts.DARK)
    assert {charts.INK, charts.FAINT, charts.PAPER} <= drawn
    sheet = picture.split("</style>", 1)[0]
    assert "@media (prefers-color-scheme: dark)" in sheet
    assert all(f'[style*="fill: {light}"]' in sheet for light in charts.DARK)


def luminance(color: str) -> float:
    """Return the luminance that WCAG 2 defines."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Return the contrast, from 1 to 21."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrasts_suffice_on_light_and_dark() -> None:
    """Check the contrasts of WCAG 2: 4.5 for text, 3 for what is drawn."""
    for ink in (charts.INK, charts.FAINT):
        assert contrast(ink, charts.PAPER) >= 4.5
        assert contrast(charts.DARK[ink], charts.DARK[charts.PAPER]) >= 4.5
    for color in (color for colors in charts.COLORS.values() for color in colors):
        assert contrast(color, charts.PAPER) >= 3
        assert contrast(color, charts.DARK[charts.PAPER]) >= 3


def test_the_same_rows_make_the_same_bytes(rows: tuple[Record, ...], picture: str) -> None:
    """Check that a picture changes only with its numbers, since it lies in a repository."""
    (series,) = gather(rows)
    assert draw_series(series, looks(rows)) == picture
    assert "<dc:date>" not in picture


def test_providers_look_alike_in_all_pictures(rows: tuple[Record, ...]) -> None:
    """Check that ours have the first color, a floor is dashed, and no two of a kind look alike."""
    look = looks(rows)
    assert look["ours triton"].color == charts.COLORS["ours"][0]
    assert look["SDPA flash"].dashed and not look["ours triton"].dashed
    assert len({(each.color, each.marker) for each in look.values()}) == len(look)


def test_ceilings_are_drawn_where_they_were_measured(rows: tuple[Record, ...]) -> None:
    """Check both ceilings, one, or none; the picture names the absent ones."""
    look = looks(rows)
    for ceilings, said in (
        ({"tflops": 700.0, "gbs": 2900.0}, "Ceilings: copy 2,900 GB/s, measured; matmul 700 TFLOP/s, measured"),
        ({"tflops": 700.0}, "Ceilings: matmul 700 TFLOP/s, measured; copy bandwidth not measured, so not drawn"),
        ({}, "Ceilings: copy bandwidth not measured, so not drawn; matmul throughput not measured, so not drawn"),
    ):
        svg = draw_roofline(rows, ceilings, look)
        assert svg is not None
        assert said in texts(svg)


def test_no_roofline_without_flops(rows: tuple[Record, ...]) -> None:
    """Check that without flops there is no picture."""
    assert draw_roofline([row for row in rows if row.median is None], {}, looks(rows)) is None


def test_a_series_without_memory_and_losses_has_one_line_of_panels(tmp_path: Path) -> None:
    """Check that no empty axes are drawn."""
    table = made_up.document()
    table["benchmarks"] = [x for x in table["benchmarks"] if x["extra_info"]["kind"] == "ours"]
    for entry in table["benchmarks"]:
        entry["extra_info"]["peak_memory_bytes"] = None
    table["not_timed"] = []
    (series,) = gather(rows := load(made_up.written(tmp_path / "x.json", table)).records)
    words = texts(draw_series(series, looks(rows)))
    assert "peak memory, MiB" not in words and "lost" not in words and words.count("tokens N") == 3
