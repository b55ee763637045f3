"""The appendix: every fault's script says what it found; every path that a page names exists."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import faults
from experiments import next as next_
from experiments.faults import ABSENT, NOT_HERE, PRESENT, SCRIPTS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / f"book/{name}.md" for name in ("found_on_the_way", "troubleshooting")]
PAGES.append(ROOT / "book/what_people_ask_next.md")
AVX512 = {
    "row_scales": faults.has_avx512f,
    "repack_crash": faults.has_avx512bf16,
    "repack_merge": faults.has_avx512bf16,
    "repack_gradient": faults.has_avx512bf16,
    "repack_save": faults.has_avx512bf16,
}
# A path in backticks that begins with a folder of the repository.
FOLDERS = ("qlora_lab", "experiments", "tests", "tools", "book", "notebooks", "results")
NAMED = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)`")
LINKED = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[\w-]+)?\)")


def test_every_script_is_listed():
    here = {path.stem for path in (ROOT / "experiments/faults").glob("*.py")}
    assert here - {"__init__", "__main__"} == set(SCRIPTS)


# 0.284, 82 %, 202,496; not what was "about" so.
RESULT = re.compile(r"(?<!about )(?<![\w.,])(\d[\d,]*\.\d+|\d+,\d{3}|\d+(?= %))")
NOT_TOLD = re.compile(r"```.*?```|`[^`]*`|\[[^]]*\]\([^)]*\)", re.DOTALL)


def told(name: str) -> set[str]:
    """The results that the appendix tells of one script, as they stand in its text."""
    sections = PAGES[0].read_text("utf-8").split("\n## ")
    (section,) = (s for s in sections if f"`experiments/faults/{name}.py` ·" in s)
    did = section.partition("**What it did.**")[2].partition("**Cause.**")[0]
    # A sentence marked A tells what another machine gave.
    sentences = [s for s in re.split(r"(?<=\.)\s", did) if "{sup}`A`" not in s]
    blocks = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    return set().union(*map(RESULT.findall, [NOT_TOLD.sub("", " ".join(sentences)), *blocks]))


def is_shown(number: str, output: str) -> bool:
    places, value = len(number.partition(".")[2]), float(number.replace(",", ""))
    numbers = [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*", output)]
    return any(abs(k * n - value) <= 0.51 * 10**-places for n in numbers for k in (1, 100))


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.filterwarnings("ignore")
def test_a_script_says_what_it_found(name, capsys):
    word = importlib.import_module(f"experiments.faults.{name}").main()
    shown = capsys.readouterr().out
    assert [number for number in sorted(told(name)) if not is_shown(number, shown)] == []
    assert f"-> {word}: " in shown
    assert str(ROOT) not in shown
    if name in AVX512:
        # Never claimed where the CPU does not run the code.
        assert word in ((PRESENT, ABSENT) if AVX512[name]() else (NOT_HERE,))
    else:
        assert word in (PRESENT, ABSENT)


def test_the_results_told_are_looked_for():
    assert told("footprint") == {"81,536", "202,496", "5.1", "12.6"}
    assert {"0.284", "0.149"} <= told("row_scales") and "82" in told("repack_save")
    assert is_shown("12.6", "left out (12.6% of the weights)") and not is_shown("12.6", "0.125")


def test_a_script_runs_alone():
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "experiments.faults.half_checkpoint"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"-> {PRESENT}: " in run.stdout or f"-> {ABSENT}: " in run.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_path_that_a_page_names_exists(page):
    text = page.read_text("utf-8")
    named = NAMED.findall(text)
    missing = [path for path in named if not (ROOT / path).exists()]
    missing += [link for link in LINKED.findall(text) if not (page.parent / link).exists()]
    assert not missing


def test_the_table_is_that_of_the_recorded_runs():
    text = PAGES[2].read_text("utf-8")
    shown = text.partition(next_.FIRST_MARK)[2].partition(next_.LAST_MARK)[0].strip()
    assert shown == next_.table(next_.summarise(ROOT / next_.OUT))


def test_every_method_has_three_seeds_of_equal_length():
    runs = next_.summarise(ROOT / next_.OUT)
    assert {name: len(row["validation_loss"]) for name, row in runs.items()} == dict.fromkeys(
        runs, 3
    )


def test_what_the_page_reads_from_the_table_holds_in_every_seed():
    loss = {name: row["validation_loss"] for name, row in next_.summarise(ROOT / next_.OUT).items()}

    def above(name):
        return [a - b for a, b in zip(loss[name], loss["qlora"], strict=True)]

    assert max(map(abs, above("dora") + above("8bit"))) < 0.01
    assert min(above("loftq")) > 0.05
    assert [round(x, 2) for x in sorted(above("qlora-50rows"))] == [0.03, 0.03, 0.04]
    assert max(above("qlora-400rows")) < 0


def test_the_path_rule_can_fail():
    assert NAMED.findall("see `experiments/faults/none_such.py`") == [
        "experiments/faults/none_such.py"
    ]
    assert LINKED.findall("[a](../notebooks/none.ipynb) [b](https://x.org/y)") == [
        "../notebooks/none.ipynb"
    ]


def test_the_appendix_names_every_script():
    text = PAGES[0].read_text("utf-8")
    assert [name for name in SCRIPTS if f"experiments/faults/{name}.py" not in text] == []


def test_troubleshooting_has_its_symptoms_each_with_a_thread():
    text = PAGES[1].read_text("utf-8")
    symptoms = re.split(r"^### ", text, flags=re.M)[1:]
    assert len(symptoms) >= 18
    for symptom in symptoms:
        title = symptom.splitlines()[0]
        for part in ("**Cause.**", "**See it.**", "**Remedy.**", "**Met in.**"):
            assert part in symptom, (title, part)
        met = symptom.split("**Met in.**")[1]
        assert re.search(r"\]\(https://[^)]+\)", met) or "No thread found" in met, title
