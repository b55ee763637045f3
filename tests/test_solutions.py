"""Exercises and their solutions: each pair fits, and a solution that does not solve is found.

Whether the chapters' own solutions solve is shown where the chapters run: `make test`, other-cpu.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

from tools import check
from tools.notebooks import chapters, read, write
from tools.solutions import SolutionError, checked, exercises, solve, solved, solved_copies

EXERCISE = """\
my_sum = 0

numbers = [1, 2, 3]
print("right" if my_sum == sum(numbers) else "not yet")"""
# The second block stands below the fold: the next section's, and no part of the solution.
ANSWER = """\
<details>
<summary>Solution</summary>

Add them up: `sum`, or `print(numbers)` and a pencil.

{code}
</details>

```python
my_sum = "spoilt"
```
"""
BLOCK = "```python\nmy_sum = sum(numbers)\n```"
ANSWERED = ANSWER.format(code=BLOCK)


def chapter(exercise=EXERCISE, answer=ANSWERED):
    v4 = nbformat.v4
    said = v4.new_output("stream", text="not yet\n")
    cells = [
        v4.new_code_cell(exercise, outputs=[said], execution_count=2),
        v4.new_markdown_cell(answer),
    ]
    return v4.new_notebook(cells=[v4.new_code_cell("x = 1"), *cells, v4.new_markdown_cell("End")])


def run(exercise, code):
    exec(compile(checked(solved(exercise, ANSWER.format(code=code))), "cell", "exec"), {})


# The chapters


@pytest.mark.parametrize("path", chapters(), ids=lambda path: path.stem)
def test_every_exercise_of_a_chapter_has_a_solution_that_fits(path):
    notebook = read(path)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    headings = re.findall(r"^### Exercise", "\n".join(texts), re.MULTILINE)
    for cell, _ in exercises(notebook):
        assert "not yet" in "".join(output.get("text", "") for output in cell.outputs)
    assert solve(notebook) == len(headings)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(cell.source, path.name, "exec")


# The rule, on a small exercise


@pytest.mark.parametrize(
    "code",
    [
        BLOCK,
        "`my_sum = 6`. So *six*.",
        "```python\nmy_sum = 0\n```\n\nand then\n\n```python\nmy_sum += 6\n```",
        "```python\nmy_sum = sum(n for n in numbers)\n```\n\nNot `my_sum = 5`.",
    ],
    ids=["block", "inline", "two blocks", "block before inline"],
)
def test_a_right_solution_passes(code):
    run(EXERCISE, code)


@pytest.mark.parametrize("code", [BLOCK.replace("sum(n", "max(n"), "`my_sum = 7`"])
def test_a_wrong_solution_is_found(code):
    with pytest.raises(AssertionError, match="not yet"):
        run(EXERCISE, code)


def test_what_a_solution_raises_is_seen():
    with pytest.raises(NameError, match="number"):
        run(EXERCISE, BLOCK.replace("numbers", "number"))


def test_a_function_replaces_the_one_of_the_exercise():
    exercise = (
        'def my_double(x):\n    return x\n\n\nprint("ok" if my_double(2) == 4 else "not yet")'
    )
    run(exercise, "```python\ndef my_double(x):\n    return 2 * x\n```")
    with pytest.raises(AssertionError):
        run(exercise, "```python\ndef my_double(x):\n    return 3 * x\n```")


@pytest.mark.parametrize("code", ["It is six.", "`my_summ = 6`", "```python\nanswer = 6\n```"])
def test_a_solution_that_defines_no_name_of_the_exercise_does_not_fit(code):
    with pytest.raises(SolutionError, match="defines nothing"):
        solved(EXERCISE, ANSWER.format(code=code))


def test_a_name_that_the_exercise_never_uses_does_not_fit():
    with pytest.raises(SolutionError, match="defines nothing"):
        solved('my_sum = 0\nprint("not yet")', ANSWER.format(code="`my_sum = 6`"))


def test_an_exercise_without_solution_and_a_solution_without_exercise_are_found():
    with pytest.raises(SolutionError, match="no solution follows"):
        exercises(chapter(answer="Well done."))
    with pytest.raises(SolutionError, match="no solution follows"):
        exercises(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(EXERCISE)]))
    with pytest.raises(SolutionError, match="no cell says 'not yet'"):
        exercises(chapter(exercise=EXERCISE.replace("not yet", "wrong")))


# Copies


def test_only_the_copy_is_solved_and_only_exercises_change(tmp_path):
    path = tmp_path / "01_one.ipynb"
    write(path, chapter())
    before = path.read_bytes()
    (tmp_path / "copies").mkdir()
    copies = solved_copies([path], tmp_path / "copies")
    assert copies == [tmp_path / "copies" / path.name]
    assert path.read_bytes() == before
    first, exercise, *rest = read(copies[0]).cells
    assert [first, *rest] == [read(path).cells[i] for i in (0, 2, 3)]
    assert exercise.metadata.tags == ["nbval-ignore-output"]
    assert "my_sum = sum(numbers)" in exercise.source


def test_a_pair_that_does_not_fit_is_named_with_its_chapter(tmp_path, monkeypatch, capsys):
    write(tmp_path / "07_seven.ipynb", chapter(answer=ANSWER.format(code="Six.")))
    monkeypatch.setattr(check, "slowest_first", lambda: [tmp_path / "07_seven.ipynb"])
    assert not check.other_cpu()
    assert "07_seven: the solution" in capsys.readouterr().out


def test_the_other_processor_runs_the_solved_chapters(tmp_path, monkeypatch):
    paths = [tmp_path / "02_two.ipynb", tmp_path / "01_one.ipynb"]
    for path in paths:
        write(path, chapter())
    monkeypatch.setattr(check, "slowest_first", lambda: paths)
    commands = []

    def python(*arguments, env=None):
        if "--nbval" in arguments:
            copies = [Path(each) for each in arguments[-2:]]
            commands.append((arguments, env, [read(path).cells[1].source for path in copies]))
        return True

    monkeypatch.setattr(check, "python", python)
    assert check.other_cpu()
    [(arguments, env, sources)] = commands
    assert sources == 2 * [checked(solved(EXERCISE, ANSWERED))]
    assert [Path(each).name for each in arguments[-2:]] == [path.name for path in paths]
    # With another root the cells of all copies would have the same names.
    assert arguments[arguments.index("--rootdir") + 1] == str(Path(arguments[-1]).parent)
    assert env["FAST"] == "quiet"


def test_chapter_0_trains_on_the_other_processor_too(tmp_path):
    first = chapters()[0]
    (copy,) = solved_copies([first], tmp_path)
    check.trains(copy)
    cells = [
        [c.source for c in read(path).cells if c.cell_type == "code"] for path in (first, copy)
    ]
    assert cells[1][0].endswith(cells[0][0]) and "os.environ.pop('FAST'" in cells[1][0]
    assert cells[1][1:] == cells[0][1:]
