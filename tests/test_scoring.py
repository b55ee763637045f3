"""What counts as right, against answers whose marks are plain to see."""

import json

import pytest

from qlora_lab import orders, scoring
from qlora_lab.errors import InputError

ORDER = {"name": "Anna", "items": [{"count": 2, "size": "large", "item": "tea", "with": ["mint"]}]}


def test_exact_match_compares_parsed_json():
    answer = orders.to_json(ORDER)
    assert scoring.exact_match(json.dumps(ORDER, indent=1), answer)
    assert not scoring.exact_match(answer.replace("2", "3"), answer)
    assert not scoring.exact_match(answer[:-1], answer)
    assert not scoring.exact_match("", answer)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"a"', "[" * 100_000, "{} {}"])
def test_what_is_no_object_is_not_valid(text):
    assert scoring.parse(text) is None
    assert not scoring.exact_match(text, text)
    hits = scoring.field_hits(text, orders.to_json(ORDER))
    assert all(right == 0 and total == 1 for right, total in hits.values())


def test_fields_are_counted_by_position():
    two = ORDER | {"items": [ORDER["items"][0], ORDER["items"][0] | {"size": None}]}
    hits = scoring.field_hits(orders.to_json(ORDER), orders.to_json(two))
    assert hits["name"] == (1, 1) and hits["size"] == hits["item"] == (1, 2)
    swapped = two | {"items": two["items"][::-1]}
    hits = scoring.field_hits(orders.to_json(swapped), orders.to_json(two))
    assert hits["count"] == hits["item"] == hits["with"] == (2, 2) and hits["size"] == (0, 2)


def test_too_many_items_are_wrong_too():
    two = ORDER | {"items": ORDER["items"] * 2}
    assert scoring.field_hits(orders.to_json(two), orders.to_json(ORDER))["item"] == (1, 2)


@pytest.mark.parametrize("items", ["3", '"tea"', "[1, 2]", "null", '[{"item": []}]', "{}"])
def test_odd_items_are_wrong_and_not_an_error(items):
    hits = scoring.field_hits(f'{{"name":"Anna","items":{items}}}', orders.to_json(ORDER))
    assert hits["name"] == (1, 1) and hits["item"][0] == 0


def test_a_missing_size_is_not_a_null_size():
    none = ORDER | {"items": [ORDER["items"][0] | {"size": None}]}
    without = '{"name":"Anna","items":[{"count":2,"item":"tea","with":["mint"]}]}'
    assert scoring.field_hits(without, orders.to_json(none))["size"] == (0, 1)


def test_score_of_a_mixed_set():
    answers = [orders.to_json(ORDER)] * 4
    wrong = answers[0].replace("Anna", "Ben")
    score = scoring.score([answers[0], wrong, answers[0][:-3], "no"], answers)
    assert score.exact == [True, False, False, False] and score.valid == [True, True, False, False]
    assert (score.exact_match, score.valid_json) == (0.25, 0.5)
    assert score.fields == {"name": 0.25, "count": 0.5, "size": 0.5, "item": 0.5, "with": 0.5}
    low, high = score.interval()
    assert 0 <= low < 0.25 < high <= 1
    assert str(score).startswith("exact match 25.0% [") and str(score).endswith("n=4")


def test_score_refuses_what_it_cannot_pair():
    with pytest.raises(InputError):
        scoring.score([], [])
    with pytest.raises(InputError):
        scoring.score(["{}"], [])
    with pytest.raises(InputError, match="no JSON object"):
        scoring.score(["{}"], ["nonsense"])


def test_score_lines():
    assert scoring.score_lines(["1234\n", "12"], ["1234", "1234"]) == [True, False]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scoring.parse(None), "an answer None is not possible"),
        (lambda: scoring.field_hits("{}", '{"name":"A"}'), "no order with a name and items"),
        (lambda: scoring.score("ab", ["{}", "{}"]), "predictions 'ab'"),
        (lambda: scoring.score_lines(["a"], ["a", "b"]), "1 predictions for 2 answers"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
