"""What every chapter's first cell calls: check that all is there, and on Colab add what is not.

1. Compare what is installed with the oldest versions that the course works with.
2. On Colab, install what is *missing*, bitsandbytes for instance. PyTorch and NumPy are never
   touched, and pip is told to keep every other package as it is.
3. Anywhere else, install nothing: one line says what is missing and what to type.
4. Quiet three messages that mean nothing here and differ from machine to machine.

The choice: lower bounds and no pins. Notebooks that pin exact versions rot in both directions: the
pin disappears, or it replaces what the runtime was built with and forces a restart in the middle
of a lesson. The price is that a chapter on Colab may run with newer versions than the stored
outputs did; the exact ones are in `requirements.txt`.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

# The oldest versions that the course works with: those of Colab's runtime of August 2026.
# pyproject.toml says the same (a test compares), but it is not there when only a clone is.
REQUIRED = {
    "torch": "2.11",
    "transformers": "5.15",
    "peft": "0.20",
    "bitsandbytes": "0.50",
    "datasets": "4.0",
    "accelerate": "1.14",
    "safetensors": "0.5",
    "numpy": "2.0",
    "matplotlib": "3.9",
    "tqdm": "4.66",
}

# A runtime is built around these two: replacing one of them breaks what was compiled against it.
NEVER_INSTALLED = ("torch", "numpy")


class NotReady(RuntimeError):
    """Something that the chapters need is missing; the message says what to do.

    A notebook shows the message alone: forty lines of traceback would hide the one that helps.
    """

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def prepare() -> None:
    """Make this notebook ready to run, or say in one line why it is not.

    Raises:
        NotReady: A package is missing or too old and cannot be added here.
    """
    quiet()
    absent, old = check(REQUIRED)
    if absent and on_colab():
        install(absent)
        absent, old = check(REQUIRED)
    if absent or old:
        raise NotReady(advice(absent, old))
    print("Ready: the package and all that it needs are here.")


def on_colab() -> bool:
    """Return whether this process runs in Google Colab."""
    return "google.colab" in sys.modules or "COLAB_RELEASE_TAG" in os.environ


def installed(name: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check(required: dict[str, str]) -> tuple[list[str], list[str]]:
    """Compare required with installed versions.

    Args:
        required: Distribution name -> oldest version that will do.

    Returns:
        The names that are absent, and the names that are there but too old.
    """
    absent, old = [], []
    for name, oldest in required.items():
        have = installed(name)
        if have is None:
            absent.append(name)
        elif _numbers(have) < _numbers(oldest):
            old.append(name)
    return absent, old


def _numbers(version: str) -> tuple[int, ...]:
    """Return the release part of a version: 2.11.0+cu128 -> (2, 11, 0), 5.0rc1 -> (5, 0)."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in release[0].split(".")) if release else ()


def install(names: list[str]) -> None:
    """Add missing packages with pip, leaving all that is installed exactly as it is.

    Args:
        names: Distributions to add; those in `NEVER_INSTALLED` are left out.

    Raises:
        NotReady: pip failed.
    """
    wanted = [f"{name}>={REQUIRED[name]}" for name in names if name not in NEVER_INSTALLED]
    if not wanted:
        return
    print("Adding", ", ".join(wanted))
    with tempfile.TemporaryDirectory() as folder:
        # What is here stays as it is: pip would rather fail than change one of these.
        keep = Path(folder) / "keep.txt"
        keep.write_text(
            "".join(
                f"{dist.name}=={dist.version}\n"
                for dist in metadata.distributions()
                if dist.name and dist.name not in names
            ),
            encoding="utf-8",
        )
        result = subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "-c", str(keep), *wanted],
            capture_output=True,
            text=True,
        )
    if result.returncode:
        last = (result.stderr.strip() or "no message").splitlines()[-1]
        raise NotReady(f"pip could not add {', '.join(wanted)}: {last}")
    importlib.invalidate_caches()


def advice(absent: list[str], old: list[str]) -> str:
    """Return the one line that says what is missing and what to type."""
    parts = []
    if absent:
        parts.append(f"missing: {', '.join(absent)}")
    if old:
        parts.append(
            "too old: " + ", ".join(f"{n} {installed(n)} (needs {REQUIRED[n]})" for n in old)
        )
    if on_colab():
        cure = "choose a newer runtime version (Runtime > Change runtime type)"
    else:
        cure = "run `make lab` in the course's folder, or `pip install -r requirements.txt`"
    return f"Not ready, {'; '.join(parts)}. To go on, {cure}."


def quiet() -> None:
    """Silence messages that say nothing about this course and depend on the machine.

    bitsandbytes warns about an optional package, but only on CPUs with AVX512-BF16; tokenizers
    warns about threads when a process forks; tqdm warns where a notebook has no widgets, which it
    does without. Everything else stays visible.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", message="IProgress not found")
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    return "kernels-community" not in str(record.msg)
