"""Answers and bits against slow or exact counterparts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import learn_by_heart, tiny_model, tiny_tokenizer

from qlora_lab import data, evaluation, orders
from qlora_lab.errors import InputError
from qlora_lab.merge import answer_bits

SEVERAL_LINES = "yes\nand more\nof it"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def rows():
    """Answers of different lengths: a line, a word, an order."""
    short = [{"text": f"{n} teas", "answer": "abcdefghi"[:n]} for n in range(1, 10)]
    several = {"text": "two teas and more", "answer": SEVERAL_LINES}
    return [*short, several, *orders.make_rows("pairs", 4)]


@pytest.fixture(scope="module")
def model(rows):
    """A tiny model that knows these rows by heart, so that answers end, at different lengths."""
    model = tiny_model(context=192)
    learn_by_heart(model, rows)
    return model


# --- answers ---------------------------------------------------------------------------------


def test_batched_answers_are_those_of_one_prompt_at_a_time(model, tokenizer, rows):
    prompts = [data.prompt(row["text"]) for row in rows] + ["# 3", "def f(x):\n", "{"]
    alone = [evaluation.generate(model, tokenizer, [text], 60)[0] for text in prompts]
    assert len({len(text) for text in alone}) > 5  # they end at different lengths
    for batch_size in (4, len(prompts)):
        assert evaluation.generate(model, tokenizer, prompts, 60, batch_size) == alone


def test_answers_are_greedy(model, tokenizer):
    text = "# 3 teas\n"
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    said = []
    with torch.no_grad():
        while len(said) < 20:
            said.append(model(ids).logits[0, -1].argmax().item())
            if said[-1] == tokenizer.eos_token_id or "\n" in tokenizer.decode(said[-1]):
                break
            ids = torch.cat([ids, torch.tensor([said[-1:]])], dim=1)
    expected = tokenizer.decode(said, skip_special_tokens=True).split("\n")[0]
    assert evaluation.generate(model, tokenizer, [text], 20) == [expected]


def test_generation_stops_with_the_last_row(model, tokenizer, rows, monkeypatch):
    prompts = [data.prompt(row["text"]) for row in rows[:9]]
    answers = evaluation.generate(model, tokenizer, prompts, 100)
    assert answers == [row["answer"] for row in rows[:9]]
    steps = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: steps.append(1) or forward(*a, **k))
    evaluation.generate(model, tokenizer, prompts, 100)
    longest = max(len(tokenizer(answer)["input_ids"]) for answer in answers)
    assert len(steps) <= longest + 1  # and the end token


def test_one_line_answers_stop_at_the_line_break(model, tokenizer):
    asked = [data.prompt("two teas and more")]
    assert evaluation.generate(model, tokenizer, asked, 60) == ["yes"]
    whole = evaluation.generate(model, tokenizer, asked, 60, one_line=False)
    assert whole == [SEVERAL_LINES]


def test_the_bound_on_new_tokens_holds(tokenizer):
    (answer,) = evaluation.generate(tiny_model(seed=1), tokenizer, ["# a\n"], 7, one_line=False)
    assert len(tokenizer(answer)["input_ids"]) <= 7 or len(answer.encode()) <= 7 * 8


def test_bounds_can_differ_by_prompt(model, tokenizer, rows):
    prompts = [data.prompt(row["text"]) for row in rows[:4]]
    whole = evaluation.generate(model, tokenizer, prompts, 60)
    mixed = evaluation.generate(model, tokenizer, prompts, [60, 1, 60, 1], batch_size=2)
    assert mixed[0::2] == whole[0::2]
    assert all(full.startswith(cut) for full, cut in zip(whole[1::2], mixed[1::2], strict=True))


def test_answers_that_start_wrong_end_at_once(model, tokenizer, rows, monkeypatch):
    prompts = [data.prompt(row["text"]) for row in rows]
    whole = evaluation.generate(model, tokenizer, prompts, 100)
    checked = evaluation.generate(model, tokenizer, prompts, 100, must_start="{")
    assert {text[0] for text in whole} == {"a", "y", "{"}
    for full, text in zip(whole, checked, strict=True):
        assert text == full if full.startswith("{") else len(tokenizer(text)["input_ids"]) == 1
    steps = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: steps.append(1) or forward(*a, **k))
    evaluation.generate(model, tokenizer, prompts[:9], 100, must_start="{")
    assert len(steps) == 1


@pytest.mark.parametrize("training", [True, False])
def test_model_and_tokenizer_come_back_as_they_were(tokenizer, training):
    model = tiny_model().train(training)
    evaluation.generate(model, tokenizer, ["# a\n", "# a b c d\n"], 3)
    evaluation.bits_per_byte(model, tokenizer, ["x = 1\n"], context=64, stride=32)
    assert model.training is training and tokenizer.padding_side == "right"
    assert all(module.training is training for module in model.modules())
    assert torch.is_grad_enabled()


def test_training_goes_on_after_an_evaluation(tokenizer):
    """No inference tensors are left behind: gradients flow as before."""
    model = tiny_model()
    batch = data.collator(tokenizer)([data.encode(tokenizer, "two teas", "{}")])
    model(**batch).loss.backward()
    before = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    model.zero_grad()
    evaluation.generate(model, tokenizer, ["# a\n"], 3)
    model(**batch).loss.backward()
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, before)


def test_bad_prompts(tokenizer):
    model = tiny_model(context=128)
    with pytest.raises(InputError, match="empty"):
        evaluation.generate(model, tokenizer, [""])
    with pytest.raises(InputError, match="context of 128"):
        evaluation.generate(model, tokenizer, ["# a\n"], max_new_tokens=127)
    with pytest.raises(InputError, match="max_new_tokens 0"):
        evaluation.generate(model, tokenizer, ["# a\n"], max_new_tokens=0)
    assert evaluation.generate(model, tokenizer, [], 5) == []


# --- test sets -------------------------------------------------------------------------------


def test_evaluate_orders_scores_each_grade(model, tokenizer, rows):
    known = rows[10:]
    unknown = orders.make_rows("copying", 3)
    scores = evaluation.evaluate_orders(
        model, tokenizer, {"known": known, "unknown": unknown}, batch_size=3
    )
    assert scores["known"].exact_match == 1.0 and scores["unknown"].exact_match < 1.0
    assert scores["known"].predictions == [row["answer"] for row in known]
    assert len(scores["unknown"].exact) == 3


# --- bits per byte ---------------------------------------------------------------------------


@given(st.integers(2, 400), st.integers(2, 64), st.data())
def test_each_token_is_scored_once_with_the_most_context(length, context, draw):
    stride = draw.draw(st.integers(1, context - 1))
    scored = {}
    for start, end, new in evaluation._spans(length, context, stride):
        assert 0 <= start < end <= length and end - start <= context
        for token in range(end - new, end):
            assert token not in scored
            scored[token] = token - start  # tokens before it in the window
    assert sorted(scored) == list(range(1, length))
    for token, before in scored.items():
        assert before == token or before >= context - stride


def slow_bits(model, tokenizer, text, context, stride):
    """One token at a time, with no batches and no shared windows."""
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    bits, end = 0.0, min(context, len(ids))
    for token in range(1, len(ids)):
        while token >= end:
            end = min(end + stride, len(ids))
        window = torch.tensor([ids[max(0, end - context) : token]])
        with torch.no_grad():
            logits = model(window).logits[0, -1].double()
        bits -= torch.log_softmax(logits, -1)[ids[token]].item() / math.log(2)
    return bits


@pytest.mark.parametrize("batch_size", [1, 4])
def test_bits_equal_the_slow_count(model, tokenizer, batch_size):
    texts = ["x = 1\n", "# " + "two large lattes, " * 8, "Ünïcödé ☕ " * 3, "a"]
    slow = [slow_bits(model, tokenizer, text, 40, 15) for text in texts]
    fast = evaluation.text_bits(model, tokenizer, texts, 40, 15, batch_size)
    np.testing.assert_allclose(fast, slow, rtol=1e-5)
    per_byte = evaluation.bits_per_byte(model, tokenizer, texts, 40, 15, batch_size)
    assert per_byte == pytest.approx(sum(slow) / sum(len(t.encode()) for t in texts), rel=1e-5)


def test_a_model_that_knows_nothing_needs_nine_bits_a_token(tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()  # tied: all logits equal, 512 tokens
    text = "café ☕\r\n" * 40
    tokens = len(tokenizer(text)["input_ids"])
    found = evaluation.bits_per_byte(model, tokenizer, [text], context=64, stride=32)
    assert found == pytest.approx(9 * tokens / len(text.encode("utf-8")), rel=1e-6)


def test_no_byte_of_the_heldout_text_is_lost(tokenizer):
    for text in data.heldout_texts(limit=4).values():
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("context", "stride", "message"),
    [(1, 1, "context 1"), (129, 64, "context 129"), (64, 0, "stride 0"), (64, 64, "stride 64")],
)
def test_bad_windows(tokenizer, context, stride, message):
    with pytest.raises(InputError, match=message):
        evaluation.bits_per_byte(tiny_model(context=128), tokenizer, ["x"], context, stride)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_nothing_is_refused(tokenizer, batch_size):
    model = tiny_model(context=128)
    for measure in (
        lambda: evaluation.generate(model, tokenizer, ["# a\n"], batch_size=batch_size),
        lambda: evaluation.text_bits(model, tokenizer, ["x"], 64, 32, batch_size),
        lambda: answer_bits(model, tokenizer, [{"text": "a", "answer": "b"}], batch_size),
    ):
        with pytest.raises(InputError, match="batch_size .* from 1 on"):
            measure()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m, t: evaluation.generate(m, t, "# a\n"), "prompts .* give a list of texts"),
        (lambda m, t: evaluation.generate(m, t, [3]), r"prompts \[3\]"),
        (lambda m, t: evaluation.generate(m, t, ["# a\n"], "48"), "max_new_tokens '48'"),
        (lambda m, t: evaluation.generate(m, t, ["# a\n"], [4, 4]), "2 bounds for 1 prompts"),
        (lambda m, t: evaluation.generate(m, t, ["# a\n"], 4, must_start=3), "must_start 3"),
        (lambda m, t: evaluation.generate((m, t), t, ["# a\n"]), "give a model: .* its .model"),
        (lambda m, t: evaluation.generate(m, m, ["# a\n"]), "tokenizer of type LlamaFor"),
        (lambda m, t: evaluation.text_bits(m, t, "import os"), "texts 'import os'"),
        (lambda m, t: evaluation.text_bits(m, t, {"a.py": "import os"}), "give a list of texts"),
        (lambda m, t: evaluation.text_bits((m, t), t, ["x"]), "give a model"),
        (lambda m, t: evaluation.bits_per_byte(m, t, "import os"), "texts 'import os'"),
        (lambda m, t: evaluation.bits_per_byte(m, t, ["x"], "64"), "context '64'"),
        (lambda m, t: evaluation.evaluate_orders(m, t, [{}]), "grades .* give rows by grade"),
        (lambda m, t: evaluation.evaluate_orders(m, t, {"mine": []}), "'mine' has no rows"),
        (lambda m, t: evaluation.evaluate_orders(m, t, {"mine": 3}), "grade 'mine': 3"),
        (
            lambda m, t: evaluation.evaluate_orders(m, t, {"mine": [{"text": "a", "answer": "b"}]}),
            "'mine' has an answer that is no order, 'b'",
        ),
    ],
)
def test_what_is_of_another_kind_is_refused(tokenizer, call, says):
    with pytest.raises(InputError, match=says) as error:
        call(tiny_model(context=128), tokenizer)
    assert "\n" not in str(error.value)


def test_empty_texts_are_refused(tokenizer):
    with pytest.raises(InputError, match="text 1 is empty"):
        evaluation.bits_per_byte(tiny_model(), tokenizer, ["x", ""], 64, 32)
    with pytest.raises(InputError, match="no text to measure"):
        evaluation.bits_per_byte(tiny_model(), tokenizer, [], 64, 32)
