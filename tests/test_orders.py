"""The orders task: what each grade may contain, and that no answer leaks into training."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lab import orders
from qlora_lab.errors import InputError

ASSETS = Path(orders.__file__).resolve().parent / "assets" / "orders"
SEEDS = st.integers(0, 10_000)


@pytest.fixture(scope="module")
def splits():
    """The splits as shipped."""
    return {
        path.stem: [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in ASSETS.glob("*.jsonl")
    }


def words(rows):
    return {word for row in rows for word in re.findall(r"[A-Za-z]+", row["text"])}


def met(rows):
    """Pairs of a name and an item that stand in one sentence or one answer."""
    pairs = set()
    for row in rows:
        here = words([row]) | words([{"text": row["answer"]}])
        here |= {word.removesuffix("s") for word in here}
        pairs |= {(n, i) for n in here & set(orders.NAMES) for i in here & set(orders.ITEMS)}
    return pairs


def asked(rows):
    """The (name, item) pairs of the answers."""
    return {pair for row in rows for pair in orders.pairs(row)}


# --- the shipped files -----------------------------------------------------------------------


def test_shipped_files_are_what_the_generator_makes(splits):
    assert splits == orders.make_splits()


def test_sizes(splits):
    assert set(splits) == {"train", "validation", *orders.GRADES}
    assert all(len(splits[grade]) >= 100 for grade in orders.GRADES)
    assert len(splits["train"]) >= 300 * 16  # one epoch covers 300 steps of batch 16


def test_no_sentence_and_no_answer_is_in_two_splits(splits):
    for field in ("text", "answer"):
        seen = {}
        for split, rows in splits.items():
            for value in {row[field] for row in rows}:
                assert seen.setdefault(value, split) == split
    assert len({row["text"] for row in splits["train"]}) == len(splits["train"])


def test_word_lists_do_not_overlap():
    assert not set(orders.NAMES) & set(orders.NEW_NAMES)
    assert not set(orders.ITEMS) & set(orders.NEW_ITEMS)
    new_frames = [frame for level in orders.NEW_FRAMES for frame in level]
    assert not set(orders.FRAMES) & set(new_frames)
    for kind, phrases in orders.NEW_CORRECTIONS.items():
        assert not set(phrases) & set(orders.CORRECTIONS.get(kind, ()))
    for group in (orders.NAMES, orders.NEW_NAMES, orders.ITEMS, orders.NEW_ITEMS, orders.FRAMES):
        assert len(set(group)) == len(group)


# --- what each grade asks --------------------------------------------------------------------


def test_seen_has_only_known_parts(splits):
    assert {row["frame"] for row in splits["seen"]} <= {row["frame"] for row in splits["train"]}
    assert words(splits["seen"]) <= words(splits["train"])


def test_pairs_never_met_in_training(splits):
    pairs = asked(splits["pairs"])
    assert not pairs & met(splits["train"] + splits["validation"])
    assert all(orders.held_out(*pair) for pair in pairs)
    assert {name for name, _ in pairs} <= {name for name, _ in asked(splits["train"])}
    assert {item for _, item in pairs} <= {item for _, item in asked(splits["train"])}
    assert {row["frame"] for row in splits["pairs"]} <= set(orders.FRAMES)


def test_every_fourth_pair_is_held_out_evenly():
    for name in orders.NAMES:
        assert sum(orders.held_out(name, item) for item in orders.ITEMS) == len(orders.ITEMS) / 4
    for item in orders.ITEMS:
        assert sum(orders.held_out(name, item) for name in orders.NAMES) == len(orders.NAMES) / 4


def test_known_pairs_were_all_trained(splits):
    trained = asked(splits["train"])
    for grade in ("seen", "phrasings", "longer", "corrections"):
        assert asked(splits[grade]) <= trained


def test_phrasings_are_new_but_words_are_not(splits):
    frames = {row["frame"] for row in splits["phrasings"]}
    assert not frames & {row["frame"] for row in splits["train"] + splits["validation"]}
    assert all(frames & set(level) for level in orders.NEW_FRAMES)
    names = {name for name, _ in asked(splits["phrasings"])}
    assert names <= {name for name, _ in asked(splits["train"])}


def test_copying_words_are_in_no_training_text(splits):
    names = {name for name, _ in asked(splits["copying"])}
    items = {item for _, item in asked(splits["copying"])}
    assert names <= set(orders.NEW_NAMES) and items <= set(orders.NEW_ITEMS)
    trained = words(splits["train"] + splits["validation"])
    assert not trained & (names | items | {item + "s" for item in items})
    assert {row["frame"] for row in splits["copying"]} <= set(orders.FRAMES)


def test_longer_orders_are_longer_than_any_trained_one(splits):
    def count(row):
        return len(json.loads(row["answer"])["items"])

    trained = [count(row) for row in splits["train"]]
    assert min(count(row) for row in splits["longer"]) > max(trained)
    # Some orders of more than one item must be trained on, or "longer" could only be 0 %.
    assert 0.1 < sum(n == max(trained) for n in trained) / len(trained) < 0.3


def test_corrections_mix_known_and_new_ones(splits):
    kinds = [row["correction"] for row in splits["corrections"]]
    assert all(kinds)
    assert {kind.removeprefix("new ") for kind in kinds} == set(orders.NEW_CORRECTIONS) | set(
        orders.CORRECTIONS
    )
    assert any(kind.startswith("new ") for kind in kinds)
    assert not all(kind.startswith("new ") for kind in kinds)
    trained = [row["correction"] for row in splits["train"]]
    assert set(trained) == {"", *orders.CORRECTIONS}
    assert 0.1 < sum(map(bool, trained)) / len(trained) < 0.2


def test_new_wordings_are_in_no_training_text(splits):
    text = "\n".join(row["text"] for row in splits["train"] + splits["validation"])
    for phrases in orders.NEW_CORRECTIONS.values():
        for phrase in phrases:
            fields = {"count": "|".join(orders.NUMBERS), "size": "|".join(orders.SIZES)}
            fields |= {"item": "[a-z]+", "name": "[A-Z][a-z]+", "mod": "[a-z ]+"}
            pattern = phrase.format(**{k: f"(?:{v})" for k, v in fields.items()})
            # "no, make that (item)" is told from the trained "no, make that three" by its word
            known = {*orders.NUMBERS, *orders.SIZES}
            hits = [hit for hit in re.findall(pattern, text) if hit.split()[-1] not in known]
            assert not hits, (phrase, hits[:3])


# --- the generator ---------------------------------------------------------------------------


@given(SEEDS, st.sampled_from(("train", *orders.GRADES)))
def test_sentence_holds_what_the_answer_says(seed, grade):
    for row in orders.make_rows(grade, 5, seed):
        assert "\n" not in row["text"] and "  " not in row["text"] and " ," not in row["text"]
        order = json.loads(row["answer"])
        assert orders.to_json(order) == row["answer"]
        assert list(order) == ["name", "items"] and order["items"]
        assert re.search(rf"\b{order['name']}\b", row["text"])
        for item in order["items"]:
            assert list(item) == ["count", "size", "item", "with"]
            assert re.search(rf"\b{item['item']}s?\b", row["text"])
            assert item["count"] in range(1, 7)
            assert item["size"] is None or item["size"] in row["text"]
            assert all(mod.removeprefix("no ") in row["text"] for mod in item["with"])
            assert len({mod.split()[-1] for mod in item["with"]}) == len(item["with"])


def test_same_seed_same_rows_other_seed_other_rows():
    first = orders.make_rows("train", 50, seed=3)
    assert first == orders.make_rows("train", 50, seed=3)
    assert first[:20] == orders.make_rows("train", 20, seed=3)
    assert not {r["text"] for r in first} & {r["text"] for r in orders.make_rows("train", 50, 4)}


def test_avoid_keeps_sentences_and_answers_out():
    first = orders.make_rows("pairs", 40)
    second = orders.make_rows("pairs", 40, avoid=first)
    for field in ("text", "answer"):
        assert not {row[field] for row in first} & {row[field] for row in second}


def test_difficulty_can_be_set():
    easy = orders.make_rows("phrasings", 30, phrasing_weights=(1, 0, 0))
    assert {row["frame"] for row in easy} <= set(orders.NEW_FRAMES[0])
    long = orders.make_rows("longer", 10, long_items=(6,))
    assert {len(json.loads(row["answer"])["items"]) for row in long} == {6}
    for share, kinds in ((0.0, {False}), (1.0, {True})):
        rows = orders.make_rows("corrections", 30, new_corrections=share)
        assert {row["correction"].startswith("new ") for row in rows} == kinds


@given(SEEDS)
def test_a_correction_changes_one_thing(seed):
    rng = orders.random.Random(seed)
    order = orders.draw_order(rng, 2)
    before = json.dumps(order)
    for kind, phrases in orders.NEW_CORRECTIONS.items() | orders.CORRECTIONS.items():
        done = orders.correct(rng, order, kind, phrases[0])
        assert json.dumps(order) == before
        if done is None:
            assert (kind == "size" and not order["items"][1]["size"]) or (
                kind == "drop" and all(m.startswith("no ") for m in order["items"][1]["with"])
            )
            continue
        said, meant = done
        assert meant != order and meant["items"][0] == order["items"][0]
        assert (meant["name"] != order["name"]) == (kind == "name")
        changed = {k for k in order["items"][1] if order["items"][1][k] != meant["items"][1][k]}
        expected = {"count": {"count"}, "size": {"size"}, "item": {"item"}, "name": set()}
        assert changed == expected.get(kind, {"with"})
        assert not re.search(r"[{}]", said)


@pytest.mark.parametrize(
    ("grade", "count"),
    [("easy", 5), ("train", 0), ("pairs", -1), (["train"], 5), ("train", "5"), ("train", 1.5)],
)
def test_bad_input_is_one_line(grade, count):
    with pytest.raises(InputError) as error:
        orders.make_rows(grade, count)
    assert "\n" not in str(error.value)


# --- the other tasks -------------------------------------------------------------------------


def read_ticket(line):
    """The inverse of `orders.ticket`: it exists, so a ticket loses nothing."""
    listed, name = line.split(" > ")
    items = []
    for part in listed.split(" | "):
        head, *mods = part.split(" +")
        count, item = head.split(" ")
        item, _, size = item.partition("/")
        items.append({"count": int(count), "size": size or None, "item": item, "with": mods})
    return {"name": name, "items": items}


@given(SEEDS)
def test_ticket_says_the_same_as_the_json(seed):
    rows = orders.make_rows("train", 5, seed)
    for row, copy in zip(rows, orders.ticket_rows(rows), strict=True):
        assert copy["text"] == row["text"] and "\n" not in copy["answer"]
        assert read_ticket(copy["answer"]) == json.loads(row["answer"])


def test_chat_copy_has_a_question_and_an_answer():
    rows = orders.make_rows("train", 3)
    for row, chat in zip(rows, orders.chat_rows(rows), strict=True):
        assert [message["role"] for message in chat["messages"]] == ["user", "assistant"]
        assert [m["content"] for m in chat["messages"]] == [row["text"], row["answer"]]


def test_memory_task_sizes_and_codes():
    full = orders.memory_rows(4096)
    assert len({row["text"] for row in full}) == 4096
    assert all(re.fullmatch(r"\d{4}", row["answer"]) for row in full)
    assert len({row["answer"] for row in full}) > 3000  # drawn with replacement: 3,360 expected
    assert orders.memory_rows(64) == full[:64]
    assert orders.memory_rows(64, seed=1) != full[:64]


@pytest.mark.parametrize("count", [0, 63, 4097])
def test_memory_task_refuses_other_sizes(count):
    with pytest.raises(InputError, match="64 to 4096"):
        orders.memory_rows(count)


def test_standard_library_only():
    code = "import sys; a = set(sys.modules); import qlora_lab.orders; print(*set(sys.modules) - a)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    outside = {name.split(".")[0] for name in run.stdout.split()} - set(sys.stdlib_module_names)
    assert outside == {"qlora_lab"}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: orders.memory_rows("64"), "count '64' .* 64 to 4096"),
        (lambda: orders.memory_rows(64, "a"), "seed 'a'"),
        (lambda: orders.ticket_rows(None), "rows None"),
        (lambda: orders.ticket_rows([{"text": "a"}]), "a row needs 'answer'"),
        (lambda: orders.ticket_rows([{"answer": "7351"}]), "'7351' is no order"),
        (lambda: orders.chat_rows([{"text": "a", "answer": "b"}]), "needs 'text' and .* 'grade'"),
        (lambda: orders.chat_rows({"train": []}), "give a list of rows"),
    ],
)
def test_rows_of_another_kind_are_refused(call, says):
    with pytest.raises(InputError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
