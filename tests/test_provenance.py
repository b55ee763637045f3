"""Where a number comes from: complete, true, and without this machine's folders."""

import json
import re
import subprocess
import sys
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path

import pytest

from qlora_lab import provenance as module
from qlora_lab.provenance import PACKAGES, provenance, without_folders

PACKAGE = Path(module.__file__).parent


def test_it_is_complete_and_plain():
    block = provenance(7, "make it again")
    assert set(block) == {"device", "python", "versions", "commit", "seed", "date", "command"}
    assert json.loads(json.dumps(block)) == block
    assert (block["seed"], block["command"]) == (7, "make it again")
    assert block["versions"] == {name: version(name) for name in PACKAGES}
    assert block["device"]["cpu"] and block["device"]["cores"] >= 1
    assert abs(date.fromisoformat(block["date"]) - datetime.now(UTC).date()).days <= 1


def test_torch_is_asked_only_if_it_is_loaded():
    code = (
        "import sys, qlora_lab.provenance as p; block = p.provenance(); "
        "assert not {'torch', 'transformers'} & set(sys.modules); "
        "assert 'threads' not in block['device']; "
        "import torch; assert p.provenance()['device']['threads'] == torch.get_num_threads()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_gpu_is_described_where_there_is_one(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "H200")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: type("P", (), {"total_memory": 15 << 30})
    )
    monkeypatch.setattr(module, "_output", lambda command: "570.1\n570.1")  # one line for each GPU
    device = provenance()["device"]
    assert (device["gpu"], device["gpu_bytes"], device["driver"]) == ("H200", 15 << 30, "570.1")


# --- the commit ------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *words], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A repository with this package in it, and the module believing to be there."""
    package = tmp_path / "qlora_lab"
    package.mkdir()
    (package / "provenance.py").write_text("old")
    (tmp_path / "README.md").write_text("old")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    monkeypatch.setattr(module, "__file__", str(package / "provenance.py"))
    return tmp_path


def test_the_commit_is_that_of_the_clone(clone):
    assert provenance()["commit"] == git(clone, "rev-parse", "HEAD")
    (clone / "README.md").write_text("new")  # no number depends on it
    assert provenance()["commit"] == git(clone, "rev-parse", "HEAD")


@pytest.mark.parametrize("file", ["provenance.py", "added.py"])
def test_a_changed_package_is_marked(clone, file):
    (clone / "qlora_lab" / file).write_text("new")
    assert re.fullmatch(r"[0-9a-f]{40} with changes", provenance()["commit"])


def test_the_commit_of_somebody_elses_repository_is_not_ours(clone, monkeypatch):
    installed = clone / ".venv" / "site-packages" / "qlora_lab"
    installed.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(installed / "provenance.py"))
    assert provenance()["commit"] is None


def test_without_git_there_is_no_commit(clone, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance()["commit"] is None


# --- the command, and folders ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/srv/anna/models/llama", "llama"),
        ("C:\\lab\\Anna\\run", "run"),
        ("\\\\server\\share\\models\\llama", "llama"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("runs/finetune-1", "runs/finetune-1"),
        ("200", "200"),
        ("", ""),
    ],
)
def test_absolute_paths_of_any_system_lose_their_folders(path, expected):
    assert without_folders(path) == expected


@pytest.mark.parametrize(
    ("arguments", "main", "expected"),
    [
        (["/opt/env/bin/qlora-lab", "finetune", "--r", "8"], None, "qlora-lab finetune --r 8"),
        (["/x/qlora_lab/__main__.py", "ask", "two teas"], "qlora_lab.__main__",
         "python -m qlora_lab ask 'two teas'"),
        (["tools/record.py", "--output=/srv/anna/out"], None,
         "python tools/record.py --output=out"),
        (["qlora-lab", "finetune", "--output", "C:\\lab\\Anna\\out"], None,
         "qlora-lab finetune --output out"),
        (["/x/ipykernel_launcher.py", "-f", "/srv/anna/kernel.json"], "ipykernel_launcher",
         "a notebook"),
    ],
)  # fmt: skip
def test_the_command_can_be_typed_again_and_names_no_folder(monkeypatch, arguments, main, expected):
    spec = type("Spec", (), {"name": main}) if main else None
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert provenance()["command"] == expected


def test_no_folder_of_this_machine_is_in_it():
    block = json.dumps(provenance())
    for folder in (PACKAGE.parent, Path(sys.prefix)):
        assert str(folder) not in block
