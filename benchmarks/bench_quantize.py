"""Quantizing and restoring a 4096 x 4096 weight: this package, bitsandbytes, torchao.

bitsandbytes quantizes on a CPU with eager PyTorch and restores with a C++ kernel; torchao is eager
PyTorch both ways and always double-quantizes. A plain copy of the tensor is the floor: no quantizer
can be faster than reading the weights.
"""

from __future__ import annotations

import logging

import bitsandbytes.functional as bnb
import torch

from benchmarks.common import ROUNDS, Row, Timing
from qlora_lab.blockwise import dequantize_4bit, quantize_4bit
from qlora_lab.bnb_compat import from_quant_state

SIDE = 4096


def rows(device: str = "cpu", rounds: int = ROUNDS) -> list[Row]:
    """Measure both ways in float32, and restoring in bfloat16 as well."""
    weight = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(device)
    return quantize_rows(weight, rounds) + [
        row
        for dtype in (torch.float32, torch.bfloat16)
        for row in dequantize_rows(weight.to(dtype), rounds)
    ]


def quantize_rows(weight: torch.Tensor, rounds: int) -> list[Row]:
    """Quantize to NF4, block size 64: compiled against a copy, eager against bitsandbytes."""
    room = torch.empty_like(weight)
    copy, compiled, eager = "copy of the tensor", "quantize, compiled", "quantize, eager"
    theirs = "quantize, bitsandbytes"
    runs = {
        copy: lambda: room.copy_(weight),
        compiled: lambda: quantize_4bit(weight, compiled=True),
        eager: lambda: quantize_4bit(weight, compiled=False),
        theirs: lambda: bnb.quantize_4bit(weight, quant_type="nf4"),
    }
    on_gpu = weight.device.type == "cuda"
    if on_gpu:
        del runs[compiled]  # the compiled form is for CPUs
    expected = bnb.quantize_4bit(weight, quant_type="nf4")[0].view(-1)
    for name in (compiled, eager):
        if not on_gpu and not torch.equal(runs[name]().packed, expected):
            raise AssertionError(
                f"{name}: other bytes than bitsandbytes, so its time means nothing"
            )
    timing = Timing(runs, weight.device.type, rounds)
    if on_gpu:
        return [timing.row(copy), timing.row(eager, theirs), timing.row(theirs, copy)]
    return [
        timing.row(copy),
        timing.row(compiled, copy, at_most=4),
        timing.row(eager, theirs, at_most=1),
        timing.row(theirs, compiled),
    ]


def dequantize_rows(weight: torch.Tensor, rounds: int) -> list[Row]:
    """Restore the weight: against bitsandbytes' kernel, and torchao against ours."""
    kind = f"to {str(weight.dtype).removeprefix('torch.')}"
    ours, double = f"dequantize {kind}", f"dequantize {kind}, 8-bit scales"
    theirs, theirs_double = f"bitsandbytes {kind}", f"bitsandbytes {kind}, 8-bit scales"
    torchao = f"torchao {kind}, 8-bit scales"
    plain, twice = quantize_4bit(weight), quantize_4bit(weight, double_quant=True)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4")
    packed2, state2 = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    # Both from the same bytes: those of a CUDA kernel differ from ours in near ties (tests/gpu).
    ours_of_theirs = dequantize_4bit(from_quant_state(packed, state))
    if not torch.equal(ours_of_theirs, bnb.dequantize_4bit(packed, state)):
        raise AssertionError("other values than bitsandbytes, so the time means nothing")
    runs = {
        ours: lambda: dequantize_4bit(plain),
        double: lambda: dequantize_4bit(twice),
        theirs: lambda: bnb.dequantize_4bit(packed, state),
        theirs_double: lambda: bnb.dequantize_4bit(packed2, state2),
    }
    at_most = 1.5 if weight.device.type == "cpu" else None
    at_least = 5 if weight.device.type == "cpu" else None
    # It warns at import of GPU kernels that it could not load, and that are not used here.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4
    except ImportError:
        print("torchao is not installed (requirements-bench.txt): nothing to compare with")
    else:
        nf4 = to_nf4(weight)
        runs[torchao] = nf4.get_original_weight
    timing = Timing(runs, weight.device.type, rounds)
    found = [
        timing.row(ours, theirs, at_most=at_most),
        timing.row(theirs),
        timing.row(double, theirs_double, at_most=at_most),
        timing.row(theirs_double),
    ]
    return found + ([timing.row(torchao, double, at_least=at_least)] if torchao in runs else [])
