"""Rejoin a chapter in the middle: `qlora_lab.checkpoint("4.3")`.

Who comes late, or whose kernel died, wants the variables that a section starts with, not the
half hour before it. `checkpoint` runs the chapter's cells up to that section, without figures and
printed lines, with recorded training runs (`qlora_lab.recorded`), and leaves the same names behind
as the chapter does. The cells travel with the package as `assets/sections.json`, which
`make notebooks` writes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from qlora_lab.errors import InputError, shown

FILE = Path(__file__).resolve().parent / "assets" / "sections.json"
HEADING = re.compile(r"^## (?:(\d+)\.? )?(.+)$", re.MULTILINE)


def checkpoint(section: str, namespace: dict[str, Any] | None = None) -> None:
    """Bring the state in which a section of a chapter starts.

    Args:
        section: Chapter and section as the headings count them: "4.3" is section 3 of chapter 4.
        namespace: Where the names go; in a notebook, the notebook's own variables.

    Raises:
        InputError: There is no such chapter or section, or no notebook to bring the names to.
    """
    if not isinstance(namespace, dict | None):
        raise InputError(f"namespace {shown(namespace)} is not possible; give a dictionary")
    chapter, number = _find(section)
    if namespace is None:
        shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
        if shell is None:
            raise InputError("checkpoint fills a notebook's variables; elsewhere give namespace={}")
        namespace = shell.user_ns
    before = set(namespace)
    start = time.perf_counter()
    with _quietly():
        for at, source in chapter["cells"]:
            if at is None or at >= number:
                break
            exec(compile(source, f"<chapter {section}>", "exec"), namespace)
    names = sorted(name for name in set(namespace) - before if not name.startswith("_"))
    print(f"{chapter['title']}, at the start of section {number}: {len(names)} new names")
    print(f"  ({time.perf_counter() - start:.0f} s) {', '.join(names)}")


def _find(section: str) -> tuple[dict[str, Any], int]:
    chapters = _chapters()
    match = re.fullmatch(r"(\d+)\.(\d+)", str(section))
    if match is None:
        raise InputError(
            f'{shown(section)} is no section; write chapter and section, such as "4.3"'
        )
    chapter = chapters.get(match[1])
    if chapter is None:
        raise InputError(f"there is no chapter {match[1]}; there are {', '.join(chapters)}")
    number = int(match[2])
    if number not in chapter["sections"]:
        last = chapter["sections"][-1]
        raise InputError(f"chapter {match[1]} has no section {number}; it has 1 to {last}")
    return chapter, number


@cache
def _chapters() -> dict[str, dict[str, Any]]:
    return json.loads(FILE.read_text(encoding="utf-8"))


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No figures, no output, and recorded runs in place of training."""
    from qlora_lab import plots

    fast, show = os.environ.get("FAST"), plots.show
    os.environ["FAST"], plots.show = "quiet", lambda *_, **__: None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        plots.show = show
        if fast is None:
            del os.environ["FAST"]
        else:
            os.environ["FAST"] = fast


def cut(notebooks: dict[str, list[tuple[str, str]]]) -> dict[str, dict[str, Any]]:
    """Cut chapters into sections.

    Args:
        notebooks: For each notebook's name its cells in order, as (kind, source) with the kind
            "markdown" or "code", without the bootstrap cell.

    Returns:
        By chapter number: its title, the numbers of its sections, and its code cells, each with
        the number of the section that it stands in (0 before the first, None after the last).
    """
    found = {}
    for name, cells in notebooks.items():
        at: int | None = 0
        title, sections, code = "", [], []
        for kind, source in cells:
            if kind == "code":
                code.append([at, source])
                continue
            if not title:
                title = source.split("\n", 1)[0].lstrip("# ")
            for number, _ in HEADING.findall(source):
                at = int(number) if number else None
                sections += [at] if number else []
        found[str(int(name[:2]))] = {"title": title, "sections": sections, "cells": code}
    return found
