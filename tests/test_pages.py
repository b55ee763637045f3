"""The pages around the chapters: their code runs, their numbers are right, their links lead on.

The book executes no `.md` page, so what a page prints or tabulates is recomputed here: each block
of the toolbox is run and compared with the output under it, and each table is read from the page
and held against the package. What the built pages look like is measured in tests/book.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import math
import re
from pathlib import Path
from statistics import NormalDist

import pytest

from tools.notebooks import ROOT, chapters, read

BOOK = ROOT / "book"
PAGES = ("toolbox", "notation", "glossary", "cheat_sheet")
BOXES = (
    "Floating point",
    "Adam's two moments",
    "SVD",
    "Quantiles and ppf",
    "Perplexity and bits per byte",
    "Label masking",
)
BLOCKS = {"7B": (4096, 32), "13B": (5120, 40), "33B": (6656, 60), "65B": (8192, 80)}


def page(name: str) -> str:
    return (BOOK / f"{name}.md").read_text(encoding="utf-8")


def tables(text: str) -> dict[str, list[list[str]]]:
    """Return the rows of each Markdown table under the first line that it has."""
    found, rows = {}, []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            found[" | ".join(rows[0])] = rows[2:]
            rows = []
    return found


def list_tables(text: str) -> list[list[list[str]]]:
    """Return the rows of each `list-table`, its header among them."""
    found = []
    for body in re.findall(r"```\{list-table\}\n(.*?)\n```", text, re.DOTALL):
        rows = re.split(r"^\* - ", body, flags=re.MULTILINE)[1:]
        found.append([re.split(r"\n  - ", row.strip()) for row in rows])
    return found


def number(text: str) -> float:
    return float(text.replace(",", "").replace("−", "-"))


def rounds_to(value: float, shown: str) -> bool:
    """Whether a shown number is the value, rounded to as many places as are shown."""
    places = len(shown.partition(".")[2])
    return f"{value:.{places}f}" == shown.replace(",", "").replace("−", "-")


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    heading = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", heading).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    """Return what can be linked in a file: its headings, and a glossary's terms."""
    if path.suffix == ".ipynb":
        text = "\n\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    text = re.sub(r"^```python.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    return found | {term_anchor(term) for term in terms(text)}


def term_anchor(term: str) -> str:
    """The anchor of a glossary's term, as Sphinx makes it."""
    return "term-" + re.sub(r"[ -]+|\(\)", "-", term).strip("-")


def terms(text: str) -> dict[str, str]:
    """Return each glossary entry by its term."""
    if "```{glossary}" not in text:
        return {}
    body = text.split("```{glossary}\n")[1].split("\n```")[0]
    entries = (entry.partition("\n") for entry in body.split("\n\n"))
    return {term: " ".join(definition.split()) for term, _, definition in entries}


def broken(links: list[str], here: Path) -> list[str]:
    """Return the internal links that lead to no file or no anchor."""
    problems = []
    for link in links:
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (here.parent / file).resolve() if file else here
        if not target.is_file():
            problems.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target):
            problems.append(f"{link}: no such anchor")
    return problems


def links_of(text: str) -> list[str]:
    inline = re.findall(r"\]\(([^()\s]+(?:\([^()]*\))?)\)", text)
    return inline + re.findall(r"^\[\w+\]: (\S+)$", text, re.MULTILINE)


# Links


@pytest.mark.parametrize("name", PAGES)
def test_every_link_of_a_page_leads_somewhere(name):
    text = re.sub(r"^```python.*?^```", "", page(name), flags=re.DOTALL | re.MULTILINE)
    assert links_of(text)
    assert broken(links_of(text), BOOK / f"{name}.md") == []


@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.stem)
def test_a_chapters_links_lead_to_their_anchors(path):
    text = "\n\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
    assert broken(links_of(text), path) == []


def test_a_planted_broken_link_is_found():
    links = links_of("[a](setup.md) [b](#gone) [c](nowhere.md) [d](toolbox.md#svd)\n[e]: x.ipynb")
    problems = broken(links, BOOK / "toolbox.md")
    assert [p.partition(":")[0] for p in problems] == ["#gone", "nowhere.md", "x.ipynb"]


# Toolbox


def test_the_toolbox_has_its_six_boxes_each_behind_a_question():
    boxes = page("toolbox").split("\n## ")[1:]
    assert tuple(box.splitlines()[0] for box in boxes) == BOXES
    for box in boxes:
        assert box.splitlines()[2].startswith("**Check yourself.**")
        assert ":::{dropdown} Open after you have answered" in box
        assert re.search(r"^\*Used in\* chapters? .*\.ipynb\)", box, re.MULTILINE)
        assert "_static/" in box or "\n| " in box or '<div class="tokens"' in box
        (code,) = re.findall(r"```python\n(.*?)```", box, re.DOTALL)
        assert 4 <= len([line for line in code.splitlines() if line.strip()]) <= 14
        assert all(len(line) <= 76 for line in code.splitlines())  # longer ones scroll


CODE = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", page("toolbox"), re.DOTALL)


@pytest.mark.parametrize("index", range(6), ids=BOXES)
def test_a_boxs_code_prints_what_stands_under_it(index):
    code, shown = CODE[index]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, f"toolbox, {BOXES[index]}", "exec"), {})
    assert printed.getvalue() == shown


def test_the_toolboxs_pictures_are_what_their_script_draws():
    from tools.draw_toolbox import STATIC, drawings

    for name, text in drawings().items():
        assert (STATIC / name).read_text(encoding="utf-8") == text
        assert f":file: _static/{name}" in page("toolbox")


def test_the_pictures_numbers():
    import torch

    from tools.draw_toolbox import FORMATS, leading_pair, quartiles

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for name, (sign, exponent, fraction) in FORMATS.items():
        info = torch.finfo(dtypes[name])
        assert info.bits == sign + exponent + fraction and info.eps == 2.0**-fraction
        assert info.max == 2.0 ** (2 ** (exponent - 1) - 1) * (2 - 2.0**-fraction)
    matrix = [[float(i * j) for j in range(1, 10)] for i in range(1, 10)]
    matrix[0][0] += 10
    assert leading_pair(matrix)[2] == pytest.approx(
        torch.linalg.svdvals(torch.tensor(matrix))[0].item(), rel=1e-5
    )
    assert f"−{NormalDist().inv_cdf(0.75):.2f}" in quartiles()


def test_the_toolboxs_answers_and_tables():
    import torch

    text = page("toolbox")
    assert torch.finfo(torch.bfloat16).eps == 0.0078125 and "bf16 can write is 1.0078125" in text
    assert torch.finfo(torch.float16).max == 65504 and "ends at 65,504" in text
    assert 3 * (1000 + 1000) == 6000 and "6,000 are enough" in text

    adam = tables(text)["Gradients of 100 steps | Last update, in learning rates"]
    sequences = [[1.0] * 100, [0.001] * 100, [1.0, -1.0] * 50, ([0.0] * 9 + [1.0]) * 10]
    for (_, shown), gradients in zip(adam, sequences, strict=True):
        p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        optimizer = torch.optim.Adam([p], lr=1.0)
        for g in gradients:
            before = p.item()
            p.grad = torch.full_like(p, g)
            optimizer.step()
        assert rounds_to(before - p.item(), shown)

    rows = tables(text)[" | Tokens | Loss for a token | Perplexity | Bits per byte"]
    for _, tokens, loss, perplexity, bits in rows:
        assert rounds_to(math.exp(number(loss)), perplexity)
        assert rounds_to(number(tokens) * number(loss) / math.log(2) / 1000, bits)


def test_label_masking_is_what_the_package_does():
    from transformers import AutoTokenizer

    from qlora_lab import embedded_model
    from qlora_lab.data import encode

    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    row = encode(tokenizer, "two small teas for Zoe", '{"name":"Zoe"}')
    learnt = [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    assert learnt[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(learnt[:-1]) == '{"name":"Zoe"}'


# Notation


def letters(formula: str) -> set[str]:
    """The symbols of a formula: Latin letters and Greek commands, without words and layout."""
    formula = re.sub(r"\\(text|mathrm|operatorname)\s*\{[^}]*\}", " ", formula)
    formula = re.sub(r"\\(begin|end)\{\w+\}", " ", formula)
    greek = r"alpha|beta|gamma|delta|Delta|epsilon|eta|theta|lambda|phi|sigma|Sigma"
    symbols = set(re.findall(rf"\\({greek})(?![a-zA-Z])", formula))
    return symbols | set(re.findall(r"[A-Za-z]", re.sub(r"\\[a-zA-Z]+", " ", formula)))


def formulas(text: str) -> list[str]:
    text = re.sub(r"^```.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", " ", text)
    found = re.findall(r"\$\$(.+?)\$\$|(?<!\\)\$([^$\n]+(?:\n[^$\n]+)?)(?<!\\)\$", text, re.DOTALL)
    return [display or inline for display, inline in found]


@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.stem)
def test_every_symbol_of_a_chapter_is_on_the_notation_page(path):
    known = set().union(*map(letters, formulas(page("notation")))) | set("ij")
    sources = [c.source for c in read(path).cells if c.cell_type == "markdown"]
    used = set().union(*(letters(f) for s in sources for f in formulas(s)), set())
    assert sorted(used - known) == [], "add a row to book/notation.md"


def test_the_notation_pages_numbers():
    text = page("notation")
    flat = " ".join(text.split())
    r, n, m = 16, 4096, 11008
    assert f"16 · (4096 + 11008) = {r * (n + m):,} beside 4096 · 11008 = {n * m:,}" in flat
    assert f"which is {r * (n + m) / (n * m):.2%}".replace("%", " %") in flat

    for _, alpha, rank, ratio in tables(text)["Where | $\\alpha$ | $r$ | $\\alpha / r$"]:
        assert number(alpha) / number(rank) == number(ratio)
    from peft import LoraConfig

    from qlora_lab.finetuning import recipe

    ratios = {row[0]: row[1:3] for row in tables(text)["Where | $\\alpha$ | $r$ | $\\alpha / r$"]}
    assert ratios["PEFT's defaults"] == [str(LoraConfig().lora_alpha), str(LoraConfig().r)]
    assert float(ratios["this course's small model"][0]) == recipe(None, "qlora", 16)[1]

    sizes = {row[0]: row[1:] for row in tables(text)[" | Bytes | How much more"]}
    for unit, bytes_ in {"MB": 10**6, "MiB": 2**20, "GB": 10**9, "GiB": 2**30}.items():
        assert sizes[f"1 {unit}"][0].split(" = ")[-1] == f"{bytes_:,}"
    assert sizes["1 MiB"][1].startswith(f"{(2**20 / 1e6 - 1) * 100:.1f} %")
    assert sizes["1 GiB"][1].startswith(f"{(2**30 / 1e9 - 1) * 100:.1f} %")
    header, (row,) = next((h, r) for h, r in tables(text).items() if h.startswith("GiB |"))
    for gib, gb in zip(header.split(" | ")[1:], row[1:], strict=True):
        assert rounds_to(int(gib) * 2**30 / 1e9, gb)


def test_bits_per_weight_on_the_notation_page():
    from transformers import LlamaConfig

    from qlora_lab.memory import ledger

    header = "Stored | Bits for a weight | Result | 16 bits are so many times as much"
    rows = tables(page("notation"))[header]
    assert len(rows) == 6
    for _, sum_, result, times in rows:
        bits = eval(compile(ast.parse(sum_.replace("·", "*"), mode="eval"), "", "eval"))
        assert rounds_to(bits, result) and rounds_to(16 / bits, times)

    book = ledger(LlamaConfig(), "qlora", batch=0)
    linear = book["4-bit weights"].parameters
    assert f"LLaMA-7B has {linear:,} weights" in page("notation")
    stored = book["4-bit weights"].bytes + book["quantization constants"].bytes
    assert f"4.127 / 8 = {linear * 4.127 / 8 / 1e9:.2f} GB" in page("notation")
    assert f"{stored / 1e9:.2f}" == f"{linear * 4.127 / 8 / 1e9:.2f}"
    assert f"in 16 bits {2 * linear / 1e9:.2f} GB" in page("notation")


# Glossary


def test_the_glossary_has_at_least_60_terms_in_order_each_with_where_it_is_taught():
    found = terms(page("glossary"))
    assert len(found) >= 60
    assert list(found) == sorted(found, key=str.lower)
    defined = dict(re.findall(r"^\[(\w+)\]: (\S+)$", page("glossary"), re.MULTILINE))
    for term, definition in found.items():
        taught = [defined[n] for n in re.findall(r"\]\[(\d+)\]", definition)]
        assert taught and all(link.startswith("../notebooks/") for link in taught), term
        sentences = re.split(r"(?<=[.:?!])\s+(?=[A-Z\[])", definition)
        said = [s for s in sentences if not s.startswith("[")]
        assert 1 <= len(said) <= 4 and len(definition) < 420, term


def test_a_glossarys_reference_to_a_term_is_one():
    found = {term.lower() for term in terms(page("glossary"))}
    for path in BOOK.glob("*.md"):
        for term in re.findall(r"\{term\}`([^`<]+)`", path.read_text(encoding="utf-8")):
            assert term.lower() in found, f"{path.name}: {term}"


# Links to the glossary and the toolbox

# What the chapters also call a term.
ALSO = {
    "fp16": "float16",
    "gradient checkpointing": "checkpointing",
    "LLM.int8()": "LLM.int8",
    "paged optimizer": "paging",
}
NOT_PROSE = (
    r"^(```|~~~)[\s\S]*?^\1",
    r"\$\$[\s\S]*?\$\$",
    r"(?<!\\)\$[^$\n]+(?:\n[^$\n]+)?(?<!\\)\$",
    r"`[^`]*`",
    r"^#+ .*$",
    r"<summary>[\s\S]*?</summary>",
    r"<[^>\n]+>",
)
OTHER_MEANINGS = r"\b(a|the|that) moment\b|\boff the page\b"
EVERYDAY = {"learning rate", "padding", "seed"}  # for anyone who has trained with PyTorch


def blank(pattern: str, text: str) -> str:
    """Put spaces in place of what matches, so that all else stays where it is."""
    return re.sub(pattern, lambda m: re.sub(r"\S", " ", m[0]), text, flags=re.MULTILINE)


def links_and_prose(sources: list[str]) -> tuple[list[tuple[int, str]], str]:
    """Return the links to glossary and toolbox with their places, and a chapter's running text.

    The opening cell and the tables are no running text, but a link in them is one. The summary
    and what follows it repeat the chapter and are left out.
    """
    text = "\n\n".join(sources).split("\n## Summary")[0]
    for pattern in NOT_PROSE:
        text = blank(pattern, text)
    target = r"\[[^\]]*\]\(\.\./book/((?:glossary|toolbox)\.md#[^)\s]+)\)"
    links = [(m.start(), m[1]) for m in re.finditer(target, text)]
    text = blank(r"\[[^\]]*\]\([^()\s]+(?:\([^()]*\))?\)", text)
    text = blank(OTHER_MEANINGS, blank(r"^\|.*$", text))
    return links, " " * len(sources[0]) + text[len(sources[0]) :]


def spellings(term: str) -> str:
    """Return a pattern for a term as a whole word: as it is, in the plural, or hyphenated."""
    names = [re.escape(name).removesuffix("s") for name in (term, ALSO.get(term, term))]
    case = "" if re.search("[A-Z]", term) else "i"
    forms = "|".join(names).replace(r"\ ", r"[\s>-]+")
    return rf"(?<![\w-])(?{case}:{forms})s?(?!-?\w)"


def first_uses(text: str) -> dict[str, int]:
    """Return the terms that a text uses with their first places; of "low rank", not "rank"."""
    found = {}
    for term in sorted(terms(page("glossary")), key=len, reverse=True):
        if match := re.search(spellings(term), text):
            found[term] = match.start()
            text = blank(spellings(term), text)
    return found


def badly_linked(sources: list[str], chapter: int) -> list[str]:
    """Return the terms that a chapter uses before it links them, links twice, or only teaches."""
    links, text = links_and_prose(sources)
    used = first_uses(text)
    problems = []
    for term, entry in terms(page("glossary")).items():
        own = [at for at, link in links if link == f"glossary.md#{term_anchor(term)}"]
        box = [at for at, link in links if f"({link})" in entry]
        if len(own) > 1:
            problems.append(f"{term}: linked {len(own)} times")
        if f"][{chapter}]" in entry and not own + box:
            problems.append(f"{term}: taught, not linked")
        if own and term in used and used[term] < min(own + box):
            problems.append(f"{term}: used before its link")
    return problems


def markdown(path: Path) -> list[str]:
    return [cell.source for cell in read(path).cells if cell.cell_type == "markdown"]


LINKED = {path.name: {to for _, to in links_and_prose(markdown(path))[0]} for path in chapters()}


def test_every_term_of_the_glossary_is_linked_from_a_chapter():
    linked = set().union(*LINKED.values())
    missing = [t for t in terms(page("glossary")) if f"glossary.md#{term_anchor(t)}" not in linked]
    assert missing == []


def test_no_chapter_uses_a_term_that_was_not_linked_until_then():
    linked, problems = set(), []
    for path in chapters():
        linked |= LINKED[path.name]
        for term in first_uses(links_and_prose(markdown(path))[1]).keys() - EVERYDAY:
            boxes = re.findall(r"\((toolbox\.md#[\w-]+)\)", terms(page("glossary"))[term])
            if not linked & {f"glossary.md#{term_anchor(term)}", *boxes}:
                problems.append(f"{path.name}: {term}")
    assert problems == []


@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.stem)
def test_a_chapter_links_a_term_where_it_first_uses_it(path):
    assert badly_linked(markdown(path), int(path.name[:2])) == []


def test_planted_faults_of_links_to_terms_are_found():
    path = next(path for path in chapters() if path.name.startswith("11"))
    sources = markdown(path)
    assert badly_linked(sources, 11) == []
    for planted, fault in {
        "a `rank`, $rank$": None,
        "an effective rank": None,
        "ranks": "rank: used before its link",
        "low\n> Rank": None,
        "[ranks](../book/glossary.md#term-rank)": "rank: linked 2 times",
    }.items():
        ending = "[rank](../book/glossary.md#term-rank)"
        found = badly_linked([*sources[:1], planted, ending, *sources[1:]], 11)
        assert found == ([fault] if fault else []), planted
    unlinked = [re.sub(r"\[DDP\]\([^)]*\)", "DDP", source) for source in sources]
    assert badly_linked(unlinked, 11) == ["DDP: taught, not linked"]


@pytest.mark.parametrize("box", BOXES)
def test_a_box_names_the_chapters_that_link_it(box):
    (body,) = [b for b in page("toolbox").split("\n## ")[1:] if b.startswith(f"{box}\n")]
    named = re.findall(r"\.\./notebooks/(\w+\.ipynb)\)", body.split("*Used in*")[1])
    assert named == [name for name, to in LINKED.items() if f"toolbox.md#{slug(box)}" in to]


# Cheat sheet


def llama(size: str):
    """The shape of one of the first LLaMA models, as chapter 8 makes it."""
    from transformers import LlamaConfig

    width, blocks = BLOCKS[size]
    return LlamaConfig(
        hidden_size=width,
        intermediate_size=256 * -(-(8 * width // 3) // 256),
        num_hidden_layers=blocks,
        num_attention_heads=width // 128,
    )


@pytest.mark.parametrize("column, size", list(enumerate(BLOCKS, start=1)))
def test_the_cheat_sheets_run(column, size):
    from qlora_lab.memory import ledger

    shown = [row[column] for row in tables(page("cheat_sheet"))["LLaMA | 7B | 13B | 33B | 65B"]]
    book = ledger(llama(size), "qlora", r=16, batch=1, sequence=512, checkpointing=True)

    def gb(*names: str) -> float:
        return sum(book[name].bytes for name in names) / 1e9

    values = [
        2 * book["4-bit weights"].parameters / 1e9,
        gb("4-bit weights", "quantization constants"),
        gb("embeddings and head", "norms, biases, other", "buffers"),
        gb("adapters", "gradients", "optimizer state"),
        gb("activations", "logits", "one weight dequantized"),
        book.total / 1e9,
        book.total / 2**30,
    ]
    assert values[5] == pytest.approx(sum(values[1:5]))
    for value, text in zip(values, shown, strict=True):
        assert rounds_to(value, text)


def test_the_cheat_sheets_bytes():
    from qlora_lab.memory import adam_bytes

    header = " | Stored | Gradient | Adam | Sum"
    rows = {row[0]: row[1:] for row in tables(page("cheat_sheet"))[header]}
    million = 10**6
    for name, cells in rows.items():
        parts = [0.0 if cell == "–" else number(cell) for cell in cells]
        assert sum(parts[:3]) == parts[3], name
        assert parts[2] in (0.0, adam_bytes(million, bits=32) / million)
    assert rounds_to((4 + 32 / 64) / 8, rows["weight, frozen, NF4"][0])
    assert rounds_to((4 + 8 / 64 + 32 / (64 * 256)) / 8, rows["+ double quantization"][0])


def test_the_cheat_sheets_formulas():
    import torch

    from qlora_lab import nf4

    (rows,) = list_tables(page("cheat_sheet"))
    shown = dict(rows)
    assert f"{4 + 8 / 64 + 32 / (64 * 256):.3f}" in shown["Bits a weight"]
    p = 1 - (1 / 30 + 1 / 32) / 2
    assert f"= {p:.7f}$" in shown["NF4's list"]
    Q = NormalDist().inv_cdf
    values = [Q(0.5 + (p - 0.5) * i / 8) for i in range(1, 9)]
    values += [0.0, *(-Q(0.5 + (p - 0.5) * i / 7) for i in range(1, 8))]
    assert sorted(v / max(values) for v in values) == pytest.approx(nf4(), abs=2e-7)

    # the backward pass: dx as the sheet has it
    g = torch.Generator().manual_seed(0)
    x, W, A, B, dy = (
        torch.randn(shape, generator=g, dtype=torch.float64)
        for shape in ((3, 5), (4, 5), (2, 5), (4, 2), (3, 4))
    )
    x.requires_grad_()
    (x @ W.T + 8 / 2 * x @ A.T @ B.T).backward(dy)
    torch.testing.assert_close(x.grad, dy @ W + 8 / 2 * dy @ B @ A)


def test_the_cheat_sheets_lines_run_and_their_remarks_on_defaults_are_true(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    from transformers import BitsAndBytesConfig, TrainingArguments

    from qlora_lab.loading import load_model

    (code,) = re.findall(r"```python\n(.*?)```", page("cheat_sheet"), re.DOTALL)
    assert all(len(line) <= 76 for line in code.splitlines())

    class Tokenizer:
        pad_token = None

    # A machine without a card refuses bf16=True; the line is for one with a card.
    code = code.replace('"out"', repr(str(tmp_path))).replace("bf16=True", "use_cpu=True")
    names = {c.__name__: c for c in (BitsAndBytesConfig, LoraConfig, TrainingArguments)}
    names |= {f.__name__: f for f in (get_peft_model, prepare_model_for_kbit_training)}
    names |= {"torch": torch, "tokenizer": Tokenizer(), "model": load_model(bits=4).model}
    exec(code, names)
    trained = {n for n, p in names["model"].named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)

    default = BitsAndBytesConfig(load_in_4bit=True)
    assert default.bnb_4bit_quant_type == "fp4" and not default.bnb_4bit_use_double_quant
    assert default.bnb_4bit_compute_dtype == torch.float32
    assert LoraConfig().lora_dropout == 0 and LoraConfig().bias == "none"
    llama_targets = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING["llama"]
    assert list(llama_targets) == ["q_proj", "v_proj"]
    fields = {k: v.default for k, v in inspect.signature(TrainingArguments).parameters.items()}
    assert fields["learning_rate"] == 5e-5 and fields["max_grad_norm"] == 1.0
    assert fields["lr_scheduler_type"] == "linear"
    assert (fields["adam_beta1"], fields["adam_beta2"], fields["adam_epsilon"]) == (
        0.9,
        0.999,
        1e-8,
    )
