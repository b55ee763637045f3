"""Prove everything, and say at the end where the time went: `make test`.

Every step runs, also after one that failed, so that one round shows all there is to mend. The exit
code is 0 only when every step passed.

- lint       ruff: errors, imports, format, in modules and notebooks
- unit       the package against its references, and the tools
- notebooks  every cell of every chapter again, compared with the stored output (nbval, strict);
             two chapters at a time, so with one thread each, where `make notebooks` has all
- other-cpu  the same as if on another processor (AVX2 kernels), with recorded training runs in
             place of training, except in chapter 0: FAST is tested. The exercises are solved: each
             solution has to satisfy its exercise's own check
- book       built from nothing, warnings are errors, pages counted
- browser    the built book in Chromium: phone and desktop, light and dark

`python -m tools.check --only unit,book` runs some of them; `--skip other-cpu` all but some.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tools import book, bootstrap_cell, solutions
from tools.notebooks import ROOT, chapters, kernel_environment, read, write

# Two processes with two threads each would fight for two cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
OTHER_CPU = {"ATEN_CPU_CAPABILITY": "avx2", "FAST": "quiet"}
WORKERS = min(2, os.cpu_count() or 1)
BAR = 24  # characters of the longest bar in the closing table


def python(*arguments: str, env: dict[str, str] | None = None) -> bool:
    """Run this interpreter with arguments in the repository; return whether it succeeded."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL).returncode == 0


def lint() -> bool:
    """Check style and format."""
    checked = python("-m", "ruff", "check", ".")
    return python("-m", "ruff", "format", "--check", "--quiet", ".") and checked


def unit() -> bool:
    """Run the tests of package and tools, on two processes."""
    env = os.environ | ONE_THREAD
    return python(
        *("-m", "pytest", "-q", "-n", str(WORKERS), "--dist", "loadfile", "--durations", "10"),
        *("--ignore", "tests/book", "tests"),
        env=env,
    )


def slowest_first() -> list[Path]:
    """Return the chapters, those that took longest last time first: two processes end together."""
    times = json.loads((ROOT / "results" / "notebooks.json").read_text(encoding="utf-8"))
    return sorted(chapters(), key=lambda path: -times.get(path.stem, {}).get("seconds", 0))


def notebooks(extra: dict[str, str] | None = None, copies: list[Path] | None = None) -> bool:
    """Run every cell of every chapter and compare with what is stored.

    Args:
        extra: Environment variables of the kernels.
        copies: Notebooks of one folder to run in place of the chapters.
    """
    # A first import of matplotlib may say on stderr that it builds its font cache; do it here.
    python("-c", "import matplotlib.font_manager")
    with tempfile.TemporaryDirectory() as folder:
        env = kernel_environment(Path(folder)) | ONE_THREAD | (extra or {})
        return python(
            *("-m", "pytest", "-q", "--nbval", "--nbval-current-env"),
            # Said by name, because copies lie elsewhere. Cells are called by their chapter's path
            # below the root; without it those of all chapters would have the same names.
            *("-c", "pyproject.toml", "--rootdir", str(copies[0].parent if copies else ROOT)),
            *("--nbval-sanitize-with", "tests/nbval_sanitize.cfg"),
            *("--nbval-cell-timeout", "900", "--durations", "5"),
            # loadscope: the cells of one chapter stay together and in order.
            *("-n", str(WORKERS), "--dist", "loadscope"),
            *map(str, copies or slowest_first()),
            env=env,
        )


def other_cpu() -> bool:
    """Run the chapters with what stands in for another processor, and their exercises solved."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            copies = solutions.solved_copies(slowest_first(), Path(folder))
        except solutions.SolutionError as error:
            print(error)
            return False
        for copy in copies:
            if copy.name.startswith("00_"):
                trains(copy)
        return notebooks(OTHER_CPU, copies)


def trains(path: Path) -> None:
    """Let a copy of a chapter train whatever FAST says.

    Chapter 0 does: it is the run from end to end that everybody makes first.

    Args:
        path: The copy, which is changed.
    """
    notebook = read(path)
    first = bootstrap_cell.first_code_cell(notebook)
    first.source = "import os\n\nos.environ.pop('FAST', None)\n" + first.source
    write(path, notebook)


def pages() -> bool:
    """Build the book from nothing, with warnings as errors, and count its pages."""
    try:
        count = book.build(strict=True)
    except book.BuildError as error:
        print(error)
        return False
    print(f"{count} pages, as many as the table of contents names")
    return True


def browser() -> bool:
    """Look at the built book with Chromium."""
    return python("-m", "pytest", "-q", "-n", str(WORKERS), "--durations", "5", "tests/book")


STEPS: dict[str, Callable[[], bool]] = {
    "lint": lint,
    "unit": unit,
    "notebooks": notebooks,
    "other-cpu": other_cpu,
    "book": pages,
    "browser": browser,
}


def chosen(only: str, skip: str) -> list[str]:
    """Return the steps to run, in order.

    Raises:
        ValueError: A name is not that of a step.
    """
    wanted = only.split(",") if only else list(STEPS)
    unwanted = skip.split(",") if skip else []
    for name in wanted + unwanted:
        if name not in STEPS:
            raise ValueError(f"no step is called {name!r}; there are {', '.join(STEPS)}")
    return [name for name in STEPS if name in wanted and name not in unwanted]


def table(results: list[tuple[str, bool, float]]) -> str:
    """Return the closing table.

    Args:
        results: For each step its name, whether it passed, and its seconds.
    """
    longest = max((seconds for _, _, seconds in results), default=0) or 1
    lines = []
    for name, passed, seconds in results:
        bar = "#" * round(BAR * seconds / longest)
        lines.append(f"  {name:<10} {'passed' if passed else 'FAILED'}  {clock(seconds)}  {bar}")
    total = sum(seconds for _, _, seconds in results)
    good = all(passed for _, passed, _ in results)
    lines.append(f"  {'all':<10} {'passed' if good else 'FAILED'}  {clock(total)}")
    return "\n".join(line.rstrip() for line in lines)


def clock(seconds: float) -> str:
    """Return seconds as minutes and seconds, aligned."""
    return f"{int(round(seconds)) // 60:>3}:{int(round(seconds)) % 60:02d}"


def main(argv: list[str] | None = None) -> int:
    """Parse the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Prove everything.")
    parser.add_argument("--only", default="", help="these steps, separated by commas")
    parser.add_argument("--skip", default="", help="all but these")
    options = parser.parse_args(argv)
    try:
        steps = chosen(options.only, options.skip)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    results = []
    for name in steps:
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        passed = STEPS[name]()
        results.append((name, passed, time.monotonic() - start))
    print(f"\nWhere the time went (minutes:seconds)\n{table(results)}", flush=True)
    return 0 if all(passed for _, passed, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
