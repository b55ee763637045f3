"""bitsandbytes, AVX512-BF16: after an evaluation the bytes no longer mean the weight.

`dequantize_4bit` does not look whether the bytes were repacked, so PEFT's `merge_and_unload` and
transformers' `dequantize` add the adapter to a scrambled weight. Nothing warns.
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


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    return ((after - before).norm() / before.norm()).item()


def main() -> str:
    heading("The weight that a merge reads, after an evaluation", "bitsandbytes", "torch")
    made = layer()
    before = read(made).clone()
    evaluate(made)
    changed = change(before, read(made))
    print(f"  relative change by one evaluation forward: {changed:.3f}")
    if changed > 0.01:
        return verdict(PRESENT, "a merge made now adds the adapter to other numbers")
    if has_avx512bf16():
        return verdict(ABSENT, "this CPU repacks, and the weight is still read rightly")
    repack_by_hand(made)
    by_hand = change(before, read(made))
    print(f"  relative change by the repacking called by hand: {by_hand:.3f}")
    return verdict(NOT_HERE, "no evaluation forward repacks on this CPU")


if __name__ == "__main__":
    main()
