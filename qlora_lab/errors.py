"""The one exception a reader meets: an argument that cannot work, answered in one line.

Every public function checks what it is given at the door and says what was wrong and what is
allowed. Without that, a block size of 48 or a NaN weight would surface three calls later as a
shape error or, worse, as a loss that is quietly too high.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        raise InputError(f"{name} {value!r} is not possible; give a whole number {allowed}")


def above_zero(name: str, value: object) -> None:
    """Refuse what is not a finite number above 0.

    Args:
        name: What the reader calls it.
        value: What was given.

    Raises:
        InputError: It is no number, or not above 0 and finite.
    """
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        raise InputError(f"{name} {value!r} is not possible; give a finite number above 0")


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
            shown = sorted(row) if isinstance(row, Mapping) else row
            raise InputError(
                f"a row needs {' and '.join(map(repr, names))}; this one has {shown!r}"
            )
    return [row[name] for name in names]
