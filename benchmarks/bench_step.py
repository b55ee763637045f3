"""One training step of the embedded model: our QLoRALinear against PEFT on bitsandbytes.

Both models hold the same NF4 bytes with double quantization and LoRA of rank 16 on all linear
layers. A step is forward, backward and AdamW on a batch of 16 x 64 tokens, all in float32.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.common import ROUNDS, Row, Timing, stepper
from qlora_lab.loading import load_model
from qlora_lab.lora import lora_layers
from qlora_lab.qlora import quantize_model

BAR = 1.15  # times the reference's step that ours may take
BATCH, LENGTH, RANK, ALPHA = 16, 64, 16, 32


def reference(device: str) -> nn.Module:
    """PEFT on bitsandbytes, as everybody runs it."""
    from peft import LoraConfig, get_peft_model

    model = load_model(bits=4, device=device, compute_dtype=torch.float32).model
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def from_scratch(device: str) -> nn.Module:
    """The same model with this package's layers."""
    model = load_model(bits=16, device=device, compute_dtype=torch.float32).model
    quantize_model(model, RANK, ALPHA, double_quant="bnb")
    return model


def copy_adapters(reference_model: nn.Module, model: nn.Module) -> None:
    """Start both from the same A and B."""
    modules = dict(reference_model.base_model.model.named_modules())
    for path, layer in lora_layers(model).items():
        layer.lora_A["default"].data.copy_(modules[path].lora_A["default"].weight)
        layer.lora_B["default"].data.copy_(modules[path].lora_B["default"].weight)


def rows(device: str = "cpu", rounds: int = ROUNDS) -> list[Row]:
    """Time the two in turns, after making sure that they are the same model."""
    ours, theirs = "training step, QLoRALinear", "training step, PEFT + bitsandbytes"
    reference_model, model = reference(device), from_scratch(device)
    copy_adapters(reference_model, model)
    steps = {ours: stepper(model, BATCH, LENGTH), theirs: stepper(reference_model, BATCH, LENGTH)}
    first = {name: step() for name, step in steps.items()}
    if abs(first[ours] - first[theirs]) > 1e-3 * first[theirs]:
        raise AssertionError(f"different losses, so the times mean nothing: {first}")
    timing = Timing(steps, device, rounds)
    return [timing.row(ours, theirs, at_most=BAR if device == "cpu" else None), timing.row(theirs)]
