"""What a cell shows after a prediction stays folded, and one click unfolds it."""

from __future__ import annotations

import pytest

from tools.notebooks import ROOT, chapters, read

FOLDS = "details.below-input"
PAGE = "notebooks/04_nf4_by_quantiles.html"
NAMES = [path.relative_to(ROOT).with_suffix(".html").as_posix() for path in chapters()]


def opened(page) -> list[bool]:
    return page.eval_on_selector_all(FOLDS, "folds => folds.map(fold => fold.open)")


def folded_cells(path) -> int:
    return sum("hide-output" in cell.metadata.get("tags", []) for cell in read(path).cells)


@pytest.mark.parametrize(("path", "name"), zip(chapters(), NAMES, strict=True), ids=NAMES)
def test_each_tagged_output_is_folded(path, name, reading):
    with reading() as reader:
        reader.open(name)
        assert opened(reader.page) == [False] * folded_cells(path)


def test_one_output_opens_the_others_of_its_prediction_and_no_more(reading):
    with reading() as reader:
        reader.open(PAGE)
        page = reader.page
        assert folded_cells(ROOT / PAGE.replace(".html", ".ipynb")) == 3  # of two predictions
        page.locator(FOLDS).nth(1).locator("summary").click()
        page.wait_for_function(f"document.querySelectorAll('{FOLDS}[open]').length == 2")
        assert opened(page) == [False, True, True]
        assert page.locator(FOLDS).nth(2).locator("pre").first.is_visible()


def test_an_answer_opens_what_it_speaks_of(reading):
    with reading() as reader:
        reader.open(PAGE)
        page = reader.page
        follows = f"{FOLDS} >> nth=0 >> xpath=following::details[1]"
        page.locator(follows).locator("summary").click()
        page.wait_for_function(f"document.querySelectorAll('{FOLDS}[open]').length == 1")
        assert opened(page) == [True, False, False]


def test_a_button_opens_all(reading):
    with reading() as reader:
        reader.open(PAGE)
        page = reader.page
        page.get_by_role("button", name="Open every prediction").click()
        page.wait_for_function(f"document.querySelectorAll('{FOLDS}[open]').length == 3")
        assert page.get_by_role("button", name="Open every prediction").count() == 0


def test_paper_has_what_is_folded(reading):
    with reading() as reader:
        reader.open(PAGE)
        reader.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert all(opened(reader.page))
