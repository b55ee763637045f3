"""LoRA layers, adapters and files against PEFT, which is the referee."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from qlora_lab.errors import InputError
from qlora_lab.lora import (
    LoRALinear,
    add_adapters,
    load_adapter,
    lora_layers,
    lora_parameters,
    merge,
    save_adapter,
    set_adapter,
    unmerge,
)

IDS = torch.tensor([[1, 5, 9, 2, 7, 3], [4, 4, 8, 6, 0, 1]])


def tiny_llama(seed: int = 0, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=128,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def shake(model: nn.Module, seed: int = 7) -> None:
    """Give every adapter matrix, the zero B too, values that would show a mistake."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(next(model.parameters()).device)).logits


def pair(bias=True, r=4, alpha=16, dropout=0.0, rslora=False, dtype=torch.float32):
    """One base layer under PEFT's LoRA and under ours, with the same A and B."""
    torch.manual_seed(0)
    base = nn.Linear(48, 32, bias=bias).to(dtype)
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora)
    theirs = PeftLinear(copy.deepcopy(base), "default", config, r=r, lora_alpha=alpha)
    theirs.lora_A.float(), theirs.lora_B.float()  # as get_peft_model does on a 16-bit base
    ours = LoRALinear(base, r, alpha, dropout, rslora)
    shake(ours)
    theirs.lora_A["default"].weight.data.copy_(ours.lora_A["default"])
    theirs.lora_B["default"].weight.data.copy_(ours.lora_B["default"])
    return theirs, ours


def assert_layers_agree(theirs, ours, x, tolerance=1e-6) -> None:
    """The comparison of this file: outputs and the gradients of x, A and B."""
    x_theirs, x_ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(3)  # the same dropout mask on both sides
    y_theirs = theirs(x_theirs)
    torch.manual_seed(3)
    y_ours = ours(x_ours)
    assert y_ours.dtype == y_theirs.dtype
    for y in (y_theirs, y_ours):
        y.float().square().mean().backward()
    torch.testing.assert_close(y_ours, y_theirs, atol=tolerance, rtol=tolerance)
    for got, expected in (
        (x_ours.grad, x_theirs.grad),
        (ours.lora_A["default"].grad, theirs.lora_A["default"].weight.grad),
        (ours.lora_B["default"].grad, theirs.lora_B["default"].weight.grad),
    ):
        torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


# --- one layer -----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layer_equals_pefts_in_forward_and_gradients(bias, rslora, dropout):
    theirs, ours = pair(bias=bias, rslora=rslora, dropout=dropout)
    assert_layers_agree(theirs, ours, torch.randn(3, 5, 48))


@given(st.integers(1, 32), st.floats(0.25, 64), st.booleans())
def test_layer_equals_pefts_for_any_rank_and_alpha(r, alpha, rslora):
    theirs, ours = pair(r=r, alpha=alpha, rslora=rslora)
    assert ours.adapters["default"].scaling == theirs.scaling["default"]
    # In float64 the two are the same arithmetic, whatever the size of the numbers.
    assert_layers_agree(theirs.double(), ours.double(), torch.randn(7, 48).double(), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_equals_pefts_on_a_16_bit_base(dtype):
    theirs, ours = pair(dtype=dtype)
    assert ours.lora_A["default"].dtype == torch.float32
    # One rounding step of the 16-bit output, which both round once.
    step = torch.finfo(dtype).eps
    assert_layers_agree(theirs, ours, torch.randn(3, 5, 48, dtype=dtype), tolerance=step)


def test_start_is_kaiming_uniform_A_and_zero_B():
    torch.manual_seed(0)
    base = nn.Linear(400, 300)
    layer = LoRALinear(base, 64, 64)
    A, B = layer.lora_A["default"].detach(), layer.lora_B["default"].detach()
    bound = 1 / math.sqrt(400)  # kaiming-uniform with a = sqrt 5 over a fan-in of 400
    assert B.shape == (300, 64) and not B.any()
    assert A.shape == (64, 400) and 0.99 * bound < A.abs().max() <= bound
    assert A.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    x = torch.randn(2, 400)
    assert torch.equal(layer(x), base(x))


def test_dropout_acts_in_training_only_and_on_the_detour_only():
    _, layer = pair(dropout=0.5)
    x = torch.randn(4, 48)
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))
    set_adapter(layer, None)
    assert torch.equal(layer.train()(x), layer.base(x))


def test_eval_and_train_never_touch_the_weight():
    _, layer = pair()
    before = layer.base.weight.clone()
    layer.eval(), layer(torch.randn(2, 48)), layer.train()
    assert torch.equal(layer.base.weight, before) and layer.merged is None


def test_only_A_and_B_learn():
    _, layer = pair()
    layer(torch.randn(2, 48)).sum().backward()
    assert layer.base.weight.grad is None and layer.base.bias.grad is None
    assert layer.lora_A["default"].grad is not None


# --- a model -------------------------------------------------------------------------------


def test_all_linear_chooses_what_peft_chooses():
    ours, theirs = tiny_llama(tied=False), tiny_llama(tied=False)
    chosen = add_adapters(ours, "all-linear", r=4, alpha=8)
    peft_model = get_peft_model(theirs, LoraConfig(r=4, target_modules="all-linear"))
    expected = [
        name.removeprefix("base_model.model.")
        for name, module in peft_model.named_modules()
        if isinstance(module, PeftLinear)
    ]
    assert chosen == expected and len(chosen) == 14
    assert not any("lm_head" in name for name in chosen)


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["model.layers.1.mlp.up_proj"], r".*\.1\..*_proj", "lm_head"]
)
def test_patterns_choose_what_peft_chooses(targets):
    ours, theirs = tiny_llama(tied=False), tiny_llama(tied=False)
    chosen = add_adapters(ours, targets, r=4, alpha=8)
    peft_model = get_peft_model(theirs, LoraConfig(r=4, target_modules=targets))
    expected = {n for n, m in peft_model.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert set(chosen) == expected


def test_the_rest_of_the_model_is_frozen():
    model = tiny_llama()
    add_adapters(model, r=4, alpha=8)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".lora_" in name for name in trainable)
    assert len(lora_parameters(model)) == len(trainable) == 28
    assert sum(p.numel() for p in lora_parameters(model)) == 4 * 2 * (
        4 * (64 + 64) + 3 * (64 + 128)
    )


def test_named_adapters_switch_at_run_time():
    model = tiny_llama()
    bare = logits(model)
    add_adapters(model, r=4, alpha=8, name="orders")
    shake(model, 1)
    orders = logits(model)
    add_adapters(model, ["q_proj"], r=2, alpha=8, name="tickets")  # on fewer layers
    for layer in lora_layers(model).values():
        if "tickets" in layer.lora_B:
            nn.init.normal_(layer.lora_B["tickets"])
    tickets = logits(model)
    assert not torch.equal(orders, tickets)
    assert len(lora_parameters(model)) == 4 and len(lora_parameters(model, "orders")) == 28
    set_adapter(model, "orders")
    assert torch.equal(logits(model), orders)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(name.endswith(".orders") for name in trainable)
    set_adapter(model, None)
    assert torch.equal(logits(model), bare)
    set_adapter(model, "tickets")
    assert torch.equal(logits(model), tickets)


def test_merge_and_unmerge_keep_the_answers(device):
    model = tiny_llama().to(device)
    before = {n: p.clone() for n, p in model.named_parameters()}
    add_adapters(model, r=4, alpha=8)
    shake(model)
    expected = logits(model)
    merge(model)
    layer = next(iter(lora_layers(model).values()))
    assert not torch.equal(layer.base.weight, before["model.layers.0.self_attn.q_proj.weight"])
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    model.eval(), model.train(), model.eval()
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    unmerge(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    for name, weight in before.items():
        now = dict(model.named_parameters())[name.replace("_proj.weight", "_proj.base.weight")]
        torch.testing.assert_close(now, weight, atol=1e-6, rtol=0)


def test_merge_equals_pefts_merge(device):
    theirs, ours = (layer.to(device) for layer in pair())
    theirs.merge(), ours.merge()
    torch.testing.assert_close(ours.base.weight, theirs.base_layer.weight, atol=1e-6, rtol=1e-6)


def test_a_merge_in_bf16_rounds_once():
    _, layer = pair(dtype=torch.bfloat16)
    expected = (layer.base.weight.float() + layer.delta()).to(torch.bfloat16)
    layer.merge()
    assert torch.equal(layer.base.weight, expected)


# --- files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_peft_reads_what_we_write(tmp_path, targets, rslora, device):
    ours = tiny_llama().to(device)
    add_adapters(ours, targets, r=4, alpha=9, name="orders", dropout=0.1, rslora=rslora)
    shake(ours)
    save_adapter(ours, tmp_path / "a", "orders")
    theirs = PeftModel.from_pretrained(tiny_llama().to(device), tmp_path / "a")
    assert type(theirs).__name__ == "PeftModelForCausalLM"
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(ours), logits(tiny_llama().to(device)), atol=1e-2)
    config = theirs.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 9, 0.1)
    assert sorted(config.target_modules)[0] == "down_proj"


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], r".*mlp\.up_proj"])
def test_we_read_what_peft_writes(tmp_path, targets, rslora, device):
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=rslora, target_modules=targets)
    theirs = get_peft_model(tiny_llama().to(device), config)
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    ours = tiny_llama().to(device)
    load_adapter(ours, tmp_path, "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(ours), logits(tiny_llama().to(device)), atol=1e-2)


def test_ranks_that_differ_by_layer_survive_both_ways(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    theirs = get_peft_model(tiny_llama(), config)
    shake(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = tiny_llama()
    load_adapter(ours, tmp_path / "theirs", "x")
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=0)
    save_adapter(ours, tmp_path / "ours", "x")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(theirs), atol=1e-5, rtol=0)


def test_saved_tensors_are_pefts_to_the_name(tmp_path):
    targets = ["q_proj", "v_proj"]
    ours = tiny_llama()
    add_adapters(ours, targets, r=4, alpha=8)
    save_adapter(ours, tmp_path / "ours")
    theirs = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=targets))
    theirs.save_pretrained(tmp_path / "theirs")
    a = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    b = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}


def test_only_one_adapter_is_written(tmp_path):
    model = tiny_llama()
    add_adapters(model, r=4, alpha=8, name="one")
    add_adapters(model, r=2, alpha=8, name="two")
    save_adapter(model, tmp_path, "two")
    assert {
        t.shape[0]
        for k, t in load_file(tmp_path / "adapter_model.safetensors").items()
        if "lora_A" in k
    } == {2}


def test_names_are_written_in_full_where_endings_would_say_too_much(tmp_path):
    model = tiny_llama()
    add_adapters(model, ["model.layers.1.mlp.up_proj"], r=4, alpha=8)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.mlp.up_proj"]
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)


def test_two_loaded_adapters_live_side_by_side(tmp_path):
    for seed, name in enumerate(["a", "b"]):
        model = tiny_llama()
        add_adapters(model, r=4, alpha=8)
        shake(model, seed)
        save_adapter(model, tmp_path / name)
    alone = logits(model)
    both = tiny_llama()
    load_adapter(both, tmp_path / "b", "b")
    load_adapter(both, tmp_path / "a", "a")
    assert not torch.equal(logits(both), alone)
    set_adapter(both, "b")
    assert torch.equal(logits(both), alone)


# --- bad input -----------------------------------------------------------------------------


def adapted() -> nn.Module:
    model = tiny_llama()
    add_adapters(model, r=4, alpha=8)
    return model


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: LoRALinear(nn.Linear(8, 4), 0, 8), "rank 0 is not allowed: a 8 -> 4 .* 1 to 4"),
        (lambda: LoRALinear(nn.Linear(8, 4), 5, 8), "rank 5 is not allowed"),
        (lambda: LoRALinear(nn.Linear(8, 4), 2.0, 8), "whole number"),
        (lambda: LoRALinear(nn.Linear(8, 4), 2, 0), "alpha 0"),
        (lambda: LoRALinear(nn.Linear(8, 4), 2, float("nan")), "alpha nan"),
        (lambda: LoRALinear(nn.Linear(8, 4), 2, 8, dropout=1.0), "dropout 1.0"),
        (lambda: LoRALinear(nn.Linear(8, 4), 2, 8, adapter="a.b"), "name 'a.b'"),
        (lambda: LoRALinear(nn.Linear(8, 4), 2, 8, adapter="keys"), "name 'keys'"),
        (lambda: add_adapters(tiny_llama(), ["qproj"]), "match no linear layer.*q_proj"),
        (lambda: add_adapters(tiny_llama(), ["q_proj", "value"]), r"\['value'\] match no linear"),
        (lambda: add_adapters(tiny_llama(), "(("), "is no regular expression"),
        (lambda: add_adapters(tiny_llama(), 3), "targets 3 is not possible; give a list of texts"),
        (lambda: add_adapters((tiny_llama(), None)), "give a model: .* its .model"),
        (lambda: add_adapters(tiny_llama(), r="16"), "rank '16' is not allowed"),
        (lambda: add_adapters(tiny_llama(), r=True), "rank True is not allowed"),
        (lambda: add_adapters(tiny_llama(), alpha="16"), "alpha '16' is not possible"),
        (lambda: add_adapters(tiny_llama(), dropout="0"), "dropout '0' is not possible"),
        (lambda: add_adapters(tiny_llama(), name=3), "adapter name 3"),
        (lambda: LoRALinear("layer", 2, 8), "a base 'layer' is not possible"),
        (lambda: save_adapter(adapted(), None), "directory None"),
        (lambda: save_adapter(adapted(), "unused", None), "adapter name None"),
        (lambda: load_adapter(tiny_llama(), 3), "directory 3"),
        (lambda: set_adapter(adapted(), ["typo"]), r"no adapter \['typo'\]"),
        (lambda: add_adapters(tiny_llama(), r=65), "rank 65"),
        (lambda: add_adapters(adapted(), r=4), "'default' exists already"),
        (lambda: set_adapter(adapted(), "typo"), r"no adapter 'typo' .* \['default'\]"),
        (lambda: adapted().model.layers[0].mlp.up_proj.set_adapter("typo"), "no adapter 'typo'"),
        (lambda: unmerge(adapted()), "no adapter is merged"),
        (lambda: merge(tiny_llama()), "no adapter is active"),
        (lambda: save_adapter(adapted(), "unused", "typo"), "no adapter 'typo'"),
        (lambda: lora_parameters(tiny_llama()), "no adapter is active"),
    ],
)
def test_bad_input_is_answered_in_one_line(call, says):
    with pytest.raises(InputError, match=says) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_refused_adapter_leaves_the_model_whole():
    model = tiny_llama()
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(InputError):
        add_adapters(model, r=65)
    assert not lora_layers(model) and [p.requires_grad for p in model.parameters()] == trainable


def test_merge_states_are_refused_in_words():
    model = adapted()
    merge(model)
    for call, says in (
        (lambda: merge(model), "is merged already"),
        (lambda: set_adapter(model, None), "call unmerge"),
        (lambda: add_adapters(model, r=4, name="second"), "call unmerge first"),
    ):
        with pytest.raises(InputError, match=says):
            call()


def test_a_tied_weight_is_not_merged():
    model = tiny_llama(tied=True)
    add_adapters(model, ["lm_head"], r=4, alpha=8)
    with pytest.raises(InputError, match="tied .*embed_tokens"):
        merge(model)


def test_gpt2_without_linear_layers_says_so():
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    with pytest.raises(InputError, match="match no linear layer"):
        add_adapters(GPT2LMHeadModel(config), r=4)


def test_adapters_that_do_not_fit_are_refused(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "ok")

    def rewrite(folder, config=None, tensors=None):
        target = tmp_path / folder
        target.mkdir()
        old = json.loads((tmp_path / "ok/adapter_config.json").read_text())
        (target / "adapter_config.json").write_text(json.dumps(old | (config or {})))
        old = load_file(tmp_path / "ok/adapter_model.safetensors")
        save_file(old if tensors is None else tensors, target / "adapter_model.safetensors")
        return target

    first = "base_model.model.model.layers.0.self_attn.q_proj"
    half = {f"{first}.lora_A.weight": torch.ones(4, 64)}
    wide = half | {f"{first}.lora_B.weight": torch.ones(96, 4)}
    damaged = rewrite("damaged")
    (damaged / "adapter_model.safetensors").write_bytes(b"cut off")
    lost = {k.replace("q_proj", "elsewhere"): v for k, v in wide.items()}
    magnitude = wide | {f"{first}.lora_magnitude_vector": torch.ones(64)}
    cases = [
        (tmp_path / "nowhere", "no adapter_config.json"),
        (rewrite("prefix", {"peft_type": "PREFIX_TUNING"}), "'PREFIX_TUNING' is not LORA"),
        (rewrite("alpha", {"alpha_pattern": {"q_proj": 2}}), "alpha_pattern"),
        (rewrite("pissa", {"init_lora_weights": "pissa"}), "init_lora_weights='pissa'"),
        (rewrite("half", tensors=half), "A and B belong together"),
        (rewrite("wide", tensors=wide), "maps 64 -> 96 and the model's 64 -> 64"),
        (rewrite("lost", tensors=lost), "no such layer"),
        (rewrite("dora", tensors=magnitude), "not a plain LoRA tensor"),
        (rewrite("empty", tensors={}), "is empty"),
        (damaged, "is damaged"),
    ]
    for folder, says in cases:
        fresh = tiny_llama()
        with pytest.raises(InputError, match=says):
            load_adapter(fresh, folder)
        assert not lora_layers(fresh)
