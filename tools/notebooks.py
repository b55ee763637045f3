"""Reading and writing notebooks so that the same content is always the same bytes.

A notebook file carries much that is about the machine and not about the chapter: the patch release
of Python, when a cell started, an editor's remarks. `write` keeps what a reader sees and drops the
rest, so that a diff shows changes and nothing else.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
KEPT_CELL_METADATA = {"tags", "mystnb"}
# Top-level metadata: what a kernel needs, and `qlora_lab`, where this course keeps run times.
KEPT_METADATA = {"qlora_lab"}


def read(path: Path) -> nbformat.NotebookNode:
    """Return a notebook as nbformat 4."""
    return nbformat.read(path, as_version=4)


def chapters(folder: Path = NOTEBOOKS) -> list[Path]:
    """Return the chapters' notebooks in reading order."""
    return sorted(folder.glob("*.ipynb"))


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Drop from a notebook, in place, what depends on the machine or the moment.

    Args:
        notebook: A notebook of nbformat 4.

    Returns:
        The same notebook: fixed kernel metadata, known cell metadata only, stable cell ids,
        neighbouring pieces of one stream joined.
    """
    kept = {key: notebook.metadata[key] for key in sorted(KEPT_METADATA & set(notebook.metadata))}
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}, **kept}
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: set[str] = set()
    for index, cell in enumerate(notebook.cells):
        for key in set(cell.metadata) - KEPT_CELL_METADATA:
            del cell.metadata[key]
        cell.id = _stable_id(cell.get("id"), index, seen)
        cell.source = cell.source.strip("\n")
        if cell.cell_type == "code":
            cell.outputs = _joined_streams(cell.outputs)
    return notebook


def _stable_id(given: str | None, index: int, seen: set[str]) -> str:
    """Keep an id that is there and unique; an absent one is made from the cell's position."""
    name = given if given and given not in seen else f"cell-{index:02d}"
    while name in seen:
        name += "x"
    seen.add(name)
    return name


def _joined_streams(outputs: list) -> list:
    """Join neighbouring pieces of the same stream: how they are cut up depends on timing."""
    joined: list = []
    for output in outputs:
        last = joined[-1] if joined else None
        if (
            last is not None
            and output.output_type == last.output_type == "stream"
            and output.name == last.name
        ):
            last.text += output.text
        else:
            joined.append(output)
    return joined


def write(path: Path, notebook: nbformat.NotebookNode) -> None:
    """Write a notebook, cleaned, with sorted keys and one line ending on every system."""
    notebook = clean(notebook)
    nbformat.validate(notebook)
    text = nbformat.writes(notebook)
    text = json.dumps(json.loads(text), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def kernel_environment(folder: Path) -> dict[str, str]:
    """Return the environment in which a chapter's kernel runs, the same on every machine.

    Args:
        folder: An empty folder, in place of the user's own IPython profile and Jupyter settings.

    Returns:
        This process's variables, without what would change a result or a message.
    """
    environment = {name: value for name, value in os.environ.items() if not _disturbs(name)}
    return environment | {
        "CUDA_VISIBLE_DEVICES": "",  # the stored outputs are the CPU's
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(folder / "ipython"),
        "JUPYTER_CONFIG_DIR": str(folder / "jupyter"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "PYTHONUTF8": "1",
    }


def _disturbs(name: str) -> bool:
    return name in {
        "PYTHONPATH",
        "PYTHONHOME",
        "PYTHONSTARTUP",
        "PYTHONWARNINGS",
        "MPLBACKEND",  # the kernel chooses its own
        "MATPLOTLIBRC",
        "FAST",
    }
