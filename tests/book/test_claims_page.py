"""What a reader marks before chapter 1 is there again in chapter 12, and stays in the browser."""

import json

from tools.book import ROOT

CLAIMS = json.loads((ROOT / "qlora_lab/assets/claims.json").read_text(encoding="utf-8"))
PRETEST, CHAPTER = "book/pretest.html", "notebooks/12_claims_checked.html"


def test_every_claim_is_asked_and_none_answered(reading):
    with reading() as reader:
        reader.open(PRETEST)
        fields = reader.page.query_selector_all("form.pretest fieldset")
        assert len(fields) == len(CLAIMS) >= 30
        for field, claim in zip(fields, CLAIMS, strict=True):
            assert claim["claim"] in field.inner_text()
        assert "data-verdict" not in reader.page.content()
        assert "verdict" not in reader.page.inner_html("form.pretest")


def test_marks_are_kept_and_met_again(reading):
    right, wrong = CLAIMS[0], CLAIMS[5]
    other = next(v for v in ("true", "false") if v != wrong["verdict"])
    with reading() as reader:
        page = reader.page
        reader.open(PRETEST)
        for claim, belief in ((right, right["verdict"]), (wrong, other)):
            page.check(f"fieldset[data-claim='{claim['id']}'] input[value='{belief}']")
        page.select_option(f"fieldset[data-claim='{wrong['id']}'] select", "certain")
        reader.open(PRETEST)  # as on another day
        assert "2 of" in page.inner_text(".pretest-status")
        assert page.is_checked(
            f"fieldset[data-claim='{right['id']}'] input[value='{right['verdict']}']"
        )

        reader.open(CHAPTER)
        marks = page.query_selector_all("p.claim-mark")
        assert len(marks) == 2
        assert "right" in marks[0].get_attribute("class")
        assert "wrong" in marks[1].get_attribute("class")
        assert "(certain)" in marks[1].inner_text()
        summary = page.inner_text("#your-marks")
        assert f"Of {len(CLAIMS)} claims you marked 2; 1 as this chapter does." in summary
        assert "Where you were certain: 0 of 1." in summary

        reader.open(PRETEST)
        page.click("form.pretest button[type=reset]")
        page.wait_for_function(
            "() => document.querySelector('.pretest-status').textContent.startsWith('0 of')"
        )
        reader.open(CHAPTER)
        assert page.query_selector("p.claim-mark") is None
        assert reader.outside == [] and reader.errors == []
