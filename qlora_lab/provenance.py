"""Where a recorded number comes from: device, versions, commit, seed, date, command.

Every file under `results/` carries this block, so that a reader can judge a number and make it
again. Standard library only; the device is asked of torch if it is already loaded.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "numpy")


def provenance(seed: int | None = None, command: str | None = None) -> dict[str, Any]:
    """Describe this run.

    Args:
        seed: The run's seed, if it has one.
        command: What to type to make it again; the command line of this process by default.

    Returns:
        A dictionary of plain values, ready for JSON. No path of this machine is in it.
    """
    return {
        "device": _device(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "seed": seed,
        "date": datetime.now(UTC).date().isoformat(),
        "command": command or _command(),
    }


def without_folders(name: str) -> str:
    """Cut an absolute path down to its last part, so that no folder of this machine is recorded.

    Args:
        name: A path of Linux, macOS or Windows, or anything else.

    Returns:
        The last part of an absolute path; anything else (a hub name, a relative path) unchanged.
    """
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.is_absolute():
            return path.name
    return name


def _device() -> dict[str, Any]:
    device: dict[str, Any] = {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.system()}
    torch = sys.modules.get("torch")
    if torch is None:
        return device
    device["threads"] = torch.get_num_threads()
    device["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        device["gpu"] = torch.cuda.get_device_name(0)
        device["gpu_bytes"] = torch.cuda.get_device_properties(0).total_memory
        device["cuda"] = torch.version.cuda
        device["driver"] = _driver()
    return device


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found = _output(query)
    return found.splitlines()[0] if found else None  # one line for each GPU


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the repository that this package lies in, with a mark if it was changed."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    # An installed copy may lie in the environment of another repository, whose commit says nothing.
    if _output([*git, "rev-parse", "--show-prefix"]) != f"{here.name}/":
        return None
    commit = _output([*git, "rev-parse", "HEAD"])
    changed = _output([*git, "status", "--porcelain", "--", "."])
    return f"{commit} with changes" if changed else commit


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _command() -> str:
    program = without_folders(sys.argv[0])
    if program.startswith("ipykernel"):
        return "a notebook"
    words = [program]
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:
        words = ["python", "-m", spec.name.removesuffix(".__main__")]
    elif program.endswith(".py"):
        words = ["python", program]
    for argument in sys.argv[1:]:
        option, equals, value = argument.rpartition("=")  # --output=/tmp/run as well as /tmp/run
        words.append(f"{option}{equals}{without_folders(value)}")
    return shlex.join(words)
