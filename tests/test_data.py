"""What a run learns from: the prompt masked, the end trained, the padding left alone."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_model, tiny_tokenizer

from qlora_lab import data, orders
from qlora_lab.errors import InputError

ROW = {"text": "two lattes for Anna", "answer": '{"name":"Anna"}'}
LINE = st.text(st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1).filter(
    lambda text: text.strip() and len(text.splitlines()) == 1
)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def altered(tokenizer, **attributes):
    """A copy of the tokenizer with other special tokens or padding side."""
    other = copy.deepcopy(tokenizer)
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


# --- loading ---------------------------------------------------------------------------------


def test_shipped_splits_load():
    splits = data.load_orders()
    assert set(splits) == {"train", "validation", *orders.GRADES}
    assert splits["pairs"].num_rows >= 100
    assert set(splits["train"].column_names) == {"text", "answer", "grade", "frame", "correction"}
    assert all(json.loads(answer) for answer in splits["copying"]["answer"])


def test_own_files_load_without_a_word(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    row = orders.make_rows("pairs", 1)[0]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert data.load_orders(["pairs"], tmp_path)["pairs"][0] == row
    assert capfd.readouterr() == ("", "")  # no progress bar in a notebook's output


def test_unknown_or_missing_split(tmp_path):
    with pytest.raises(InputError, match="'easy' is unknown"):
        data.load_orders(["easy"])
    with pytest.raises(InputError, match="pairs.jsonl is missing"):
        data.load_orders(["pairs"], tmp_path)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda _: data.load_orders("seen"), "splits 'seen' .* around a single one"),
        (lambda _: data.load_orders([]), "no split is asked for; choose one or more of train"),
        (lambda _: data.load_orders(3), "splits 3"),
        (lambda _: data.load_orders(["pairs"], 3), "folder 3"),
        (lambda _: data.heldout_texts(-1), "limit -1"),
        (lambda _: data.heldout_texts("3"), "limit '3'"),
        (lambda _: data.prompt(3), "the prompt 3 is no text"),
        (lambda t: data.encode(t, None, "{}"), "the prompt None is no text"),
        (lambda t: data.encode(t, "a", {}), "the answer {} is no text"),
        (lambda t: data.encode(t, "a", "{}", "512"), "max_length '512'"),
        (lambda _: data.encode("gpt2", "a", "{}"), "tokenizer 'gpt2'"),
        (lambda t: data.encode_rows(t, None), "rows None is not possible; give a list of rows"),
        (lambda t: data.encode_rows(t, ROW), "give a list of rows"),
        (lambda t: data.encode_rows(t, [ROW], -1), "max_length -1"),
        (lambda t: data.encode_rows(t, [ROW], too_long=["skip"]), "is unknown; choose from raise"),
        (lambda t: data.collator(t, 0), "multiple_of 0"),
        (lambda t: data.collator(t)([]), "no rows"),
        (lambda _: data.collator(None), "tokenizer None"),
    ],
)
def test_what_is_of_another_kind_is_refused(tokenizer, call, says):
    with pytest.raises(InputError, match=says) as caught:
        call(tokenizer)
    assert "\n" not in str(caught.value)


def test_heldout_texts_are_whole_files():
    texts = data.heldout_texts()
    assert len(texts) >= 25 and "csv.py.txt" in texts
    assert all(text.strip() for text in texts.values())
    assert list(data.heldout_texts(limit=3)) == sorted(texts)[:3]


# --- labels ----------------------------------------------------------------------------------


@given(LINE, LINE)
def test_prompt_is_masked_and_answer_and_end_are_trained(text, answer):
    tokenizer = tiny_tokenizer()
    row = data.encode(tokenizer, text, answer)
    learnt = [label for label in row["labels"] if label != data.IGNORED]
    assert tokenizer.decode(learnt[:-1]) == answer
    assert learnt[-1] == tokenizer.eos_token_id
    masked = len(row["labels"]) - len(learnt)
    assert row["labels"][:masked] == [data.IGNORED] * masked
    assert row["input_ids"][masked:] == learnt
    assert row["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.decode(row["input_ids"][1:masked]) == f"# {text}\n"
    assert row["attention_mask"] == [1] * len(row["input_ids"])


def test_training_and_asking_use_the_same_prompt(tokenizer):
    asked = tokenizer(data.prompt(ROW["text"]), add_special_tokens=False)["input_ids"]
    row = data.encode(tokenizer, **ROW)
    assert row["input_ids"][1 : 1 + len(asked)] == asked
    assert row["labels"][len(asked)] == data.IGNORED != row["labels"][1 + len(asked)]


@pytest.mark.parametrize("room", range(1, 60))
def test_no_length_leaves_a_row_without_targets(tokenizer, room):
    try:
        row = data.encode(tokenizer, **ROW, max_length=room)
    except InputError as error:
        assert "max_length" in str(error) and "\n" not in str(error)
    else:
        assert len(row["input_ids"]) <= room and row["labels"][-1] == tokenizer.eos_token_id


def test_longer_rows_are_refused_or_skipped_whole(tokenizer):
    long = {"text": "two lattes for Anna and " * 20, "answer": ROW["answer"]}
    length = len(data.encode(tokenizer, **ROW)["input_ids"])
    with pytest.raises(InputError, match="max_length"):
        data.encode_rows(tokenizer, [ROW, long], max_length=length)
    kept = data.encode_rows(tokenizer, [ROW, long], max_length=length, too_long="skip")
    assert kept.num_rows == 1 and kept[0]["length"] == length
    assert kept[0]["labels"] == data.encode(tokenizer, **ROW)["labels"]
    with pytest.raises(InputError, match="no row is left"):
        data.encode_rows(tokenizer, [long], max_length=length, too_long="skip")
    with pytest.raises(InputError, match="'cut' is unknown"):
        data.encode_rows(tokenizer, [ROW], too_long="cut")


@pytest.mark.parametrize(
    ("text", "answer", "message"),
    [("", "{}", "empty"), ("  ", "{}", "empty"), ("a\nb", "{}", "one line"), ("a", "", "empty")],
)
def test_bad_rows(tokenizer, text, answer, message):
    with pytest.raises(InputError, match=message):
        data.encode(tokenizer, text, answer)


def test_tokenizer_without_an_end_is_refused(tokenizer):
    with pytest.raises(InputError, match="no end token"):
        data.encode(altered(tokenizer, eos_token=None), **ROW)


def test_tokenizer_without_a_beginning_works(tokenizer):
    row = data.encode(altered(tokenizer, bos_token=None), **ROW)
    assert row["input_ids"] == data.encode(tokenizer, **ROW)["input_ids"][1:]


# --- batches ---------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, 9))
def test_batch_is_padded_and_padding_is_never_learnt(seed, size):
    tokenizer = tiny_tokenizer()
    rows = [
        data.encode(tokenizer, r["text"], r["answer"]) for r in orders.make_rows("seen", size, seed)
    ]
    batch = data.collator(tokenizer)(rows)
    width = batch["input_ids"].shape[1]
    longest = max(len(row["input_ids"]) for row in rows)
    assert width % 8 == 0 and longest <= width < longest + 8
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        for key in ("input_ids", "labels", "attention_mask"):
            assert batch[key][i, :n].tolist() == row[key]
        assert (batch["input_ids"][i, n:] == tokenizer.pad_token_id).all()
        assert (batch["labels"][i, n:] == data.IGNORED).all()
        assert (batch["attention_mask"][i, n:] == 0).all()
        assert (batch["labels"][i] == tokenizer.eos_token_id).sum() == 1


def test_padding_does_not_change_the_loss(tokenizer):
    model = tiny_model(context=256)
    pad_to = data.collator(tokenizer)
    rows = [data.encode(tokenizer, r["text"], r["answer"]) for r in orders.make_rows("longer", 1)]
    rows += [data.encode(tokenizer, **ROW)]
    with torch.no_grad():
        together = model(**pad_to(rows)).loss
        alone = [model(**data.collator(tokenizer, 1)([row])).loss for row in rows]
    counts = [sum(label != data.IGNORED for label in row["labels"]) for row in rows]
    expected = sum(n * loss for n, loss in zip(counts, alone, strict=True)) / sum(counts)
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pad_token", [None, "<|eos|>"])
def test_padding_must_exist_and_not_be_the_end(tokenizer, pad_token):
    with pytest.raises(InputError, match="pad_token"):
        data.collator(altered(tokenizer, pad_token=pad_token))


def test_left_padding_is_refused_for_training(tokenizer):
    with pytest.raises(InputError, match="padding_side='right'"):
        data.collator(altered(tokenizer, padding_side="left"))


def test_other_tasks_encode_like_orders(tokenizer):
    rows = orders.memory_rows(64) + orders.ticket_rows(orders.make_rows("train", 8))
    encoded = data.encode_rows(tokenizer, rows)
    assert encoded.num_rows == 72
    learnt = [i for i in encoded[0]["labels"] if i != data.IGNORED]
    assert tokenizer.decode(learnt[:-1]) == rows[0]["answer"]
