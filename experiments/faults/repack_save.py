"""bitsandbytes, AVX512-BF16: a checkpoint saved after an evaluation holds other scales.

Saving turns the repacked bytes back. The codes come back exactly; the scales went through bfloat16
and, with double quantization, are quantized a second time.
"""

import torch

from experiments.faults import (
    ABSENT,
    NOT_HERE,
    PRESENT,
    evaluate,
    has_avx512bf16,
    heading,
    layer,
    read,
    repack_by_hand,
    verdict,
)


def compared(first: dict, made, weight: torch.Tensor) -> tuple[float, float]:
    """Share of scale bytes that differ from the first state, and the change of the weight."""
    saved = made.state_dict()
    codes = torch.equal(first["weight"], saved["weight"])
    other = (first["weight.absmax"] != saved["weight.absmax"]).float().mean().item()
    changed = ((read(made) - weight).norm() / weight.norm()).item()
    print(f"    codes equal: {codes}; scale bytes that differ: {other:.1%}; ", end="")
    print(f"relative change of the weight: {changed:.4f}")
    return other, changed


def main() -> str:
    heading("Saving after an evaluation", "bitsandbytes", "torch")
    made = layer(1024, 256)
    weight = read(made).clone()
    first = {name: value.clone() for name, value in made.state_dict().items()}
    evaluate(made)
    print("  saved after one evaluation forward:")
    other, _ = compared(first, made, weight)
    if other:
        return verdict(PRESENT, "the file is not the model that was loaded")
    if has_avx512bf16():
        return verdict(ABSENT, "this CPU repacks, and the file is the same")
    repack_by_hand(made)
    print("  saved after the repacking was called by hand:")
    compared(first, made, weight)
    return verdict(NOT_HERE, "no evaluation forward repacks on this CPU")


if __name__ == "__main__":
    main()
