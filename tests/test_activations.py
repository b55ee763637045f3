"""What autograd keeps: formula = trace = a real model.

Every number is compared with what a model that really exists saves, loaded in 4 bits by
transformers and bitsandbytes and adapted by PEFT, small enough for a CPU.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from small_models import (
    BATCH,
    CONFIGS,
    GPT,
    NO_DROPOUT,
    SEQUENCE,
    SHAPE,
    VOCABULARY,
    adapt,
    build,
    every_config,
    load,
    quant_state_tensors,
    save_checkpoints,
    token_ids,
)
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    T5Config,
)

from qlora_lab.activations import LiveBytes, llama_block_activations, record_saved
from qlora_lab.errors import InputError
from qlora_lab.memory import ledger

LLAMA_FAMILY = ("llama", "qwen2", "mistral")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return save_checkpoints(tmp_path_factory)


# Formula = trace = a real model


def measured(model, **extra):
    """Bytes that a real forward pass saves, the loss left out, each storage once."""
    with record_saved(model) as saved:
        model(input_ids=token_ids(), use_cache=False, **extra)
    return sum(each.bytes for each in saved)


@every_config
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize(
    ("dtype", "attention"), [(torch.bfloat16, "sdpa"), (torch.float32, "eager")]
)
def test_trace_equals_a_real_model(checkpoints, name, method, dtype, attention):
    supported = "eager" if name == "bloom" else attention  # Bloom has no sdpa; the ledger knows
    if name == "qwen2-moe":
        dtype = torch.bfloat16  # PyTorch's grouped product of experts is traced in no other
    model = build(checkpoints[name], method, dtype, supported)
    book = ledger(
        CONFIGS[name],
        method,
        r=4,
        batch=BATCH,
        sequence=SEQUENCE,
        dtype=dtype,
        attention=attention,
    )
    assert book["activations"].bytes == measured(model)


@pytest.fixture
def cuda_autocast(monkeypatch):
    """Let PEFT see autocast as it sees it on a GPU: it asks without naming a device."""
    ask = torch.is_autocast_enabled  # autocast itself asks for its own device, to restore it
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: not device or ask(*device))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_trace_equals_a_real_model_under_autocast(checkpoints, name, method, cuda_autocast):
    dtype = torch.float32 if method == "full" else torch.bfloat16
    model = build(checkpoints[name], method, dtype, "sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        real = measured(model)
    book = ledger(
        CONFIGS[name], method, r=4, batch=BATCH, sequence=SEQUENCE, dtype=dtype, autocast=True
    )
    assert book["activations"].bytes == real


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral"])
@pytest.mark.parametrize("autocast", [False, True])
def test_trace_equals_a_real_model_after_kbit_prep(checkpoints, name, autocast, request):
    if autocast:
        request.getfixturevalue("cuda_autocast")
    model = build(checkpoints[name], "qlora", torch.bfloat16, "sdpa", kbit_prep=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        real = measured(model)
    book = ledger(
        CONFIGS[name],
        r=4,
        batch=BATCH,
        sequence=SEQUENCE,
        kbit_prep=True,
        autocast=autocast,
    )
    assert book["activations"].bytes == real


@pytest.mark.parametrize("name", LLAMA_FAMILY)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("dtypes", [("bfloat16", "float32"), ("float32",) * 2, ("bfloat16",) * 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_formula_equals_trace(name, method, dtypes, attention):
    shared = {"r": 4, "batch": BATCH, "sequence": SEQUENCE, "attention": attention}
    shared |= {"dtype": dtypes[0], "adapter_dtype": dtypes[1]}
    seen = ledger(CONFIGS[name], method, **shared).activations
    typical = list(seen.blocks)[-1]
    on_paper = llama_block_activations(CONFIGS[name], method, **shared)
    assert seen.block_bytes(typical) == on_paper


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dropout_costs_a_mask_and_a_copy(dtype):
    """Each adapter keeps its own thinned-out input and one byte an element for the mask."""
    shared = {"r": 4, "batch": BATCH, "sequence": SEQUENCE, "dtype": dtype}
    block = "model.layers.1"  # the first block's q, k, v read embeddings, which need no gradient
    plain = ledger(CONFIGS["llama"], **shared).activations.block_bytes(block)
    thinned = ledger(CONFIGS["llama"], **shared, dropout=0.1).activations.block_bytes(block)
    h, f, tokens = 64, 192, BATCH * SEQUENCE
    masks = 6 * h + f
    copies = 0  # beside a 16-bit base every adapter has a float32 copy of its input anyway
    if dtype == "float32":  # q, k, v shared h; gate, up shared h; o used the attention's result
        copies = 4 * (2 * h + 1 * h + 1 * h)
    assert thinned - plain == tokens * (masks + copies)


def test_dropout_is_counted_as_cuda_keeps_it():
    """GPT-2's own dropouts: the CPU keeps a float a value, CUDA one byte, the ledger says CUDA."""
    config = GPT2Config(**GPT, n_embd=64, n_positions=64, **{**NO_DROPOUT, "resid_pdrop": 0.1})
    without = ledger(CONFIGS["gpt2"], "full", batch=BATCH, sequence=SEQUENCE)["activations"].bytes
    with_it = ledger(config, "full", batch=BATCH, sequence=SEQUENCE)["activations"].bytes
    assert with_it - without == 4 * 2 * BATCH * SEQUENCE * 64  # layers x two per block


def test_equal_blocks_are_folded_without_changing_the_sum():
    """A stack of 2 is run whole, a stack of 9 is folded to 2: the difference is 7 blocks."""
    sizes = {}
    for layers in (2, 9):
        config = LlamaConfig(**{**SHAPE, "num_hidden_layers": layers})
        sizes[layers] = ledger(config, r=4, batch=BATCH, sequence=SEQUENCE)
    nine, two = (sizes[n]["activations"].bytes for n in (9, 2))
    block = sizes[9].activations.block_bytes("model.layers.1")
    assert sizes[9].activations.blocks == {"model.layers.0": 1, "model.layers.1": 8}
    assert nine - two == 7 * block


def test_blocks_that_differ_are_not_folded(checkpoints):
    targets = r".*layers\.[02]\..*_proj"
    model = adapt(load(checkpoints["llama"], torch.bfloat16, attention="sdpa"), targets=targets)
    book = ledger(CONFIGS["llama"], "lora", r=4, targets=targets, batch=BATCH, sequence=SEQUENCE)
    assert len(book.activations.blocks) == 4
    assert book["activations"].bytes == measured(model)


def test_a_mixture_and_an_encoder_decoder_are_traced_too():
    mixture = MixtralConfig(
        **SHAPE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    t5 = T5Config(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    for config in (mixture, t5):
        assert ledger(config, "lora", r=4, batch=1, sequence=8)["activations"].bytes > 0


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_an_architecture_that_reads_the_bias_of_an_adapted_layer(method, tmp_path):
    """A state-space block hands it to its kernel; without that kernel the layer itself runs."""
    config = BambaConfig(
        **{**SHAPE, "num_hidden_layers": 2}, num_key_value_heads=2, attn_layer_indices=[1],
        mamba_n_heads=4, mamba_d_head=32,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = build(tmp_path, method, torch.bfloat16, "sdpa")
    book = ledger(config, method, r=4, batch=BATCH, sequence=SEQUENCE)
    assert book["activations"].bytes == measured(model)


def test_saved_tensors_as_a_table():
    text = str(ledger(CONFIGS["llama"], r=4, batch=BATCH, sequence=SEQUENCE).activations)
    assert "self_attn.q_proj" in text and "one block of 4" in text


# Watching a real model


def test_recording_changes_no_output():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    plain = model(input_ids=token_ids()).logits
    with record_saved(model) as saved:
        recorded = model(input_ids=token_ids()).logits
    assert torch.equal(plain, recorded) and saved
    assert {s.module for s in saved} >= {"model.norm", "model.layers.3.mlp.down_proj"}


def test_hooks_are_gone_after_recording():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    with contextlib.suppress(ZeroDivisionError), record_saved(model):
        raise ZeroDivisionError
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_live_bytes_follow_every_operation():
    """Three operations on a model that is not counted itself: one by one, by hand."""
    model = torch.nn.Linear(8, 4, bias=False)
    with LiveBytes(model) as live:
        x = torch.ones(2, 8)  # 64 bytes
        y = model(x)  # 32 more; the weight's transpose is a view of the weight
        z = y * 2  # 32 more
        assert live.timeline[-1] == 128
        del z
        assert live.now() == 96
        x = x.view(16)  # a view is no new memory
    assert live.now() == 96 and max(live.timeline) == 128 and y.shape == (2, 4)


def test_live_bytes_of_a_4_bit_model_leave_its_constants_out(checkpoints):
    model = build(checkpoints["llama"], "qlora")
    with LiveBytes(model) as live:
        for tensor in quant_state_tensors(model):
            tensor.view(-1)
    assert set(live.timeline) == {0}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: LiveBytes(("model", "tokenizer")), "give a model: .* its .model"),
        (lambda: record_saved(None).__enter__(), "model None"),
        (lambda: llama_block_activations(CONFIGS["gpt2"]), "has no formula"),
        (lambda: llama_block_activations(CONFIGS["llama"], sequence="8"), "sequence '8'"),
    ],
)
def test_what_is_no_model_and_no_number_is_refused(call, says):
    with pytest.raises(InputError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
