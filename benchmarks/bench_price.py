"""The price of four bits: a step of QLoRA against one of 16-bit LoRA, by tokens a step.

Both models are the embedded one with LoRA of rank 16 on all linear layers, on this package's
layers; the only difference is the base, NF4 with double quantization or plain weights. A CPU
computes in float32 and so holds the plain base in float32, too; a CUDA device takes bfloat16. A
step is forward, backward and AdamW. The second table is one frozen layer of the width of a 7B
model, forward and backward to its input, without adapters. There is no bar: this is a price.

On a CPU everything runs on one thread and is timed in processor time: beside other programs the
wall clock would measure them, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.bench_step import ALPHA, RANK
from benchmarks.common import ROUNDS, Row, Timing, stepper
from qlora_lab.blockwise import quantize_4bit
from qlora_lab.loading import choose_dtype, load_model
from qlora_lab.lora import add_adapters
from qlora_lab.qlora import QuantizedLinear, quantize_model

BATCHES, LENGTH = (1, 8, 32), 64
WIDTH, TOKENS = 4096, (16, 128, 1024)


def passer(layer: nn.Module, tokens: int, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Return a function that goes through a frozen layer and back to its input."""
    x = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(0))
    x = x.to(device, dtype).requires_grad_()

    def forth_and_back() -> None:
        y = layer(x)
        torch.autograd.grad(y, x, y)

    return forth_and_back


def rows(device: str = "cpu", rounds: int = ROUNDS) -> list[Row]:
    """Time pairs in turns: the model at several batch sizes, then one wide layer."""
    clock = None if device == "cuda" else time.process_time
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if device == "cuda" else 1)
    try:
        return _rows(device, rounds, clock)
    finally:
        torch.set_num_threads(threads)


def _rows(device: str, rounds: int, clock: Callable[[], float] | None) -> list[Row]:
    dtype = choose_dtype(device)[0]
    bases = {}
    for method in ("QLoRA", "LoRA"):
        model = load_model(bits=16, device=device, compute_dtype=dtype).model
        put_on = quantize_model if method == "QLoRA" else add_adapters
        put_on(model, r=RANK, alpha=ALPHA)
        bases[method] = model.to(device)
    steps = {
        f"step of {method}, {batch * LENGTH} tokens": stepper(model, batch, LENGTH)
        for batch in BATCHES
        for method, model in bases.items()
    }
    timing = Timing(steps, device, rounds, clock)
    found = []
    for batch in BATCHES:
        tokens = batch * LENGTH
        ours, plain = (f"step of {method}, {tokens} tokens" for method in bases)
        found += [timing.row(ours, plain) | {"tokens": tokens}, timing.row(plain)]

    weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) / 64
    quantized = QuantizedLinear(quantize_4bit(weight, double_quant=True), compute_dtype=dtype)
    frozen = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype, device=device).requires_grad_(False)
    layers = {"4-bit": quantized.to(device), "plain": frozen}
    passes = {
        f"{name} layer, {tokens} tokens": passer(layer, tokens, device, dtype)
        for tokens in TOKENS
        for name, layer in layers.items()
    }
    timing = Timing(passes, device, rounds, clock)
    for tokens in TOKENS:
        ours, plain = (f"{name} layer, {tokens} tokens" for name in layers)
        found += [timing.row(ours, plain) | {"tokens": tokens}, timing.row(plain)]
    return found
