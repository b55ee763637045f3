"""Teach the base model to end what it writes, on its own text.

A small model that is asked for its most likely text writes the same line for ever: in training it
always goes on from somebody else's text, never from its own. So it is trained, for a few steps, on
what it meets when it goes on by itself, as in DAgger (Ross, Gordon and Bagnell, 2011,
arXiv:1011.0686):

1. it goes on, greedily, from the beginnings of training functions;
2. `corrected` keeps the longest start of that text which is good code, and ends it there;
   where nothing is good, the function as it was written takes the place of the model's text;
3. the model is trained on the result, together with ordinary rows of the corpus.

The 20 prompts of `tools/prompts.json` take no part: what is watched is the share of good
completions of 64 functions that are withheld here.
"""

from __future__ import annotations

import ast
import os
import random
import re
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure_base  # noqa: E402

BEGINNINGS = 48  # functions of a step, beside 8 rows of the corpus
MIX = (3, 0, 0, 5)  # those rows: core, tests, packages, definitions
WITHHELD = 64
NEW_TOKENS = 112
LONGEST = 200  # tokens of a sequence
LOOP = re.compile(r"(.{2,60}?)\1{2,}")  # the same 2 to 60 characters three times running


def functions(rows: np.ndarray, seed: int) -> list[list[int]]:
    """The functions of 12 to 160 tokens in packed rows, as token ids, in seeded order."""
    found, current = [], None
    for token in rows.reshape(-1).tolist():
        if token == 1:
            current = []
        elif token == 2:
            if current:
                found.append(current)
            current = None
        elif current is not None:
            current.append(token)
    found = [ids for ids in found if 12 <= len(ids) <= 160]
    random.Random(seed).shuffle(found)
    return found


def beginning(text: str, rng: random.Random) -> str:
    """The first one to three lines of a function, and often the first words of the next."""
    lines = text.split("\n")
    count = max(1, min(rng.choice((1, 1, 2, 2, 2, 3)), len(lines) - 2))
    begun = "\n".join(lines[:count])
    if rng.random() < 0.5:
        words = re.findall(r"\s*\S+", lines[count])
        if words:
            begun += "\n" + "".join(words[: rng.choice((1, 2))])
    return begun.rstrip()


def corrected(begun: str, completion: str) -> str | None:
    """The longest good start of a completion with its beginning, ended there; None without one.

    Good: it parses, has two statements or more, no line of more than eight characters twice, no
    line three times, and no piece of a line three times running.
    """
    cut = re.search(r"\n(?=\S)", completion)
    lines = (begun + (completion[: cut.start()] if cut else completion)).rstrip().split("\n")
    given = begun.count("\n")
    kept: list[str] = []
    seen: Counter[str] = Counter()
    for at, line in enumerate(lines):
        bare = line.strip()
        seen[bare] += 1
        again = seen[bare] >= 3 or (seen[bare] == 2 and len(bare) > 8)
        if at > given and bare and again or LOOP.search(bare):
            break
        kept.append(line)
    for count in range(len(kept), given, -1):
        text = "\n".join(kept[:count]).rstrip()
        if len(text) <= len(begun):
            break
        if _statements(text) >= 2:
            return text + "\n"
    return None


def _statements(text: str) -> int:
    """Statements inside the outermost definition as `measure_base.judge` counts; 0: no code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            return 0
    statements = [n for n in ast.walk(tree) if isinstance(n, ast.stmt)]
    bare = [s for s in statements if isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)]
    return len(statements) - len(bare) - len(tree.body)


@torch.no_grad()
def greedy(model, tokenizer, texts: list[str], new_tokens: int = NEW_TOKENS) -> list[str]:
    """The most likely continuations of several texts at once, padded on the left."""
    encoded = [[1, *tokenizer(text)["input_ids"]] for text in texts]
    width = max(map(len, encoded))
    ids = torch.tensor([[0] * (width - len(e)) + e for e in encoded])
    mask = torch.tensor([[0] * (width - len(e)) + [1] * len(e) for e in encoded])
    device = model.device
    out = model.generate(
        ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)


def good(model, tokenizer, begun: list[str]) -> int:
    """How many beginnings the model completes as `measure_base.judge` wants it."""
    judged = 0
    for start in range(0, len(begun), 32):
        part = begun[start : start + 32]
        texts = greedy(model, tokenizer, part, measure_base.MAX_NEW_TOKENS)
        judged += sum(measure_base.judge(b, t)["good"] for b, t in zip(part, texts, strict=True))
    return judged


def teach(
    model, tokenizer, pools, rows, *, steps: int, lr: float, seed: int, checkpoint: Path
) -> dict:
    """Train `model` in place for `steps` steps; resumes from `checkpoint` if that file is there.

    Args:
        pools: packed rows by pool; the functions are read from ``pools["definitions"]``.
        rows: the run's `Rows`, which go on where the run left them.
        lr: AdamW's learning rate; it rises over 5 steps and falls to zero over the second half.
        checkpoint: of this stage alone, replaced every 20 steps.

    Returns:
        Steps, rate, tokens learnt of its own text, and how many withheld functions came out well
        before and after.
    """
    texts = functions(pools["definitions"], seed)
    withheld = [
        beginning(tokenizer.decode(ids), random.Random(i)) for i, ids in enumerate(texts[:WITHHELD])
    ]
    texts = texts[WITHHELD:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    step, record = 0, {"steps": steps, "lr": lr, "own_tokens": 0, "seconds": 0.0}
    record["withheld"] = WITHHELD
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=model.device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, record, rows.place = saved["step"], saved["record"], saved["place"]
        print(f"resumed at step {step} on its own text", flush=True)
    else:
        record["good_before"] = good(model, tokenizer, withheld)
        print(f"{record['good_before']} of {WITHHELD} withheld functions", flush=True)
    while step < steps:
        tick = time.perf_counter()
        rate = lr * min(1.0, (step + 1) / 5, 2 * (steps - step) / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
        for part in rows.take(MIX).to(model.device).split(4):
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
            (loss / 2).backward()
            total += loss.item() / 2
        batch = [texts[(step * BEGINNINGS + i) % len(texts)] for i in range(BEGINNINGS)]
        ids, labels, own = _own_text(model, tokenizer, batch, random.Random(seed * 10**6 + step))
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        record["seconds"] += time.perf_counter() - tick
        record["own_tokens"] += int((labels[:, 1:] != -100).sum())
        print(f"{step}: corpus {total:.3f}, own text {loss.item():.3f}, {own} kept", flush=True)
        if step % 20 == 0 or step == steps:
            if step == steps:
                record["good_after"] = good(model, tokenizer, withheld)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step, "record": record, "place": rows.place}
            torch.save(state, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
    print(f"{record['good_after']} of {WITHHELD} withheld functions", flush=True)
    return record


def _own_text(model, tokenizer, batch, rng):
    """Token ids and labels (batch, length) of one step, and how many texts are the model's."""
    originals = [tokenizer.decode(ids) for ids in batch]
    begun = [beginning(text, rng) for text in originals]
    own, sequences = 0, []
    for original, text, more in zip(originals, begun, greedy(model, tokenizer, begun), strict=True):
        target = corrected(text, more)
        own += target is not None
        ids = [1, *tokenizer(target or original)["input_ids"], 2][:LONGEST]
        sequences.append((ids, 1 + len(tokenizer(text)["input_ids"])))
    width = max(len(ids) for ids, _ in sequences)
    padded = torch.zeros(len(sequences), width, dtype=torch.long)
    labels = torch.full_like(padded, -100)  # the beginnings are given, not learnt
    for row, (ids, first) in enumerate(sequences):
        padded[row, : len(ids)] = torch.tensor(ids)
        labels[row, first : len(ids)] = torch.tensor(ids[first:])
    return padded.to(model.device), labels.to(model.device), own
