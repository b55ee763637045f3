"""The run that chapter 9 makes before its reader's eyes, as recorded: 80 steps, over seeds.

    python -m experiments.short      # what is missing; again after a stop

A run of 80 steps is no beginning of a longer one: its learning rate rises and falls faster. So the
chapter's live run is compared with runs of its own length. Each writes its losses to
`results/cpu/short/<method>-seed<k>.json`; a file that exists is not made again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.methods import write
from qlora_lab.provenance import provenance

OUT = Path("results/cpu/short")
METHODS = ("qlora", "lora", "8bit")
STEPS = 80
COMMAND = "python -m experiments.short"


def one_run(method: str, seed: int) -> dict:
    """Fine-tune for `STEPS` steps; the record is ready for JSON."""
    from qlora_lab.finetuning import finetune

    result = finetune(
        None,
        method,
        steps=STEPS,
        seed=seed,
        device="cpu",
        tests={},
        before=False,
        progress=False,
        say=lambda line: None,
    )
    return {
        "method": method,
        "settings": result.record()["settings"],
        "losses": [round(loss, 6) for loss in result.run.losses],
        "provenance": provenance(seed, command=COMMAND),
    }


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for seed in parser.parse_args().seeds:
        for method in METHODS:
            path = OUT / f"{method}-seed{seed}.json"
            if not path.exists():
                record = one_run(method, seed)
                write(path, record)
                print(method, seed, record["losses"][-1], flush=True)


if __name__ == "__main__":
    main()
