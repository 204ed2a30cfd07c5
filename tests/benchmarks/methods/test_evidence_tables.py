"""Check that numbers go from the summary into the tables and the article's blocks, and from nowhere else."""

from __future__ import annotations

from pathlib import Path

from fastdistill.benchmarks.methods import evidence_tables as tables
from tests.benchmarks.methods.summaries import method, ring, small

TEXT = """before
<!-- compare:begin meanflow -->
typed by hand
<!-- compare:end meanflow -->
between
<!-- compare:begin dmd -->
<!-- compare:end dmd -->
<!-- compare:begin table -->
<!-- compare:end table -->
after
"""


def test_blocks_are_replaced_and_the_rest_stays() -> None:
    filled = tables.fill_article(TEXT, small())
    assert "typed by hand" not in filled
    assert "- `meanflow`, ring: SW2 0.100 ± 0.000 / " in filled
    assert f"compare:begin dmd -->\n{tables.NOT_YET}\n<!--" in filled
    assert "| meanflow | 0.100 ± 0.000 |" in filled
    assert [line for line in ("before", "between", "after") if line not in filled.splitlines()] == []


def test_filling_twice_changes_nothing_and_an_empty_summary_empties() -> None:
    filled = tables.fill_article(TEXT, small())
    assert tables.fill_article(filled, small()) == filled
    emptied = tables.fill_article(filled, {})
    assert tables.NO_TABLE in emptied
    assert "0.100" not in emptied


def test_table_ranks_by_one_step_and_names_references() -> None:
    lines = tables.results_table("ring", small()["ring"]).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| meanflow", "| flow_matching", "| *euler*", "| *data*"]
    assert lines[0].count("|") == lines[2].count("|") == lines[-1].count("|")
    assert "| 5.0 | 1.00 |" in lines[2]


def test_references_of_many_steps_are_one_row() -> None:
    """Check that each number of steps has its column, and that the exact map's row stands among them."""
    result = small()["ring"]
    result["references"] = {
        "euler 1": {"sliced_wasserstein": 1.4, "map_error": 1.0},
        "euler 4": {"sliced_wasserstein": 0.124},
        "exact map 1": {"sliced_wasserstein": 0.0, "map_error": 0.0},
        "exact map by consistency, against the flow 4": {"sliced_wasserstein": 0.05},
    }
    lines = tables.results_table("ring", result).splitlines()[4:]
    assert lines[0].startswith("| *euler* | 1.400 |  | 0.124 |  | 1.000 |")
    assert lines[1].startswith("| *exact map* | 0.000 |  |  |  | 0.000 |")
    assert lines[2].startswith("| *exact map by consistency, against the flow* |  |  | 0.050 |  |  |")


def test_the_whole_budget_is_in_the_tables_with_share_and_exponent() -> None:
    """Check the text on tuning and sample numbers too; a summary that lacks the budget has no such table."""
    summary = {"ring": ring(flow_matching=method((0.8,) * 4), scm=method((0.2,) * 4, teacher=True))}
    text = tables.closing_tables(summary)
    assert "| scm | teacher | 3,000 | 75 % | 0.5 | 3,000 |  |  | 2.30 (0.77) | 12 (6) |" in text
    assert "| flow_matching | data | 3,000 | 75 % | 0.5 |  |  |  | 1.54 | 6 |" in text
    assert "Tuning: " in text
    assert "Every number is one of 4,096 samples" in text
    assert all(part in tables.evidence_page(summary) for part in ("Tuning: ", "the whole budget", "2.30 (0.77)"))
    del summary["ring"]["budget"]["samples"]
    assert "whole budget" not in tables.closing_tables(summary)


def test_a_method_that_diverged_is_named_and_not_ranked() -> None:
    summary = small()
    summary["ring"]["methods"]["ect"] = method((1.0, 1.0, 1.0, 1.0)) | {"failed": "loss: NaN at step 7"}
    assert "- ect failed: loss: NaN at step 7" in tables.evidence_page(summary)
    assert "ect" not in tables.results_table("ring", summary["ring"])
    assert tables.measured(["ect"], summary) == tables.NOT_YET


def test_page_shows_gates_plots_and_what_it_ran_on() -> None:
    result = ring(meanflow=method((0.2, 0.1, 0.1, 0.1)))
    result["gates"] = [{"gate": "meanflow below 0.45", "passed": False, "found": "map error 0.500"}]
    result["plots"] = {"quality": "ring_quality.png"}
    page = tables.evidence_page({"ring": result})
    assert "- **FAIL**: meanflow below 0.45 (map error 0.500)" in page
    assert "![quality](ring_quality.png)" in page
    assert "Measured on: python 3.12; torch 2.13." in page
    assert "Not yet measured." in tables.evidence_page({})


def test_a_figure_is_shown_once_it_is_drawn(tmp_path: Path) -> None:
    text = "<!-- figure:begin reflow -->\n<!-- figure:end reflow -->\n"
    before = tables.fill_article(text, {}, tmp_path)
    assert tables.NOT_DRAWN in before
    (tmp_path / "reflow.png").touch()
    after = tables.fill_article(before, {}, tmp_path)
    assert tables.NOT_DRAWN not in after
    assert "](figures/reflow.png)" in after
