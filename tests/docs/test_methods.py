"""Check docs/methods.md against the code: names exist, each method has its section, measured numbers aren't typed.

What the formulas say is tested where the functions are. Here only text, code and evidence are kept together.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdistill.benchmarks.methods.evidence_tables import BLOCK, NOT_YET, fill_article, read_summary
from fastdistill.objectives import OBJECTIVES

ROOT = Path(__file__).parents[2]
ARTICLE = ROOT / "docs" / "methods.md"
TEXT = ARTICLE.read_text(encoding="utf-8")
NAME = re.compile(r"`(fastdistill(?:\.\w+)+)")
PARTS = ("**Objective.**", "**Code:**", "**Algorithm.**", "**Sampler.**", "**Pros and cons.**", "**Source.**")
MAX_FIGURES = 400 * 1024


def resolve(name: str) -> Any:
    """Return the object of a dotted name: the longest importable module, then its attributes."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


def sections(text: str) -> dict[str, str]:
    """Return heading -> text for headings of the third level."""
    pieces = re.split(r"^### (.+)$", re.split(r"^## Samplers$", text, flags=re.MULTILINE)[0], flags=re.MULTILINE)
    return {
        heading: re.split(r"^## ", body, flags=re.MULTILINE)[0] for heading, body in zip(pieces[1::2], pieces[2::2])
    }


def code_of(body: str) -> str:
    """Return the paragraph of a section that names its functions."""
    found = re.search(r"^\*\*Code:\*\*.*?(?=\n\n)", body, flags=re.DOTALL | re.MULTILINE)
    return found[0] if found else ""


def math(text: str) -> list[str]:
    """Return the formulas between dollars, outside of fenced blocks."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\$([^$]+)\$", prose)


def fragile(formula: str) -> bool:
    """Return whether Markdown may change a formula: escapes of punctuation, emphasis, tags, table bars."""
    return bool(re.search(r"\\[^A-Za-z ]|[<>*|`\n]", formula)) or formula.count("{") != formula.count("}")


@pytest.mark.parametrize("name", sorted(set(NAME.findall(TEXT))))
def test_every_name_exists(name: str) -> None:
    """Check that `resolve` finds every part of the name."""
    assert resolve(name) is not None


def test_a_name_that_does_not_exist_is_found() -> None:
    with pytest.raises(AttributeError):
        resolve("fastdistill.objectives.median_flow")


@pytest.mark.parametrize("method", OBJECTIVES)
def test_every_method_of_the_registry_has_a_section_and_a_measured_block(method: str) -> None:
    homes = [body for body in sections(TEXT).values() if f"`fastdistill.objectives.{method}`" in code_of(body)]
    assert len(homes) == 1, f"{method}: {len(homes)} sections"
    assert method in " ".join(match[2] for match in BLOCK.finditer(homes[0])).split()


@pytest.mark.parametrize("heading", sections(TEXT))
def test_every_section_is_whole_and_in_order(heading: str) -> None:
    body = sections(TEXT)[heading]
    places = [body.find(part) for part in PARTS]
    assert -1 not in places, f"{heading} lacks {PARTS[places.index(-1)]}"
    assert places == sorted(places)
    assert len(BLOCK.findall(body)) == 1


def test_measured_blocks_are_what_the_evidence_says() -> None:
    """Check that nobody edited a block by hand, or left old numbers in it; `evidence_tables` writes them."""
    assert fill_article(TEXT, read_summary()) == TEXT
    edited = BLOCK.sub(lambda match: f"{match[1]}Best of all.\n{match[4]}", TEXT, count=1)
    assert fill_article(edited, read_summary()) == TEXT


def test_blocks_say_so_where_nothing_was_measured() -> None:
    empty = fill_article(TEXT, {})
    blocks = BLOCK.findall(empty)
    assert len(blocks) == len(sections(TEXT)) + 1
    assert sum(content.strip() == NOT_YET for _, _, content, _ in blocks) == len(sections(TEXT))


def test_figures_are_there_and_small() -> None:
    files = [ROOT / "docs" / file for file in re.findall(r"!\[[^]]+\]\((.+?)\)", TEXT)]
    assert files
    assert all(file.is_file() for file in files), [file.name for file in files if not file.is_file()]
    assert sum(file.stat().st_size for file in files) < MAX_FIGURES


def test_links_inside_lead_to_headings() -> None:
    headings = re.findall(r"^#+ (.+)$", TEXT, flags=re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert links
    assert [link for link in links if link not in anchors] == []


def test_formulas_survive_markdown() -> None:
    assert [formula for formula in math(TEXT) if fragile(formula)] == []
    assert TEXT.count("$") % 2 == 0


@pytest.mark.parametrize("formula", [r"d\,u", r"\{x\}", "a * b", "a|b", "t<s", "x_{t"])
def test_a_fragile_formula_is_found(formula: str) -> None:
    assert fragile(formula)


RIGHT: dict[str, Callable[[str], bool]] = {
    "1 Gaussian": lambda text: r"\frac{\dot\beta}{\beta}x_t=\dot\alpha x_0+\dot\beta x_1" in text,
    "2 FM": lambda text: r"\frac{(1-\sigma)x_t-x_0}{\sigma+(1-\sigma)t}=(1-\sigma)x_1-x_0" in text,
    "3 I-CFM": lambda text: r"\mathcal N((1-t)x_0+t x_1,\ \sigma^2 I)" in text,
    "4 OT-CFM": lambda text: r"$(x_0,x_1)\sim\pi^\ast$" in text,
    "5 conditional velocity": lambda text: r"\mathbb E(\hat v\mid x_t,x_0)=(x_t-x_0)/t" in text,
    "6 direction": lambda text: "from $t=1$ down to $t=0$" in text,
    "7 weight": lambda text: "every positive $w$ has the same optimum" in text,
    "8 identities": lambda text: all(word in text for word in ("Lagrangian (forward", "Eulerian (backward", "(tri-")),
    "9 MeanFlow": lambda text: r"u=v-d\,D_v u" in text and r"$(\partial_x u)v$" in text,
    "10 jvp": lambda text: "fd.jvp(net, (x, t, s), (w, 1.0, 0.0))" in text and "$(w,1,1)$" in text,
    "11 limit": lambda text: r"\frac{\nabla_\theta L}{2(t-r)}" in text,
    "12 FACM": lambda text: r"$c_{\mathrm{CM}}=(t,0)$ and $c_{\mathrm{FM}}=(t,t)$" in text,
    "13 AYF": lambda text: text.count(r"\frac{\nabla_\theta L}{2\epsilon}") == 2 and r"$w(t,s)=1/d^2$" in text,
    "14 Shortcut": lambda text: "$d^2=4\\delta^2$" in text and "dyadic" in text,
    "15 ReFlow": lambda text: r"S=\int_0^1\mathbb E" in text,
    "16 IMM": lambda text: r"[f_{\theta}(x_r,r,s)]" in text and "0.994" in text,
    "17 DMD": lambda text: r"$\tau (v_{\mathrm{real}}-v_{\mathrm{fake}})$" in text,
    "18 closing": lambda text: "for each *data* point, the nearest" in text and "parameter-efficient" in text,
}


@pytest.mark.parametrize("error", RIGHT)
def test_each_error_of_the_seed_article_is_corrected(error: str) -> None:
    """Check that the body has the right form, and the list at the end an entry; an empty article has neither."""
    body, changes = TEXT.split("## What changed against the seed article\n")
    assert RIGHT[error](body)
    assert re.search(rf"^{error.split()[0]}\. ", changes, flags=re.MULTILINE)
    assert not RIGHT[error]("")
