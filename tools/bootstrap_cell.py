"""The first code cell of every chapter: its one source, and the stamp that puts it everywhere.

`python -m tools.bootstrap_cell` writes the cell, with the repository's address of `_config.yml`,
into all notebooks; `--check` only says which differ. The cell does as little as a cell outside the
package can: find the package, then call `qlora_lab.bootstrap.prepare`, where everything else is
and where it is tested.

On Colab it installs the package from the repository with `--no-deps`, so that nothing that the
runtime brings is replaced. While the course has no address it installs nothing from anywhere: an
address that nobody owns today is somebody else's tomorrow.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import nbformat

from tools.notebooks import NOTEBOOKS, read, write

CELL_ID = "bootstrap"
TAGS = ["remove-cell"]  # not on the web pages; setup.md explains it

TEMPLATE = """\
# The same in every chapter: find the package, check what it needs (on Colab, add it).
import importlib.util
import pathlib
import subprocess
import sys

REPOSITORY = "{url}"  # this course's public address, written by `make set-url`

if importlib.util.find_spec("qlora_lab") is None:
    if pathlib.Path("../qlora_lab").is_dir():  # a clone, opened without installing
        sys.path.insert(0, str(pathlib.Path("..").resolve()))
    elif "google.colab" in sys.modules and REPOSITORY:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
        subprocess.run([*pip, f"git+{{REPOSITORY}}"], check=True)
    else:
        raise SystemExit("qlora_lab is not here: open this notebook from a clone of the course.")

from qlora_lab.bootstrap import prepare

prepare()"""


def source(url: str) -> str:
    """Return the cell's source for a repository address ("" where there is none)."""
    return TEMPLATE.format(url=url)


def first_code_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    """Return the notebook's first code cell."""
    return next((cell for cell in notebook.cells if cell.cell_type == "code"), None)


def is_bootstrap(cell: nbformat.NotebookNode | None) -> bool:
    """Return whether a cell is the common one, in this or an earlier wording."""
    return cell is not None and "qlora_lab.bootstrap" in cell.source


def differs(notebook: nbformat.NotebookNode, url: str) -> bool:
    """Return whether a notebook lacks the cell or carries another one."""
    cell = first_code_cell(notebook)
    return (
        cell is None
        or cell.source != source(url)
        or cell.id != CELL_ID
        or cell.metadata.get("tags") != TAGS
    )


def stamp(notebook: nbformat.NotebookNode, url: str) -> None:
    """Put the cell into a notebook: over its earlier wording, or else before the first code."""
    cell = first_code_cell(notebook)
    if not is_bootstrap(cell):
        place = notebook.cells.index(cell) if cell is not None else len(notebook.cells)
        cell = nbformat.v4.new_code_cell()
        notebook.cells.insert(place, cell)
    cell.source, cell.id = source(url), CELL_ID
    cell.metadata["tags"] = list(TAGS)


def stamp_all(url: str, folder: Path = NOTEBOOKS) -> list[str]:
    """Stamp every notebook of a folder; return the names of those that changed."""
    changed = []
    for path in sorted(folder.glob("*.ipynb")):
        notebook = read(path)
        if differs(notebook, url):
            stamp(notebook, url)
            write(path, notebook)
            changed.append(path.name)
    return changed


def main(argv: list[str] | None = None) -> int:
    """Parse the command line; return the exit code."""
    from tools.set_url import configured_url

    parser = argparse.ArgumentParser(description="Write the common first cell.")
    parser.add_argument("--check", action="store_true", help="only say which notebooks differ")
    options = parser.parse_args(argv)
    url = configured_url()
    if options.check:
        names = [p.name for p in sorted(NOTEBOOKS.glob("*.ipynb")) if differs(read(p), url)]
        print("\n".join(names))
        return 1 if names else 0
    print("\n".join(stamp_all(url)) or "nothing to do")
    return 0


if __name__ == "__main__":
    sys.exit(main())
