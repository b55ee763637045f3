"""The embedded model is what its card says, and meets the bars that were set before training."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

import qlora_lab
from qlora_lab.data import heldout_texts
from qlora_lab.evaluation import bits_per_byte

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(qlora_lab.embedded_model())
sys.path.insert(0, str(ROOT / "tools"))
import endings  # noqa: E402
import measure_base  # noqa: E402


@pytest.fixture(scope="module")
def measured():
    return json.loads((FOLDER / "measured.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def trained():
    return json.loads((FOLDER / "training.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Nothing of ours: plain transformers must load it.
    model = AutoModelForCausalLM.from_pretrained(qlora_lab.embedded_model(), dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(qlora_lab.embedded_model())


def test_it_is_small_and_every_layer_dimension_is_a_multiple_of_64(loaded):
    size = sum(p.stat().st_size for p in FOLDER.iterdir())
    assert size <= 25_000_000
    model, _ = loaded
    assert type(model).__name__ == "LlamaForCausalLM"
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.in_features % 64 == 0 and module.out_features % 64 == 0, name


def test_special_tokens_are_three_different_ones(loaded):
    _, tokenizer = loaded
    ids = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert ids == {0, 1, 2}


def test_the_tokenizer_gives_every_text_back(loaded):
    _, tokenizer = loaded
    for text in ("def f(x):\n\treturn x  # ok\n", "naïve café \u2603 \U0001f600", "\r\n \n\n    a"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_the_weights_are_those_that_were_measured(trained, measured):
    weights = hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    assert weights == trained["weights_sha256"] == measured["weights_sha256"]


def test_bits_per_byte_meet_the_bar_over_all_files_whole(measured):
    texts = heldout_texts()
    assert measured["files"] == len(texts) >= 25
    assert measured["bytes"] == sum(len(t.encode()) for t in texts.values())
    assert (measured["context"], measured["stride"]) == (512, 256)
    assert measured["bits_per_byte"] <= 1.20
    # The neighbour that it is compared with was measured too, not assumed.
    assert 1.0 < measured["xz_with_training_text"] < measured["xz_alone"] < 2.5


def test_one_file_measured_again_gives_the_recorded_number(loaded, measured):
    name = "queue.py.txt"
    again = bits_per_byte(*loaded, [heldout_texts()[name]])
    assert again == pytest.approx(measured["bits_per_byte_of_file"][name], abs=2e-3)


def test_prompts_were_all_completed_and_judged(measured):
    prompts = json.loads((ROOT / "tools" / "prompts.json").read_text("utf-8"))
    assert len(prompts) == 20
    texts = [p["text"] for p in measured["prompts"]]
    assert all(t.startswith(q.rstrip()) for t, q in zip(texts, prompts, strict=True))
    assert sum(p["good"] for p in measured["prompts"]) == measured["prompts_good"]


def test_recorded_completions_meet_the_bar(measured):
    assert measured["prompts_good"] >= 15


def test_completions_made_again_meet_the_bar(loaded):
    prompts = json.loads((ROOT / "tools" / "prompts.json").read_text("utf-8"))
    good = [p["good"] for p in measure_base.complete(*loaded, prompts)]
    # Greedy choices may flip at near-ties between CPUs, so the bar, not the text, is compared.
    assert sum(good) >= 15


def test_the_stage_on_its_own_text_ends_what_is_good_and_keeps_nothing_else():
    begun = "def f(x):\n    y = x"
    again = begun + "\n    if y:\n        return y\n"
    # ended where it begins to go round in circles, and left as it is where nothing is wrong
    circle = "\n    if y:\n        return y\n" + "    y = long(x)\n" * 9
    assert endings.corrected(begun, circle) == again + "    y = long(x)\n"
    assert endings.corrected(begun, "\n    if y:\n        return y\n\ndef g():\n    pass") == again
    for nothing in (
        "",
        "\n    return (y",
        "\n    f(" + "x, " * 9,
        "\n" + "    return y.z.z.z.z.z\n",
    ):
        assert endings.corrected("def f(x):", nothing) is None
    kept = endings.corrected(begun, "\n    return y\n    return (((")
    assert kept == begun + "\n    return y\n"
    assert measure_base.judge(begun, kept.removeprefix(begun))["good"]


def test_the_stage_on_its_own_text_is_recorded_and_never_saw_the_prompts(trained):
    own = trained["endings"]
    assert own["good_after"] > own["good_before"] and own["withheld"] >= 64
    source = (ROOT / "tools" / "endings.py").read_text("utf-8")
    assert "PROMPTS" not in source and "prompts.json`" in source  # named in the docstring only
    assert source.count("prompts.json") == 1


def test_the_judge_of_completions_can_say_no():
    judge = measure_base.judge
    prompt = "def f(x):\n    if"
    good = judge(prompt, " x:\n        return 1\n    return 2\n\nclass A:")
    assert good["good"] and good["statements"] == 3 and "class" not in good["text"]
    assert not judge(prompt, " x:\n        return (1\n")["good"], "does not parse"
    assert not judge("def f(x):\n    return", " x\n\nx = 1\ny = 2\n")["good"], "one statement"
    assert not judge("def f(x):\n    ", "x()\n    x()\n    x()\n")["good"], "three equal lines"
    assert not judge("def f(x):\n    ", '"""Doc."""\n    return x\n')["good"], "docstring counts"


def test_the_training_record_is_complete(trained):
    assert trained["tokens"] == trained["steps"] * 16 * 512
    assert trained["steps"] == trained["planned_steps"]
    assert trained["parameters"] == 4_262_144
    assert trained["seed"] == 0 and len(trained["corpus"]["sha256"]) == 64
    assert {"torch", "transformers", "tokenizers", "python"} <= set(trained["versions"])
    losses = [point["loss"] for point in trained["curve"]]
    assert len(losses) >= 50 and losses[-1] < losses[0] / 2
    held = {name.removesuffix(".txt") for name in heldout_texts()}
    dropped = {name.removeprefix("stdlib/") for name, why in trained["corpus"]["dropped"]}
    assert held <= dropped


def test_the_card_says_the_measured_numbers(trained, measured):
    card = (FOLDER / "README.md").read_text("utf-8")
    assert f"{measured['bits_per_byte']:.3f}" in card
    assert f"{measured['xz_with_training_text']:.3f}" in card
    assert f"{trained['tokens'] / 1e6:.1f} million tokens" in card
    assert f"{measured['prompts_good']} of 20" in card
    assert card == measure_base.card(trained, measured)
