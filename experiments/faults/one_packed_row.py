"""bitsandbytes: a packed weight of one row comes back transposed.

Older callers passed packed bytes as a row and got the transposed weight back. The convention lives
on in `dequantize_4bit`: the first dimension of the *packed* tensor decides, whatever the shape in
the state says. Bytes reshaped to one row, or a weight of one or two values, meet it by accident.
"""

import bitsandbytes.functional as bnb
import torch

from experiments.faults import ABSENT, PRESENT, heading, verdict


def main() -> str:
    heading("Packed bytes as a column and as a row", "bitsandbytes", "torch")
    torch.manual_seed(0)
    packed, state = bnb.quantize_4bit(torch.randn(64, 128), quant_type="nf4")
    column = bnb.dequantize_4bit(packed, state)
    row = bnb.dequantize_4bit(packed.view(1, -1), state)
    print(f"  packed {tuple(packed.shape)}: the weight is {tuple(column.shape)}")
    print(f"  packed {tuple(packed.view(1, -1).shape)}: the weight is {tuple(row.shape)}")
    if row.shape != column.shape and torch.equal(row, column.t()):
        return verdict(PRESENT, "the same bytes and the same state give two shapes")
    return verdict(ABSENT, "the state alone decides the shape")


if __name__ == "__main__":
    main()
