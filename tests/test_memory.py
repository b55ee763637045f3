"""The ledger against the libraries: parameters, bytes, constants and states.

Every number is compared with a model that really exists, loaded in 4 bits by transformers and
bitsandbytes and adapted by PEFT, small enough for a CPU. Nothing here is compared with the
ledger's own arithmetic, except where the subject is too large to exist (LLaMA-7B, 65B).
"""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    BATCH,
    CONFIGS,
    SEQUENCE,
    SHAPE,
    adapt,
    build,
    every_config,
    load,
    quant_state_tensors,
    save_checkpoints,
    token_ids,
)
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig, MixtralConfig, ViTConfig

from qlora_lab import plots
from qlora_lab.activations import LiveBytes
from qlora_lab.errors import InputError
from qlora_lab.memory import (
    LOSS_BYTES_PER_LOGIT,
    adam_bytes,
    constant_bytes,
    ledger,
    packed_bytes,
)

MAMBA = MambaConfig(vocab_size=320, hidden_size=64, num_hidden_layers=2)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return save_checkpoints(tmp_path_factory)


def storage_bytes(tensors):
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


# Parameters and bytes of the base model


@every_config
def test_parameters_are_those_of_the_instantiated_model(name):
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    book = ledger(CONFIGS[name], "full", batch=0, dtype="float32")
    assert book.parameters == sum(p.numel() for p in model.parameters())
    assert book.footprint == model.get_memory_footprint()
    embeddings = {id(model.get_input_embeddings().weight): model.get_input_embeddings().weight}
    embeddings[id(model.get_output_embeddings().weight)] = model.get_output_embeddings().weight
    positions = model.transformer.wpe.weight.numel() if name == "gpt2" else 0
    expected = sum(w.numel() for w in embeddings.values()) + positions
    assert book["embeddings and head"].parameters == expected


@every_config
@pytest.mark.parametrize(
    ("double_quant", "dtype"), [(True, torch.bfloat16), (False, torch.float32)]
)
def test_bytes_are_those_of_the_model_loaded_in_4_bits(checkpoints, name, double_quant, dtype):
    model = load(checkpoints[name], dtype, bits=4, double_quant=double_quant)
    book = ledger(CONFIGS[name], "qlora", batch=0, dtype=dtype, double_quant=double_quant)
    assert book.footprint == model.get_memory_footprint()
    constants = storage_bytes(quant_state_tensors(model))
    assert (constants > 0) == (name != "falcon")  # its own class of linear layers is passed by
    assert book["quantization constants"].bytes == constants
    codes = [p for p in model.parameters() if hasattr(p, "quant_state")]
    assert book["4-bit weights"].bytes == sum(p.nbytes for p in codes)
    numels = [p.quant_state.shape.numel() for p in codes]
    assert book["4-bit weights"].parameters == sum(numels)


def test_conv1d_is_quantized_and_adapted_as_a_linear_layer(checkpoints):
    """GPT-2: four Conv1D a block, all of them 4-bit and all of them in "all-linear"."""
    model = adapt(load(checkpoints["gpt2"], bits=4))
    adapted = [m for m in model.modules() if type(m).__name__ == "Linear4bit" and hasattr(m, "r")]
    assert len(adapted) == 4 * CONFIGS["gpt2"].n_layer
    assert ledger(CONFIGS["gpt2"], batch=0)["adapters"].note.endswith(f"{len(adapted)} layers")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "bloom", "gpt2", "falcon", "qwen2-moe"])
def test_kbit_prep_casts_what_is_not_4_bit(checkpoints, name):
    from peft import prepare_model_for_kbit_training

    model = load(checkpoints[name], torch.bfloat16, bits=4)
    before = ledger(CONFIGS[name], batch=0).footprint
    assert model.get_memory_footprint() == before
    prepare_model_for_kbit_training(model)
    after = ledger(CONFIGS[name], batch=0, kbit_prep=True).footprint
    assert model.get_memory_footprint() == after > before


def test_a_mixture_keeps_its_experts_in_16_bits():
    """Fused expert weights are parameters, not linear layers, and load_in_4bit passes them by."""
    config = MixtralConfig(
        **SHAPE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    book = ledger(config, batch=0)
    experts = 4 * 4 * 3 * 64 * 192  # layers x experts x (gate, up, down)
    assert book["norms, biases, other"].parameters > experts > book["4-bit weights"].parameters


@given(numel=st.integers(1, 70_000), blocksize=st.sampled_from([32, 64, 128, 4096]))
@settings(max_examples=15)
def test_constants_of_any_weight(numel, blocksize):
    import bitsandbytes.functional as bnb

    weight = torch.randn(numel, generator=torch.manual_seed(numel))
    for double_quant in (False, True):
        codes, state = bnb.quantize_4bit(
            weight, blocksize=blocksize, quant_type="nf4", compress_statistics=double_quant
        )
        assert codes.nbytes == packed_bytes(numel)
        tensors = [v for v in vars(state).values() if isinstance(v, torch.Tensor)]
        if double_quant:
            tensors += [v for v in vars(state.state2).values() if isinstance(v, torch.Tensor)]
        assert storage_bytes(tensors) == constant_bytes(numel, blocksize, double_quant)


# Adapters, gradients, optimizer state


@every_config
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_adapters_are_pefts(checkpoints, name, method):
    model = build(checkpoints[name], method, torch.bfloat16, r=3)
    trained = [p for p in model.parameters() if p.requires_grad]
    book = ledger(CONFIGS[name], method, r=3, batch=0)
    assert book["adapters"].parameters == sum(p.numel() for p in trained)
    assert book["adapters"].bytes == book["gradients"].bytes == sum(p.nbytes for p in trained)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*layers\.[01]\..*_proj"])
def test_targets_mean_what_they_mean_in_peft(checkpoints, targets):
    model = adapt(load(checkpoints["llama"]), targets=targets)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    book = ledger(CONFIGS["llama"], "lora", r=4, targets=targets, batch=0, dtype="float32")
    assert book["adapters"].parameters == trained


def optimizers():
    import bitsandbytes as bnb

    return {
        "adamw": bnb.optim.AdamW,
        "adamw_8bit": bnb.optim.AdamW8bit,
        "torch": torch.optim.AdamW,
    }


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "torch"])
@pytest.mark.parametrize("method", ["full", "qlora"])
def test_optimizer_state_is_the_optimizers(checkpoints, optimizer, method):
    model = build(checkpoints["llama"], method, r=32)  # r=32: adapters below and above 4,096
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    step = optimizers()[optimizer](trained, lr=1e-3)
    step.step()
    tensors = [v for s in step.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    if optimizer == "torch":  # torch also keeps the step number as a tensor
        tensors = [t for t in tensors if t.numel() > 1]
        optimizer = "adamw"
    book = ledger(CONFIGS["llama"], method, r=32, batch=0, dtype="float32", optimizer=optimizer)
    assert book["optimizer state"].bytes == storage_bytes(tensors)
    assert book["gradients"].bytes == sum(p.grad.nbytes for p in trained)


def test_paged_state_follows_the_hundred_thousand_rule():
    wide = LlamaConfig(**{**SHAPE, "hidden_size": 4096, "intermediate_size": 11008})
    layers, eight, sixteen = 4, 2 * 8 * 4096, 16 * 11008
    assert ledger(wide, r=8, paged=True, batch=0)["optimizer state"].pageable == 0
    assert eight < 100_000 <= sixteen
    # three of the seven layers have an 11008-sided matrix
    assert ledger(wide, r=16, paged=True, batch=0)["optimizer state"].pageable == (
        layers * 3 * 8 * sixteen
    )
    everything = ledger(wide, r=32, paged=True, batch=0)["optimizer state"]
    assert everything.pageable == everything.bytes
    assert ledger(wide, r=32, batch=0)["optimizer state"].pageable == 0
    # 8-bit: the moments only, their scales stay
    eight_bit = ledger(wide, r=32, paged=True, batch=0, optimizer="adamw_8bit")["optimizer state"]
    assert eight_bit.pageable == everything.pageable // 4 < eight_bit.bytes


# Numbers that the course states


def llama(hidden, inner, layers, heads):
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32000,
    )


def test_llama_7b():
    book = ledger(llama(4096, 11008, 32, 32), r=64, batch=0)
    assert book["4-bit weights"].parameters == 6_476_005_376
    assert book["embeddings and head"].parameters == 262_144_000
    assert book["adapters"].parameters == 159_907_840
    quantized = book["4-bit weights"].bytes + book["quantization constants"].bytes
    assert round(quantized / 1e6, 1) == pytest.approx(3340.8, abs=0.3)  # tables: 0.24 MB
    bits = 8 * quantized / book["4-bit weights"].parameters
    assert bits == pytest.approx(4.127, abs=0.0005)


def test_780_gb_for_65b():
    book = ledger(llama(8192, 22016, 80, 64), "full", batch=0)
    assert book.parameters == 65_285_660_672
    assert book.total - book["buffers"].bytes == 12 * book.parameters
    assert book.total / 1e9 == pytest.approx(780, rel=0.005)


# A live step, and a model too large to exist


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_live_memory_of_a_real_step(checkpoints, method, dtype, checkpointing):
    """Nothing but what the ledger names is alive, at three moments of one training step."""
    model = build(checkpoints["llama"], method, dtype, "sdpa")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    book = ledger(
        CONFIGS["llama"],
        method,
        r=4,
        batch=BATCH,
        sequence=SEQUENCE,
        dtype=dtype,
        checkpointing=checkpointing,
    )
    activations, logits = book["activations"].bytes, book["logits"].bytes
    per_logit = logits // LOSS_BYTES_PER_LOGIT
    ids = token_ids()
    labels, scalars = ids.nbytes, 8  # shifted labels; the loss and the number of its terms
    if method == "full":  # the embedding keeps the ids, which the step did not make
        activations -= ids.nbytes

    live = LiveBytes(model)
    with live:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        after_forward, done = live.now(), len(live.timeline)
        loss.backward()
    peak = max(live.timeline[done:])

    kept = activations
    if checkpointing:  # the recomputed block is not there yet
        kept -= max(book.activations.block_bytes(b, inputs=False) for b in book.activations.blocks)
    assert after_forward == kept + 4 * per_logit + labels + scalars
    if not checkpointing:  # the loss's backward pass is the peak: 12 bytes a logit
        assert peak == activations + logits + scalars
    rest = ("activations", "logits", "gradients", "one weight dequantized")
    transient = sum(row.bytes for row in book.rows if row.name in rest)
    assert activations <= peak <= transient + labels + scalars
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert gradients == book["gradients"].bytes


def test_the_65b_ledger_allocates_nothing():
    resource = pytest.importorskip("resource", reason="Windows counts memory elsewhere")
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    book = ledger(llama(8192, 22016, 80, 64), checkpointing=True, sequence=2048)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    assert book["4-bit weights"].bytes > 30e9
    assert grown < 500e6


# What the reader sees


def test_table_names_its_units():
    text = str(ledger(llama(4096, 11008, 32, 32), r=64, batch=0, paged=True))
    assert "qlora of LlamaForCausalLM, r=64, before the first batch, bfloat16" in text
    assert "1 GB = 1,000,000,000 bytes, 1 GiB = 1,073,741,824 bytes" in text
    assert "4-bit weights              6,476,005,376     3,238,002,688     3.238     3.016" in text
    assert "may be paged to the CPU" in text
    assert "1 MB = 1,000,000 bytes" in str(ledger(CONFIGS["llama"], batch=0))


def test_slices_of_the_pictures_lose_no_byte():
    """What `plots.memory_bars` draws is the ledger's rows, all of them, in the spine's slices."""
    for method in ("full", "lora", "qlora"):
        book = ledger(CONFIGS["llama"], method, r=4, batch=BATCH, sequence=SEQUENCE)
        slices = plots.ledger_slices(book)
        assert sum(slices.values()) == book.total
        assert slices["weights"] == book.rows[0].bytes
    figure = plots.memory_bars({"one run": slices}, {"a card": 3e6})
    assert f"one run {book.total / 1e6:.1f} MB" in figure.alt and "a card" in figure.alt
    with pytest.raises(InputError, match="no_such"):
        plots.memory_bars({"one run": {"no_such": 1}}, {})


def test_rows_add_up_and_are_found_by_name():
    book = ledger(CONFIGS["llama"], batch=0)
    assert book.total == sum(row.bytes for row in book.rows)
    with pytest.raises(InputError, match="no row 'weights'"):
        book["weights"]


def test_a_folder_is_as_good_as_a_config(checkpoints):
    book = ledger(str(checkpoints["llama"]), batch=0)
    assert book.rows == ledger(CONFIGS["llama"], batch=0).rows


def test_the_config_is_not_changed():
    config = LlamaConfig(**SHAPE)
    before = config.to_json_string()
    ledger(config, sequence=8)
    assert config.to_json_string() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "dora"}, "method 'dora'"),
        ({"r": 0}, "r 0"),
        ({"r": 65}, "rank 65 is larger than every layer with an adapter: give 1..64"),
        ({"batch": -1}, "batch -1"),
        ({"sequence": 0}, "sequence 0"),
        ({"blocksize": 48}, "blocksize=48: use a power of two from 32 to 4096"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"optimizer": "sgd"}, "optimizer 'sgd'"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"dropout": "0"}, "dropout '0'"),
        ({"blocksize": "64"}, "blocksize='64'"),
        ({"attention": "flash"}, "attention 'flash' is unknown"),
        ({"targets": ["q_proj", "value"]}, "['value'] match no linear layer"),
        ({"config": "no/such/model"}, "'no/such/model' cannot be loaded"),
        ({"r": "16"}, "r '16' is not possible"),
        ({"targets": ["nothing"]}, "match no linear layer"),
        ({"config": 7}, "config is a int"),
        (
            {"config": MAMBA},
            "PEFT puts no adapter on out_proj in a MambaConfig model",
        ),
        (
            {"config": MAMBA, "targets": ["in_proj"]},
            "which bitsandbytes holds as 4-bit codes",
        ),
        ({"config": ViTConfig(hidden_size=64, num_hidden_layers=1)}, "cannot be run on input_ids"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    with pytest.raises(InputError) as error:
        ledger(**{"config": CONFIGS["llama"], **arguments})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_config_without_text_has_a_ledger_without_activations():
    config = ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    book = ledger(config, "full", batch=0, dtype="float32")
    model = transformers.AutoModel.from_config(config)
    assert book.parameters == sum(p.numel() for p in model.parameters())


def test_adam_bytes_at_the_edges():
    assert adam_bytes(4095, bits=8) == 8 * 4095
    assert adam_bytes(4096, bits=8) == 2 * (4096 + 4 * 16)
    assert adam_bytes(10) == 80


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: adam_bytes(10, 3), "bits=3 is not possible; give 32 or 8, the Adams"),
        (lambda: adam_bytes("10"), "numel '10'"),
        (lambda: packed_bytes(1.5), "numel 1.5"),
        (lambda: constant_bytes(64, 48), "blocksize=48: use a power of two"),
        (lambda: constant_bytes(-1), "numel -1"),
    ],
)
def test_numbers_of_another_kind_are_refused(call, says):
    with pytest.raises(InputError, match=says) as error:
        call()
    assert "\n" not in str(error.value)
