"""The built pages as files: every internal link and anchor leads somewhere, nothing is fetched."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from tools.book import expected_pages
from tools.notebooks import ROOT, chapters
from tools.set_url import configured_url

# Attributes that make a browser fetch something, by tag.
FETCHING = {
    "script": "src",
    "img": "src",
    "iframe": "src",
    "source": "src",
    "video": "src",
    "link": "href",
}


class Page(HTMLParser):
    """What a page refers to and what can be referred to in it."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()
        self.images: list[dict] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if values.get("id"):
            self.anchors.add(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in FETCHING and values.get(FETCHING[tag]):
            self.fetched.append(values[FETCHING[tag]])
        if tag == "img":
            self.images.append(values)


def broken(name: str, pages: dict[str, Page], html) -> list[str]:
    """Return the internal links of a page that lead nowhere."""
    problems = []
    here = html / name
    for link in pages[name].links + pages[name].fetched:
        parts = urlsplit(link)
        if parts.scheme or link.startswith("//"):
            continue
        target = (here.parent / unquote(parts.path)).resolve() if parts.path else here.resolve()
        if not target.is_file():
            problems.append(f"{link}: no such file")
            continue
        anchor = unquote(parts.fragment)
        known = pages.get(target.relative_to(html.resolve()).as_posix())
        if anchor and known is not None and anchor not in known.anchors:
            problems.append(f"{link}: no such anchor")
    return problems


@pytest.fixture(scope="module")
def pages(html):
    return {
        path.relative_to(html).as_posix(): Page(path.read_text(encoding="utf-8"))
        for path in html.rglob("*.html")
        if "_static" not in path.relative_to(html).parts
    }


@pytest.mark.parametrize("page", expected_pages())
def test_every_internal_link_leads_somewhere(page, pages, html):
    assert broken(f"{page}.html", pages, html) == []


@pytest.mark.parametrize("page", expected_pages())
def test_a_page_names_no_file_of_anybody_elses(page, pages):
    outside = [url for url in pages[f"{page}.html"].fetched if urlsplit(url).netloc]
    assert outside == []


@pytest.mark.parametrize("page", expected_pages())
def test_every_picture_has_an_alternative_text(page, pages):
    # The logo stands beside the course's name and is decoration: its alternative is "".
    lacking = [image for image in pages[f"{page}.html"].images if image.get("alt") is None]
    generated = [i for i in pages[f"{page}.html"].images if "_images/" in (i.get("alt") or "")]
    assert lacking + generated == []


def test_a_planted_broken_link_and_anchor_are_found(html):
    text = '<a href="nowhere.html">x</a><a href="#gone">y</a><a href="#here" id="here">z</a>'
    problems = broken("index.html", {"index.html": Page(text)}, html)
    assert problems == ["nowhere.html: no such file", "#gone: no such anchor"]


def test_the_first_page_leads_to_the_landing_page(html):
    assert "book/intro.html" in (html / "index.html").read_text(encoding="utf-8")


def test_launch_buttons_are_there_with_an_address_and_only_then(html):
    url = configured_url()
    for path in chapters():
        page = (html / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        wanted = "colab.research.google.com/github" + url.removeprefix("https://github.com")
        assert (wanted in page) is bool(url)
        assert url or "colab.research" not in page


@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.stem)
def test_a_chapters_figures_bring_their_alt_texts_and_the_first_cell_stays_out(path, html, pages):
    shown = {image.get("alt") for image in pages[f"notebooks/{path.stem}.html"].images}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            alt = output.get("metadata", {}).get("image/png", {}).get("alt")
            assert alt is None or alt in shown
    page = (html / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
    assert "qlora_lab.bootstrap" not in page


def test_every_module_shows_its_public_names(html):
    import ast

    for path in sorted((ROOT / "qlora_lab").glob("[!_]*.py")):
        page = (html / "book" / "api" / f"{path.stem}.html").read_text(encoding="utf-8")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                if not node.name.startswith("_") and ast.get_docstring(node):
                    assert f'id="qlora_lab.{path.stem}.{node.name}"' in page, node.name


def test_every_figure_is_on_the_page_of_its_family(html):
    """`plots` is a folder: its functions are in the modules below it."""
    import ast

    page = (html / "book" / "api" / "plots.html").read_text(encoding="utf-8")
    found = 0
    for path in sorted((ROOT / "qlora_lab" / "plots").glob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                found += 1
                assert re.search(rf'id="qlora_lab\.plots\.(\w+\.)?{node.name}"', page), node.name
    assert found > 15


def test_the_api_page_leads_to_every_module(pages, html):
    modules = {f"{path.stem}.html" for path in (ROOT / "qlora_lab").glob("[!_]*.py")}
    article = (html / "book" / "api" / "index.html").read_text(encoding="utf-8")
    body = article.split("<article")[1].split("</article>")[0]
    assert modules <= set(Page(body).links)
