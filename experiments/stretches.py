"""What rounding costs on other stretches of the held-out files: chapter 4's last table, four times.

    python -m experiments.stretches      # about a minute

Chapter 4 rounds all matrices of the embedded model to one format after another and lets it read
the first 800 characters of every held-out file. Here it reads the next three stretches as well.
Writes `results/cpu/stretches.json`: for each stretch the formats' added bits per byte, and for each
pair of formats the difference, with its 95 % interval.
"""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

from experiments.methods import write
from qlora_lab.provenance import provenance

OUT = Path("results/cpu/stretches.json")
COMMAND = "python -m experiments.stretches"
LENGTH = 800  # characters
STARTS = (0, 800, 1600, 2400)
FORMATS = {
    "NF4": ("nf4", 64),
    "int4": ("int4", 64),
    "int4, all codes": ("int4-asym", 64),
    "FP4": ("fp4", 64),
    "int4, one scale a matrix": ("int4", None),
    "NF3": ("nf3", 64),
}


def measure() -> dict[int, dict]:
    """Return start -> {"cost": format -> interval, "difference": "A - B" -> interval}."""
    from qlora_lab import fake_quantize, load_model
    from qlora_lab.data import heldout_texts
    from qlora_lab.evaluation import text_bits
    from qlora_lab.intervals import paired_difference

    model, tokenizer, _ = load_model(bits=16, device="cpu")
    layers = {n: w.detach().clone() for n, w in model.named_parameters() if "proj" in n}
    files = list(heldout_texts().values())
    found = {}
    for start in STARTS:
        texts = [text[start : start + LENGTH] for text in files if len(text) > start]
        n_bytes = [len(text.encode()) for text in texts]
        bits = {"unrounded": text_bits(model, tokenizer, texts)}
        for name, (codebook, blocksize) in FORMATS.items():
            for path, weight in layers.items():
                rounded = fake_quantize(weight, blocksize, codebook)
                model.get_parameter(path).data.copy_(rounded)
            bits[name] = text_bits(model, tokenizer, texts)
        for path, weight in layers.items():
            model.get_parameter(path).data.copy_(weight)

        def difference(one, other, bits=bits, n_bytes=n_bytes):
            return [round(x, 5) for x in paired_difference(bits[one], bits[other], n_bytes)]

        found[start] = {
            "texts": len(texts),
            "cost": {name: difference("unrounded", name) for name in FORMATS},
            "difference": {f"{b} - {a}": difference(a, b) for a, b in permutations(FORMATS, 2)},
        }
    return found


def main() -> None:
    """Measure and write."""
    write(OUT, {"stretches": measure(), "provenance": provenance(0, COMMAND)})


if __name__ == "__main__":
    main()
