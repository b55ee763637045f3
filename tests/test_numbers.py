"""The numbers of the text: each stands in an output beside it, in a record, or has its source.

Looked at are numbers with a decimal point, a percent sign or a comma after the thousands: these are
results. A shorter whole number may be a rank, a chapter or a year.
"""

from __future__ import annotations

import json
import re
from functools import cache

import pytest

from tools.notebooks import ROOT, chapters, read

NUMBER = re.compile(r"(?<![\w.,/^_{}\\$-])\d[\d,]*(?:\.\d+)?(?:\s?%|\s(?:million|billion))?(?!\w)")
SCALE = {"million": 1e6, "billion": 1e9}
# A sentence that names its source, or works the number out before the reader's eyes.
SOURCE = re.compile(
    r"\]\(http|\]\(\.\./book/references|\b(paper|[Tt]able|appendix)\b|[=≈×·]|\bet al\.|\d / \d"
)
SENTENCE = re.compile(r"(?<=[.!?:;])\s+(?=[A-Z*])")
CHAPTER = re.compile(r"\((?:\.\./notebooks/)?(\d\d_\w+\.ipynb)[#)]")
RESULT = re.compile(r"[.%]|\d,\d{3}")
# What everybody can look up: 16-bit patterns, float16's largest number, bitsandbytes' bound.
CONSTANTS = {65_536.0, 65_504.0, 100_000.0}
CHOICE = re.compile(r"(^|\s)[-*]?\s*\(?[a-e]\)\s")  # an answer to choose may be a wrong one
OPENING = re.compile(r"run: about ")  # the opening's times are written and tested elsewhere


def prose(markdown: str) -> str:
    """The words of a cell: no code, no formulas, no addresses."""
    for pattern, left in (
        (r"```.*?```\s*", "= "),  # and what follows code, with the code
        (r"\$\$.*?\$\$", "="),  # what stands beside a formula can be followed there
        (r"\$[^$]*\$", "x"),
        (r"`[^`]*`", ""),
        (r"<[^>]+>", ""),
    ):
        markdown = re.sub(pattern, left, markdown, flags=re.DOTALL)
    return markdown


def values(text: str) -> set[float]:
    return {float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", text)}


def is_one_of(number: str, known: set[float]) -> bool:
    """Whether a number of the text is a known value, rounded as the text rounds it."""
    digits = re.match(r"[\d,]+(?:\.(\d+))?", number)
    value, places = float(digits[0].replace(",", "")), len(digits[1] or "")
    scale = next((s for word, s in SCALE.items() if word in number), 1.0)
    zeros = 0 if "." in number else len(digits[0]) - len(digits[0].rstrip("0"))
    if zeros and RESULT.search(digits[0]):  # 196,600 is rounded to hundreds, 0.20 and 100 are not
        places = -zeros
    half = 0.500001 * 10**-places
    near = (lambda x: abs(x / scale - value) <= half) if scale > 1 else None
    near = near or (lambda x: abs(x - value) <= half or abs(100 * x - value) <= half)
    return any(near(x) for x in known)


@cache
def recorded() -> frozenset[float]:
    """Every number below `results/`."""
    found: set[float] = set()

    def walk(node):
        if isinstance(node, dict):
            [walk(value) for key, value in node.items() if key != "provenance"]
        elif isinstance(node, list):
            [walk(value) for value in node]
        elif isinstance(node, int | float):
            found.add(abs(float(node)))

    for path in (ROOT / "results").rglob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        # The curve of a run is a thousand numbers: any would be found among them.
        walk({k: v for k, v in record.items() if k != "losses"} if isinstance(record, dict) else [])
    return frozenset(found)


def shown(cells) -> set[float]:
    """Every number in the code and in the outputs of a chapter."""
    text = ""
    for cell in cells:
        if cell.cell_type == "code":
            text += cell.source + "\n"
            for output in cell.outputs:
                text += output.get("text", "") + output.get("data", {}).get("text/plain", "") + "\n"
    return values(text)


@cache
def shown_in(name: str) -> frozenset[float]:
    return frozenset(shown(read(ROOT / "notebooks" / name).cells))


def unproven(cells) -> list[str]:
    """The results in a chapter's text that are in no output and no code, and have no source.

    Where the text says "recorded", the records below `results/` count too; where a paragraph links
    another chapter, what that chapter shows.
    """
    here = shown(cells)
    missing = []
    for cell in cells:
        if cell.cell_type != "markdown":
            continue
        for paragraph in re.split(r"\n\s*\n|\n(?=[-|>])", prose(cell.source)):
            if OPENING.search(paragraph) or CHOICE.search(paragraph):
                continue
            known = here | CONSTANTS | (recorded() if "recorded" in cell.source else set())
            known = known.union(*(shown_in(name) for name in CHAPTER.findall(paragraph)))
            for sentence in SENTENCE.split(" ".join(paragraph.split())):
                if SOURCE.search(sentence):
                    continue
                for match in NUMBER.finditer(sentence):
                    if RESULT.search(match[0]) and not is_one_of(match[0], known):
                        missing.append(f"{match[0]!r} in {sentence[:120]!r}")
    return missing


@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.stem)
def test_every_result_in_the_text_is_in_an_output(path):
    assert unproven(read(path).cells) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("NF4 loses 12.34 % here.", True),
        ("NF4 loses 12.3 % here.", False),
        ("It has 1,234,567 parameters.", False),
        ("It has 1,234,600 parameters.", False),
        ("It has 1,234,500 parameters.", True),
        ("It has 1,234,568 parameters.", True),
        ("bfloat16 has 65,536 patterns.", False),
        ("It has 1.2 million parameters.", False),
        ("It has 1.3 million parameters.", True),
        ("It is 0.05 % more.", True),
        ("It costs 4.127 bits (the paper, section 3).", False),
        ("It costs 4.127 bits (the paper, section 3). Ours costs 4.128.", True),
        ("780 GB ([chapter 8](08_the_memory_budget.ipynb)) are 783.4 GB.", False),
        ("780 GB ([chapter 5](05_double_quantization.ipynb)) are 783.4 GB.", True),
        ("Seven of 16 are 43.75 = 7 / 16.", False),
        ("Read: 5 minutes · run: about 2.5 minutes", False),
    ],
)
def test_a_number_from_nowhere_is_found(text, found):
    cells = [
        _cell("code", "print(share, n)", "0.1230 1,234,567\n"),
        _cell("markdown", f"# Title\n\n{text}"),
    ]
    assert bool(unproven(cells)) == found


def _cell(kind, source, text=""):
    import nbformat

    made = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}[kind]
    cell = made(source)
    if kind == "code":
        cell.outputs = [nbformat.v4.new_output("stream", text=text)]
    return cell
