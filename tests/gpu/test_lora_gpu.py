"""The parity of test_lora and test_qlora, repeated on CUDA.

Tests that need nothing but another `device` are imported as they are.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_lora import (  # noqa: F401 - the tests among them are collected here once more
    assert_layers_agree,
    pair,
    test_merge_and_unmerge_keep_the_answers,
    test_merge_equals_pefts_merge,
    test_peft_reads_what_we_write,
    test_we_read_what_peft_writes,
)
from test_qlora import (
    ALPHA,
    R,
    assert_adapters_move,
    assert_gradients_agree,
    assert_losses_agree,
    embedded_base,
    gradients,
    saved_tensors,
    theirs_by_name,
    train,
)
from torch import nn
from transformers import AutoModelForCausalLM

from qlora_lab.blockwise import quantize_4bit
from qlora_lab.bnb_compat import from_quant_state
from qlora_lab.loading import load_model
from qlora_lab.lora import lora_layers
from qlora_lab.qlora import QLoRALinear, QuantizedLinear

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _float32_means_float32():
    matmul = torch.backends.cuda.matmul  # monkeypatch fails to undo an attribute as this one is
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    yield
    matmul.allow_tf32 = before


def reference(compute: torch.dtype) -> nn.Module:
    """PEFT on bitsandbytes on the GPU."""
    model = load_model(embedded_base(), bits=4, device="cuda", compute_dtype=compute).model
    torch.manual_seed(0)
    lora = LoraConfig(r=R, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def from_scratch(theirs: nn.Module, compute: torch.dtype) -> nn.Module:
    """Our layers on bitsandbytes' own bytes: the CUDA kernels round scales as they like."""
    model = AutoModelForCausalLM.from_pretrained(embedded_base(), dtype=compute).cuda()
    model.requires_grad_(False)
    for path, layer in theirs_by_name(theirs).items():
        weight = layer.base_layer.weight
        quantized = from_quant_state(weight.data, weight.quant_state)
        ours = QLoRALinear(quantized, None, R, ALPHA, compute_dtype=compute)
        ours.lora_A["default"].data.copy_(layer.lora_A["default"].weight)
        ours.lora_B["default"].data.copy_(layer.lora_B["default"].weight)
        model.set_submodule(path, ours)
    return model


def batches_on_gpu(monkeypatch) -> None:
    import test_qlora

    on_cpu = test_qlora.batches
    monkeypatch.setattr(test_qlora, "batches", lambda n: [ids.cuda() for ids in on_cpu(n)])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layer_equals_pefts(dropout):
    theirs, ours = pair(dropout=dropout)
    assert_layers_agree(theirs.cuda(), ours.cuda(), torch.randn(3, 5, 48, device="cuda"))


def test_dequantized_weights_equal_bitsandbytes():
    import bitsandbytes as bnb

    theirs = reference(torch.float32)
    for path, layer in theirs_by_name(theirs).items():
        weight = layer.base_layer.weight
        expected = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        ours = QuantizedLinear(from_quant_state(weight.data, weight.quant_state)).dequantize()
        assert torch.equal(ours, expected), path


def test_float32_gradients_and_losses_equal_peft_on_bitsandbytes(monkeypatch):
    batches_on_gpu(monkeypatch)
    theirs = reference(torch.float32)
    ours = from_scratch(theirs, torch.float32)
    assert_gradients_agree(gradients(ours), gradients(theirs))
    theirs = reference(torch.float32)
    assert_losses_agree(train(from_scratch(theirs, torch.float32)), train(theirs))


def test_adapters_trained_on_codes_move_to_peft_on_bitsandbytes_and_back(monkeypatch, tmp_path):
    batches_on_gpu(monkeypatch)
    theirs = reference(torch.float32)
    assert_adapters_move(from_scratch(theirs, torch.float32), theirs, tmp_path)


def test_bfloat16_losses_follow_peft_on_bitsandbytes(monkeypatch):
    batches_on_gpu(monkeypatch)
    theirs = reference(torch.bfloat16)
    # bfloat16 has 8 bits: single products differ by 1/256, a mean over 126 tokens by less.
    assert_losses_agree(train(from_scratch(theirs, torch.bfloat16)), train(theirs), tolerance=0.02)


def test_nothing_but_codes_survives_the_forward():
    big = nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16)
    base = QuantizedLinear(quantize_4bit(big.weight, double_quant=True))
    x = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    base(x)  # tables and workspaces are made once
    before = torch.cuda.memory_allocated()
    kept = saved_tensors(lambda: base(x))
    y = base(x)
    assert torch.cuda.memory_allocated() - before < 2 * y.nbytes + 2**20
    assert sum(t.nbytes for t in kept) == base.quantized.nbytes < 0.53 * 4096 * 4096


def test_moving_a_layer_moves_codes_and_adapters():
    layer = QLoRALinear.from_linear(nn.Linear(64, 96), 4, 8)
    before = layer.base.dequantize()
    layer.cuda()
    assert all(t.is_cuda for t in [*layer.parameters(), *layer.buffers()])
    assert torch.equal(layer.base.dequantize().cpu(), before)
    assert lora_layers(nn.Sequential(layer))
