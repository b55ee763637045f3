"""Put every exercise's solution where a reader would, so that the chapter itself checks it.

An exercise is a code cell that prints "not yet" until it is solved; the next cell folds its
solution. The solution's code is its `python` blocks or, where it has none, the inline code that
assigns a name of the exercise. It goes in front of the first statement that uses a name which both
define: below what the reader was to replace, and below what the cell computes to be used in it.

`make test` runs the chapters as on another processor with the solutions in place (`tools.check`),
so that a new base model or a changed helper makes none of them wrong unnoticed.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

import nbformat

from tools.notebooks import read, write

UNSOLVED = "not yet"
SUMMARY = "<summary>Solution</summary>"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")

# What the cell prints is for a reader; here it is kept, and must not hold the word for failure.
CHECKED = """\
import contextlib as _contextlib
import io as _io

with _contextlib.redirect_stdout(_io.StringIO()) as _printed:
{body}
assert {unsolved!r} not in _printed.getvalue(), _printed.getvalue()"""


class SolutionError(Exception):
    """An exercise and its solution do not fit each other; the message says which and why."""


def exercises(
    notebook: nbformat.NotebookNode,
) -> list[tuple[nbformat.NotebookNode, nbformat.NotebookNode]]:
    """Return the exercises of a chapter: each its code cell, and the cell with its solution.

    Raises:
        SolutionError: An exercise has no solution, or a solution no exercise.
    """
    pairs = []
    for cell, following in zip(notebook.cells, [*notebook.cells[1:], None], strict=True):
        asks = cell.cell_type == "code" and UNSOLVED in cell.source
        answered = following is not None and SUMMARY in following.source
        if asks and not answered:
            raise SolutionError(f"no solution follows:\n{cell.source}")
        if answered and not asks:
            raise SolutionError(f"before it no cell says {UNSOLVED!r}:\n{following.source}")
        if asks:
            pairs.append((cell, following))
    return pairs


def defined(code: str) -> set[str]:
    """Return the names that code assigns, or gives to functions, at its top level."""
    names = set()
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.FunctionDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                names |= _names(target, ast.Store)
    return names


def _names(tree: ast.AST, context: type[ast.expr_context]) -> set[str]:
    """The names that are stored (`ast.Store`) or used (`ast.Load`) anywhere below a node."""
    nodes = ast.walk(tree)
    return {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, context)}


def code_of(solution: str, names: set[str]) -> str:
    """Return the code of a solution, "" if there is none.

    Args:
        solution: Text of the cell; what stands below the fold is not part of it.
        names: Those that the exercise defines. Inline code counts if it assigns one of them.
    """

    def assigns(code: str) -> bool:
        try:
            return bool(defined(code) & names)
        except SyntaxError:
            return False

    folded = solution.partition(SUMMARY)[2].partition("</details>")[0]
    return "\n".join(BLOCK.findall(folded) or filter(assigns, INLINE.findall(folded)))


def solved(exercise: str, solution: str) -> str:
    """Return the source of an exercise with its solution in it.

    Args:
        exercise: Source of the code cell.
        solution: Text of the cell that folds the solution.

    Raises:
        SolutionError: The solution defines no name that the exercise defines and then uses.
    """
    code = code_of(solution, defined(exercise))
    names = defined(code) & defined(exercise)
    body = ast.parse(exercise).body
    uses = [index for index, statement in enumerate(body) if _names(statement, ast.Load) & names]
    if not uses or not uses[0]:
        raise SolutionError(f"the solution\n{code}\ndefines nothing that this uses:\n{exercise}")
    lines = exercise.splitlines()
    place = body[uses[0] - 1].end_lineno
    return "\n".join([*lines[:place], *code.splitlines(), *lines[place:]])


def checked(source: str) -> str:
    """Return source that runs a cell and raises if it prints that the exercise is not solved."""
    return CHECKED.format(body=textwrap.indent(source, "    "), unsolved=UNSOLVED)


def solve(notebook: nbformat.NotebookNode) -> int:
    """Put the solutions into a chapter's exercises, in place; return how many.

    The solved cells are checked by what they print, and no longer by their stored output.

    Raises:
        SolutionError: An exercise and its solution do not fit each other.
    """
    pairs = exercises(notebook)
    for cell, solution in pairs:
        cell.source = checked(solved(cell.source, solution.source))
        cell.metadata.tags = [*cell.metadata.get("tags", []), "nbval-ignore-output"]
    return len(pairs)


def solved_copies(chapters: Iterable[Path], folder: Path) -> list[Path]:
    """Write copies of chapters with their exercises solved.

    Args:
        chapters: Notebooks; they stay as they are.
        folder: Where the copies go, under the same names.

    Returns:
        The copies, in the order of the chapters.

    Raises:
        SolutionError: An exercise and its solution do not fit each other.
    """
    copies = []
    for path in chapters:
        notebook = read(path)
        try:
            solve(notebook)
        except SolutionError as error:
            raise SolutionError(f"{path.stem}: {error}") from None
        copies.append(folder / path.name)
        write(copies[-1], notebook)
    return copies
