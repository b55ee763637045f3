"""`make run`, timed: the command as a reader types it, in a fresh process, once a seed.

    python -m experiments.one_command      # what is missing of three seeds

Nothing else may run beside it: what counts here is the time, from the start of the process to the
saved adapter, with the model measured before and after. Each run writes
`results/cpu/one_command/seed<k>.json`; a file that exists is not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.methods import write
from qlora_lab.provenance import provenance

OUT = Path("results/cpu/one_command")
COMMAND = "python -m experiments.one_command"


def one_run(seed: int) -> dict:
    """Run the command; return its times, and what was right before and after."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "qlora_lab", "finetune", "--seed", str(seed)]
        start = time.monotonic()
        subprocess.run([*command, "--output", str(run)], check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start
        result = json.loads((run / "result.json").read_text("utf-8"))
    return {
        "settings": result["settings"],
        "seconds": {"in all": round(seconds, 1)} | result["seconds"],
        "exact_match": {
            when: {grade: score["exact_match"] for grade, score in result[when].items()}
            for when in ("before", "after")
        },
        "provenance": provenance(seed, command=COMMAND),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    for seed in parser.parse_args().seeds:
        path = OUT / f"seed{seed}.json"
        if not path.exists():
            record = one_run(seed)
            write(path, record)
            print(seed, record["seconds"], record["exact_match"]["after"]["pairs"], flush=True)


if __name__ == "__main__":
    main()
