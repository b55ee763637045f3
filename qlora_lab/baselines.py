"""What a number is compared with: two controls that need no training.

1. `few_shot_prompt` shows the untrained model solved examples before the question; does the task
   have to be learnt at all?
2. `regex_baseline` answers with regular expressions; does it take a model at all?
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from qlora_lab.data import prompt
from qlora_lab.errors import InputError, needs, shown, texts_of, whole
from qlora_lab.orders import MODIFIERS, NUMBERS, SIZES, to_json


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
