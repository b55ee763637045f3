"""The ledger against a CUDA device: what is allocated and saved, where the peak is, what pages.

The saved tensors are the CPU's but for a few bytes: the flash kernel also keeps the state of its
random numbers, so those sums are compared to one part in a thousand.
"""

import gc

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from qlora_lab.activations import record_saved
from qlora_lab.memory import ledger
from qlora_lab.paged_optimizer import is_paged

pytestmark = pytest.mark.gpu

BATCH, SEQUENCE, RANK = 2, 512, 16
CONFIG = LlamaConfig(
    vocab_size=8192,
    hidden_size=1024,
    intermediate_size=2816,
    num_hidden_layers=8,
    num_attention_heads=16,
    max_position_embeddings=SEQUENCE,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
RUN = {"r": RANK, "batch": BATCH, "sequence": SEQUENCE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).save_pretrained(path)
    return path


def load(folder):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=quantization,
        device_map={"": 0},
        attn_implementation="sdpa",
    ).train()


def adapt(model):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def token_ids():
    return torch.randint(3, 8192, (BATCH, SEQUENCE), device="cuda")


def test_allocated_is_weights_and_constants(folder):
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model = load(folder)
    gc.collect()
    allocated = torch.cuda.memory_allocated() - before
    book = ledger(CONFIG, batch=0)
    expected = book.footprint + book["quantization constants"].bytes
    assert model.get_memory_footprint() == book.footprint
    tensors = 6 * 7 * CONFIG.num_hidden_layers + 40  # the allocator rounds each up to 512 bytes
    assert expected <= allocated <= expected + 512 * tensors


@pytest.mark.parametrize("autocast", [False, True])
def test_saved_tensors_are_those_of_the_trace(folder, autocast):
    model = adapt(load(folder))
    with record_saved(model) as saved, torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        model(input_ids=token_ids(), use_cache=False)
    measured = sum(each.bytes for each in saved)
    predicted = ledger(CONFIG, **RUN, autocast=autocast)["activations"].bytes
    assert measured == pytest.approx(predicted, rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_peak_is_near_the_total(folder, checkpointing):
    import bitsandbytes as bnb

    model = adapt(load(folder))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = bnb.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for _ in range(2):  # the second step has the optimizer's state from the start
        torch.cuda.reset_peak_memory_stats()
        ids = token_ids()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated()
    total = ledger(CONFIG, **RUN, checkpointing=checkpointing).total
    workspace = 80e6  # cuBLAS
    print(f"peak {peak / 1e6:.1f} MB, ledger {total / 1e6:.1f} MB")
    assert 0.7 * total <= peak <= 1.1 * total + workspace


def test_only_large_states_are_paged():
    import bitsandbytes as bnb

    sizes = (99_999, 100_000, 200_000)
    weights = [torch.nn.Parameter(torch.zeros(n, device="cuda")) for n in sizes]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = bnb.optim.PagedAdamW(weights, lr=1e-3)
    optimizer.step()
    for weight in weights:
        state = optimizer.state[weight]["state1"]
        assert getattr(state, "is_paged", False) == is_paged(weight.numel())
