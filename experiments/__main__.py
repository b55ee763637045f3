"""Make every recorded result that is missing: `make experiments`.

    python -m experiments          # what is missing in results/cpu
    python -m experiments --list   # what there is to run, and nothing else

The runs share the machine: as many at a time as there are cores, one thread each, the longest
first; only the timed one, at the end, has it to itself. Each resumes by itself, so a stop costs one
run. When nothing was there at the start, the time of the whole is recorded in
`results/cpu/experiments.json`; delete the folders of `results/cpu` to make all again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from qlora_lab.provenance import provenance

OUT = Path("results/cpu")
SEEDS = (0, 1, 2)
# The longest first. `merging` takes the adapters of `methods`, a seed of `where` what seed 0 found.
JOBS = (
    *(("methods", "--seeds", str(seed)) for seed in SEEDS),
    *(("adapting", "ranks", "--seeds", str(seed)) for seed in SEEDS),
    *(("next", "--seeds", str(seed)) for seed in SEEDS),
    ("low_rank",),
    ("adapting", "learning_rates"),
    ("adapting", "where"),
    *(("merging", "--seeds", str(seed)) for seed in SEEDS),
    ("short",),
    ("stretches",),
)
SUMMARIES = ("methods", "next")  # once more at the end: they collect over seeds
ALONE = "one_command"  # its times count, so it runs when all else has ended
FOLDERS = ("ranks", "where", "learning_rates", "methods", "low_rank", "merging", "next", "short")
FOLDERS += (ALONE,)


def run(job: tuple[str, ...]) -> tuple[float, bool]:
    """Run one job in a process of its own; return its seconds and whether it went well."""
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    env = os.environ | ({} if job == (ALONE,) else one_thread)
    command = [sys.executable, "-m", f"experiments.{job[0]}", *job[1:]]
    start = time.monotonic()
    ended = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    print(f"{seconds / 60:6.1f} min  {' '.join(job)}", flush=True)
    if ended.returncode:
        print(ended.stderr[-2000:], file=sys.stderr, flush=True)
    return seconds, ended.returncode == 0


def main() -> int:
    """Parse the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the jobs and stop")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="jobs at a time")
    options = parser.parse_args()
    if options.list:
        print("\n".join(" ".join(job) for job in (*JOBS, (ALONE,))))
        return 0
    nothing_there = not any(any((OUT / name).glob("*.json")) for name in FOLDERS)
    start = time.monotonic()
    with ThreadPoolExecutor(options.workers) as pool:
        found = dict(zip(JOBS, pool.map(run, JOBS), strict=True))
    good = all(well for _, well in found.values())
    good &= all(run((name,))[1] for name in (*SUMMARIES, ALONE))
    wall = time.monotonic() - start
    times = os.times()
    cpu = times.children_user + times.children_system
    print(f"{wall / 60:6.1f} min in all, {cpu / 60:.1f} of processor time")
    if good and nothing_there:
        record = {
            "minutes": round(wall / 60, 1),
            "cpu_minutes": round(cpu / 60, 1),
            "workers": options.workers,
            "jobs": {" ".join(job): round(seconds) for job, (seconds, _) in found.items()},
            "provenance": provenance(command="python -m experiments"),
        }
        text = json.dumps(record, indent=1) + "\n"
        (OUT / "experiments.json").write_text(text, encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
