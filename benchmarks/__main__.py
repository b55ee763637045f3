"""Measure speed and hold it to its bars: `make bench`, or `python -m benchmarks`.

Prints a table for each benchmark and writes it with its provenance under `results/`. The exit code
is 1 if a bar was missed. Close other programs first: a busy machine measures the other programs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

BENCHES = ("quantize", "step", "price")


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen benchmarks.

    Args:
        arguments: The command line without the program; that of the process by default.

    Returns:
        0 if every bar was kept, 1 if not, 2 if there is no device to measure.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", metavar="NAMES", default=",".join(BENCHES), help="comma-separated"
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, 5 or more")
    parser.add_argument("--gpu", action="store_true", help="on the CUDA device instead")
    parser.add_argument("--no-save", action="store_true", help="print the tables only")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    if unknown := [name for name in names if name not in BENCHES]:
        parser.error(f"no benchmark {unknown[0]!r}: there are {', '.join(BENCHES)}")
    if options.rounds < 5:
        parser.error(f"--rounds {options.rounds}: a median needs 5 or more")

    import torch

    from benchmarks.common import load_average, save, table

    if options.gpu and not torch.cuda.is_available():
        print("no CUDA device here: nothing measured", file=sys.stderr)
        return 2
    device = "cuda" if options.gpu else "cpu"
    missed = 0
    for name in names:
        load = load_average()
        if load is not None and load > (os.cpu_count() or 1) / 2:
            print(f"the machine is busy (load {load}): these ratios will be wrong")
        rows = importlib.import_module(f"benchmarks.bench_{name}").rows(device, options.rounds)
        print(f"\n{name} on {device}\n{table(rows)}")
        missed += sum(not row.get("met", True) for row in rows)
        if not options.no_save:
            path = save(name, rows, device, load)
            print(f"saved: {path.relative_to(path.parents[2]).as_posix()}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
