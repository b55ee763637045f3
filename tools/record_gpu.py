"""Record the fine-tuning run on a CUDA device: `make gpu`, or `python -m tools.record_gpu`.

For each of qlora, lora and full, on the embedded model with the course's own settings:

1. run `finetune` once for a few steps, which compiles and caches what has to be;
2. run it as the course does, training and evaluation, from seed 0;
3. write losses, scores, times and peak memory with their provenance to
   `results/gpu/finetune_<method>.json`.

Quantizing, dequantizing and single layers are timed by `python -m benchmarks --gpu`. Peak memory
is what PyTorch allocated at most during training, the base included; the model is small, so most
of it is activations and logits, and the order of the methods says little about 7B.

`--device cpu --out FOLDER --steps 2` tries the script where there is no device; such a record has
no peak, and nothing is written under `results/`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __package__ in (None, ""):  # run as a file, not with -m
    sys.path.insert(0, str(ROOT))

RESULTS = ROOT / "results" / "gpu"
METHODS = ("qlora", "lora", "full")
COMMAND = "python -m tools.record_gpu"


def main(arguments: list[str] | None = None) -> int:
    """Record the chosen methods.

    Args:
        arguments: The command line without the program; that of the process by default.

    Returns:
        0, or 2 where there is no CUDA device or the arguments do not go together.
    """
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: those of the course")
    parser.add_argument("--out", type=Path, help="default: results/gpu")
    options = parser.parse_args(arguments)

    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("record_gpu: no CUDA device here, so nothing was recorded", file=sys.stderr)
        return 2
    if options.device == "cpu" and not options.out:
        print("record_gpu: --device cpu is a trial; give --out FOLDER for it", file=sys.stderr)
        return 2
    records = {}
    for method in options.methods:
        print(f"{method} on {options.device}", flush=True)
        records[method] = record(method, options.device, options.seed, options.steps)
        write(options.out or RESULTS, f"finetune_{method}", records[method])
    print(table(records))
    return 0


def record(method: str, device: str, seed: int = 0, steps: int | None = None) -> dict[str, Any]:
    """Fine-tune the embedded model once and describe the run.

    Args:
        method: One of `METHODS`.
        device: "cuda" or "cpu".
        seed: Seed of the run.
        steps: Optimizer steps; those of the course by default, which are also measured on all
            six grades. A number of one's own is a trial: 200 rows to train on, 10 to measure.

    Returns:
        `Result.record()` and, under "ms_a_step", the mean time of a training step.
    """
    from qlora_lab.data import load_orders
    from qlora_lab.finetuning import finetune
    from qlora_lab.training import STEPS

    run = {"method": method, "device": device, "seed": seed, "progress": False}
    rows = tests = None
    if steps is not None:
        orders = load_orders(["train", "pairs"])
        rows, tests = (
            orders["train"].select(range(200)),
            {"pairs": orders["pairs"].select(range(10))},
        )
    if device == "cuda":
        finetune(**run, rows=rows, tests={}, steps=5)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        result = finetune(**run, rows=rows, tests=tests, steps=steps or STEPS, output=output)
        saved = sum(p.stat().st_size for p in output.glob("*/*.safetensors"))
    described = result.record()
    described["ms_a_step"] = round(1000 * result.run.seconds / len(result.run.losses), 2)
    described["saved_bytes"] = saved
    described["provenance"]["command"] = COMMAND
    return described


def write(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Write a record whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.part"
    partial.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    partial.replace(folder / f"{name}.json")


def table(records: dict[str, dict[str, Any]]) -> str:
    """Lay the records out for a terminal."""
    lines = [f"{'':6} {'dtype':>9} {'ms/step':>8} {'peak MB':>8} {'saved MB':>9} {'pairs':>7}"]
    for method, one in records.items():
        peak = f"{one['peak_bytes'] / 1e6:.1f}" if one["peak_bytes"] else "-"
        dtype = one["base"]["compute_dtype"].removeprefix("torch.")
        lines.append(
            f"{method:6} {dtype:>9} {one['ms_a_step']:8.1f} {peak:>8} "
            f"{one['saved_bytes'] / 1e6:9.2f} {one['after']['pairs']['exact_match']:7.1%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
