"""Measure the embedded base model against its bars and write the numbers into its folder.

    python tools/measure_base.py [--model qlora_lab/assets/model] [--no-xz]

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


def complete(model, tokenizer, prompts: list[str]) -> list[dict]:
    """Greedy completions of the prompts, judged."""
    import torch

    judged = []
    for prompt in prompts:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]])
        with torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
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
    print(f"prompts: {result['prompts_good']} of {len(judged)} good  (bar: 15)")
    if args.xz:
        pools, _ = corpus.build(progress=lambda *_: None)
        training = "\n".join(t for texts in pools.values() for t in texts)
        joined = "\n".join(held.values())
        size = len(joined.encode())
        alone = 8 * len(lzma.compress(joined.encode(), preset=9)) / size
        given = xz_bits_per_byte(training, joined)
        result["xz_alone"], result["xz_with_training_text"] = round(alone, 4), round(given, 4)
        print(f"xz -9 alone {alone:.3f}, xz -9e given the training text {given:.3f}")
    if args.save:
        (folder / "measured.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
