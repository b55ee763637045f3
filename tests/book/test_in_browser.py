"""Every page as a reader has it: on a desk and on a phone, by day and by night.

Measured in Chromium: nothing is wider than the screen, nothing is fetched from elsewhere, the
console is silent, pictures and formulas are there, and every piece of text has the contrast that
WCAG AA asks for.
"""

from __future__ import annotations

import re

import pytest

from tools.book import ROOT, expected_pages

PAGES = [f"{page}.html" for page in expected_pages()]
MODES = ("light", "dark")
DESKTOP = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}
SIZES = {"desktop": DESKTOP, "phone": PHONE, "small phone": {"width": 320, "height": 640}}


@pytest.mark.parametrize("name", [*PAGES, "search.html", "genindex.html"])
def test_page(name, reading):
    """One visit in each mode; within it, every width."""
    for mode in MODES:
        with reading(DESKTOP, mode) as reader:
            reader.open(name)
            assert reader.page.evaluate("document.documentElement.dataset.theme") == mode
            if "/" in name:
                assert reader.page.evaluate("probes.structure()") == []
            for label, size in SIZES.items():
                reader.page.set_viewport_size(size)
                assert reader.page.evaluate("probes.width()") == [], f"wider than a {label}"
                found = reader.page.evaluate("probes.contrast()")
                # On a phone a search page without a query shows its heading and footer alone.
                assert found["count"] > (2 if name == "search.html" else 5)
                assert found["problems"] == [], f"{mode}, {label}"
            assert reader.outside == [], "fetched from somebody else's server"
            assert reader.failed == []
            assert reader.errors == []


def with_formulas() -> list[str]:
    pages = []
    for page in expected_pages():
        for suffix in (".md", ".ipynb"):
            path = ROOT / f"{page}{suffix}"
            if path.is_file() and re.search(r"\$[^$\n]+\$", path.read_text(encoding="utf-8")):
                pages.append(f"{page}.html")
    return pages


def test_some_page_has_formulas():
    assert "book/references.html" in with_formulas()


@pytest.mark.parametrize("name", with_formulas())
def test_formulas_are_set_without_a_network(name, reading):
    with reading() as reader:
        reader.open(name)
        # Attached, not visible: a page's first formula may be inside a folded answer.
        reader.page.wait_for_selector("article mjx-container", state="attached")
        text = reader.page.inner_text("article")
        assert "\\(" not in text and "\\[" not in text and "$$" not in text
        assert reader.outside == []


def test_search_finds_a_term_and_leads_to_it(reading):
    with reading() as reader:
        reader.open("search.html?q=absmax")
        reader.page.wait_for_selector("#search-results li a")
        links = [
            a.get_attribute("href") for a in reader.page.query_selector_all("#search-results a")
        ]
        assert any("glossary" in link or "blockwise" in link for link in links)
        reader.page.click("#search-results li a")
        assert "absmax" in reader.page.inner_text("article").lower()
        assert reader.outside == [] and reader.errors == []


def test_search_says_when_it_finds_nothing(reading):
    with reading() as reader:
        reader.open("search.html?q=zzzzqqqq")
        reader.page.wait_for_function(
            "() => document.querySelector('#search-results').innerText.includes('did not match')"
        )
        assert reader.page.query_selector("#search-results li a") is None


def test_the_keyboard_opens_search(reading):
    with reading() as reader:
        reader.open("book/intro.html")
        reader.page.keyboard.press("Control+k")
        reader.page.keyboard.type("nibble")
        reader.page.keyboard.press("Enter")
        reader.page.wait_for_selector("#search-results li a")


def test_the_switch_changes_the_mode_and_a_new_page_remembers_it(reading):
    with reading(DESKTOP, "light") as reader:
        reader.open("book/intro.html")
        theme = "document.documentElement.dataset.theme"
        for _ in range(3):  # auto, light, dark
            if reader.page.evaluate(theme) == "dark":
                break
            reader.page.click(".bd-header-article button.theme-switch-button")
        assert reader.page.evaluate(theme) == "dark"
        reader.open("book/glossary.html")
        assert reader.page.evaluate(theme) == "dark"


def test_on_a_phone_the_menu_opens_and_leads_to_a_page(reading):
    with reading(PHONE) as reader:
        reader.open("book/intro.html")
        assert not reader.page.locator("#pst-primary-sidebar").is_visible()
        reader.page.click("button.primary-toggle")
        # The theme moves the menu into a dialog when it opens.
        menu = reader.page.locator("#pst-primary-sidebar-modal nav a", has_text="Glossary")
        link = menu.first
        link.wait_for(state="visible")
        link.click()
        reader.page.wait_for_url("**/glossary.html")


def test_previous_and_next_walk_through_the_whole_book(reading):
    with reading() as reader:
        reader.open(PAGES[0])
        walked = [PAGES[0]]
        while (step := reader.page.query_selector("a.right-next")) is not None:
            reader.page.goto(reader.page.evaluate("a => a.href", step))
            walked.append(reader.page.url.removeprefix(reader.address + "/"))
        assert walked == PAGES


def test_the_checks_see_what_they_are_for(reading):
    """Plant one fault of each kind; each is found."""
    with reading() as reader:
        reader.open("book/setup.html")
        page = reader.page
        page.evaluate("document.querySelector('article p').style.color = 'rgb(200, 200, 200)'")
        assert "rgb(200, 200, 200)" in str(page.evaluate("probes.contrast()")["problems"])
        page.evaluate("document.querySelector('article p').style.width = '3000px'")
        assert page.evaluate("probes.width()")[0].startswith("3")
        page.evaluate("document.querySelector('article').append(document.createElement('h6'))")
        assert "jump to h6" in page.evaluate("probes.structure()")
        page.evaluate("new Image().src = 'https://example.org/pixel.png'")
        page.evaluate("console.error('planted')")
        page.evaluate("fetch('/nowhere.js')")
        page.wait_for_timeout(500)
        assert reader.outside == ["https://example.org/pixel.png"]
        assert any("planted" in error for error in reader.errors)
        assert any("nowhere.js" in failed for failed in reader.failed)
