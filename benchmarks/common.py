"""Timing that can be compared: interleaved rounds, medians, and where the numbers come from.

A laptop's speed drifts, so two things timed one after the other are not compared but their times of
day are. Here every round runs all candidates once, and only medians over the rounds of one run are
divided by each other. A row is a plain dictionary, ready for JSON:

    what      the candidate
    ms        its median time; ms_min and ms_max: the fastest and the slowest of `rounds` rounds
    against   the candidate it is compared with, and ratio: its median time over that one's
    at_most   or at_least: the bar for the ratio, if there is one, and met: whether it was kept
    peak_mib  most memory that it allocated on the GPU, if it ran there

A module `bench_NAME.py` has a function `rows(device, rounds)` that returns such rows.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_lab.provenance import provenance

RESULTS = Path(__file__).resolve().parent.parent / "results"
ROUNDS = 7

Row = dict[str, Any]


class Timing:
    """Times of several candidates over the same rounds.

    Args:
        candidates: Name -> a function without arguments.
        device: "cpu" or "cuda"; on the latter each timing waits for the device to finish.
        rounds: How often each candidate is timed, after one run that is not.
        clock: What is read before and after; the wall clock by default. `time.process_time`
            leaves out the turns of other programs, and means something on one thread only.
    """

    def __init__(
        self,
        candidates: dict[str, Callable[[], Any]],
        device: str = "cpu",
        rounds: int = ROUNDS,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in candidates}
        self.peak: dict[str, int] = {}
        for name, run in candidates.items():
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            run()  # warms caches, and compiles what is to be compiled
            if device == "cuda":
                self.peak[name] = torch.cuda.max_memory_allocated() - before
        for _ in range(rounds):
            for name, run in candidates.items():
                self.seconds[name].append(_time(run, device, clock or time.perf_counter))

    def row(
        self,
        what: str,
        against: str | None = None,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> Row:
        """Describe one candidate, maybe against another, maybe against a bar for their ratio."""
        times = self.seconds[what]
        median = statistics.median(times)
        row: Row = {
            "what": what,
            "ms": round(median * 1e3, 3),
            "ms_min": round(min(times) * 1e3, 3),
            "ms_max": round(max(times) * 1e3, 3),
            "rounds": len(times),
        }
        if what in self.peak:
            row["peak_mib"] = round(self.peak[what] / 2**20, 1)
        if against is not None:
            row["against"] = against
            row["ratio"] = round(median / statistics.median(self.seconds[against]), 3)
        if at_most is not None:
            row |= {"at_most": at_most, "met": row["ratio"] <= at_most}
        if at_least is not None:
            row |= {"at_least": at_least, "met": row["ratio"] >= at_least}
        return row


def _time(run: Callable[[], Any], device: str, clock: Callable[[], float]) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def table(rows: list[Row]) -> str:
    """Lay rows out for a terminal."""
    width = max(len(row["what"]) for row in rows)
    lines = [f"{'':{width}}  {'median ms':>10}  {'ratio':>7}  "]
    for row in rows:
        line = f"{row['what']:{width}}  {row['ms']:10.2f}"
        if "ratio" in row:
            line += f"  {row['ratio']:6.2f}x  of {row['against']}"
        if "met" in row:
            bar = f"at most {row['at_most']}" if "at_most" in row else f"at least {row['at_least']}"
            line += f" ({bar}: {'kept' if row['met'] else 'MISSED'})"
        lines.append(line)
    return "\n".join(lines)


def save(name: str, rows: list[Row], device: str, load: float | None) -> Path:
    """Write rows with their provenance to `results/cpu` or `results/gpu`, and return the path."""
    path = RESULTS / ("gpu" if device == "cuda" else "cpu") / f"bench_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"provenance": provenance() | {"load_before": load}, "rows": rows}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def load_average() -> float | None:
    """Return how many processes wanted a core over the last minute; None where unknown."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def stepper(model: nn.Module, batch: int, length: int) -> Callable[[], float]:
    """Return a function that trains the adapters for one step and returns the loss."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (batch, length), generator=generator)
    ids = ids.to(model.device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
