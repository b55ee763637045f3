"""The numbers of the text: each stands in an output nearby, is worked out, or has its source.

Looked at are numbers with a decimal point, a comma after the thousands, a percent sign or a unit of
memory: these are results. Another whole number may be a rank, a chapter or a year.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import nbformat
import pytest

from tools.notebooks import ROOT, chapters, read

UNITS = {"million": 1e6, "billion": 1e9, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
UNIT = "|".join(UNITS)
# A number and its unit. In "37, 40 and 80 %" and in "3 to 4 GB" the unit is that of all.
NUMBER = re.compile(
    r"(?<![\w.,/^_{}\\$-])(?P<digits>\d+(?:,\d{3})*(?:\.(?P<places>\d+))?)"
    rf"(?=(?:(?:, | and | to | or |–)[\d.]+)*\s?(?P<unit>%|(?:{UNIT})\b)|(?!\w))(?![.,]?\d)"
)
RESULT = re.compile(r"[.%]|\d,\d{3}|B$|illion$")
PRINTED = re.compile(
    r"(?<![\w.])(?P<digits>\d+(?:,\d{3})*(?:\.(?P<places>\d+))?)(?:e(?P<power>[+-]?\d+))?"
    rf"(?:\s?(?P<unit>%|(?:{UNIT})\b))?"
)
RANGE = re.compile(rf"\s?(?:%|{UNIT})? to ")
HEADING = re.compile(r"^## (.*)$", re.MULTILINE)
# The opening and these announce or repeat what stands anywhere in the chapter.
WHOLE_CHAPTER = re.compile(r"^$|Summary|Your turn|What to do next|Further reading")
CITED = re.compile(r"\]\(http|\]\(\.\./book/references")
QUOTE = re.compile(r"^> ?", re.MULTILINE)
PARAGRAPH = re.compile(r"\n\s*\n|\n(?=[-|])")
PAPER = re.compile(r"\b([Pp]aper|[Tt]able|[Aa]ppendix)\b")  # goes on about what is cited beside it
SECTION = re.compile(r"\b[Ss]ection (\d+)\b|\bfirst picture\b")  # the picture of the opening
SENTENCE = re.compile(r"(?<=[.!?:;])\s+(?=[A-Z*[])")
CHAPTER = re.compile(r"\((?:\.\./notebooks/)?(\d\d_\w+\.ipynb)#([^)]+)\)")
# What everybody can look up: 16-bit patterns, float16's largest number, bitsandbytes' bound, the
# sizes of graphics cards and of the models with such names, and the usual level of an interval.
CONSTANTS = (
    "1 kB 1 MB 1 GB 1 GiB 65,536 65,504 100,000 7 billion 65 billion 95 % "
    "8 GB 24 GB 40 GB 48 GB 80 GB 24 GiB 48 GiB"
)
QUOTED = re.compile(r'"[^"]{,200}"')  # somebody else's words
# An answer to choose may be a wrong one.
CHOICE = re.compile(r"(^|\s)[-*]?\s*\(?[a-e]\)\s.*", re.DOTALL)
OPENING = re.compile(r"run: about ")  # the opening's times are written and tested elsewhere
HIDDEN = {"remove-cell", "remove-input", "hide-input"}
MATHS = [  # how a formula is written, and how Python writes it
    (r"\\[td]?frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)"),
    (r"\\cdot|\\times|[×·]", "*"),
    (r"\\approx", "≈"),
    (r"\{,\}", ","),
    (r"\^\{?([\d.]+)\}?", r"**\1"),
    (r"\\[,;% ]|[$`{}]", ""),
    ("−", "-"),
]


class Shown(NamedTuple):
    """A number of an output: its value, the step of its last digit, its unit."""

    value: float
    step: float
    unit: str
    heading: str  # the units that the output names without a number, as at the head of a column
    line: str  # where it stands: both ends of a range are in one line


def shown(text: str) -> set[Shown]:
    """Every number in an output."""
    heading = " ".join(re.findall(rf"%|\b(?:{UNIT})\b", PRINTED.sub("", text)))
    found = set()
    for line in text.splitlines():
        for match in PRINTED.finditer(line):
            power = 10.0 ** int(match["power"] or 0)
            value = float(match["digits"].replace(",", "")) * power
            step = 10.0 ** -len(match["places"] or "") * power
            found.add(Shown(value, step, match["unit"] or "", heading, line))
    return found


def same(match: re.Match, known: Shown) -> bool:
    """Whether a number of the text is this one, rounded as the text rounds it."""
    digits, unit = match["digits"], match["unit"] or ""
    value, step = float(digits.replace(",", "")), 10.0 ** -len(match["places"] or "")
    if "," in digits and "." not in digits:  # 196,600 is rounded to hundreds
        step = 10.0 ** (len(digits) - len(digits.rstrip("0")))
    if unit == known.unit:
        scale = 1.0
    elif known.unit in UNITS or known.unit == "%":
        return False
    elif unit in known.heading.split():
        scale = 1.0
    elif unit == "%":
        if known.value > 1 or known.step == 1:
            return False
        scale = 0.01
    else:
        scale = UNITS.get(unit, 1.0)
    finer = known.step / scale / step  # the text may round one digit away, and more only of wholes
    least = 0.0 if scale > 1 or "," in digits else 0.0999
    return abs(known.value / scale - value) <= 0.500001 * step and least <= finer <= 1.000001


def printed(cell) -> set[Shown]:
    """The numbers that a cell shows: in its outputs, and whole ones that its code takes in."""
    found, typed = set(), set(re.findall(r"\d+(?:\.\d+)?", cell.source))
    for output in cell.outputs:
        text = output.get("text", "") or output.data.get("text/plain", "")
        if "image/png" in output.get("data", {}):  # a picture's description may be typed
            text = PRINTED.sub(lambda m: "" if m["digits"] in typed else m[0], text)
        found |= shown(text)
    if not HIDDEN & set(cell.metadata.get("tags", [])):
        found |= {Shown(float(n), 1.0, "", "", "") for n in inputs(ast.parse(cell.source))}
    return found


def inputs(node: ast.AST) -> list[int]:
    """The whole numbers in code; what an assertion expects is no input."""
    if isinstance(node, ast.Assert):
        return []
    if isinstance(node, ast.Constant):
        return [node.value] if type(node.value) is int and node.value > 999 else []
    return [number for child in ast.iter_child_nodes(node) for number in inputs(child)]


def sections(cells) -> list[tuple[str, list[str], set[Shown]]]:
    """A chapter from heading to heading: the heading, the texts and the printed numbers."""
    found = [("", [], set())]
    for cell in cells:
        if cell.cell_type == "code":
            found[-1][2].update(printed(cell))
        elif cell.cell_type == "markdown":
            first, *rest = HEADING.split(re.sub(r"```.*?```", "", cell.source, flags=re.DOTALL))
            found[-1][1].append(first)
            for heading, text in zip(rest[::2], rest[1::2], strict=True):
                found.append((heading, [text], set()))
    return found


def slug(heading: str) -> str:
    """The anchor of a heading, as MyST makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@cache
def shown_in(name: str, anchor: str) -> frozenset[Shown]:
    """What the section of a chapter prints that an anchor names."""
    parts = sections(read(ROOT / "notebooks" / name).cells)
    chosen = [numbers for heading, _, numbers in parts if slug(heading) == anchor]
    return frozenset().union(*chosen)


def prose(paragraph: str) -> str:
    """The words on one line: no formulas, no code, no tags."""
    for pattern, left in (r"\$\$.*?\$\$", ""), (r"\$[^$]*\$", "x"), (r"`[^`]*`|<[^>]+>", ""):
        paragraph = re.sub(pattern, left, paragraph, flags=re.DOTALL)
    return " ".join(paragraph.split())


def calculation(text: str) -> tuple[float, str] | None:
    """The sum, product or quotient with which a text ends: what it comes to, and itself."""
    text = re.sub(r"(?<=\d),(?=\d{3})", "", text)
    text = re.sub(r"([\d.]+) (million|billion)", lambda m: f"{float(m[1]) * UNITS[m[2]]:.0f}", text)
    text = re.sub(r"(?<=[\d)]) [A-Za-z]+( [a-z]+)*(?= [-+*/)]|\s*$)", "", text)  # as in "12 bytes"
    for start in re.finditer(r"(?<![\w.])[\d(]", text):
        tail = text[start.start() :].strip()
        if re.fullmatch(r"[\d.\s()*/+-]+", tail) and re.search(r"[*/+-]", tail):
            if re.search(r"\*\*\d{4}|\*\*.*\*\*", tail):  # would not end
                return None
            try:
                return float(eval(tail)), tail
            except (SyntaxError, TypeError, ArithmeticError):
                continue
    return None


def worked_out(paragraph: str) -> set[Shown]:
    """The numbers of the calculations in a paragraph that are right, such as "8 / 64 = 12.5 %"."""
    for pattern, plain in MATHS:
        paragraph = re.sub(pattern, plain, paragraph)
    found = set()
    for left, right in pairwise(re.split(r"[=≈]", " ".join(paragraph.split()))):
        made, result = calculation(left), NUMBER.match(right.lstrip())
        if made is None or result is None:
            continue
        unit, units = result["unit"] or "", " ".join(re.findall(rf"\b(?:{UNIT})\b", left))
        exact = 10.0 ** -len(result["places"] or "")
        for scale in (1.0, 0.01 if unit == "%" else UNITS.get(unit, 1.0)):
            if same(result, Shown(made[0] / scale, exact, unit, "", "")):
                found |= shown(f"{made[1]}; {units}") | shown(f"{result[0]} {unit}")
    return found


def unproven(cells) -> list[str]:
    """The results in a chapter's text that are in no output near them, and have no source."""
    parts, missing = sections(cells), []
    everything = set().union(*(numbers for _, _, numbers in parts))
    numbered = {heading.partition(" ")[0]: numbers for heading, _, numbers in parts}
    for heading, texts, numbers in parts:
        here = everything if WHOLE_CHAPTER.search(heading) else numbers
        for paragraph in PARAGRAPH.split(QUOTE.sub("", "\n\n".join(texts))):
            if OPENING.search(paragraph):
                continue
            known = here | shown(CONSTANTS) | worked_out(paragraph)
            sentences = SENTENCE.split(CHOICE.sub("", prose(paragraph)))
            for i, sentence in enumerate(sentences):
                around = " ".join(sentences[max(i - 1, 0) : i + 2])
                if CITED.search(around if PAPER.search(sentence) else sentence):
                    continue
                named = {n for name in SECTION.findall(sentence) for n in numbered.get(name, ())}
                named = named.union(*(shown_in(*link) for link in CHAPTER.findall(sentence)))
                words = re.sub(r"\]\([^)]*\)", "]", QUOTED.sub("", sentence))
                before = None  # the first number of a range has the second beside it
                for match in NUMBER.finditer(words):
                    told = match["digits"] + " " * bool(match["unit"]) + (match["unit"] or "")
                    lines = {k.line for k in known | named if same(match, k)}
                    if before and RANGE.fullmatch(words[before[0] : match.start()]):
                        lines &= before[1]
                    before = match.end(), lines
                    if RESULT.search(told) and not lines:
                        missing.append(f"{told!r} in {sentence[:120]!r}")
    return missing


@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.stem)
def test_every_result_in_the_text_is_in_an_output(path):
    assert unproven(read(path).cells) == []


OUTPUT = """\
recorded: 16 directions hold 37% to 79%
by chance 52% and 91%
QLoRA: mean +0.1, loss 6.71, gain 7.04
LoRA copies 31% to 42%
QLoRA copies 16% to 23%
65B: adapters in 16 bits 45.5 GB, in 32 bits 48.8 GB
one more level: 12 MB
pairs: 0.1230 of 1,234,567, at least 90%
"""
ELSEWHERE = "a copy: 16 MB, 82.0%, error 0.3416, of them right 4.6\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("16 directions hold 37 % to 79 %.", False),
        ("16 directions hold 52 % to 79 %.", True),
        ("16 directions hold 37 % to 91 %.", True),
        ("A loss of 6.7 points is not excluded.", False),
        ("A loss of 4.6 points is not excluded.", True),
        ("QLoRA copies 16 % to 23 % of new names.", False),
        ("QLoRA copies 16 % to 42 % of new names.", True),
        ("32 bits cost 48.8 − 45.5 = 3.3 GB more.", False),
        ("32 bits cost 3.3 GB more.", True),
        ("32 bits cost 48.8 − 45.5 = 2.9 GB more.", True),
        ("A third level saves 12 MB.", False),
        ("A third level saves 16 MB.", True),
        ("A third level saves 12 MB, and a copy in section 2 has 16 MB.", False),
        ("At least 90 % of the pairs are right.", False),
        ("At least 80 % of the pairs are right.", True),
        ("The share is 12.3 %.", False),
        ("The share is 12.34 %.", True),
        ("It is right 7 % of the time.", True),
        ("The threshold is 0.55.", True),
        ("Rank 4 of width 4,096 is thin.", False),
        ("Of 1,234,567 orders, 1.2 million, about 1,234,600.", False),
        ("It has 1,234,500 parameters.", True),
        ("bfloat16 has 65,536 patterns.", False),
        ("8 of 64 is 8 / 64 = 12.5 %.", False),
        ("8 of 64 is 8 / 64 = 14.5 %.", True),
        ("The paper says 4.127 bits.", True),
        ("The [paper](https://arxiv.org/abs/2305.14314) says 4.127 bits.", False),
        ("The [paper](https://arxiv.org/abs/2305.14314) says so. Table 4 has 53.1.", False),
        ("The [paper](https://arxiv.org/abs/2305.14314) says so. Ours has 53.1.", True),
        ("780.3 GB ([chapter 8](08_the_memory_budget.ipynb)) are held.", True),
        ("45.5 GB ([it](08_the_memory_budget.ipynb#2-forty-eight)) and 42.4 GiB are held.", False),
        ('They say "75 % less memory".', False),
        ("They say 75 % less memory.", True),
        ("Read: 5 minutes · run: about 2.5 minutes", False),
    ],
)
def test_a_number_from_nowhere_is_found(text, found):
    cells = [
        _cell("markdown", f"# Title\n\n## 1 Near\n\n{text}"),
        _cell("code", "width = 4096\nassert width > 0.55", OUTPUT),
        _cell("markdown", "## 2 Far"),
        _cell("code", "width", ELSEWHERE),
    ]
    assert bool(unproven(cells)) == found


def _cell(kind, source, text=""):
    made = {"code": nbformat.v4.new_code_cell, "markdown": nbformat.v4.new_markdown_cell}[kind]
    cell = made(source)
    if kind == "code":
        cell.outputs = [nbformat.v4.new_output("stream", text=text)]
    return cell
