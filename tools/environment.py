"""Make a virtual environment and fill it: `python tools/environment.py .venv requirements.txt`.

1. Create the environment if it is not there.
2. Hash the requirements file, the files it includes and (for the course itself) pyproject.toml.
3. If the stamp in the environment holds the same hash, stop: nothing has changed.
4. Else install, then write the stamp, last, so that an interrupted install is done again.

A content hash was chosen over Make's file times: `git checkout` touches times, and a needless
round through the resolver costs half a minute. Standard library only: this runs before anything
is installed, with whichever Python the reader has.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTORCH_INDEX = "https://download.pytorch.org/whl/"


def included_files(requirements: Path) -> list[Path]:
    """Return a requirements file and all that it pulls in with `-r` or `-c`, in order."""
    found = [requirements]
    for line in requirements.read_text(encoding="utf-8").splitlines():
        option, _, target = line.strip().partition(" ")
        if option in ("-r", "-c"):
            for path in included_files(requirements.parent / target.strip()):
                if path not in found:
                    found.append(path)
    return found


def fingerprint(requirements: Path, editable: bool) -> str:
    """Return a hash that changes when, and only when, the environment has to change."""
    digest = hashlib.sha256(f"{sys.version_info[:2]}".encode())
    files = included_files(requirements)
    if editable:
        files.append(ROOT / "pyproject.toml")
    for path in files:
        # Line endings differ between checkouts on Windows and elsewhere; the content does not.
        digest.update(path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def python_of(folder: Path, windows: bool = os.name == "nt") -> Path:
    """Return the environment's interpreter."""
    return folder / ("Scripts/python.exe" if windows else "bin/python")


def pip_arguments(requirements: Path, torch_index: str) -> list[str]:
    """Return the arguments of `pip install`.

    Args:
        requirements: The requirements file.
        torch_index: "" for whatever PyPI has, or a folder of PyTorch's own index ("cpu", "cu128").
    """
    arguments = ["-r", str(requirements)]
    if torch_index:
        # A build from here carries a local version (2.13.0+cpu), which pip sorts above the plain
        # 2.13.0 of PyPI, so the pin stays true and the chosen build wins.
        arguments += ["--extra-index-url", PYTORCH_INDEX + torch_index]
    return arguments


def prepare(folder: Path, requirements: Path, editable: bool, torch_index: str) -> bool:
    """Bring the environment up to date; return whether anything had to be installed."""
    stamp = folder / f".installed-{requirements.stem}"
    wanted = fingerprint(requirements, editable)
    python = python_of(folder)
    if python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return False
    if not python.exists():
        print(f"Making the environment {folder.name}", flush=True)
        venv.create(folder, with_pip=True)
    print(f"Installing {requirements.name} into {folder.name} (minutes, once)", flush=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    if not sys.stdout.isatty():
        pip.append("--quiet")
    subprocess.run([*pip, *pip_arguments(requirements, torch_index)], check=True)
    if editable:
        # The package itself, as it stands in this folder. --no-deps: the pins above are the law.
        subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return True


def main(argv: list[str] | None = None) -> int:
    """Parse the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Make or update a virtual environment.")
    parser.add_argument("folder", help="where the environment is, for example .venv")
    parser.add_argument("requirements", help="for example requirements.txt")
    parser.add_argument("--editable", action="store_true", help="also install qlora_lab itself")
    parser.add_argument(
        "--torch-index",
        default=os.environ.get("TORCH_INDEX", ""),
        help="cpu: PyTorch's CPU build; empty: the build on PyPI (default: $TORCH_INDEX)",
    )
    options = parser.parse_args(argv)
    if sys.version_info < (3, 11):  # noqa: UP036  an old one may well be what runs this
        have = ".".join(map(str, sys.version_info[:3]))
        print(f"Python 3.11 or newer is needed, this is {have}: make PYTHON=...", file=sys.stderr)
        return 2
    try:
        prepare(
            ROOT / options.folder,
            ROOT / options.requirements,
            options.editable,
            options.torch_index,
        )
    except subprocess.CalledProcessError as error:
        print(f"The installation failed (pip's exit code {error.returncode}).", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
