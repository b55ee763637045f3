"""checkpoint("4.3"): the names that a section starts with; one clear line for a wrong section."""

import json
import os

import pytest

import qlora_lab
from qlora_lab import plots, sections
from qlora_lab.errors import InputError
from tools import derive
from tools.notebooks import chapters

CELLS = [
    ("markdown", "# A chapter\n\nText."),
    ("code", "start = 1"),
    ("markdown", "## 1 First\n\n### Exercise 1: one\n"),
    ("code", "first = start + 1"),
    ("markdown", "Text.\n\n## 2. Second"),
    ("code", "second = 0"),
    ("markdown", "## Summary"),
    ("code", "after = 0"),
]


def test_cut():
    found = sections.cut({"07_name": CELLS})
    assert found == {
        "7": {
            "title": "A chapter",
            "sections": [1, 2],
            "cells": [
                [0, "start = 1"],
                [1, "first = start + 1"],
                [2, "second = 0"],
                [None, "after = 0"],
            ],
        }
    }


@pytest.fixture
def small(monkeypatch):
    """One small chapter, with a figure and a printed line in it."""
    cells = [*CELLS[:4], ("code", "import os, qlora_lab.plots as p\np.show(1 / 1)\nprint('x')")]
    cells += [("code", "fast = os.environ['FAST']"), *CELLS[4:]]
    monkeypatch.setattr(sections, "_chapters", lambda: sections.cut({"07_name": cells}))


def test_it_runs_up_to_the_section_and_says_what_there_is(small, capsys, monkeypatch):
    monkeypatch.setenv("FAST", "0")
    show, found = plots.show, {}
    qlora_lab.checkpoint("7.2", found)
    assert found["first"] == 2 and found["fast"] == "quiet" and "second" not in found
    assert os.environ["FAST"] == "0" and plots.show is show
    assert (
        capsys.readouterr().out.splitlines()[0]
        == "A chapter, at the start of section 2: 5 new names"
    )
    found = {}
    qlora_lab.checkpoint("7.1", found)
    assert "start" in found and "first" not in found


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("7", "write chapter and section"),
        ("seven.one", "write chapter and section"),
        (None, "write chapter and section"),
        ("8.1", "there is no chapter 8; there are 7"),
        ("7.3", "chapter 7 has no section 3; it has 1 to 2"),
    ],
)
def test_no_such_section(small, section, message):
    with pytest.raises(InputError, match=message):
        qlora_lab.checkpoint(section, {})


def test_outside_a_notebook_it_asks_for_a_place(small):
    with pytest.raises(InputError, match="namespace"):
        qlora_lab.checkpoint("7.1")
    with pytest.raises(InputError, match="namespace 3 is not possible; give a dictionary"):
        qlora_lab.checkpoint("7.1", 3)


def test_a_section_runs_from_its_checkpoint():
    """The fifth chapter's third section needs what came before; from its checkpoint it runs."""
    names: dict = {"__name__": "__main__"}
    qlora_lab.checkpoint("5.3", names)
    cells = [source for at, source in sections._chapters()["5"]["cells"] if at == 3]
    assert cells
    with pytest.raises(NameError):
        exec(cells[0], {})
    with sections._quietly():
        for source in cells:
            exec(source, names)


def test_what_travels_with_the_package_is_what_the_chapters_say():
    assert sections.FILE.read_text("utf-8") == derive.sections_text()
    assert derive.STATUS.read_text("utf-8") == derive.status_text()
    assert derive.status_text().count("../notebooks/") == len(chapters())


def test_no_chapter_takes_twice_what_it_may():
    times = json.loads(derive.TIMES.read_text("utf-8"))
    took = {path.stem: times[path.stem]["seconds"] for path in chapters()}
    assert {n: s for n, s in took.items() if s > 2 * derive.budget(n)} == {}
    assert sum(took.values()) <= 2 * derive.ALL
