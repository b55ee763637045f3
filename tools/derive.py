"""Write what is derived from the chapters: `python -m tools.derive`; `make notebooks` does it too.

- `qlora_lab/assets/sections.json`: the cells that `qlora_lab.checkpoint` runs;
- `book/status.md`: how long each chapter runs, when it was executed, and with which versions.

A test compares both with what this would write.
"""

from __future__ import annotations

import json

from qlora_lab import sections
from tools.notebooks import ROOT, chapters, read

STATUS = ROOT / "book" / "status.md"
TIMES = ROOT / "results" / "notebooks.json"
# Seconds on two cores: what a reader is asked to wait for a chapter, and for all of them.
BUDGET = {0: 150, 1: 60, 2: 60, 6: 60, 9: 90, 10: 60, 11: 60}
OTHERS, ALL = 20, 480
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")


def sections_text() -> str:
    """Return the content of `sections.json`."""
    notebooks = {}
    for path in chapters():
        cells = [c for c in read(path).cells if "remove-cell" not in c.metadata.get("tags", [])]
        notebooks[path.stem] = [(cell.cell_type, cell.source) for cell in cells]
    return json.dumps(sections.cut(notebooks), indent=1, ensure_ascii=False) + "\n"


def budget(name: str) -> int:
    """Return the seconds that a chapter may run, by its file's number."""
    return BUDGET.get(int(name[:2]), OTHERS)


def status_text() -> str:
    """Return the content of the status page."""
    times = json.loads(TIMES.read_text(encoding="utf-8"))
    lines = [
        "# Status",
        "",
        "Every chapter is executed from its first cell to its last before its outputs are",
        "stored, and again by `make test`, which compares what comes out with what is stored.",
        "This table is written by the script that executes them.",
        "",
        "| Chapter | Runs in | Budget | Executed |",
        "|---|---:|---:|---|",
    ]
    for path in chapters():
        title = read(path).cells[0].source.split("\n", 1)[0].lstrip("# ")
        run = times[path.stem]
        lines.append(
            f"| [{title}](../notebooks/{path.name}) | {run['seconds']:.0f} s "
            f"| {budget(path.stem)} s | {run['date']} |"
        )
    runs = {path.stem: times[path.stem] for path in chapters()}
    cpus = sorted({run["cpus"] for run in runs.values()})
    total = sum(run["seconds"] for run in runs.values())
    used = {
        name: " or ".join(sorted({run[name] for run in runs.values()}))
        for name in ("python", *PACKAGES)
    }
    longer = [str(int(stem[:2])) for stem, run in runs.items() if run["seconds"] > budget(stem)]
    told = [f"Longer than their budget: {', '.join(longer)}."] if longer else []
    return "\n".join(
        [
            *lines,
            f"| **all** | **{total:.0f} s** | {ALL} s | |",
            "",
            f"The times are those of a machine with {' or '.join(map(str, cpus))} processor cores",
            "and no GPU, one chapter after the other; `make test` runs two at a time. A test fails",
            "at twice a budget.",
            *told,
            "",
            "All with " + ", ".join(f"{name} {version}" for name, version in used.items()) + ".",
            "",
        ]
    )


def main() -> None:
    """Write both files."""
    for path, text in ((sections.FILE, sections_text()), (STATUS, status_text())):
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
