"""The cheat sheet on paper: one sheet of A4, with all that the page says and nothing else."""

from __future__ import annotations

import re

import pytest

A4 = {"width": 718, "height": 1054}  # less the margins that the style sheet sets, at 96 dpi


def sheets(pdf: bytes) -> int:
    return len(re.findall(rb"/Type\s*/Page\b", pdf))


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_the_cheat_sheet_prints_on_one_sheet(mode, reading):
    with reading(mode=mode) as reader:
        reader.open("book/cheat_sheet.html")
        page = reader.page
        assert sheets(page.pdf(format="A4", prefer_css_page_size=True)) == 1
        assert sheets(page.pdf(format="Letter")) <= 2

        page.set_viewport_size(A4)
        page.emulate_media(media="print")
        shown = page.evaluate("document.body.innerText")
        headings = "es => es.map(e => e.firstChild.textContent)"
        for heading in page.eval_on_selector_all(".bd-article :is(h1, h2)", headings):
            assert heading.strip() in shown
        for furniture in ("On this page", "Previous", "Search", "Print it"):
            assert furniture not in shown
        # Nothing is cut off at the right, and the text ends on the sheet.
        box = page.eval_on_selector("article > section", "e => e.getBoundingClientRect().toJSON()")
        assert box["bottom"] <= A4["height"] and box["right"] <= A4["width"] + 1
        cut = "es => es.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.className)"
        assert (
            page.eval_on_selector_all("article pre, article .pst-scrollable-table-container", cut)
            == []
        )


def test_an_ordinary_page_takes_more_than_one(reading):
    with reading() as reader:
        reader.open("book/glossary.html")
        assert sheets(reader.page.pdf(format="A4")) > 1
