"""Training runs that are kept, so that nobody has to wait for them twice: `FAST=1`.

A workshop has no two minutes for a loss to fall, and a crashed kernel should not cost them again.
With `FAST=1` in the environment, `training.train` looks whether just this run was recorded (the
same weights before it, the same rows, the same settings) and if so puts the trained weights in
place, with the losses as they were recorded. Anything else is trained as always: who changes a
rank or a learning rate sees what that does.

    FAST=1       use recorded runs, and say so in a line
    FAST=quiet   the same without the line, for checks that compare outputs

`make notebooks` records: it sets `QLORA_LAB_RECORD` to the folder that the package carries.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qlora_lab.errors import InputError, needs
from qlora_lab.provenance import provenance

PACKAGE = Path(__file__).resolve().parent
FOLDER = PACKAGE / "assets" / "recorded"
# In a clone the results lie beside the package; an installed package carries a copy.
RESULTS = (PACKAGE.parent / "results", PACKAGE / "assets" / "results")
LARGEST = 1_000_000  # trained numbers; what is larger (full fine-tuning) is not kept


def results(name: str) -> dict[str, Any]:
    """Read what `experiments/` recorded.

    Args:
        name: A file or folder below `results/`, such as "cpu/methods/summary.json" or "cpu/ranks".

    Returns:
        A file's content; of a folder, the content of each `.json` file in it by its stem.

    Raises:
        InputError: There is no such file or folder, or no results in it.
    """
    needs("path", name, "results")
    for root in RESULTS:
        path = root / name
        if path.is_file() and path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        if path.is_dir():
            files = sorted(path.glob("*.json"))
            if not files:
                below = ", ".join(sorted(f"{name}/{each.name}" for each in path.iterdir()))
                raise InputError(f"results/{name} holds no results itself; choose from {below}")
            return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    raise InputError(f"results/{name} is not there: run the experiment that makes it, or pull")


def fast() -> bool:
    """Say whether recorded runs are wanted.

    Raises:
        InputError: `FAST` is set to something else than 0, 1 or quiet.
    """
    value = os.environ.get("FAST", "").strip().lower()
    if value not in ("", "0", "1", "quiet"):
        raise InputError(f"FAST={value!r} is unknown; 1 uses recorded runs, 0 trains everything")
    return value in ("1", "quiet")


def key(model: torch.nn.Module, rows: Iterable[Mapping], settings: Mapping[str, Any]) -> str:
    """Name a run by all that decides it.

    Args:
        model: As it is before training; its weights and which of them are trained count.
        rows: Encoded rows, each with "input_ids" and "labels".
        settings: Plain values.

    Returns:
        32 hexadecimal digits. Equal models, rows and settings give equal digits on every machine.
    """
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode())
    for name, tensor in _held(model):
        digest.update(f"{_plain(name)} {tensor.requires_grad} {tuple(tensor.shape)}".encode())
        data = tensor.data.cpu().contiguous()
        digest.update(data.view(-1).view(torch.uint8).numpy().tobytes())
    for row in rows:
        digest.update(json.dumps([row["input_ids"], row["labels"]]).encode())
    return digest.hexdigest()[:32]


def restore(model: torch.nn.Module, name: str, folder: Path = FOLDER) -> dict[str, Any] | None:
    """Put a recorded run's weights into the model.

    Args:
        model: The model that `key` was asked about.
        name: What `key` returned.
        folder: Where recorded runs are.

    Returns:
        The record (losses, seconds, provenance), or None if this run was not recorded; the model
        is then as it was.
    """
    path = next(folder.glob(f"**/{name}.safetensors"), None)
    if path is None:
        return None
    trained = {_plain(n): p for n, p in model.named_parameters() if p.requires_grad}
    with safe_open(path, "pt") as file, torch.no_grad():
        for each in file.keys():
            trained.pop(each).copy_(file.get_tensor(each))
        record = json.loads(file.metadata()["run"])
    assert not trained, f"{path.name} holds nothing for {', '.join(trained)}"
    if os.environ["FAST"] == "1":
        print(f"FAST=1: trained on {record['provenance']['date']}; shown as recorded, not run here")
    return record


def keep(model: torch.nn.Module, name: str, losses: list[float], seconds: float) -> Path | None:
    """Record a run that has just ended in the folder that `QLORA_LAB_RECORD` names.

    Args:
        model: The trained model.
        name: What `key` returned before training.
        losses: Of each step.
        seconds: Time in the training loop.

    Returns:
        The file, or None if nothing is recorded because more than a million numbers were trained.
    """
    trained = {_plain(n): p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}
    if sum(p.numel() for p in trained.values()) > LARGEST:
        return None
    run = {
        "losses": [round(loss, 6) for loss in losses],
        "seconds": round(seconds, 1),
        "provenance": provenance(),
    }
    path = Path(os.environ["QLORA_LAB_RECORD"]) / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    save_file({n: p.contiguous() for n, p in trained.items()}, partial, {"run": json.dumps(run)})
    os.replace(partial, path)
    return path


def same(first: Path, second: Path) -> bool:
    """Say whether two recorded runs ended with the same weights and losses."""
    with safe_open(first, "pt") as a, safe_open(second, "pt") as b:
        return (
            set(a.keys()) == set(b.keys())
            and all(torch.equal(a.get_tensor(n), b.get_tensor(n)) for n in a.keys())
            and json.loads(a.metadata()["run"])["losses"]
            == json.loads(b.metadata()["run"])["losses"]
        )


def _held(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All numbers of a model: parameters, codes and scales held as buffers, bitsandbytes' scales.

    Not the rotary frequencies, which are computed from the configuration, on each CPU its own way.
    """
    yield from model.named_parameters()
    yield from ((name, b) for name, b in model.named_buffers() if "inv_freq" not in name)
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:  # the scales, and with double quantization the scales' scales
            name += ".quant_state"
            yield name, state.absmax
            if state.offset is not None:
                yield f"{name}.offset", state.offset.reshape(1)
            state = state.state2


def _plain(name: str) -> str:
    """A parameter's name without the wrappers that only some machines add."""
    return re.sub(r"(^|\.)(module|_orig_mod)\.", r"\1", name)
