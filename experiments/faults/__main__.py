"""Run every fault's script: `python -m experiments.faults`."""

import importlib

from experiments.faults import SCRIPTS

if __name__ == "__main__":
    for script in SCRIPTS:
        importlib.import_module(f"experiments.faults.{script}").main()
        print()
