"""From sentences to batches: which tokens a fine-tuning run learns from.

How a row becomes training data, in four steps:

1. `load_orders` reads the shipped JSONL files with `datasets`;
2. `prompt` puts the sentence into a fixed template, a comment line as in the Python source
   that the embedded model was trained on: `# two lattes for Anna` and a line break;
3. `encode` joins the tokens of the prompt and of the answer, ends them with the end token,
   and makes the labels: -100 (ignored by the loss) over the prompt, the tokens themselves
   over the answer *and the end token*;
4. `collator` pads a batch to a multiple of 8; what is padded is neither attended nor learnt.

Three mistakes that cost people days are refused here instead. The end token is part of the
labels, otherwise the model never learns to stop. Padding must not be the end token, otherwise
a mask made from the padding hides the end token too, with the same result. A row that is too
long is an error (or skipped, if you say so), because cutting its end leaves a row that teaches
nothing, and a batch of such rows has the loss NaN.

Training on the prompt as well (no mask) would also work here, but half of the loss would then
be about sentences that the model only ever has to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_lab.errors import InputError, needs, shown, texts_of, whole
from qlora_lab.orders import GRADES

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import BatchEncoding, PreTrainedTokenizerBase

IGNORED = -100  # the label that PyTorch's cross-entropy leaves out
PROMPT = "# {text}\n"
SPLITS = ("train", "validation", *GRADES)
TOO_LONG = ("raise", "skip")

_ASSETS = Path(__file__).resolve().parent / "assets"


def load_orders(splits: Iterable[str] = SPLITS, folder: str | Path | None = None) -> DatasetDict:
    """Load the orders task with `datasets`.

    Args:
        splits: Any of "train", "validation" and the grades of `qlora_lab.orders.GRADES`.
        folder: Where the files `<split>.jsonl` are; the shipped ones by default.

    Returns:
        A `DatasetDict` with the columns "text", "answer", "grade", "frame" and "correction".

    Raises:
        InputError: If no split is asked for, one is unknown, or its file is missing.
    """
    from datasets import load_dataset
    from datasets.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    needs("texts", splits, "splits")
    if not splits:
        raise InputError(f"no split is asked for; choose one or more of {', '.join(SPLITS)}")
    if folder is not None:
        needs("path", folder, "folder")
    folder = _ASSETS / "orders" if folder is None else Path(folder)
    files = {}
    for split in splits:
        path = folder / f"{split}.jsonl"
        if split not in SPLITS:
            raise InputError(f"split {split!r} is unknown; choose from {', '.join(SPLITS)}")
        if not path.is_file():
            raise InputError(f"{path} is missing; make it with python -m tools.make_orders")
        files[split] = str(path)
    hidden = are_progress_bars_disabled()
    disable_progress_bars()  # a second's work: a bar would only clutter a notebook
    try:
        return load_dataset("json", data_files=files)
    finally:
        if not hidden:
            enable_progress_bars()


def heldout_texts(limit: int | None = None) -> dict[str, str]:
    """Read the held-out files on which bits per byte are measured.

    Args:
        limit: Take only the first files, by name, 1 or more; None takes all.

    Returns:
        The text of each file by its name.

    Raises:
        InputError: If the limit is no whole number from 1 on.
    """
    if limit is not None:
        whole("limit", limit)
    files = sorted((_ASSETS / "heldout").glob("*.py.txt"))
    # Bytes, not text mode: universal newlines would change the count on Windows.
    return {path.name: path.read_bytes().decode("utf-8") for path in files[:limit]}


def prompt(text: str) -> str:
    """Put a sentence into the template that ends where the answer begins.

    Args:
        text: The order in English, one line.

    Returns:
        The prompt, ending with a line break.

    Raises:
        InputError: If there is no text, or more than one line.
    """
    if not isinstance(text, str):
        raise InputError(f"the prompt {shown(text)} is no text; write one, a sentence in English")
    if not text.strip():
        raise InputError("the prompt is empty; write an order such as 'two lattes for Anna'")
    if len(text.splitlines()) > 1:
        raise InputError("the prompt has more than one line; the template is a single comment line")
    return PROMPT.format(text=text)


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, answer: str, max_length: int = 512
) -> dict[str, list[int]]:
    """Turn one example into token ids and labels.

    The prompt and the answer are tokenized apart, so that no token lies across the border
    between what is masked and what is learnt.

    Args:
        tokenizer: A tokenizer with an end token.
        text: The order in English.
        answer: What the model has to write, without the end token.
        max_length: The longest row allowed, in tokens.

    Returns:
        "input_ids", "attention_mask" and "labels", lists of one length; labels are -100 over the
        beginning token and the prompt.

    Raises:
        InputError: If the text or the answer is empty or no text, the row is too long, or there is
            no end token.
    """
    needs("tokenizer", tokenizer)
    whole("max_length", max_length)
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end token; without one the model cannot stop")
    if not isinstance(answer, str):
        raise InputError(f"the answer {shown(answer)} is no text; write what the model has to")
    if not answer.strip():
        raise InputError(f"the answer to {text!r} is empty; there is nothing to learn from it")
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    asked = start + _ids(tokenizer, prompt(text))
    told = [*_ids(tokenizer, answer), tokenizer.eos_token_id]
    if len(asked) + len(told) > max_length:
        raise InputError(
            f"the row {text[:40]!r}... has {len(asked) + len(told)} tokens, max_length is "
            f"{max_length}; raise it or skip such rows"
        )
    return {
        "input_ids": asked + told,
        "attention_mask": [1] * len(asked + told),
        "labels": [IGNORED] * len(asked) + told,
    }


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def encode_rows(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    max_length: int = 512,
    too_long: str = "raise",
) -> Dataset:
    """Encode every row for the Trainer.

    Args:
        tokenizer: A tokenizer with an end token.
        rows: Rows with "text" and "answer": a `datasets.Dataset` or a list of dictionaries.
        max_length: The longest row allowed, in tokens.
        too_long: "raise" stops at the first longer row; "skip" leaves longer rows out.

    Returns:
        A `Dataset` with the columns of `encode` and "length", by which the Trainer puts rows of
        similar length in one batch (`train_sampling_strategy="group_by_length"`).

    Raises:
        InputError: As `encode` says, if `too_long` is unknown, or if no row is left.
    """
    from datasets import Dataset

    if too_long not in TOO_LONG:
        raise InputError(
            f"too_long={shown(too_long)} is unknown; choose from {', '.join(TOO_LONG)}"
        )
    needs("rows", rows)
    whole("max_length", max_length)
    room = max_length if too_long == "raise" else 2**31
    encoded = [encode(tokenizer, *texts_of(row, "text", "answer"), room) for row in rows]
    if not encoded:
        raise InputError("there are no rows; give one or more")
    kept = [row for row in encoded if len(row["input_ids"]) <= max_length]
    if not kept:
        raise InputError(f"no row is left of {len(encoded)} at max_length {max_length}; raise it")
    return Dataset.from_list([row | {"length": len(row["input_ids"])} for row in kept])


def collator(
    tokenizer: PreTrainedTokenizerBase, multiple_of: int = 8
) -> Callable[[Sequence[Mapping[str, Any]]], BatchEncoding]:
    """Make the function that pads rows to a batch: transformers' own, with the guard.

    Args:
        tokenizer: A tokenizer whose padding token is not its end token.
        multiple_of: The batch's length is rounded up to a multiple of this.

    Returns:
        A callable from a list of rows ("input_ids", "attention_mask", "labels") to tensors of
        shape (batch, length), padded on the right: padding token, attention 0, label -100. It
        raises InputError for a batch of no rows.

    Raises:
        InputError: If there is no padding token, it is the end token, or it stands on the left.
    """
    needs("tokenizer", tokenizer)
    whole("multiple_of", multiple_of)
    from transformers import DataCollatorForSeq2Seq

    if tokenizer.pad_token_id is None:
        raise InputError("the tokenizer has no padding token; set pad_token to an unused token")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise InputError(
            f"padding and end token are both {tokenizer.eos_token!r}, so a mask over the padding "
            "hides the end and the model never stops; set pad_token to another, unused token"
        )
    if tokenizer.padding_side != "right":
        raise InputError("the tokenizer pads on the left; set padding_side='right' for training")
    pad = DataCollatorForSeq2Seq(
        tokenizer, padding=True, pad_to_multiple_of=multiple_of, label_pad_token_id=IGNORED
    )

    def collate(rows: Sequence[Mapping[str, Any]]) -> BatchEncoding:
        if not rows:
            raise InputError("a batch of no rows is not possible; give at least one encoded row")
        return pad(rows)

    return collate
