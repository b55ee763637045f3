"""The one exception a reader meets: an argument that cannot work, answered in one line.

Every public function checks what it is given at the door and says what was wrong and what is
allowed. Without that, a block size of 48 or a NaN weight would surface three calls later as a
shape error or, worse, as a loss that is quietly too high.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Mapping
from numbers import Integral, Real


class InputError(ValueError):
    """An argument that this package refuses, with one line that says what is allowed.

    It is a `ValueError`, so code that knows nothing of this package catches it too. The command
    line prints the message and leaves with exit code 2 instead of a traceback.
    """


def whole(name: str, value: object, least: int = 1, most: int | None = None) -> None:
    """Refuse what is not a whole number in a range.

    Args:
        name: What the reader calls it.
        value: What was given.
        least: The smallest allowed.
        most: The largest allowed, if there is one.

    Raises:
        InputError: It is no whole number, or outside.
    """
    number = isinstance(value, Integral) and not isinstance(value, bool)
    if not number or value < least or (most is not None and value > most):
        allowed = f"from {least} on" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} {shown(value)} is not possible; give a whole number {allowed}")


def above_zero(name: str, value: object) -> None:
    """Refuse what is not a finite number above 0.

    Args:
        name: What the reader calls it.
        value: What was given.

    Raises:
        InputError: It is no number, or not above 0 and finite.
    """
    if not _real(value) or not 0 < value < float("inf"):
        raise InputError(f"{name} {shown(value)} is not possible; give a finite number above 0")


def share(name: str, value: object) -> None:
    """Refuse what cannot be the probability of a dropout.

    Args:
        name: What the reader calls it.
        value: What was given.

    Raises:
        InputError: It is no number, or not from 0 to less than 1.
    """
    if not _real(value) or not 0 <= value < 1:
        raise InputError(f"{name} {shown(value)} is not possible; give 0 or more, below 1")


def _real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


# What a helper may need: how it is told (by what it can do, so that nothing is imported for it),
# and what to give.
_KINDS = {
    "tensor": (
        lambda value: hasattr(value, "untyped_storage"),
        "a torch tensor, such as torch.tensor([0.5, -1.0])",
    ),
    "model": (
        lambda value: hasattr(value, "named_modules"),
        "a model: of what load_model returns, its .model",
    ),
    "tokenizer": (
        lambda value: hasattr(value, "eos_token_id") and callable(value),
        "a tokenizer: of what load_model returns, its .tokenizer",
    ),
    "texts": (
        lambda value: (
            isinstance(value, Iterable)
            and hasattr(value, "__len__")
            and not isinstance(value, str | bytes | Mapping)
            and all(isinstance(text, str) for text in value)
        ),
        "a list of texts, with [...] around a single one, too",
    ),
    "rows": (
        lambda value: isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping),
        "a list of rows, such as [{'text': 'a tea', 'answer': '1 tea'}]",
    ),
    "path": (lambda value: isinstance(value, str | os.PathLike) and value != "", "a path"),
}


def needs(kind: str, value: object, name: str | None = None) -> None:
    """Refuse what is not of the kind that a helper works on.

    Args:
        kind: "tensor", "model", "tokenizer", "texts", "rows" or "path".
        value: What was given.
        name: What the reader calls it, if not as the kind.

    Raises:
        InputError: It is something else, a `Loaded` where its model is meant for example.
    """
    fits, allowed = _KINDS[kind]
    if isinstance(value, type) or not fits(value):
        raise InputError(f"{name or kind} {shown(value)} is not possible; give {allowed}")


def shown(value: object) -> str:
    """Show a value in a few words on one line: a model or a tensor by its type alone."""
    if type(value) in (list, tuple, dict, set):
        return " ".join(reprlib.repr(value).split())[:80]
    kind = type(value).__name__
    plain = isinstance(value, str | bytes | Real | os.PathLike) or value is None or kind == "dtype"
    return repr(value)[:80] if plain else f"of type {kind}"


def texts_of(row: object, *names: str) -> list[str]:
    """Return the texts of a row, refusing one that lacks them.

    Args:
        row: A row of training or test data.
        names: The texts that it must have.

    Raises:
        InputError: It is no mapping, or lacks one of them.
    """
    for name in names:
        if not isinstance(row, Mapping) or not isinstance(row.get(name), str):
            held = shown(sorted(row) if isinstance(row, Mapping) else row)
            raise InputError(f"a row needs {' and '.join(map(repr, names))}; this one has {held}")
    return [row[name] for name in names]
