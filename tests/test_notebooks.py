"""What a chapter's file has to be, whatever its subject: run, clean, readable, and stamped.

The cells themselves are run again and compared by nbval (`make test`). nbval has a blind spot: a
notebook with cleared outputs passes, with nothing compared. These tests close it, and hold the
rules that nbval knows nothing of. Each rule is a function over a notebook that returns what is
wrong; a planted fault shows for each that it can fail.
"""

from __future__ import annotations

import copy
import re

import nbformat
import pytest

from tools import bootstrap_cell, run_notebooks
from tools.notebooks import ROOT, chapters, clean, read
from tools.set_url import configured_url

MAX_LINES = 25
MAX_IGNORED = 3  # cells with nbval-ignore-output: each is a cell that proves nothing
CHAPTERS = chapters()
TAGS = {
    "remove-cell",
    "hide-input",
    "hide-output",
    "nbval-ignore-output",
    "nbval-skip",
    "raises-exception",
}

# Paths of some machine, as Linux, macOS and Windows write them.
PATHS = re.compile(
    r"(?<![\w.:/<])/(?:home|root|Users|usr|tmp|var|opt|work|mnt|private)/[\w.-]+"
    r"|\b[A-Za-z]:\\\\?[\w .-]+\\"
)
WARNING = re.compile(r"\b\w*Warning\b:|\[W\d{3,}|WARNING:")
# MyST means something on the web pages and nothing in Colab or on GitHub.
MYST = [
    (re.compile(r"^\s*(:{3,}|`{3,})\{", re.MULTILINE), "a directive"),
    (re.compile(r"\{[a-z][a-z:-]*\}`"), "a role"),
    (re.compile(r"^\([\w-]+\)=\s*$", re.MULTILINE), "a target"),
    (re.compile(r"^\+\+\+", re.MULTILINE), "a cell break"),
    (re.compile(r"\{\{.*?\}\}"), "a substitution"),
]
PICTURE = re.compile(r"!\[(?P<alt>[^\]]*)\]\([^)]*\)|<img\b(?P<attributes>[^>]*)>")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            yield index, output


def texts(output):
    """Every piece of text in an output."""
    if output.output_type == "stream":
        yield output.text
    for kind, content in output.get("data", {}).items():
        if not kind.startswith("image/"):
            yield content if isinstance(content, str) else str(content)


def not_executed(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    wanted = list(range(1, len(counts) + 1))
    return [] if counts == wanted else [f"execution counts are {counts}, not {wanted}"]


def shows_errors_or_warnings(notebook):
    problems = []
    for index, output in outputs(notebook):
        if output.output_type == "error":
            problems.append(f"cell {index}: error {output.ename}")
        if output.get("name") == "stderr":
            problems.append(f"cell {index}: stderr {output.text[:80]!r}")
        problems += [f"cell {index}: warning" for text in texts(output) if WARNING.search(text)]
    return problems


def shows_paths(notebook):
    return [
        f"cell {index}: {match[0]}"
        for index, output in outputs(notebook)
        for text in texts(output)
        for match in PATHS.finditer(text)
    ]


def uses_myst(notebook):
    problems = []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type != "markdown":
            continue
        text = re.sub(r"\$\$.*?\$\$|\$[^$\n]*\$", "", cell.source, flags=re.DOTALL)
        text = re.sub(r"(?<!\})`[^`\n]+`", "", text)  # code may hold braces; a role's span stays
        problems += [f"cell {index}: {what}" for rule, what in MYST if rule.search(text)]
    return problems


def breaks_a_formula(notebook):
    # A line of a formula that begins like a list item ends the formula, and the page shows dollars.
    problems = []
    for index, cell in enumerate(notebook.cells):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", cell.source, flags=re.DOTALL)
        formulas = re.findall(r"\$\$.*?\$\$|\$[^$]+\$", text, re.DOTALL)
        if cell.cell_type == "markdown":
            problems += [
                f"cell {index}: {formula[:40]!r}"
                for formula in formulas
                if re.search(r"\n\s*([-+*>#]|\d+[.)])\s", formula)
            ]
    return problems


def has_long_cells(notebook):
    return [
        f"cell {index}: {len(cell.source.splitlines())} lines"
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == "code" and len(cell.source.splitlines()) > MAX_LINES
    ]


def lacks_alt_text(notebook):
    problems = []
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            for match in PICTURE.finditer(cell.source):
                alt = match["alt"] or re.search(r'\balt="([^"]+)"', match["attributes"] or "")
                if not alt:
                    problems.append(f"cell {index}: {match[0][:60]}")
    for index, output in outputs(notebook):
        for kind in ("image/png", "image/jpeg"):
            if kind in output.get("data", {}):
                alt = output.metadata.get(kind, {}).get("alt", "")
                if len(alt) < 15:
                    problems.append(f"cell {index}: output with alt text {alt!r}")
    return problems


def stores_svg(notebook):
    # nbval compares SVG as text, and matplotlib's differs from run to run.
    return [
        f"cell {index}: SVG"
        for index, output in outputs(notebook)
        if "image/svg+xml" in output.get("data", {}) or any("<svg" in t for t in texts(output))
    ]


def ignores_too_much(notebook):
    ignored = [c for c in notebook.cells if "nbval-ignore-output" in c.metadata.get("tags", [])]
    problems = [] if len(ignored) <= MAX_IGNORED else [f"{len(ignored)} cells ignore their output"]
    for index, cell in enumerate(notebook.cells):
        unknown = set(cell.metadata.get("tags", [])) - TAGS
        problems += [f"cell {index}: unknown tag {tag}" for tag in sorted(unknown)]
        if "nbval-skip" in cell.metadata.get("tags", []):
            problems.append(f"cell {index}: nbval-skip runs nothing")
    return problems


def loads_four_bits_unguarded(notebook):
    return [
        f"cell {index}: a 4-bit model without `guard`"
        for index, cell in enumerate(code_cells(notebook))
        if "from_pretrained(" in cell.source
        and "quantization_config" in cell.source
        and "guard(" not in cell.source
    ]


def shows_how_it_draws(notebook):
    # A reader of the web page wants the picture; its code opens at a click.
    return [
        f"cell {index}: draws, and is not tagged hide-input"
        for index, cell in enumerate(notebook.cells)
        if cell.cell_type == "code"
        and "@plots.styled" in cell.source
        and "hide-input" not in cell.metadata.get("tags", [])
    ]


def lacks_bootstrap(notebook):
    wrong = bootstrap_cell.differs(notebook, configured_url())
    return ["the first cell differs: python -m tools.bootstrap_cell"] if wrong else []


def needs_more_than_colab(notebook):
    return [
        f"cell {index}: {name}"
        for index, cell in enumerate(code_cells(notebook))
        for name in ("myst_nb", "ipywidgets", "google.colab import")
        if re.search(rf"^\s*(from|import) {re.escape(name)}", cell.source, re.MULTILINE)
    ]


def states_no_run_time(notebook):
    stated = run_notebooks.stated_seconds(notebook.cells[0].source)
    return [] if stated else ["the first cell does not say `run: about 15 seconds`"]


def is_not_built_like_a_chapter(notebook):
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    text = re.sub(r"^```.*?^```", "", "\n\n".join(sources), flags=re.DOTALL | re.MULTILINE)
    opening = ("After this chapter you can", "**You need**", "**Time**", "**Hardware**")
    problems = [f"the opening lacks {part!r}" for part in opening if part not in sources[0]]
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    numbers = [int(found[1]) for h in headings if (found := re.match(r"(\d+) ", h))]
    if numbers != list(range(1, len(numbers) + 1)) or not numbers:
        problems.append(f"sections are numbered {numbers}")
    if headings[-2:] != ["Summary", "Further reading"]:
        problems.append(f"ends with {headings[-2:]}, not with summary and further reading")
    summary, _, reading = text.partition("## Summary")[2].partition("## Further reading")
    said = len(re.findall(r"^\d\. ", summary, re.MULTILINE))
    if not 3 <= said <= 7:
        problems.append(f"the summary has {said} points, not 3 to 7")
    readings = len(re.findall(r"^- ", reading, re.MULTILINE))
    if readings not in (2, 3):
        problems.append(f"{readings} further readings, not 2 or 3")
    if not any("plots.spine(" in cell.source for cell in code_cells(notebook)):
        problems.append("no cell draws the spine")
    asked, folded = text.count("**Predict"), text.count("<details>")
    if asked < 2 or folded < asked:
        problems.append(f"{asked} predictions, {folded} folded answers")
    return problems


def spoils_a_prediction(notebook):
    """Where a prediction waits for its answer, no output may stand open on the web page.

    That is between the two, and, where the folded answer follows at once, in the cells below it.
    """
    problems, asked = [], ""
    marks = re.compile(r"\*\*Predict|</details>\Z|<details>|^#{2,3} ", re.MULTILINE)
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            found = [match[0] for match in marks.finditer(cell.source)]
            below = found[-3:] == ["**Predict", "<details>", "</details>"]
            if found or asked == "below":
                asked = "below" if below else "between" if found[-1:] == ["**Predict"] else ""
        elif asked and cell.outputs and "hide-output" not in cell.metadata.get("tags", []):
            problems.append(f"cell {index}: answers a prediction, and is not tagged hide-output")
    return problems


def is_not_clean(notebook):
    return [] if clean(copy.deepcopy(notebook)) == notebook else ["not as tools.notebooks.write"]


RULES = [
    not_executed,
    shows_errors_or_warnings,
    shows_paths,
    uses_myst,
    breaks_a_formula,
    has_long_cells,
    lacks_alt_text,
    stores_svg,
    ignores_too_much,
    loads_four_bits_unguarded,
    shows_how_it_draws,
    lacks_bootstrap,
    needs_more_than_colab,
    states_no_run_time,
    is_not_built_like_a_chapter,
    spoils_a_prediction,
    is_not_clean,
]


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_chapter(path, rule):
    assert rule(read(path)) == []


def test_every_notebook_is_a_chapter_of_the_book():
    from tools.book import expected_pages

    listed = [page for page in expected_pages() if page.startswith("notebooks/")]
    assert listed == [path.relative_to(ROOT).with_suffix("").as_posix() for path in CHAPTERS]


OPENING = """# Chapter

After this chapter you can

- draw a line.

| | |
|---|---|
| **You need** | a pen |
| **Time** | read: about 5 minutes; run: about 10 seconds |
| **Hardware** | any |
"""
ANSWER = "**Predict.** What?\n\n<details>\n<summary>Open</summary>\nThat.\n</details>\n\n"
ENDING = """## Summary

1. A line rises.
2. Then it falls.
3. It was drawn.

## Further reading

- One.
- Two.
"""


# The rules can fail: a good notebook breaks none, and each planted fault is found by its rule.


def good_notebook():
    v4 = nbformat.v4
    picture = v4.new_output(
        "display_data",
        {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"},
        metadata={"image/png": {"alt": "A line that rises and then falls."}},
    )
    notebook = v4.new_notebook(
        cells=[
            v4.new_markdown_cell(OPENING),
            v4.new_code_cell("x = 1", execution_count=2),
            v4.new_markdown_cell(
                "## 1 A line\n\nSet $\\frac{a}{b}$ and `{x}`. ![A bell curve](bell.png)\n\n"
                + 2 * ANSWER
            ),
            v4.new_markdown_cell(ENDING),
            v4.new_code_cell(
                "plots.show(plots.spine())",
                execution_count=3,
                outputs=[picture, v4.new_output("stream", name="stdout", text="1 / 2 = 0.5\n")],
            ),
        ]
    )
    bootstrap_cell.stamp(notebook, configured_url())
    bootstrap_cell.first_code_cell(notebook).execution_count = 1
    return clean(notebook)


def stream(text, name="stdout"):
    return nbformat.v4.new_output("stream", name=name, text=text)


def last(notebook):
    return notebook.cells[-1]


FAULTS = {
    "cleared outputs": (not_executed, lambda n: last(n).update(execution_count=None)),
    "run out of order": (not_executed, lambda n: last(n).update(execution_count=9)),
    "stderr": (shows_errors_or_warnings, lambda n: last(n).outputs.append(stream("x", "stderr"))),
    "warning": (
        shows_errors_or_warnings,
        lambda n: last(n).outputs.append(stream("UserWarning: no gradient")),
    ),
    "linux path": (shows_paths, lambda n: last(n).outputs.append(stream("in /home/ann/qlora"))),
    "mac path": (shows_paths, lambda n: last(n).outputs.append(stream("/Users/ann/x.json"))),
    "windows path": (
        shows_paths,
        lambda n: last(n).outputs.append(stream(r"saved to C:\Users\Ann Lee\runs\a")),
    ),
    "directive": (uses_myst, lambda n: n.cells[0].update(source="```{note}\nx\n```")),
    "colon directive": (uses_myst, lambda n: n.cells[0].update(source=":::{tip}\nx\n:::")),
    "citation": (uses_myst, lambda n: n.cells[0].update(source="see {cite}`hu2022lora`")),
    "target": (uses_myst, lambda n: n.cells[0].update(source="(here)=\n# T")),
    "formula broken by a list": (
        breaks_a_formula,
        lambda n: n.cells[0].update(source="It keeps $L\\,e\n+ k\\,a$ bytes."),
    ),
    "long cell": (has_long_cells, lambda n: last(n).update(source="\n".join(["x = 1"] * 26))),
    "figure without alt": (lacks_alt_text, lambda n: last(n).outputs[0].update(metadata={})),
    "picture without alt": (lacks_alt_text, lambda n: n.cells[0].update(source="![](a.png)")),
    "img without alt": (lacks_alt_text, lambda n: n.cells[0].update(source='<img src="a.png">')),
    "svg": (stores_svg, lambda n: last(n).outputs[0].data.update({"image/svg+xml": "<svg/>"})),
    "skipped cell": (ignores_too_much, lambda n: last(n).metadata.update(tags=["nbval-skip"])),
    "misspelt tag": (ignores_too_much, lambda n: last(n).metadata.update(tags=["nbval-ignore"])),
    "four bits without the guard": (
        loads_four_bits_unguarded,
        lambda n: last(n).update(source="m = M.from_pretrained(x, quantization_config=c)"),
    ),
    "drawing code in the way": (
        shows_how_it_draws,
        lambda n: last(n).update(source="@plots.styled\ndef f(): ..."),
    ),
    "changed bootstrap": (lacks_bootstrap, lambda n: n.cells[1].update(source="import torch")),
    "book only import": (
        needs_more_than_colab,
        lambda n: last(n).update(source="from myst_nb import glue"),
    ),
    "no run time": (states_no_run_time, lambda n: n.cells[0].update(source="# Chapter")),
    "no opening": (
        is_not_built_like_a_chapter,
        lambda n: n.cells[0].update(source=OPENING.replace("**You need**", "Needs")),
    ),
    "sections out of order": (
        is_not_built_like_a_chapter,
        lambda n: n.cells.insert(4, nbformat.v4.new_markdown_cell("## 3 A\n\n## 2 B")),
    ),
    "summary not at the end": (
        is_not_built_like_a_chapter,
        lambda n: n.cells.append(nbformat.v4.new_markdown_cell("## 2 A")),
    ),
    "long summary": (
        is_not_built_like_a_chapter,
        lambda n: n.cells[4].update(source=ENDING.replace("1. A", "1. A\n" * 5 + "1. A")),
    ),
    "no spine": (is_not_built_like_a_chapter, lambda n: last(n).update(source="plot(x)")),
    "one prediction": (
        is_not_built_like_a_chapter,
        lambda n: n.cells[3].update(source="## 1 A\n\n" + ANSWER),
    ),
    "open output below a prediction": (
        spoils_a_prediction,
        lambda n: n.cells[4].update(source="**Predict.** What?"),
    ),
    "open output below the folded answer": (
        spoils_a_prediction,
        lambda n: n.cells[4].update(source=ANSWER.strip()),
    ),
    "machine metadata": (is_not_clean, lambda n: n.metadata.language_info.update(version="3.11.7")),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_notebook_breaks_no_rule(rule):
    assert rule(good_notebook()) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault):
    rule, plant = FAULTS[fault]
    notebook = good_notebook()
    plant(notebook)
    assert rule(notebook) != []
