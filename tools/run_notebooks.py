"""Execute the chapters and store their outputs: `make notebooks`, `make notebooks ARGS=04`.

Each notebook runs in a kernel of its own, in its own folder, from the first cell to the last, with
the environment of `tools.notebooks.kernel_environment`. What is stored is what every run on the
same machine gives: no dates, no durations, no user's settings. How long it took goes to two places:

- `results/notebooks.json`, exactly, with versions and date;
- the chapter's opening cell, rounded, where it says `run: about 15 seconds`. It is written only
  when the measured time has left it clearly, so that two runs on one machine give the same file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from qlora_lab import recorded
from tools import derive
from tools.notebooks import NOTEBOOKS, ROOT, chapters, kernel_environment, read, write

RESULTS = ROOT / "results" / "notebooks.json"
RUN_TIME = re.compile(r"(run: about )(\d+(?:\.5)?) (seconds|minutes?)", re.IGNORECASE)
CELL_TIMEOUT = 900


def execute(notebook: nbformat.NotebookNode, folder: Path, runs: Path | None = None) -> float:
    """Run a notebook in place.

    Args:
        notebook: What to run; its outputs are replaced.
        folder: The kernel's working directory.
        runs: Where its training runs are recorded; by default they are not.

    Returns:
        Seconds from the kernel's start to its end.

    Raises:
        CellExecutionError: A cell raised.
    """
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        coalesce_streams=True,
        store_widget_state=False,
    )
    start = time.monotonic()
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as settings:
        os.environ.clear()
        os.environ.update(kernel_environment(Path(settings)))
        if runs is not None:
            os.environ["QLORA_LAB_RECORD"] = str(runs)
        try:
            client.execute()
        finally:
            os.environ.clear()
            os.environ.update(before)
    return time.monotonic() - start


def keep_runs(new: Path, kept: Path) -> None:
    """Put a chapter's recorded runs in the place of its earlier ones.

    Args:
        new: What the chapter has just recorded.
        kept: Its folder in the package. A run that came out the same stays as it is: only the
            date would change.
    """
    files = {path.name: path for path in new.glob("*.safetensors")}
    for old in kept.glob("*.safetensors"):
        if old.name in files and recorded.same(old, files[old.name]):
            del files[old.name]
        else:
            old.unlink()
    for name, path in files.items():
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, kept / name)
    if kept.is_dir() and not any(kept.iterdir()):
        kept.rmdir()


def rounded(seconds: float) -> str:
    """Return a duration as a reader wants it: `15 seconds`, `1.5 minutes`, rounded up.

    Steps of 5 seconds below a minute, of half a minute above; a tenth of a step is forgiven.
    """
    fives = max(1, math.ceil(seconds / 5 - 0.1))
    if fives < 12:
        return f"{5 * fives} seconds"
    halves = max(2, math.ceil(seconds / 30 - 0.1))
    return "1 minute" if halves == 2 else f"{halves / 2:g} minutes"


def stated_seconds(text: str) -> float | None:
    """Return the run time that a chapter's opening states, or None."""
    match = RUN_TIME.search(text)
    if match is None:
        return None
    return float(match[2]) * (1 if match[3].lower() == "seconds" else 60)


def state(notebook: nbformat.NotebookNode, seconds: float) -> bool:
    """Write the measured time into the opening cell; return whether there is a place for it."""
    opening = notebook.cells[0]
    before = stated_seconds(opening.source)
    if before is None:
        return False
    if not before / 1.2 <= seconds <= before * 1.1:
        opening.source = RUN_TIME.sub(lambda m: m[1] + rounded(seconds), opening.source, count=1)
    return True


def record(name: str, seconds: float, path: Path = RESULTS) -> None:
    """Keep the exact run time beside versions and date."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[name] = {
        "seconds": round(seconds, 1),
        "date": datetime.date.today().isoformat(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in derive.PACKAGES},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(sorted(known.items())), indent=1) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def warm_up() -> None:
    """Let matplotlib build its font cache now: the message about it belongs to no chapter."""
    import matplotlib.font_manager  # noqa: F401


def main(argv: list[str] | None = None) -> int:
    """Parse the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Execute notebooks and store their outputs.")
    parser.add_argument("names", nargs="*", help="beginnings of file names, 04 for instance")
    options = parser.parse_args(argv)
    every = chapters(NOTEBOOKS)
    chosen = [
        path
        for path in every
        if not options.names or any(path.name.startswith(name) for name in options.names)
    ]
    if not chosen:
        names = ", ".join(path.name for path in every) or "none"
        print(f"no notebook begins with {' or '.join(options.names)}; there are: {names}")
        return 2
    warm_up()
    for path in chosen:
        notebook = read(path)
        print(f"{path.name} ...", end=" ", flush=True)
        with tempfile.TemporaryDirectory() as runs:
            try:
                seconds = execute(notebook, path.parent, Path(runs))
            except CellExecutionError as error:
                print(f"failed; nothing stored\n{error}")
                return 1
            keep_runs(Path(runs), recorded.FOLDER / path.stem[:2])
        if not state(notebook, seconds):
            print("(no `run: about ...` in its first cell)", end=" ")
        write(path, notebook)
        record(path.stem, seconds)
        print(f"{seconds:.0f} s")
    derive.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
