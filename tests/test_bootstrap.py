"""The first cell's helper, with machines that are not this one: Colab, old, empty."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_lab import bootstrap

ROOT = Path(__file__).resolve().parent.parent
COLAB_IMAGE = {  # August 2026: bitsandbytes is the one that is missing
    "torch": "2.11.0+cu128",
    "transformers": "5.15.0",
    "peft": "0.20.0",
    "datasets": "4.0.0",
    "accelerate": "1.14.0",
    "safetensors": "0.7.0",
    "numpy": "2.1.3",
    "matplotlib": "3.10.0",
    "tqdm": "4.67.1",
}


@pytest.fixture
def machine(monkeypatch):
    """A machine of our own making: what is installed, whether it is Colab, what pip was asked."""
    fake = SimpleNamespace(installed={}, commands=[], constraints="", pip_fails=False)

    def version(name):
        if name not in fake.installed:
            raise metadata.PackageNotFoundError(name)
        return fake.installed[name]

    def run(command, **options):
        fake.commands.append(command)
        fake.constraints = Path(command[command.index("-c") + 1]).read_text(encoding="utf-8")
        if fake.pip_fails:
            return SimpleNamespace(returncode=1, stdout="", stderr="noise\nERROR: no such thing\n")
        for wanted in command[command.index("-c") + 2 :]:
            name, _, oldest = wanted.partition(">=")
            fake.installed[name] = oldest
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    def distributions():
        return [SimpleNamespace(name=n, version=v) for n, v in fake.installed.items()]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "distributions", distributions)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    fake.become_colab = lambda: monkeypatch.setitem(sys.modules, "google.colab", object())
    return fake


def test_a_complete_machine_is_ready_and_pip_is_not_called(machine, capsys):
    machine.installed = dict(bootstrap.REQUIRED)
    bootstrap.prepare()
    assert capsys.readouterr().out == "Ready: the package and all that it needs are here.\n"
    assert machine.commands == []


def test_colab_gets_bitsandbytes_and_nothing_else(machine, capsys):
    machine.installed = dict(COLAB_IMAGE)
    machine.become_colab()
    bootstrap.prepare()
    [command] = machine.commands
    assert command[command.index("-c") + 2 :] == ["bitsandbytes>=0.50"]
    assert machine.installed == COLAB_IMAGE | {"bitsandbytes": "0.50"}
    assert "Adding bitsandbytes>=0.50" in capsys.readouterr().out


def test_colab_pip_is_held_to_everything_that_is_installed(machine):
    machine.installed = dict(COLAB_IMAGE)
    machine.become_colab()
    bootstrap.prepare()
    assert set(machine.constraints.split()) == {f"{n}=={v}" for n, v in COLAB_IMAGE.items()}


@pytest.mark.parametrize("name", bootstrap.NEVER_INSTALLED)
def test_torch_and_numpy_are_never_installed_even_when_absent(machine, name):
    machine.installed = {n: v for n, v in bootstrap.REQUIRED.items() if n != name}
    machine.become_colab()
    with pytest.raises(bootstrap.NotReady, match=f"missing: {name}"):
        bootstrap.prepare()
    assert machine.commands == []


def test_an_old_package_on_colab_is_reported_not_replaced(machine):
    machine.installed = COLAB_IMAGE | {"bitsandbytes": "0.50.2", "peft": "0.9.1"}
    machine.become_colab()
    with pytest.raises(bootstrap.NotReady, match=r"too old: peft 0\.9\.1 \(needs 0\.20\)"):
        bootstrap.prepare()
    assert machine.commands == []


def test_elsewhere_a_missing_package_is_one_line_and_no_installation(machine):
    machine.installed = {n: v for n, v in bootstrap.REQUIRED.items() if n not in ("peft", "tqdm")}
    with pytest.raises(bootstrap.NotReady, match="missing: peft, tqdm") as caught:
        bootstrap.prepare()
    assert machine.commands == []
    assert "\n" not in str(caught.value)
    assert "make lab" in str(caught.value)
    assert caught.value._render_traceback_() == [str(caught.value)]  # what a notebook prints


def test_a_failed_installation_says_what_pip_said_last(machine):
    machine.installed = dict(COLAB_IMAGE)
    machine.become_colab()
    machine.pip_fails = True
    with pytest.raises(bootstrap.NotReady, match="ERROR: no such thing"):
        bootstrap.prepare()


@pytest.mark.parametrize(
    ("have", "oldest", "old"),
    [
        ("2.11.0+cu128", "2.11", False),
        ("2.9.1", "2.11", True),  # as text 2.9 would be newer
        ("5.15.0.dev0", "5.15", False),
        ("5.0rc1", "5.15", True),
        ("0.50", "0.50", False),
    ],
)
def test_versions_are_compared_as_numbers(machine, have, oldest, old):
    machine.installed = {"thing": have}
    assert bootstrap.check({"thing": oldest}) == ([], ["thing"] if old else [])


def test_the_bounds_are_those_of_pyproject():
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["dependencies"]
    assert dict(line.split(">=") for line in declared) == bootstrap.REQUIRED


def test_quiet_drops_the_one_message_and_keeps_the_others(caplog):
    import logging

    bootstrap.quiet()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "x")
    logger.warning("weights are wrong")
    assert [record.message for record in caplog.records] == ["weights are wrong"]


def test_quiet_drops_the_missing_widgets_and_no_other_warning():
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bootstrap.quiet()
        warnings.warn("IProgress not found. Please update jupyter and ipywidgets.", stacklevel=1)
        warnings.warn("no gradient reached the adapter", stacklevel=1)
    assert [str(w.message) for w in caught] == ["no gradient reached the adapter"]
