"""What counts as right: from what was written and the truth to a number.

`score` compares answers with the right JSON: exact match of the parsed JSON, share of valid JSON,
accuracy of each field. Exact match is the number that matters to a kitchen; the other two say what
is missing when it is low. `score_lines` serves where every letter counts.

The choice: answers are compared after parsing, since a space in JSON means nothing to who reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlora_lab.errors import InputError, needs, shown, texts_of
from qlora_lab.intervals import bootstrap_interval
from qlora_lab.orders import is_order

FIELDS = ("name", "count", "size", "item", "with")


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
