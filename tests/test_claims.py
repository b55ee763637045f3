"""Chapter 12 answers what the pre-test asks: the same claims, word for word, with a verdict."""

import json
import re

from tools.notebooks import NOTEBOOKS, ROOT, read

CLAIMS = json.loads((ROOT / "qlora_lab/assets/claims.json").read_text(encoding="utf-8"))
ANCHOR = re.compile(r'<a id="claim-(\d+)" data-verdict="(\w+)"></a>\n\n')
ENTRY = re.compile(
    ANCHOR.pattern + r'\*\*(\d+)\. "(.+?)"\*\*\s+Heard (?:on|in|from) ([\w\s\']+)\.\n\n'
    r"\*\*(True of|True|False)\.?\*\*(.+?)(?=\n\n<a id|\n\n## |\Z)",
    re.DOTALL,
)
OPENING = {"true": "True", "depends": "True of", "false": "False"}


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
        assert ".ipynb)" in reason or ".md)" in reason or "](http" in reason, claim
    assert len(ANCHOR.findall(text())) == len(CLAIMS)
    assert [found[number] for number in sorted(found)] == CLAIMS
