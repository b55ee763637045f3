"""The merge ladder, and the guard against reading repacked bytes."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_qlora import loaded, plain_base
from tiny_model import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora_lab
from qlora_lab.data import encode
from qlora_lab.errors import InputError
from qlora_lab.loading import four_bit_layers, give_padding
from qlora_lab.merge import (
    RUNGS,
    answer_bits,
    dequantize,
    dequantized_base,
    ladder,
    merge_into,
    requantize,
    save_merged,
)
from qlora_lab.qlora import quantize_model


@pytest.fixture(scope="module")
def base() -> str:
    return qlora_lab.embedded_model()


@pytest.fixture(scope="module")
def ids(base) -> torch.Tensor:
    text = "def read_lines(path):\n    with open(path) as file:\n        return file.readlines()\n"
    return AutoTokenizer.from_pretrained(base)(text, return_tensors="pt").input_ids


@pytest.fixture(scope="module")
def adapter(base, ids, tmp_path_factory) -> str:
    """An adapter trained for a few steps on the 4-bit base to say something of its own."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = copy.deepcopy(loaded(base))
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    target = ids.flip(1)
    for _ in range(16):
        model(input_ids=target, labels=target).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return str(folder)


def loss_of(ids: torch.Tensor):
    return lambda model: model(input_ids=ids, labels=ids).loss.item()


def test_the_ladder_first_rungs_agree_and_the_others_do_not(base, adapter, ids):
    scores = ladder(base, adapter, loss_of(ids.flip(1)), device="cpu")
    assert tuple(scores) == RUNGS
    unmerged, same, original, again, in_four_bits = scores.values()
    untrained = loss_of(ids.flip(1))(loaded(base))
    assert unmerged < 0.8 * untrained, "the adapter learned nothing: nothing is compared"
    assert same == pytest.approx(unmerged, rel=1e-5)
    assert abs(original - unmerged) > 20 * abs(same - unmerged)
    assert abs(again - unmerged) > 20 * abs(same - unmerged)
    assert unmerged + 20 * abs(same - unmerged) < in_four_bits < untrained


def test_dequantized_base_holds_the_weights_that_qlora_trained_against(base):
    plain = dequantized_base(base, device="cpu")
    assert not four_bit_layers(plain) and plain.dtype == torch.float32
    assert getattr(plain.config, "quantization_config", None) is None
    ours = copy.deepcopy(plain_base(base))
    made = quantize_model(ours, double_quant="bnb")
    for path, layer in made.items():
        assert torch.equal(plain.get_submodule(path).weight, layer.base.dequantize()), path


def test_a_repacked_model_is_refused(base):
    model = copy.deepcopy(loaded(base))
    layer = four_bit_layers(model)["model.layers.2.mlp.up_proj"]
    layer.weight.quant_state.packing_format_for_cpu = True  # what the fault leaves behind
    with pytest.raises(InputError, match="layers.2.mlp.up_proj was repacked .* load the model"):
        dequantize(model)


def test_merging_after_an_evaluation_gives_the_same_weights(base, adapter, ids):
    """FACTS section 2.3 through our loader: an eval forward first, then the merge."""
    model = copy.deepcopy(loaded(base)).eval()
    with torch.no_grad():
        model(ids)
    late, fresh = (
        merge_into(dequantize(model), adapter),
        merge_into(dequantized_base(base, "cpu"), adapter),
    )
    for (name, a), (_, b) in zip(late.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_merged_checkpoint_is_ordinary_and_has_its_old_size(base, adapter, ids, tmp_path):
    merged = merge_into(dequantize(copy.deepcopy(loaded(base))), adapter)
    assert not any("lora" in name for name, _ in merged.named_modules())
    weights = sum(p.numel() for p in merged.parameters())
    size = save_merged(merged, None, tmp_path / "16", torch.bfloat16)
    assert 2 * weights < size < 2 * weights + 20_000
    assert merged.dtype == torch.float32 and merged.config.dtype == torch.float32
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "16").eval()
    assert again.dtype == torch.bfloat16
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter.to(torch.bfloat16), again.get_parameter(name)), name
    tokenizer = AutoTokenizer.from_pretrained(base)
    size = save_merged(merged, tokenizer, tmp_path / "32", torch.float32)
    assert 4 * weights < size < 4 * weights + 20_000
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "32").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "32").vocab_size == tokenizer.vocab_size
    assert loss_of(ids)(again) == pytest.approx(loss_of(ids)(merged.eval()), rel=1e-6)


def test_requantizing_twice_changes_nothing_more(base):
    """Re-quantizing unchanged weights is idempotent up to the scales' own rounding."""
    model = dequantize(copy.deepcopy(loaded(base)))
    before = {n: p.clone() for n, p in model.named_parameters()}
    requantize(model, double_quant=False)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], atol=0, rtol=1e-6)


def test_most_of_a_small_update_is_rounded_away_by_requantizing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    nn.init.normal_(model[0].weight)
    start = requantize(model, double_quant=False)[0].weight.clone()
    update = 0.02 * torch.randn(512, 512)
    model[0].weight.data = start + update
    survived = requantize(model, double_quant=False)[0].weight.detach() - start
    share = ((survived * update).sum() / update.square().sum()).item()
    # Each block of 64 keeps its largest weight exactly; the other 63 fall back on their codes.
    assert share == pytest.approx(1 / 64, abs=0.03)
    moved = (survived.abs() > 0.05).float().mean()
    assert moved < 0.002


def test_answer_bits_are_those_of_one_row_at_a_time(base):
    rows = [
        {"text": "a tea for Anna", "answer": "x = 1"},
        {"text": "two large lattes with oat milk for Bob, please", "answer": '{"name":"Bob"}'},
        {"text": "tea", "answer": "a much longer answer than the other two, in many tokens"},
    ]
    model, tokenizer = plain_base(base), AutoTokenizer.from_pretrained(base)
    give_padding(tokenizer)
    found = answer_bits(model, tokenizer, rows, batch_size=2)
    for row, bits in zip(rows, found, strict=True):
        encoded = encode(tokenizer, row["text"], row["answer"])
        batch = {key: torch.tensor([encoded[key]]) for key in ("input_ids", "labels")}
        told = sum(label != -100 for label in encoded["labels"])
        with torch.no_grad():
            wanted = model(**batch).loss.item() * told / math.log(2)
        assert bits == pytest.approx(wanted, rel=1e-4)


def test_bad_input_is_answered_in_one_line(base, adapter, tmp_path):
    four_bit = copy.deepcopy(loaded(base))
    with_adapters = get_peft_model(copy.deepcopy(four_bit), LoraConfig(target_modules="all-linear"))
    plain = nn.Linear(8, 8)
    other = tiny_model()
    row = {"text": "a tea", "answer": "1 tea"}
    cases = [
        (lambda: merge_into(four_bit, adapter), "4-bit codes rounds most of the update away"),
        (lambda: merge_into(plain, tmp_path), "no adapter_config.json"),
        (lambda: ladder(base, tmp_path / "none", float), "no adapter_config.json"),
        (lambda: dequantize(plain), "no 4-bit layer"),
        (lambda: dequantize(with_adapters), "carries adapters"),
        (lambda: save_merged(four_bit, None, tmp_path / "x"), "merge it first"),
        (lambda: save_merged(plain, None, tmp_path / "x", "bf16"), "dtype='bf16': store"),
        (lambda: save_merged(plain, "gpt2", tmp_path / "x"), "tokenizer 'gpt2'"),
        (lambda: merge_into((plain, None), adapter), "give a model: .* its .model"),
        (lambda: merge_into(copy.deepcopy(plain_base(base)), None), "adapter None"),
        (lambda: merge_into(other, adapter), "does not fit this base"),
        (lambda: dequantize("model"), "model 'model'"),
        (lambda: ladder(base, adapter, "loss"), "score 'loss' .* give a function"),
        (lambda: answer_bits(plain_base(base), "gpt2", [row]), "tokenizer 'gpt2'"),
        (lambda: answer_bits(plain_base(base), None, row), "give a list of rows"),
        (lambda: requantize(nn.Sequential(nn.Linear(8, 8)), blocksize=48), "blocksize=48"),
    ]
    for call, says in cases:
        with pytest.raises(InputError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()
