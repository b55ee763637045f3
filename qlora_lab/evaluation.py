"""How good is it, and how sure are we: from a model to a number with an interval.

1. `generate` answers many prompts at once, greedily;
2. `score` compares the answers with the truth: exact match of the parsed JSON, share of valid
   JSON, accuracy of each field. Exact match is the number that matters to a kitchen; the other
   two say what is missing when it is low;
3. `bits_per_byte` measures the model on text it was *not* fine-tuned on: what was forgotten;
4. `bootstrap_interval` and `paired_difference` say how much of a difference is luck;
5. two controls need no training: `few_shot_prompt` and `regex_baseline`.

Choices. Answers are compared after parsing, since a space in JSON means nothing to who reads it.
Bits per byte, not perplexity per token: a tokenizer with longer tokens has a higher perplexity
at the same quality, and bytes are the same for everyone. Intervals come from resampling the
test rows, which needs no formula for the metric; they speak of *these rows drawn again*, not of
another training seed, which has to be trained again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from qlora_lab.data import prompt
from qlora_lab.errors import InputError, needs, shown, texts_of, whole
from qlora_lab.orders import MODIFIERS, NUMBERS, SIZES, is_order, to_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 160
SPARE_TOKENS = 32  # room for one item too many: a wrong answer, but still valid JSON
FIELDS = ("name", "count", "size", "item", "with")

# --- 1. Answers ------------------------------------------------------------------------------


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Switch off dropout and gradients, and put the model back as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int | Sequence[int] = MAX_NEW_TOKENS,
    batch_size: int = 120,
    one_line: bool = True,
    must_start: str = "",
) -> list[str]:
    """Continue each prompt greedily, many at a time.

    Prompts of similar length share a batch, shorter ones are padded on the left, and
    `model.generate` derives positions from the attention mask: the answers are those of one prompt
    at a time (a test holds them equal). A batch ends when its last row has ended.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts to continue, each of one token or more.
        max_new_tokens: Bound on the length of an answer, for all or for each. Prompts with similar
            bounds then share a batch, and the batch takes the largest.
        batch_size: Prompts at a time.
        one_line: Also stop at the first line break. What comes after it is cut.
        must_start: End an answer at its first token if that does not begin with this. An answer
            that is wrong from the start costs one step then instead of `max_new_tokens`.

    Returns:
        The continuations, without special tokens, in the order of the prompts.

    Raises:
        InputError: If the prompts are no list of texts, one is empty or leaves no room in the
            model's context, or a bound or the batch size is below 1.
    """
    needs("model", model)
    needs("tokenizer", tokenizer)
    needs("texts", prompts, "prompts")
    whole("batch_size", batch_size)
    if not isinstance(must_start, str):
        raise InputError(f"must_start {shown(must_start)} is not possible; give a text")
    encoded = [_encode_prompt(tokenizer, text) for text in prompts]
    several = isinstance(max_new_tokens, list | tuple)
    bounds = list(max_new_tokens) if several else [max_new_tokens] * len(encoded)
    if len(bounds) != len(encoded):
        raise InputError(f"{len(bounds)} bounds for {len(encoded)} prompts; give one for each")
    for bound in bounds:
        whole("max_new_tokens", bound)
    order = sorted(range(len(encoded)), key=lambda i: (bounds[i], len(encoded[i])), reverse=True)
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    stops += _tokens_where(tokenizer, lambda token: one_line and "\n" in token)
    starts = _tokens_where(tokenizer, lambda token: token.lstrip().startswith(must_start))
    answers = [""] * len(encoded)
    with evaluating(model):
        for rows in batches:
            longest, bound = max(len(encoded[i]) for i in rows), max(bounds[i] for i in rows)
            _check_room(model, longest, bound)
            ids, mask = _pad_left([encoded[i] for i in rows], tokenizer.pad_token_id or 0)
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=bound,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id or 0,
                stopping_criteria=[_wrong_start(longest, starts)] if must_start else None,
            )
            texts = tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
            for i, text in zip(rows, texts, strict=True):
                answers[i] = text.split("\n")[0] if one_line else text
    return answers


def _encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = _ids(tokenizer, text)
    if not ids:
        raise InputError("the prompt is empty; give the model at least one token to continue")
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: whole files are longer than the context, and that is meant
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _check_room(model: PreTrainedModel, longest: int, bound: int) -> None:
    context = model.config.max_position_embeddings
    if longest + bound > context:
        raise InputError(
            f"a prompt of {longest} tokens and an answer of {bound} do not fit into the context "
            f"of {context}; shorten the prompt or lower max_new_tokens"
        )


def _tokens_where(tokenizer: PreTrainedTokenizerBase, test: Callable[[str], bool]) -> list[int]:
    tokens = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return [i for i, token in enumerate(tokens) if test(token)]


def _wrong_start(prompt_length: int, starts: list[int]) -> Callable[..., torch.Tensor]:
    """A stopping criterion: rows whose first new token is none of `starts` are done."""

    def wrong(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return ~torch.isin(ids[:, prompt_length], torch.tensor(starts, device=ids.device))

    return wrong


def _pad_left(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


# --- 2. Scores -------------------------------------------------------------------------------


def parse(text: str) -> dict[str, Any] | None:
    """Read an answer: the JSON object, or None where it is not one.

    Raises:
        InputError: If it is no text.
    """
    if not isinstance(text, str):
        raise InputError(f"an answer {shown(text)} is not possible; give the text that was written")
    try:
        order = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return order if isinstance(order, dict) else None


def exact_match(prediction: str, answer: str) -> bool:
    """Whether both are valid JSON objects and equal once parsed."""
    order, right = parse(prediction), parse(answer)
    return order is not None and order == right


def field_hits(prediction: str, answer: str) -> dict[str, tuple[int, int]]:
    """Count the right fields of one answer.

    Items are compared by position. An item that is missing or one too many is wrong in each of
    its fields, so leaving items out does not pay.

    Args:
        prediction: What the model wrote, valid JSON or not.
        answer: The right JSON.

    Returns:
        For each of `FIELDS`, how many are right and of how many.

    Raises:
        InputError: If the right answer is no order.
    """
    right, said = parse(answer), parse(prediction) or {}
    if right is None:
        raise InputError(f"the right answer is no JSON object: {answer[:60]!r}")
    if not is_order(answer):
        raise InputError(f"the right answer is no order with a name and items: {answer[:60]!r}")
    items = said.get("items")
    said_items = items if isinstance(items, list) else []
    total = max(len(right["items"]), len(said_items))
    pairs = [
        (a, b)
        for a, b in zip(right["items"], said_items, strict=False)
        if isinstance(b, dict)  # a model may write [1, 2]
    ]
    hits = {"name": (int(said.get("name") == right["name"]), 1)}
    for key in FIELDS[1:]:
        hits[key] = (sum(key in b and a[key] == b[key] for a, b in pairs), total)
    return hits


@dataclass(frozen=True)
class Score:
    """What `score` found for one grade.

    Attributes:
        exact: For each row, whether the answer is right: what the intervals are made from.
        valid: For each row, whether the answer is a JSON object.
        fields: Share of right values for each of `FIELDS`.
        predictions: The answers, to read the failures.
    """

    exact: list[bool] = field(repr=False)
    valid: list[bool] = field(repr=False)
    fields: dict[str, float]
    predictions: list[str] = field(repr=False)

    @property
    def exact_match(self) -> float:
        """Share of exactly right answers, 0 to 1."""
        return sum(self.exact) / len(self.exact)

    @property
    def valid_json(self) -> float:
        """Share of answers that are JSON objects, 0 to 1."""
        return sum(self.valid) / len(self.valid)

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of the exact match."""
        return bootstrap_interval(self.exact, confidence=confidence)[1:]

    def __str__(self) -> str:
        low, high = self.interval()
        return (
            f"exact match {self.exact_match:.1%} [{low:.1%}, {high:.1%}], "
            f"valid JSON {self.valid_json:.1%}, n={len(self.exact)}"
        )


def score(predictions: Sequence[str], answers: Sequence[str]) -> Score:
    """Compare answers with the truth.

    Args:
        predictions: What was written, one text a row.
        answers: The right JSON, one text a row.

    Returns:
        The `Score` over all rows.

    Raises:
        InputError: If there is nothing to score, the lengths differ, or a right answer is no order.
    """
    needs("texts", predictions, "predictions")
    needs("texts", answers, "answers")
    if not answers or len(predictions) != len(answers):
        raise InputError(
            f"{len(predictions)} predictions for {len(answers)} answers; give one for each"
        )
    hits = [field_hits(p, a) for p, a in zip(predictions, answers, strict=True)]
    shares = {}
    for key in FIELDS:
        shares[key] = sum(hit[key][0] for hit in hits) / sum(hit[key][1] for hit in hits)
    return Score(
        exact=[exact_match(p, a) for p, a in zip(predictions, answers, strict=True)],
        valid=[parse(p) is not None for p in predictions],
        fields=shares,
        predictions=list(predictions),
    )


def score_lines(predictions: Sequence[str], answers: Sequence[str]) -> list[bool]:
    """Whether each line is right to the letter: for kitchen tickets and the memory task.

    Raises:
        InputError: If these are no lists of texts, or the lengths differ.
    """
    needs("texts", predictions, "predictions")
    needs("texts", answers, "answers")
    if len(predictions) != len(answers):
        raise InputError(
            f"{len(predictions)} predictions for {len(answers)} answers; give one for each"
        )
    return [p.strip() == a.strip() for p, a in zip(predictions, answers, strict=True)]


def evaluate_orders(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    grades: Mapping[str, Iterable[Mapping[str, str]]],
    batch_size: int = 120,
    make_prompt: Callable[[str], str] = prompt,
) -> dict[str, Score]:
    """Let a model answer test sets and score each.

    All sets are answered together, and rows with answers of similar length share a batch whatever
    set they are from, so that few steps are spent on a batch's last row. Two kinds of answer are
    cut short because they cannot be right any more: one that does not begin with a brace, and
    one that is `SPARE_TOKENS` longer than the longest right answer of its batch.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        grades: Rows with "text" and "answer" by grade, such as `load_orders(GRADES)`.
        batch_size: Prompts at a time.
        make_prompt: From a sentence to a prompt; `prompt` is what training uses.

    Returns:
        The `Score` of each grade.

    Raises:
        InputError: If a grade has no rows, a row is no order, or as `generate` says.
    """
    needs("model", model)
    needs("tokenizer", tokenizer)
    rows = graded_rows(grades)
    prompts = [make_prompt(text) for _, text, _ in rows]
    bounds = [SPARE_TOKENS + len(_ids(tokenizer, answer)) for _, _, answer in rows]
    predictions = generate(model, tokenizer, prompts, bounds, batch_size, must_start="{")
    scores = {}
    for grade in grades:
        mine = [i for i, row in enumerate(rows) if row[0] == grade]
        scores[grade] = score([predictions[i] for i in mine], [rows[i][2] for i in mine])
    return scores


def graded_rows(grades: Mapping[str, Iterable[Mapping[str, str]]]) -> list[tuple[str, str, str]]:
    """Read test sets, refusing what cannot be scored.

    Args:
        grades: Rows with "text" and "answer" by grade.

    Returns:
        Grade, text and answer of each row.

    Raises:
        InputError: If these are no rows by grade, a grade has none, or an answer is no order.
    """
    if not isinstance(grades, Mapping):
        raise InputError(
            f"grades {shown(grades)} is not possible; give rows by grade, "
            "such as {'mine': rows} or load_orders(['pairs'])"
        )
    rows = []
    for grade, part in grades.items():
        needs("rows", part, f"grade {grade!r}:")
        mine = [(grade, *texts_of(row, "text", "answer")) for row in part]
        if not mine:
            raise InputError(f"grade {grade!r} has no rows; give one or more, or leave it out")
        for _, _, answer in mine:
            if not is_order(answer):
                raise InputError(
                    f"grade {grade!r} has an answer that is no order, {answer[:60]!r}; "
                    "for other answers see generate and score_lines"
                )
        rows += mine
    return rows


# --- 3. What was forgotten -------------------------------------------------------------------


def text_bits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    context: int = 512,
    stride: int = 256,
    batch_size: int = 8,
) -> list[float]:
    """Measure how many bits the model needs for each text.

    A window of `context` tokens slides over the text by `stride`. Each token is scored once, in
    the window that shows the most before it; the first is predicted from the beginning token
    (the end token, where a tokenizer has no beginning).

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        texts: Whole files.
        context: Tokens in a window.
        stride: Tokens that a window scores, except the first.
        batch_size: Windows at a time.

    Returns:
        Bits of each text. Divide their sum by the bytes of the texts for bits per byte.

    Raises:
        InputError: If the texts are no list of texts, one is empty, the stride does not leave room,
            the context is longer than the model's, or the batch size is below 1.
    """
    needs("model", model)
    needs("tokenizer", tokenizer)
    needs("texts", texts)
    whole("batch_size", batch_size)
    _check_windows(model, context, stride)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    windows = []
    for i, text in enumerate(texts):
        if not text:
            raise InputError(f"text {i} is empty; leave it out")
        ids = [start, *_ids(tokenizer, text)]
        windows += [(i, ids[a:b], new) for a, b, new in _spans(len(ids), context, stride)]
    windows.sort(key=lambda window: -len(window[1]))  # equal lengths together: little padding
    bits = [0.0] * len(texts)
    with evaluating(model):
        for first in range(0, len(windows), batch_size):
            batch = windows[first : first + batch_size]
            for (i, _, _), nats in zip(batch, _window_nats(model, batch), strict=True):
                bits[i] += nats / math.log(2)
    return bits


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    context: int = 512,
    stride: int = 256,
    batch_size: int = 8,
) -> float:
    """Measure the model on text: bits per UTF-8 byte over all texts whole.

    Args and Raises: see `text_bits`.

    Returns:
        All bits divided by all bytes. Comparable between tokenizers and with `xz`.
    """
    needs("texts", texts)
    if not len(texts):
        raise InputError("there is no text to measure; give one or more")
    bits = text_bits(model, tokenizer, texts, context, stride, batch_size)
    return sum(bits) / sum(len(text.encode("utf-8")) for text in texts)


def _check_windows(model: PreTrainedModel, context: int, stride: int) -> None:
    longest = model.config.max_position_embeddings
    whole("context", context, 2, longest)  # more than the model was made for
    whole("stride", stride, 1, context - 1)  # a window has to show something before what it scores


def _spans(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows (start, end, number of tokens scored at the end) over `length` tokens.

    The last window is moved back to be full, so that its tokens see as much as all others.
    """
    scored = 1  # the beginning token is given, not predicted
    end = min(context, length)
    while scored < length:
        yield max(0, end - context), end, end - scored
        scored = end
        end = min(end + stride, length)


def _window_nats(
    model: PreTrainedModel, batch: Sequence[tuple[int, list[int], int]]
) -> list[float]:
    """Sum of -ln p over the scored tokens of each window."""
    width = max(len(ids) for _, ids, _ in batch)
    # Padding on the right needs no mask: a causal model's earlier positions cannot see it.
    ids = torch.tensor([ids + [0] * (width - len(ids)) for _, ids, _ in batch]).to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nats = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]).float(), ids[:, 1:].reshape(-1), reduction="none"
    ).view(len(batch), width - 1)
    return [
        nats[row, len(window) - 1 - new : len(window) - 1].double().sum().item()
        for row, (_, window, new) in enumerate(batch)
    ]


# --- 4. Luck ---------------------------------------------------------------------------------


def bootstrap_interval(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Estimate a mean and how far luck in the choice of rows may have moved it.

    Args:
        values: One value a row: right or wrong (n,), or bits of each text with its bytes as weight.
        weights: What each value is divided by, for ratios such as bits per byte; 1 by default.
        confidence: Share of resamples inside the interval.
        resamples: How often n rows are drawn with replacement.
        seed: Same seed, same interval.

    Returns:
        sum(values) / sum(weights), and the lower and upper end of its percentile interval.

    Raises:
        InputError: If there are no values, one is no finite number, the lengths differ, a weight is
            not above 0, the confidence is not in (0, 1), or there are no resamples.

    Source:
        Efron, "Bootstrap methods: another look at the jackknife" (1979), percentile interval.
    """
    top = _finite("values", values)
    bottom = np.ones_like(top) if weights is None else _finite("weights", weights)
    if top.ndim != 1 or top.size == 0 or top.shape != bottom.shape:
        raise InputError(
            f"values {top.shape} and weights {bottom.shape} must be equally long lists"
        )
    if not (bottom > 0).all():
        raise InputError("a weight is 0 or less: give what each value is divided by, its bytes")
    if not isinstance(confidence, Real) or not 0 < confidence < 1:
        raise InputError(
            f"confidence {shown(confidence)} is not between 0 and 1; use 0.95 for 95 %"
        )
    whole("resamples", resamples)
    whole("seed", seed, 0)
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, top.size, size=(resamples, top.size))
    means = top[rows].sum(axis=1) / bottom[rows].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(top.sum() / bottom.sum()), float(low), float(high)


def _finite(name: str, values: Sequence[float]) -> np.ndarray:
    """Return the values as an array of finite numbers."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(
            f"{name} {shown(values)} are not possible; give a list of numbers"
        ) from None
    if not np.isfinite(array).all():
        raise InputError(
            f"{name} hold NaN or infinity: no mean of them is a number; leave them out"
        )
    return array


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Estimate by how much `second` is above `first` on the same rows.

    Both methods met the same easy and hard rows. Resampling the rows' differences takes that
    common luck out, so the interval is narrower than two separate ones would suggest.

    Args:
        first: One value a row.
        second: One value for each of the same rows.
        weights: As in `bootstrap_interval`.
        confidence: As in `bootstrap_interval`.
        resamples: As in `bootstrap_interval`.
        seed: As in `bootstrap_interval`.

    Returns:
        The difference second - first, and its interval.

    Raises:
        InputError: If the rows are not the same in number; and as `bootstrap_interval` says.
    """
    before, after = _finite("first", first), _finite("second", second)
    if before.shape != after.shape or before.ndim != 1:
        raise InputError(f"{before.shape} and {after.shape} rows are not pairs; use the same rows")
    return bootstrap_interval(after - before, weights, confidence, resamples, seed)


# --- 5. Controls -----------------------------------------------------------------------------


def few_shot_examples(
    rows: Iterable[Mapping[str, str]], count: int = 3, longest: int = 95
) -> list[Mapping[str, str]]:
    """Pick solved examples for `few_shot_prompt`: the first short ones that show a modifier.

    Three of them, the longest shipped order and its answer fit into a context of 512 together.

    Args:
        rows: Training rows.
        count: How many to pick.
        longest: Characters of an example's answer.

    Returns:
        The picked rows, each with one item and no correction.

    Raises:
        InputError: If a row lacks its answer or its correction, or the count is below 1.
    """
    whole("count", count)
    whole("longest", longest)
    rows = _checked_rows(rows, "answer", "correction")
    short = (row for row in rows if len(row["answer"]) <= longest and not row["correction"])
    return list(islice((row for row in short if '"with":[]' not in row["answer"]), count))


def few_shot_prompt(examples: Iterable[Mapping[str, str]], text: str) -> str:
    """Show solved examples before the question: what the base model can do untrained.

    Args:
        examples: Rows with "text" and "answer"; `few_shot_examples` picks short ones.
        text: The order to be answered.

    Returns:
        Prompt, answer and line break of each example, then the prompt of `text`.

    Raises:
        InputError: If an example lacks its text or answer, or `prompt` refuses a text.
    """
    rows = _checked_rows(examples, "text", "answer")
    return "".join(f"{prompt(row['text'])}{row['answer']}\n" for row in rows) + prompt(text)


def _checked_rows(rows: Iterable[Mapping[str, str]], *names: str) -> Iterator[Mapping[str, str]]:
    needs("rows", rows)
    for row in rows:
        texts_of(row, *names)
        yield row


_MOD = "|".join(MODIFIERS)
_ITEM = re.compile(
    rf"\b(?P<count>an?|{'|'.join(NUMBERS)}|\d+)\b(?: (?P<size>{'|'.join(SIZES)}))? "
    rf"(?P<item>[a-z]+?)(?P<plural>s?)\b(?: with (?P<mods>(?:{_MOD})(?: and (?:{_MOD}))*))?"
)
_NAME = re.compile(r"\b(?!Hi\b|I\b)([A-Z][a-z]+)\b")


def regex_baseline(text: str) -> str:
    """Answer an order with regular expressions: how far does an hour without a model get?

    The first capitalised word is the name; each number followed by an optional size, a word and
    an optional list of known modifiers is an item. It reads what it was written for, new words
    included, and understands no correction.

    Args:
        text: The order in English.

    Returns:
        The order as JSON.

    Raises:
        InputError: If this is no text.
    """
    if not isinstance(text, str):
        raise InputError(f"the order {shown(text)} is no text; write a sentence in English")
    name = _NAME.search(text)
    items = []
    for match in _ITEM.finditer(text):
        said = match["count"]
        count = NUMBERS.index(said) + 1 if said in NUMBERS else 1 if said[0] == "a" else int(said)
        item = match["item"] + (match["plural"] if count == 1 else "")
        mods = match["mods"].split(" and ") if match["mods"] else []
        items.append({"count": count, "size": match["size"], "item": item, "with": mods})
    return to_json({"name": name[1] if name else None, "items": items})
