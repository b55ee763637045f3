"""bitsandbytes, AVX512-BF16: an evaluation forward crashes on sizes that training accepts.

The first evaluation forward repacks the bytes for a faster kernel. The repacking asks for rows in
groups of 32 and for whole blocks in each row; nothing asks before, and there is no other way out.
"""

from experiments.faults import (
    ABSENT,
    NOT_HERE,
    PRESENT,
    evaluate,
    has_avx512bf16,
    heading,
    layer,
    repack_by_hand,
    verdict,
)

SIZES = ((96, 64), (128, 48))  # width, height


def failure(action, made) -> str | None:
    try:
        action(made)
    except Exception as error:  # which one it is depends on the size
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def main() -> str:
    heading("Evaluation forward, sizes that do not fit the repacking", "bitsandbytes", "torch")
    crashed = False
    for width, height in SIZES:
        happened = failure(evaluate, layer(width, height))
        crashed = crashed or happened is not None
        print(f"  {height} x {width}, evaluation forward: {happened or 'works'}")
        if not has_avx512bf16():
            by_hand = failure(repack_by_hand, layer(width, height))
            print(f"  {height} x {width}, repacking called by hand: {by_hand or 'works'}")
    if crashed:
        return verdict(PRESENT, "a layer that trains cannot be evaluated")
    if not has_avx512bf16():
        return verdict(NOT_HERE, "no evaluation forward repacks on this CPU")
    return verdict(ABSENT, "this CPU repacks, and both sizes work")


if __name__ == "__main__":
    main()
