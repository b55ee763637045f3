"""Two controls that need no training: what they show, and what they leave to a model."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lab import baselines, data, orders, scoring
from qlora_lab.errors import InputError

ORDER = {"name": "Anna", "items": [{"count": 2, "size": "large", "item": "tea", "with": ["mint"]}]}


def test_few_shot_prompt_ends_where_the_answer_begins():
    examples = orders.make_rows("train", 2)
    text = baselines.few_shot_prompt(examples, "two teas for Bob")
    assert text.splitlines() == [
        "# " + examples[0]["text"],
        examples[0]["answer"],
        "# " + examples[1]["text"],
        examples[1]["answer"],
        "# two teas for Bob",
    ]
    assert text.endswith("\n")
    assert baselines.few_shot_prompt([], "two teas") == data.prompt("two teas")


def test_few_shot_examples_leave_room_for_the_longest_order():
    rows = orders.make_rows("train", 100)
    examples = baselines.few_shot_examples(rows)
    assert len(examples) == 3 and all(row in rows for row in examples)
    for row in examples:
        (item,) = json.loads(row["answer"])["items"]
        assert item["with"] and not row["correction"]


@pytest.mark.parametrize(
    "text",
    [
        "two large teas with mint for Anna",
        "Anna would like 2 large teas with mint",
        "could I get two large teas with mint? the name is Anna",
    ],
)
def test_regex_reads_the_plain_form(text):
    assert scoring.exact_match(baselines.regex_baseline(text), orders.to_json(ORDER))


@given(st.text(alphabet="atwo12sxI,? Awith", max_size=60))
def test_regex_survives_anything(text):
    assert scoring.parse(baselines.regex_baseline(text)) is not None


def test_regex_leaves_room_for_a_model():
    """A task that regular expressions solve is no task for a language model.

    The bound leaves them the grades of one plain item each; corrections they cannot do at all.
    """
    for grade in orders.GRADES:
        rows = orders.make_rows(grade, 100)
        score = scoring.score(
            [baselines.regex_baseline(row["text"]) for row in rows],
            [row["answer"] for row in rows],
        )
        bound = 0.05 if grade == "corrections" else 0.9
        assert score.valid_json == 1.0 and score.exact_match < bound, grade


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: baselines.regex_baseline(3), "the order 3 is no text"),
        (lambda: baselines.few_shot_prompt([{"text": "a"}], "b"), "a row needs"),
        (lambda: baselines.few_shot_examples([], 0), "count 0"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
