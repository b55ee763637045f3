"""The package of pictures: all its names are in one place, and its families stay apart."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from qlora_lab import plots

FILES = sorted(Path(plots.__file__).parent.glob("[!_]*.py"))
FAMILIES = [path.stem for path in FILES]


@pytest.mark.parametrize("family", [*FAMILIES, "_style"])
def test_every_public_name_is_in_the_package(family):
    module = importlib.import_module(f"qlora_lab.plots.{family}")
    made_there = [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    assert made_there and set(made_there) <= set(plots.__all__)
    assert all(getattr(plots, name) is getattr(module, name) for name in made_there)


def test_no_name_of_the_package_hides_a_family():
    assert not set(plots.__all__) & set(FAMILIES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_family_draws_with_the_style_and_with_no_other_family(path):
    imported = {
        node.module
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("qlora_lab.plots")
    }
    assert imported == {"qlora_lab.plots._style"}
