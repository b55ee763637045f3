"""The held-out text stays held out: the filter of `tools/corpus.py`, proven with planted copies."""

import ast
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import corpus  # noqa: E402

SECRET = textwrap.dedent(
    '''
    def weigh(stones, limit):
        """Pick stones until the basket is full."""
        basket = []
        total = 0
        for stone in sorted(stones):
            if total + stone > limit:
                break
            basket.append(stone)
            total += stone
        return basket
    '''
)
HARMLESS = "\n".join(f"value_{i} = compute({i}, mode='fast')  # step {i}" for i in range(40))


@pytest.fixture(scope="module")
def guard():
    return corpus.HeldOut([SECRET])


def test_a_file_of_its_own_passes(guard):
    assert guard.overlaps(HARMLESS) is None


def test_a_planted_copy_is_found(guard):
    assert guard.overlaps(HARMLESS + SECRET + HARMLESS) is not None


def test_a_body_is_found_under_another_name_layout_docstring_and_comments(guard):
    disguised = textwrap.dedent(
        """
        def choose(stones,
                   limit):
            '''Another docstring.'''
            basket = [  ]          # empty
            total = 0

            for stone in sorted( stones ):
                # too heavy?
                if total + stone > limit: break
                basket.append(stone); total += stone
            return (basket)
        """
    )
    body_only = corpus.HeldOut([SECRET])
    body_only.runs = np.empty(0, dtype=np.uint64)  # so that only the body rule can answer
    assert body_only.overlaps(HARMLESS + "\n" + disguised) == "body"


def test_a_planted_file_does_not_get_into_the_corpus(monkeypatch, tmp_path):
    held = next(iter(corpus.heldout_texts().values()))
    texts = {"harmless.py": HARMLESS, "copy.py": HARMLESS + "\n" + held, "again.py": HARMLESS}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    files = [(name, tmp_path / name) for name in texts]
    monkeypatch.setattr(corpus, "candidate_files", lambda: {"packages": files})
    pools, report = corpus.build(progress=lambda line: None)
    assert pools == {"packages": [HARMLESS]}  # the same text a second time is left out, too
    assert [name for name, _ in report["dropped"]] == ["copy.py"]


def test_a_changed_body_passes_the_body_rule(guard):
    changed = SECRET.replace("total += stone", "total += 2 * stone")
    assert corpus.function_bodies(changed).isdisjoint(guard.bodies)


def test_a_body_of_five_lines_is_too_common_to_count():
    short = "def f(x):\n" + "".join(f"    x += {i}\n" for i in range(5))
    assert corpus.function_bodies(short) == set()
    assert len(corpus.function_bodies(short + "    x += 5\n")) == 1


def test_runs_of_fifty_tokens_are_found_and_of_forty_nine_are_not():
    words = [f"w{i}" for i in range(50)]
    held = corpus.HeldOut(["# " + " ".join(words)])
    # "#" is a token too: the held-out comment holds 51 tokens, two runs of 50.
    assert len(held.runs) == 2
    assert held.overlaps("x = 1\n# other words\n'" + " ".join(words) + "'") == "run"
    assert held.overlaps("x = 1\n'" + " ".join(words[1:]) + "'") is None


def test_source_of_another_python_is_still_covered_by_the_token_rule():
    old = "print 'hello'\n" + SECRET  # Python 2: cannot be parsed
    with pytest.raises(SyntaxError):
        ast.parse(old)
    assert corpus.HeldOut([SECRET]).overlaps(old) == "run"


def test_each_shipped_heldout_file_is_caught_by_itself_inside_another_file():
    texts = corpus.heldout_texts()
    guard = corpus.HeldOut(list(texts.values()))
    for name, text in texts.items():
        middle = text[len(text) // 4 : 3 * len(text) // 4]
        assert guard.overlaps(HARMLESS + middle), name


def test_the_heldout_text_is_what_the_course_says():
    texts = corpus.heldout_texts()
    assert len(texts) >= 25
    for name, text in texts.items():
        assert name.endswith(".py.txt") and len(text) > 2000
        assert "\r" not in text, f"{name}: line ends were converted; see .gitattributes"
    licence = Path(corpus.heldout_dir()) / "LICENSE-PSF.txt"
    assert "PYTHON SOFTWARE FOUNDATION LICENSE" in licence.read_text("utf-8")


FILE = '''"""A file."""
import os


class Basket:
    """Holds stones."""

    limit = 3

    def add(self, stone):
        """Put a stone in.

        Or not.
        """
        if len(self.stones) < self.limit:
            self.stones.append(stone)
        return self

    def short(self): return 1


def repeats(x):
    x += 1
    x += 1
    x += 1
    return x
'''


def test_definitions_begin_at_column_0_without_docstring_and_end_where_they_end():
    basket, add = corpus.definitions([FILE, FILE])  # no copies; `repeats` is no model
    assert basket.startswith("class Basket:\n\n    limit = 3\n"), "its own docstring is gone"
    assert basket.endswith("    def short(self): return 1\n")
    expected = textwrap.dedent(
        """
            def add(self, stone):
                if len(self.stones) < self.limit:
                    self.stones.append(stone)
                return self
            """
    ).lstrip("\n")
    assert add == expected


def test_definitions_leave_out_what_is_long_or_does_not_parse():
    body = "".join(f"    x{i} = {i}\n" for i in range(24))
    assert corpus.definitions([f"def long():\n{body}", "def broken(:\n    pass\n"]) == []
    constants = "class Codes:\n    A = 1\n    B = 2\n    C = 3\n"
    assert corpus.definitions([constants]) == []
