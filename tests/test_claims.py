"""Chapter 12 answers what the pre-test asks: the same claims, word for word, with a verdict.

Each verdict has a number that decides it, and a link to where that number was found.
"""

import json
import re

import pytest

from tools.notebooks import NOTEBOOKS, ROOT, read

CLAIMS = json.loads((ROOT / "qlora_lab/assets/claims.json").read_text(encoding="utf-8"))
ANCHOR = re.compile(r'<a id="claim-(\d+)" data-verdict="(\w+)"></a>\n\n')
ENTRY = re.compile(
    ANCHOR.pattern + r'\*\*(\d+)\. "(.+?)"\*\*\s+Heard (?:on|in|from) ([\w\s\']+)\.\n\n'
    r"\*\*(True of|True|False)\.?\*\*(.+?)(?=\n\n<a id|\n\n## |\Z)",
    re.DOTALL,
)
OPENING = {"true": "True", "depends": "True of", "false": "False"}
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
# Digits that decide nothing: where something stands, and the names of things ("16-bit", "7B").
PLACES = re.compile(r"\b(?:claims?|chapters?|sections?|appendix|table) \d+", re.IGNORECASE)
NAMES = re.compile(r"\bin \d+ bits\b|\b\d+(?:- or \d+)?-bit\b|\b\d+B\b")
DIGIT = re.compile(r"(?<![\w.])\d")


def lacks(reason: str) -> list[str]:
    """What the evidence of a verdict lacks: a number of its own, a link."""
    found = [] if any(is_evidence(address) for _, address in LINK.findall(reason)) else ["a link"]
    words = NAMES.sub("", PLACES.sub("", LINK.sub("", reason)))
    return found if DIGIT.search(words) else [*found, "a number"]


def is_evidence(address: str) -> bool:
    """Whether a link leads to a chapter, a page of the book or a source."""
    return address.startswith("http") or address.partition("#")[0].endswith((".ipynb", ".md"))


def text() -> str:
    cells = read(NOTEBOOKS / "12_claims_checked.ipynb").cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def test_claims_are_numbered_and_of_three_kinds():
    assert [claim["id"] for claim in CLAIMS] == list(range(1, len(CLAIMS) + 1))
    assert len({claim["claim"] for claim in CLAIMS}) == len(CLAIMS) >= 30
    assert {claim["verdict"] for claim in CLAIMS} == set(OPENING)


def test_every_claim_is_answered_once_in_the_words_in_which_it_is_asked():
    found = {}
    for entry in ENTRY.finditer(text()):
        anchor, verdict, number, claim, heard, opening, reason = entry.groups()
        assert anchor == number and int(number) not in found
        found[int(number)] = {
            "id": int(number),
            "claim": " ".join(claim.split()).replace("`", "").replace("×", "x"),
            "heard": " ".join(heard.split()),
            "verdict": verdict,
        }
        assert opening == OPENING[verdict], claim
        assert lacks(reason) == [], claim
    assert len(ANCHOR.findall(text())) == len(CLAIMS)
    assert [found[number] for number in sorted(found)] == CLAIMS


CHAPTER_2 = "[Chapter 2](02_lora_in_a_transformer.ipynb#2-how-wide)."


@pytest.mark.parametrize(
    ("reason", "lacking"),
    [
        (f" It adds 18 numbers. {CHAPTER_2}", []),
        (f" It saves 74.2 %. {CHAPTER_2}", []),
        (f" A 4-bit 7B is float16 or NF4 in 16 bits (claim 3). {CHAPTER_2}", ["a number"]),
        (f" The model is ruined. {CHAPTER_2}", ["a number"]),
        (" It adds 18 numbers.", ["a link"]),
        (" It adds 18 numbers. [Above](#claim-3).", ["a link"]),
        (" The model is ruined.", ["a link", "a number"]),
    ],
)
def test_a_verdict_without_number_or_link_is_found(reason, lacking):
    assert lacks(reason) == lacking


def test_every_claim_of_the_chapter_is_found_when_it_loses_its_number_or_its_link():
    reasons = [entry[7] for entry in ENTRY.finditer(text())]
    assert len(reasons) == len(CLAIMS)
    for reason in reasons:
        assert lacks(LINK.sub(r"\1", reason)) == ["a link"]
        links = " ".join(link[0] for link in LINK.finditer(reason))
        assert lacks(re.sub(r"\d", "n", LINK.sub("", reason)) + links) == ["a number"]
