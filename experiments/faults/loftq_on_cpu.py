"""PEFT: LoftQ asks for a package it does not use, needs CUDA, and leaves the adapter's scale out.

LoftQ starts an adapter at the best low-rank approximation of what the rounding took away. Three
things are looked at: whether `LoraConfig` accepts it, whether it runs on this device, and whether
the adapter adds what it should when alpha is not r.
"""

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig
from peft.utils import loftq_utils

from experiments.faults import ABSENT, PRESENT, heading, verdict

RANK = 16


def said(action) -> str | None:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def relative_error(weight, quantized, alpha: float) -> float:
    """Of the weight with its adapter, both set as PEFT sets them, alpha / r in the forward pass."""
    parts = loftq_utils._low_rank_decomposition(weight - quantized, RANK)
    started = quantized + alpha / RANK * parts["L"] @ parts["R"]
    return ((started - weight).norm() / weight.norm()).item()


def main() -> str:
    heading("LoftQ", "peft", "bitsandbytes", "torch")
    torch.manual_seed(0)
    weight = torch.randn(256, 256) / 16
    packed, state = quantize_4bit(weight, quant_type="nf4")
    quantized = dequantize_4bit(packed, state)
    config = said(lambda: LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}))
    print(f"  LoraConfig(init_lora_weights='loftq'): {config or 'accepted'}")
    run = said(lambda: loftq_utils.loftq_init(weight, 4, RANK))
    print(f"  loftq_init on a CPU tensor: {run or 'runs'}")
    plain = ((quantized - weight).norm() / weight.norm()).item()
    equal, large = (relative_error(weight, quantized, factor * RANK) for factor in (1, 16))
    print(f"  relative error of the weight without an adapter: {plain:.4f}")
    print(f"  with LoftQ's start, alpha = r: {equal:.4f}; alpha = 16 r: {large:.4f}")
    if config or run or large > plain:
        return verdict(PRESENT, "see the lines above")
    return verdict(ABSENT, "accepted, runs, and starts nearer to the weight for any alpha")


if __name__ == "__main__":
    main()
