"""How good is it: from a model to its answers, their scores, and the bits it needs for text.

1. `generate` answers many prompts at once, greedily;
2. `evaluate_orders` lets a model answer whole test sets and scores each (`qlora_lab.scoring`);
3. `bits_per_byte` measures the model on text it was *not* fine-tuned on: what was forgotten.

The choice: bits per byte, not perplexity per token. A tokenizer with longer tokens has a higher
perplexity at the same quality, and bytes are the same for everyone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from qlora_lab.data import prompt
from qlora_lab.errors import InputError, needs, shown, whole
from qlora_lab.scoring import Score, graded_rows, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 160
SPARE_TOKENS = 32  # room for one item too many: a wrong answer, but still valid JSON

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


# --- 2. Test sets ----------------------------------------------------------------------------


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
