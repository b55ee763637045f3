"""Measure the embedded base model against its bars and write the numbers into its folder.

    python tools/measure_base.py [--model qlora_lab/assets/model] [--no-xz]

`--no-xz` keeps the two numbers of `xz` that were measured on the same corpus: minutes saved.

* Bits per byte on the held-out modules: all files whole, context 512, stride 256, UTF-8 bytes.
* `xz -9e` given the same training text, beside it: the held-out text appended to the training
  text, minus the training text alone. A compressor has no parameters to store, so this is the
  honest neighbour of a language model's number.
* The 20 prompts of `tools/prompts.json`, greedy, cut before the first new line at column 0.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import lzma
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import corpus  # noqa: E402

PROMPTS = Path(__file__).with_name("prompts.json")
MAX_NEW_TOKENS = 160


def judge(prompt: str, completion: str) -> dict:
    """One completion against the bar: parses, two statements or more, no line three times.

    The text is cut before its first new line at column 0 that follows the prompt. Statements are
    those inside the outermost `def` or `class`, docstrings not counted.
    """
    cut = re.search(r"\n(?=[^\s])", completion)
    ended = cut is not None
    text = prompt + (completion[: cut.start()] if cut else completion)
    lines = Counter(line.strip() for line in text.splitlines() if line.strip())
    repeats = max(lines.values(), default=0) >= 3
    try:
        tree = ast.parse(text)
        statements = [n for n in ast.walk(tree) if isinstance(n, ast.stmt)]
        docstrings = [
            s for s in statements if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)
        ]
        count = len(statements) - len(docstrings) - len(tree.body)
        parses = True
    except (SyntaxError, ValueError):
        count, parses = 0, False
    good = parses and count >= 2 and not repeats
    return {"text": text, "ended": ended, "parses": parses, "statements": count, "good": good}


def begun(prompt: str, text: str) -> int:
    """How many statements of a completed text the completion began: stricter than the bar."""
    at = (prompt.count("\n") + 1, len(prompt.rpartition("\n")[2]))
    statements = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.stmt)]
    return sum((n.lineno, n.col_offset) >= at for n in statements)


def complete(model, tokenizer, prompts: list[str]) -> list[dict]:
    """Greedy completions of the prompts, judged.

    White space at a prompt's end is left to the model to write: a line break and the indentation
    after it are one token here, and a prompt that ends inside a token leads nowhere.
    """
    import torch

    judged = []
    for prompt in prompts:
        prompt = prompt.rstrip()
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]])
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        judged.append(judge(prompt, text))
    return judged


def xz_bits_per_byte(training: str, heldout: str) -> float:
    """Bits per held-out byte that `xz -9e` needs once it has read the training text.

    The dictionary is made as large as the text, otherwise xz forgets what it read first.
    """
    both = (training + heldout).encode()
    size = 1 << max(26, (len(both) - 1).bit_length())
    filters = [
        {
            "id": lzma.FILTER_LZMA2,
            "preset": 9 | lzma.PRESET_EXTREME,
            "dict_size": min(size, 3 << 29),
        }
    ]

    def packed(data: bytes) -> int:
        return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))

    return 8 * (packed(both) - packed(training.encode())) / len(heldout.encode())


CARD = """---
license: mit
library_name: transformers
pipeline_tag: text-generation
---

# The embedded base model of QLoRA Lab

A decoder language model of {parameters:,} parameters (`LlamaForCausalLM`: hidden size 256,
4 layers, 4 heads, feed-forward size 704, context 512, tied embeddings, byte-level BPE of 4,096
tokens, bfloat16). It exists so that every step of the course runs on a laptop with no network:

```python
import qlora_lab
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(qlora_lab.embedded_model())
```

## Data

Python source text that is present wherever the course's requirements are: the standard library
({core_files} files, {core_mb:.1f} MB), its tests ({tests_files} files, {tests_mb:.1f} MB) and the
pinned packages ({packages_files} files, {packages_mb:.1f} MB). {dropped} files were dropped because
they *are* held out, or share with held-out text a normalised function body of six lines or more
or a run of 50 tokens.{definitions} The list of
dropped files and the corpus hash are in `training.json`.

## Training

{tokens:.1f} million tokens ({steps} steps of 16 rows of 512), {hours:.1f} hours on {device}, seed
{seed}, by `tools/pretrain_base.py`; the loss curve, versions and every command are in
`training.json`. The learning rate and the mix of the pools were changed when the run was resumed, and
the functions and small classes were added: the commands say at which steps, the first two in the
form that the script took then.{endings}

## Measured

| what | value |
|---|---|
| bits per byte, {files} held-out standard-library modules whole ({kb:.0f} kB), context 512, stride 256 | {bpb:.3f} |
| `xz -9e` given the same training text, on the same modules | {xz_given:.3f} |
| `xz -9` alone | {xz_alone:.3f} |
| greedy completions of 20 prompts fixed before training that parse, have two statements or more and repeat no line three times (bar: 15) | {good} of 20 |

Made by `tools/measure_base.py`; all completions are in `measured.json`. `xz` gets a dictionary as
large as the training text, so that it forgets nothing; the model saw {seen:.0%} as many tokens as the
text has, some of it several times.

Statements are counted in prompt and completion together, without docstrings, and white space at a
prompt's end is left to the model. Of the {good} completions {strict} also *begin* two statements or more
of their own; the others finish what the prompt began, or begin one.

## Limits

It has seen Python and the English of docstrings, and nothing else, and little of that: its code has
the form of code and rarely a purpose. It knows no facts, follows no instruction and must not be used
to write code that anyone runs. Its value is to be trained further in two minutes. Results on it
carry over to large models in mechanics (what is stored, what flows where, what is equal to what),
not in rankings of methods.

## Licences

Weights: MIT, as the course's code. The training text is used under the licences of CPython (PSF)
and of each package. The held-out modules in `../heldout` are CPython's, under the PSF licence
there.
"""  # noqa: E501 - a Markdown table row is one line


ENDINGS = """

A model this small, asked for its most likely text, writes one line for ever. So the last {steps}
steps (`tools/endings.py`) train it on its own text: it goes on from the beginnings of training
functions, the longest good start of what it wrote is ended there, and that is learnt
({own_tokens:,} tokens) beside rows of the corpus. Of {withheld} functions withheld from it,
{good_before} were completed well before these steps and {good_after} after them."""


def card(trained: dict, measured: dict) -> str:
    """The model card, filled from the two records: no number in it is typed by hand."""
    prompts = json.loads(PROMPTS.read_text("utf-8"))
    pools = trained["corpus"]["pools"]
    numbers = {}
    for pool, size in pools.items():
        numbers[f"{pool}_files"], numbers[f"{pool}_mb"] = size["files"], size["bytes"] / 1e6
    cut = trained["corpus"].get("definitions", "")  # a model from before that pool has none
    if cut:
        cut = (
            f" From what is left, {cut['texts']:,} functions\nand small classes"
            f" ({cut['bytes'] / 1e6:.1f} MB) are used a second time, as texts of their own."
        )
    own = trained.get("endings")
    if own:
        own = ENDINGS.format(**own)
    return CARD.format(
        endings=own or "",
        seen=trained["tokens"] / sum(trained["corpus"]["tokens"][name] for name in pools),
        parameters=trained["parameters"],
        dropped=len(trained["corpus"]["dropped"]),
        definitions=cut,
        tokens=trained["tokens"] / 1e6,
        steps=trained["steps"],
        hours=trained["hours"] + (trained.get("endings") or {"seconds": 0})["seconds"] / 3600,
        device="two CPU cores" if trained["device"] == "cpu" else "one GPU",
        seed=trained["seed"],
        files=measured["files"],
        kb=measured["bytes"] / 1e3,
        bpb=measured["bits_per_byte"],
        xz_given=measured["xz_with_training_text"],
        xz_alone=measured["xz_alone"],
        good=measured["prompts_good"],
        strict=sum(
            judged["good"] and begun(prompt.rstrip(), judged["text"]) >= 2
            for prompt, judged in zip(prompts, measured["prompts"], strict=True)
        ),
        **numbers,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=None, help="default: the embedded model")
    parser.add_argument("--xz", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import qlora_lab
    from qlora_lab.evaluation import text_bits

    folder = args.model or Path(qlora_lab.embedded_model())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held = corpus.heldout_texts()
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    sizes = [len(text.encode()) for text in held.values()]
    bits = text_bits(model, tokenizer, list(held.values()))
    result = {"weights_sha256": weights, "bits_per_byte": round(sum(bits) / sum(sizes), 4)}
    result["bits_per_byte_of_file"] = {
        name: round(b / size, 4) for name, b, size in zip(held, bits, sizes, strict=True)
    }
    result["context"], result["stride"], result["files"] = 512, 256, len(held)
    result["bytes"] = sum(sizes)
    print(f"bits per byte on {len(held)} held-out files: {result['bits_per_byte']}  (bar: 1.20)")
    judged = complete(model, tokenizer, json.loads(PROMPTS.read_text()))
    result["prompts_good"] = sum(j["good"] for j in judged)
    result["prompts"] = judged
    for j in judged:
        print(f"--- {'good' if j['good'] else 'BAD '} ({j['statements']} statements)\n{j['text']}")
    print(f"prompts: {result['prompts_good']} of {len(judged)} good  (bar: 15)", flush=True)
    trained = json.loads((folder / "training.json").read_text("utf-8"))
    result["corpus_sha256"] = trained["corpus"]["sha256"]
    if args.xz:
        pools, report = corpus.build(progress=lambda *_: None)
        if report["sha256"] != trained["corpus"]["sha256"]:
            sys.exit("the corpus of this machine is not the one of training.json; use --no-xz")
        training = "\n".join(t for texts in pools.values() for t in texts)
        joined = "\n".join(held.values())
        size = len(joined.encode())
        alone = 8 * len(lzma.compress(joined.encode(), preset=9)) / size
        given = xz_bits_per_byte(training, joined)
        result["xz_alone"], result["xz_with_training_text"] = round(alone, 4), round(given, 4)
        print(f"xz -9 alone {alone:.3f}, xz -9e given the training text {given:.3f}")
    else:
        kept = json.loads((folder / "measured.json").read_text("utf-8"))
        if kept.get("corpus_sha256") != result["corpus_sha256"]:
            sys.exit("measured.json is of another corpus: leave --no-xz out")
        result |= {name: kept[name] for name in ("xz_alone", "xz_with_training_text")}
    if args.save:
        (folder / "measured.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        (folder / "README.md").write_text(card(trained, result), "utf-8")


if __name__ == "__main__":
    main()
