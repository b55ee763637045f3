"""What a cell shows where a prediction waits for its answer stays folded until one click."""

from __future__ import annotations

import pytest

from tools.notebooks import ROOT, chapters, read

FOLDS = "details.below-input"
PAGE = "notebooks/04_nf4_by_quantiles.html"
NAMES = [path.relative_to(ROOT).with_suffix(".html").as_posix() for path in chapters()]


def opened(page) -> list[bool]:
    return page.eval_on_selector_all(FOLDS, "folds => folds.map(fold => fold.open)")


def wait_for(page, how_many: int) -> None:
    page.wait_for_function(f"document.querySelectorAll('{FOLDS}[open]').length >= {how_many}")


@pytest.mark.parametrize(("path", "name"), zip(chapters(), NAMES, strict=True), ids=NAMES)
def test_each_tagged_output_is_folded(path, name, reading):
    tagged = [c for c in read(path).cells if "hide-output" in c.metadata.get("tags", [])]
    with reading() as reader:
        reader.open(name)
        assert opened(reader.page) == [False] * len(tagged)


def test_one_output_opens_the_others_of_its_prediction_and_no_more(reading):
    """The last but one prediction of chapter 4 is decided by two outputs."""
    with reading() as reader:
        reader.open(PAGE)
        page, closed = reader.page, opened(reader.page)
        page.locator(FOLDS).nth(-3).locator("summary").click()
        wait_for(page, 2)
        assert opened(page) == [*closed[:-3], True, True, False]
        assert page.locator(FOLDS).nth(-2).locator("pre").first.is_visible()


@pytest.mark.parametrize("side", ["below", "above"])
def test_an_answer_opens_what_it_speaks_of(side, reading):
    with reading() as reader:
        reader.open(PAGE)
        page, closed = reader.page, opened(reader.page)
        if side == "below":  # that prediction's answer stands below its outputs
            box, expected = "following::details[1]", [*closed[:-3], True, True, False]
            fold = page.locator(FOLDS).nth(-2)
        else:  # the first one's stands above its output
            box, expected = "preceding::details[1]", [True, *closed[1:]]
            fold = page.locator(FOLDS).first
        fold.locator(f"xpath={box}").locator("summary").first.click()
        wait_for(page, sum(expected))
        assert opened(page) == expected


def test_a_button_opens_all(reading):
    with reading() as reader:
        reader.open(PAGE)
        page = reader.page
        button = page.get_by_role("button", name="Open every prediction")
        button.click()
        wait_for(page, len(opened(page)))
        assert button.count() == 0


def test_paper_has_what_is_folded(reading):
    with reading() as reader:
        reader.open(PAGE)
        reader.page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert opened(reader.page) and all(opened(reader.page))
