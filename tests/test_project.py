"""The repository as a whole: one address, one list of versions, light imports, honest files."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import qlora_lab
from tools import bootstrap_cell, set_url
from tools.book import expected_pages
from tools.notebooks import chapters, read

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ["torch", "transformers", "peft", "bitsandbytes", "datasets", "matplotlib", "numpy"]
MODULES = sorted(
    path.stem
    for path in (ROOT / "qlora_lab").iterdir()
    if not path.stem.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").is_file())
)


def sources(module: str) -> list[Path]:
    """The file of a module; all files of one that is a folder."""
    path = ROOT / "qlora_lab" / module
    return sorted(path.glob("*.py")) or [path.with_suffix(".py")]


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def loaded_by(code: str) -> list[str]:
    """The heavy packages in sys.modules after running code in a fresh interpreter."""
    probe = f"{code}\nimport sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return ast.literal_eval(result.stdout.splitlines()[-1])


# Light imports


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import qlora_lab") == []


def test_command_line_help_loads_nothing_heavy():
    code = """
import contextlib, io
from qlora_lab.cli import main
with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
    main(["--help"])
assert "finetune" in shown.getvalue()
"""
    assert loaded_by(code) == []


def test_the_nf4_table_needs_the_standard_library_alone():
    assert loaded_by("import qlora_lab; assert len(qlora_lab.nf4()) == 16") == []


def test_the_probe_sees_a_heavy_import():
    assert "numpy" in loaded_by("import numpy")


def test_every_public_name_resolves_and_is_the_one_in_its_module():
    import importlib

    for name, module in qlora_lab._EXPORTS.items():
        defined = getattr(importlib.import_module(f"qlora_lab.{module}"), name)
        assert getattr(qlora_lab, name) is defined


def test_the_lazy_list_names_every_module():
    assert sorted(qlora_lab._MODULES) == MODULES


def test_every_folder_of_modules_is_packaged():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    there = [
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "qlora_lab").rglob("__init__.py")
    ]
    assert sorted(listed["setuptools"]["packages"]) == sorted(there)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nf5'"):
        _ = qlora_lab.nf5


def test_embedded_paths_exist_and_say_so_when_they_do_not(monkeypatch, tmp_path):
    assert Path(qlora_lab.embedded_model(), "config.json").is_file()
    assert len(list(Path(qlora_lab.heldout_dir()).glob("*.txt"))) >= 25
    monkeypatch.setattr(qlora_lab, "_ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="installed without its data files"):
        qlora_lab.embedded_model()


def test_no_module_imports_one_above_it():
    """Data flows one way: codebooks, blocks, scales, layers, then what stands on them."""
    order = ["errors", "codebooks", "double_quant", "blockwise", "low_rank", "lora", "qlora"]
    top = ["loading", "training", "finetuning", "evaluation", "plots", "cli", "merge"]
    for rank, module in enumerate(order):
        tree = ast.parse((ROOT / "qlora_lab" / f"{module}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                if name.startswith("qlora_lab."):
                    used = name.split(".")[1]
                    assert used not in top, f"{module} imports {used}"
                    assert used not in order[rank + 1 :], f"{module} imports {used}"


# Docstrings


def public_definitions(path: Path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield path.stem, tree
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield f"{path.stem}.{node.name}", node
            for child in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(child, ast.FunctionDef) and not child.name.startswith("_"):
                    yield f"{path.stem}.{node.name}.{child.name}", child


@pytest.mark.parametrize("module", MODULES)
def test_every_public_thing_has_a_docstring(module):
    lacking = [
        name
        for path in sources(module)
        for name, node in public_definitions(path)
        if not ast.get_docstring(node)
    ]
    # forward, backward and the like are documented by what they override
    overrides = ("forward", "backward", "extra_repr", "setup_context")
    assert [name for name in lacking if not name.endswith(overrides)] == []


# The book's map


def test_every_module_has_its_api_page_and_every_page_its_module():
    pages = {page.rpartition("/")[2] for page in expected_pages() if page.startswith("book/api/")}
    assert pages - {"index"} == set(MODULES)
    for module in MODULES:
        text = (ROOT / "book" / "api" / f"{module}.md").read_text(encoding="utf-8")
        assert f".. automodule:: qlora_lab.{module}\n   :members:" in text


def test_every_page_on_disk_is_in_the_table_of_contents():
    on_disk = {
        path.relative_to(ROOT).with_suffix("").as_posix() for path in (ROOT / "book").rglob("*.md")
    }
    assert on_disk == {page for page in expected_pages() if page.startswith("book/")}


def test_the_landing_page_maps_every_chapter():
    text = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
    for page in expected_pages():
        if page.startswith("notebooks/"):
            assert f"](../{page}.ipynb)" in text


def test_every_reference_is_cited_and_every_citation_has_its_entry():
    bibliography = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    entries = re.findall(r"^@\w+\{([^,]+),", bibliography, re.MULTILINE)
    cited = set()
    for path in (ROOT / "book").rglob("*.md"):
        for group in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", path.read_text(encoding="utf-8")):
            cited.update(key.strip() for key in group.split(","))
    assert len(entries) == len(set(entries))
    assert set(entries) == cited


def test_the_pictures_are_what_their_script_draws():
    from tools.draw_identity import STATIC, drawings

    for name, text in drawings().items():
        assert (STATIC / name).read_text(encoding="utf-8") == text


# One address


def test_the_address_is_the_same_everywhere():
    url = set_url.configured_url()
    assert set_url.cited_url() == url
    for path in chapters():
        cell = bootstrap_cell.first_code_cell(read(path))
        assert cell.source == bootstrap_cell.source(url), path.name


def test_the_address_stands_nowhere_else():
    """Without an address, none is made up; with one, only the stamped files may hold it."""
    url = set_url.configured_url()
    allowed = {ROOT / "_config.yml", ROOT / "CITATION.cff", *chapters()}
    suspects = re.compile(r"github\.com/[\w.-]+/qlora[-_]lab", re.IGNORECASE)
    for path in tracked_files():
        if path in allowed or path.suffix in {".png", ".safetensors", ".ico"}:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        assert not suspects.search(text), path.name
        assert not url or url not in text, path.name


def test_without_an_address_nothing_is_installed_from_one():
    cell = bootstrap_cell.source("")
    assert 'REPOSITORY = ""' in cell
    guard = cell.index('elif "google.colab" in sys.modules and REPOSITORY:')
    assert guard < cell.index("git+{REPOSITORY}")


# Versions


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        if line and not line.startswith(("#", "-")):
            package, exact, version = line.partition("==")
            assert exact, f"{name}: {line} is not an exact pin"
            found[package.lower().replace("_", "-")] = version
    return found


REQUIREMENTS = ["requirements.txt", "requirements-book.txt", "requirements-lab.txt"]


@pytest.mark.parametrize("name", [*REQUIREMENTS, "requirements-bench.txt"])
def test_direct_dependencies_are_pinned_and_agree_with_the_lock(name):
    locked = pins("constraints.txt")
    for package, version in pins(name).items():
        if package != "torchao":  # measured against only; nothing else may depend on it
            assert locked[package] == version


def test_the_lock_holds_for_any_build_on_any_machine():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "+" not in "".join(pins("constraints.txt").values())
    assert not re.search(r"file:|@ |torchao|qlora", text.split("\n", 3)[3])


def test_the_book_needs_no_torch():
    assert "torch" not in pins("requirements-book.txt")


def test_the_pins_satisfy_what_the_package_asks_for():
    from qlora_lab.bootstrap import _numbers

    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    direct = pins("requirements.txt")
    for line in project["dependencies"]:
        name, oldest = line.split(">=")
        assert _numbers(direct[name]) >= _numbers(oldest)


def test_installed_versions_are_the_locked_ones():
    from importlib import metadata

    locked = pins("constraints.txt")
    for name, version in pins("requirements.txt").items():
        assert metadata.version(name).partition("+")[0] == version == locked[name]


def test_the_citation_has_the_packages_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == qlora_lab.__version__
    assert f"## {qlora_lab.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# Commands and prose


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").rstrip().splitlines()
    assert "make test" in readme
    assert lines[-1].split("<")[0].strip() == "exec make test"


def test_readme_and_setup_name_only_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for name in ("README.md", "book/setup.md", "book/intro.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"`?\bmake ([a-z][a-z-]+)(?=[\s`])", text):
            if f"`make {target}" in text or f"\nmake {target}" in text:
                assert target in targets, f"{name}: make {target}"


def test_contributing_explains_every_direct_dependency():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in [*REQUIREMENTS, "requirements-bench.txt"]:
        for package in pins(name):
            assert f"`{package}`" in text.lower(), package


def test_the_python_lines_for_windows_name_modules_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8") + (
        ROOT / "book" / "setup.md"
    ).read_text(encoding="utf-8")
    modules = set(re.findall(r"-m ((?:tools|qlora_lab|benchmarks)[\w.]*)", text))
    assert {"tools.book", "tools.check", "qlora_lab"} <= modules
    for module in modules:
        path = ROOT / Path(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_licences_are_whole():
    assert "Permission is hereby granted" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    text = (ROOT / "LICENSE-CC-BY-4.0").read_text(encoding="utf-8")
    assert "Attribution 4.0 International" in text
    assert len(re.findall(r"^Section [1-8] -- ", text, re.MULTILINE)) == 8


MACHINE = re.compile(r"(?<![\w.<])/(?:root|work)/|/home/(?!ann\b)[a-z]|\\Users\\(?!Ann\b)")


def test_no_file_holds_a_path_of_the_machine_it_was_made_on():
    for path in tracked_files():
        if path.suffix in {".png", ".safetensors", ".ico"} or "heldout" in path.parts:
            continue
        if path.name in {"test_notebooks.py", "test_project.py"}:
            continue  # they hold the patterns
        found = MACHINE.search(path.read_text(encoding="utf-8", errors="replace"))
        assert not found, f"{path.relative_to(ROOT)}: {found[0]}"


def test_results_carry_their_provenance():
    """Every recorded measurement says with what, from which seed and by which command it came."""
    for path in sorted((ROOT / "results").rglob("*.json")):
        if path.name in ("notebooks.json", "adapter_config.json"):  # the second is PEFT's own
            continue
        provenance = json.loads(path.read_text(encoding="utf-8"))["provenance"]
        assert {"versions", "seed", "command", "date", "commit"} <= set(provenance), path.name
