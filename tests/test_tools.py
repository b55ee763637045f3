"""The tools behind the Makefile: environments, book, address, notebooks, the closing table."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path, PureWindowsPath

import nbformat
import pytest

from tools import (
    book,
    bootstrap_cell,
    check,
    environment,
    lock,
    notebooks,
    other_model,
    run_notebooks,
    set_url,
)

ROOT = Path(__file__).resolve().parent.parent


# Environments


@pytest.fixture
def course(tmp_path):
    """A folder with requirements that include one another, as the course's do."""
    (tmp_path / "requirements.txt").write_text("-c constraints.txt\na==1\n-r book.txt\n")
    (tmp_path / "book.txt").write_text("-c constraints.txt\nb==2\n")
    (tmp_path / "constraints.txt").write_text("c==3\n")
    return tmp_path


def test_included_files_are_found_once(course):
    names = [path.name for path in environment.included_files(course / "requirements.txt")]
    assert names == ["requirements.txt", "constraints.txt", "book.txt"]


@pytest.mark.parametrize("name", ["requirements.txt", "book.txt", "constraints.txt"])
def test_the_fingerprint_changes_with_every_file(course, name):
    before = environment.fingerprint(course / "requirements.txt", editable=False)
    assert environment.fingerprint(course / "requirements.txt", editable=False) == before
    (course / name).write_text((course / name).read_text() + "d==4\n")
    assert environment.fingerprint(course / "requirements.txt", editable=False) != before


def test_the_fingerprint_ignores_line_endings(course):
    before = environment.fingerprint(course / "book.txt", editable=False)
    for path in course.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert environment.fingerprint(course / "book.txt", editable=False) == before


@pytest.fixture
def pip(monkeypatch):
    """Stand in for venv and pip: the environment appears, commands are kept."""
    commands = []

    def create(folder, with_pip):
        python = environment.python_of(folder)
        python.parent.mkdir(parents=True)
        python.touch()

    def run(command, check):
        commands.append(command)

    monkeypatch.setattr(environment.venv, "create", create)
    monkeypatch.setattr(environment.subprocess, "run", run)
    return commands


def test_an_environment_is_installed_once_and_again_only_after_a_change(course, pip):
    folder, wanted = course / "my env", course / "requirements.txt"
    assert environment.prepare(folder, wanted, editable=False, torch_index="")
    assert not environment.prepare(folder, wanted, editable=False, torch_index="")
    assert len(pip) == 1
    (course / "constraints.txt").write_text("c==4\n")
    assert environment.prepare(folder, wanted, editable=False, torch_index="")
    assert len(pip) == 2


def test_a_failed_installation_is_tried_again(course, pip, monkeypatch):
    def fail(command, check):
        raise subprocess.CalledProcessError(1, command)

    with monkeypatch.context() as patch:
        patch.setattr(environment.subprocess, "run", fail)
        with pytest.raises(subprocess.CalledProcessError):
            environment.prepare(course / "e", course / "book.txt", False, "")
    assert environment.prepare(course / "e", course / "book.txt", False, "")


def test_the_package_itself_is_installed_without_its_dependencies(course, pip):
    environment.prepare(course / "e", course / "book.txt", editable=True, torch_index="")
    assert pip[-1][-3:] == ["--no-deps", "-e", str(environment.ROOT)]


def test_the_cpu_build_adds_pytorchs_own_index_and_the_default_adds_none():
    plain = environment.pip_arguments(Path("requirements.txt"), "")
    assert plain == ["-r", "requirements.txt"]
    cpu = environment.pip_arguments(Path("requirements.txt"), "cpu")
    assert cpu[2:] == ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]


def test_the_interpreter_is_found_by_windows_rules():
    folder = PureWindowsPath(r"C:\My Courses\qlora\.venv")
    found = environment.python_of(folder, windows=True)
    assert str(found) == r"C:\My Courses\qlora\.venv\Scripts\python.exe"
    assert environment.python_of(Path("/c/.venv"), windows=False) == Path("/c/.venv/bin/python")


# The book


def test_pages_are_read_from_the_whole_table_of_contents():
    toc = {
        "root": "intro",
        "parts": [{"chapters": [{"file": "a", "sections": [{"file": "a/b"}]}, {"file": "c"}]}],
    }
    assert book.pages_of(toc) == ["intro", "a", "a/b", "c"]


def test_a_page_that_is_absent_or_empty_is_missing(tmp_path):
    (tmp_path / "a.html").write_text("<html><article>text</article></html>")
    (tmp_path / "b.html").write_text("<html></html>")
    assert book.missing_pages(tmp_path, ["a", "b", "c"]) == ["b", "c"]


@pytest.fixture
def builder(monkeypatch, tmp_path):
    """Stand in for Jupyter Book: it prints what a test wants and writes the pages it wants."""
    monkeypatch.setattr(book, "HTML", tmp_path / "html")
    monkeypatch.setattr(book, "LOG", tmp_path / "book.log")
    monkeypatch.setattr(book, "expected_pages", lambda: ["intro", "glossary"])

    def arrange(output="", returncode=0, pages=("intro", "glossary")):
        def run(*arguments, **options):
            book.HTML.mkdir(exist_ok=True)
            for page in pages:
                (book.HTML / f"{page}.html").write_text("<article>text</article>")
            return subprocess.CompletedProcess([], returncode, stdout=output)

        monkeypatch.setattr(book.subprocess, "run", run)

    return arrange


def test_a_build_counts_its_pages(builder):
    builder()
    assert book.build(strict=True) == 2


def test_a_build_without_pages_fails_although_it_exits_with_zero(builder):
    builder(pages=["intro"])
    with pytest.raises(book.BuildError, match="without these pages: glossary"):
        book.build()


def test_a_page_of_an_earlier_build_is_not_counted(builder):
    builder()
    book.build()
    builder(pages=["intro"])
    with pytest.raises(book.BuildError, match="glossary"):
        book.build(strict=True)


def test_a_warning_fails_a_strict_build_only(builder, capsys):
    builder("\x1b[91mintro.md:3: WARNING: unknown document: 'x'\x1b[39;49;00m\n")
    assert book.build() == 2
    assert capsys.readouterr().err == "intro.md:3: WARNING: unknown document: 'x'\n"
    with pytest.raises(book.BuildError, match="unknown document"):
        book.build(strict=True)


def test_a_crash_shows_the_end_of_the_log(builder):
    builder("lines\nbefore\nit stopped\n", returncode=1)
    with pytest.raises(book.BuildError, match="it stopped"):
        book.build()


def test_a_busy_port_is_one_line_and_exit_code_2():
    with socket.socket() as taken:
        taken.bind((book.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "tools.book", "--serve", "always", "--port", str(port)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"port {port} cannot be used" in result.stderr
    assert "make book PORT=" in result.stderr


def test_an_impossible_port_is_refused():
    with pytest.raises(book.BuildError, match="port 70000 is none"):
        book.serve(70000)


def test_the_server_serves_the_pages_and_only_to_this_machine(tmp_path):
    (tmp_path / "index.html").write_text("the first page")
    server = book.serve(0, tmp_path)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        host, port = server.server_address[:2]
        assert host == "127.0.0.1"
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as page:
            assert page.read() == b"the first page"
    finally:
        server.shutdown()
        server.server_close()


# The book's Sphinx extension


@pytest.fixture(scope="module")
def extension():
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    import qlora_book

    yield qlora_book
    sys.path.remove(str(ROOT / "book" / "_ext"))


def test_what_the_package_imports_is_mocked(extension, tmp_path):
    (tmp_path / "a.py").write_text(
        "import os, torch.nn\nfrom peft import x\nfrom . import b\nimport IPython\n"
        "def f():\n    import datasets\n    from pkg.b import c\n"
    )
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "__init__.py").write_text("import matplotlib as mpl\n")
    folder = tmp_path.rename(tmp_path.parent / "pkg")
    found = extension.third_party_imports(folder)
    assert found == ["datasets", "matplotlib", "peft", "torch"]


def test_a_launch_button_needs_an_address(extension):
    assert extension.launch_buttons("") == {}
    assert extension.launch_buttons("https://example.org/a/b") == {}  # Colab opens GitHub only
    assert extension.launch_buttons("https://github.com/a/b") == {
        "colab_url": "https://colab.research.google.com"
    }


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("the `rank` r", "the `rank` r"),
        ("the `lora.merge()` call", "the `lora.merge()` call"),
        ("gives `W x + b`", "gives ``W x + b``"),
        ("all `item`s", "all `item`\\ s"),
        ("`{a,\n    b}` here", "``{a, b}`` here"),
        ("a :func:`f g` role", "a :func:`f g` role"),
        ("already ``x + y``", "already ``x + y``"),
        ("`a\n\nb`", "`a\n\nb`"),
    ],
)
def test_code_in_docstrings_is_readable(extension, written, shown):
    assert extension.readable_code(written) == shown


def test_what_is_set_in_becomes_a_literal_block(extension):
    shown = extension.with_literal_blocks(["An order:", "", "    two teas", "    {}", "", "Text."])
    assert shown == ["An order:", "", "::", "", "    two teas", "    {}", "", "Text."]


@pytest.mark.parametrize(
    "lines",
    [
        ["- one", "", "      more of one"],
        ["Args:", "    x: a number.", "", "Returns:", "    y."],
        ["Like this::", "", "    code"],
        ["Text", "    set in without an empty line"],
    ],
)
def test_lists_sections_and_marked_blocks_stay(extension, lines):
    assert extension.with_literal_blocks(lines) == lines


def test_alt_text_is_found_by_the_pictures_name(extension):
    import hashlib
    from base64 import b64encode

    picture = b"not really a PNG"
    output = {
        "data": {"image/png": b64encode(picture).decode()},
        "metadata": {"image/png": {"alt": "Two curves that cross."}},
    }
    notebook = {"cells": [{"cell_type": "markdown"}, {"outputs": [output]}]}
    name = hashlib.sha256(picture).hexdigest()
    assert extension.alt_texts(notebook) == {name: "Two curves that cross."}


# The address


@pytest.mark.parametrize(
    "given",
    [
        "https://github.com/ann/course",
        "https://github.com/ann/course.git",
        "https://github.com/ann/course/",
        "git@github.com:ann/course.git",
        "ssh://git@github.com/ann/course.git",
    ],
)
def test_every_form_of_an_address_becomes_one(given):
    assert set_url.normalized(given) == "https://github.com/ann/course"


@pytest.mark.parametrize(
    "given",
    ["", "course", "https://github.com", "https://github.com/ann", "http://github.com/ann/course"]
    + ["/srv/git/course.git", 'https://github.com/a/b"; import os', "https://github.com/a/b c"],
)
def test_what_is_no_public_address_is_refused(given):
    with pytest.raises(set_url.AddressError, match="looks like https://github.com/owner/name"):
        set_url.normalized(given)


def test_a_password_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(set_url.AddressError) as caught:
        set_url.normalized("https://ann:secret@github.com/ann/course")
    assert "secret" not in str(caught.value)


@pytest.fixture
def repository(tmp_path):
    """A copy of what `make set-url` touches, with one notebook."""
    for name in ("_config.yml", "CITATION.cff"):
        text = (ROOT / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text, encoding="utf-8")
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# One"), nbformat.v4.new_code_cell("x = 1")]
    )
    (tmp_path / "notebooks").mkdir()
    notebooks.write(tmp_path / "notebooks" / "01.ipynb", notebook)
    set_url.set_url("", tmp_path)
    return tmp_path


def test_setting_the_address_writes_every_place_and_unsetting_restores_the_bytes(repository):
    files = [path for path in repository.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    changed = set_url.set_url("https://github.com/ann/course", repository)
    assert changed == ["_config.yml", "CITATION.cff", "notebooks/01.ipynb"]
    assert set_url.configured_url(repository) == "https://github.com/ann/course"
    assert set_url.cited_url(repository) == "https://github.com/ann/course"
    text = (repository / "notebooks" / "01.ipynb").read_text(encoding="utf-8")
    assert 'REPOSITORY = \\"https://github.com/ann/course\\"' in text
    assert set_url.set_url("https://github.com/ann/course", repository) == []
    set_url.set_url("", repository)
    assert {path: path.read_bytes() for path in files} == before


def test_the_config_stays_valid_and_only_the_address_changes(repository):
    import yaml

    before = yaml.safe_load((repository / "_config.yml").read_text(encoding="utf-8"))
    set_url.set_url("https://github.com/ann/course", repository)
    after = yaml.safe_load((repository / "_config.yml").read_text(encoding="utf-8"))
    assert after["repository"].pop("url") == "https://github.com/ann/course"
    assert before["repository"].pop("url") == set_url.configured_url()
    assert after == before


def test_the_clones_own_origin_is_taken(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    with pytest.raises(set_url.AddressError, match="no origin"):
        set_url.origin(tmp_path)
    address = "git@github.com:ann/course.git"
    subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", address], check=True)
    assert set_url.normalized(set_url.origin(tmp_path)) == "https://github.com/ann/course"


def test_the_command_refuses_with_exit_code_2(capsys):
    assert set_url.main(["nonsense"]) == 2
    assert "looks like" in capsys.readouterr().err


# The first cell


def run_cell(url, monkeypatch, *, colab, clone, tmp_path):
    """Execute the first cell where the package is not installed; return what it tried."""
    import importlib.util

    calls = []
    here = tmp_path / "notebooks"
    here.mkdir()
    if clone:
        (tmp_path / "qlora_lab").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: calls.append(command))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("qlora_lab.bootstrap.prepare", lambda: calls.append("prepare"))
    if colab:
        monkeypatch.setitem(sys.modules, "google.colab", object())
    else:
        monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    exec(compile(bootstrap_cell.source(url), "cell", "exec"), {})
    return calls


def test_on_colab_the_cell_installs_the_package_alone(monkeypatch, tmp_path):
    url = "https://github.com/ann/course"
    calls = run_cell(url, monkeypatch, colab=True, clone=False, tmp_path=tmp_path)
    assert calls[0][1:] == ["-m", "pip", "install", "-q", "--no-deps", f"git+{url}"]
    assert calls[1:] == ["prepare"]


def test_on_colab_without_an_address_the_cell_installs_nothing(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="open this notebook from a clone"):
        run_cell("", monkeypatch, colab=True, clone=False, tmp_path=tmp_path)


def test_elsewhere_the_cell_installs_nothing_even_with_an_address(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="open this notebook from a clone"):
        run_cell("https://github.com/a/b", monkeypatch, colab=False, clone=False, tmp_path=tmp_path)


def test_in_a_clone_the_cell_finds_the_package_beside_it(monkeypatch, tmp_path):
    calls = run_cell("", monkeypatch, colab=False, clone=True, tmp_path=tmp_path)
    assert calls == ["prepare"]
    assert sys.path[0] == str(tmp_path)


def test_stamping_replaces_an_earlier_wording_and_leaves_the_rest():
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("# One"),
            nbformat.v4.new_code_cell("from qlora_lab.bootstrap import start\nstart()"),
            nbformat.v4.new_code_cell("x = 1"),
        ]
    )
    bootstrap_cell.stamp(notebook, "")
    assert [cell.source for cell in notebook.cells] == ["# One", bootstrap_cell.source(""), "x = 1"]
    assert not bootstrap_cell.differs(notebook, "")
    assert bootstrap_cell.differs(notebook, "https://github.com/a/b")


# Notebooks


def test_writing_twice_gives_the_same_bytes_and_drops_the_machine(tmp_path):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("x = 1", id="a"), nbformat.v4.new_code_cell("y", id="b")],
        metadata={"language_info": {"name": "python", "version": "3.11.7"}, "vscode": {}},
    )
    notebook.cells[0].metadata = {"execution": {"iopub.status.busy": "2026-01-01"}, "tags": ["t"]}
    notebook.cells[1].id = "a"  # an editor's copy and paste
    path = tmp_path / "n.ipynb"
    notebooks.write(path, notebook)
    first = path.read_bytes()
    notebooks.write(path, notebooks.read(path))
    assert path.read_bytes() == first
    assert b"2026" not in first and b"3.11.7" not in first and b"vscode" not in first
    assert b"\r" not in first and first.endswith(b"}\n")
    assert [cell.id for cell in notebooks.read(path).cells] == ["a", "cell-01"]


def test_pieces_of_one_stream_are_joined():
    def piece(text, name="stdout"):
        return nbformat.v4.new_output("stream", name=name, text=text)

    cell = nbformat.v4.new_code_cell(
        "f()", outputs=[piece("a\n"), piece("b\n"), piece("c\n", "stderr"), piece("d\n")]
    )
    cleaned = notebooks.clean(nbformat.v4.new_notebook(cells=[cell]))
    assert [output.text for output in cleaned.cells[0].outputs] == ["a\nb\n", "c\n", "d\n"]


def test_kernels_see_no_settings_of_the_users(monkeypatch, tmp_path):
    for name in ("PYTHONPATH", "MPLBACKEND", "FAST"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    found = notebooks.kernel_environment(tmp_path)
    assert not {"PYTHONPATH", "MPLBACKEND", "FAST"} & set(found)
    assert found["CUDA_VISIBLE_DEVICES"] == ""
    assert Path(found["IPYTHONDIR"]).is_relative_to(tmp_path)


def test_a_notebook_is_executed_and_its_time_stated(tmp_path):
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell("Read: 1 minute · run: about 8 minutes"),
            nbformat.v4.new_code_cell("import os\nprint(os.environ['CUDA_VISIBLE_DEVICES'] + 'x')"),
        ]
    )
    seconds = run_notebooks.execute(notebook, tmp_path)
    assert notebook.cells[1].outputs[0].text == "x\n"
    assert run_notebooks.state(notebook, seconds)
    assert run_notebooks.stated_seconds(notebook.cells[0].source) < 480


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (1, "5 seconds"),
        (5, "5 seconds"),
        (11.2, "15 seconds"),
        (54, "55 seconds"),
        (57, "1 minute"),
        (61, "1 minute"),
        (64, "1.5 minutes"),
        (100, "2 minutes"),
        (149, "2.5 minutes"),
    ],
)
def test_durations_are_rounded_up_for_readers(seconds, text):
    assert run_notebooks.rounded(seconds) == text


def test_a_stated_time_is_kept_while_it_is_about_right():
    def stated_after(seconds):
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_markdown_cell("run: about 15 seconds")]
        )
        run_notebooks.state(notebook, seconds)
        return notebook.cells[0].source

    assert stated_after(12) == stated_after(16) == "run: about 15 seconds"
    assert stated_after(30) == "run: about 30 seconds"
    assert stated_after(4) == "run: about 5 seconds"


def test_a_chapter_without_a_place_for_its_time_is_noticed():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Chapter")])
    assert not run_notebooks.state(notebook, 10.0)


# `make test` itself


def test_every_step_runs_and_one_failure_fails_all(monkeypatch, capsys):
    ran = []
    steps = {
        "lint": lambda: ran.append("lint") or True,
        "unit": lambda: bool(ran.append("unit")),
        "book": lambda: ran.append("book") or True,
    }
    monkeypatch.setattr(check, "STEPS", steps)
    assert check.main([]) == 1
    assert ran == ["lint", "unit", "book"]
    closing = capsys.readouterr().out.split("Where the time went")[1]
    assert closing.count("passed") == 2
    assert closing.count("FAILED") == 2  # the step, and the whole
    assert check.main(["--skip", "unit"]) == 0


def test_steps_can_be_chosen_and_a_misspelt_one_is_refused(capsys):
    assert check.chosen("book,lint", "") == ["lint", "book"]
    assert "other-cpu" not in check.chosen("", "other-cpu")
    assert check.main(["--only", "units"]) == 2
    assert "no step is called 'units'" in capsys.readouterr().err


def test_the_chapters_are_run_slowest_first(tmp_path, monkeypatch):
    paths = [tmp_path / f"{name}.ipynb" for name in ("new", "short", "long")]
    (tmp_path / "results").mkdir()
    times = '{"short": {"seconds": 2}, "long": {"seconds": 30}}'
    (tmp_path / "results/notebooks.json").write_text(times)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "chapters", lambda: paths)
    assert [path.stem for path in check.slowest_first()] == ["long", "short", "new"]


def test_the_closing_table_shows_minutes_and_seconds():
    shown = check.table([("lint", True, 3.2), ("unit", False, 200.0)])
    assert "lint       passed    0:03" in shown
    assert "unit       FAILED    3:20" in shown
    assert shown.splitlines()[-1].split() == ["all", "FAILED", "3:23"]


# The lock


def test_the_lock_leaves_out_what_would_bind_others():
    text = lock.locked(
        {
            "torch": "2.13.0+cpu",
            "torchao": "0.18.0",
            "qlora-lab": "0.1.0",
            "nvidia-cublas-cu12": "12.8",
            "Jinja2": "3.1.6",
        }
    )
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert "torch==2.13.0" in lines and "Jinja2==3.1.6" in lines
    assert not [line for line in lines if line.startswith(("torchao", "qlora", "nvidia"))]
    assert lines == sorted(lines, key=str.lower)


def test_each_chapter_that_uses_a_model_has_one_place_to_change_it():
    places = {
        path.name[:2]: other_model.with_model(notebooks.read(path), "another")
        for path in notebooks.chapters()
    }
    assert places == dict.fromkeys(places, 1) | {"12": 0}


def test_the_other_model_is_another_architecture_that_the_chapters_can_load(tmp_path):
    from qlora_lab.loading import load_model

    other_model.make_model(tmp_path)
    model = load_model(tmp_path, bits=4).model
    assert model.config.model_type == "qwen2" != load_model().model.config.model_type
