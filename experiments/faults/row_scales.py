"""bitsandbytes, AVX512: 4-bit weights come back with other blocks' scales.

Blocks are counted over the flattened tensor. The AVX512 branch of the CPU kernel counts them row by
row: row i begins at scale i * (width // blocksize). Where the width is no multiple of the block
size, rows share and lose scales.
"""

import bitsandbytes.functional as bnb
import torch

from experiments.faults import ABSENT, NOT_HERE, PRESENT, has_avx512f, heading, verdict
from qlora_lab.blockwise import dequantize_4bit
from qlora_lab.bnb_compat import from_quant_state

# Rows, width, block size.
SHAPES = ((64, 128, 64), (64, 48, 64), (64, 704, 128), (1024, 1024, 2048))


def counted_by_row(packed, state) -> torch.Tensor:
    """What the index of the AVX512 branch gives, computed in PyTorch."""
    rows, width = state.shape
    codes = torch.stack([packed >> 4, packed & 15], dim=-1).view(rows, width).long()
    row = torch.arange(rows)[:, None] * (width // state.blocksize)
    return state.code[codes] * state.absmax[row + torch.arange(width) // state.blocksize]


def main() -> str:
    heading("Dequantize, widths that cut a block", "bitsandbytes", "torch")
    wrong = False
    for rows, width, blocksize in SHAPES:
        torch.manual_seed(0)
        weight = torch.randn(rows, width)
        packed, state = bnb.quantize_4bit(weight, blocksize=blocksize, quant_type="nf4")
        library = bnb.dequantize_4bit(packed, state)
        right = dequantize_4bit(from_quant_state(packed, state))
        by_row = counted_by_row(packed.view(-1), state)
        errors = [(w - weight).abs().mean().item() for w in (library, right, by_row)]
        wrong = wrong or not torch.equal(library, right)
        print(
            f"  {rows:4} x {width:4}, blocks of {blocksize:4}: error {errors[0]:.3f}, "
            f"right {errors[1]:.3f}, counted by row {errors[2]:.3f}"
        )
    if wrong:
        return verdict(PRESENT, "the library's error is not that of its own bytes")
    if not has_avx512f():
        return verdict(NOT_HERE, "the kernel's scalar branch runs here, and it is right")
    return verdict(ABSENT, "this CPU has AVX512F, and every width is right")


if __name__ == "__main__":
    main()
