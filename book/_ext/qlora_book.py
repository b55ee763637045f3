"""What this book needs of Sphinx beyond Jupyter Book, in eight short pieces.

1. API pages without torch: whatever the package imports that is not in the standard library is
   mocked. The list is read from the sources, so that it cannot fall behind them.
2. Launch buttons follow the one address in `_config.yml`; without an address there is none.
3. A figure's alt text, which a notebook keeps in the output's metadata, reaches the page.
4. Docstrings are written for people: code in `single backticks`, whatever it holds. Here it becomes
   a link where it is a name, and literal text where it is an expression.
5. The directive `{module-table}`: every module with the first sentence of its docstring.
6. No page loads a script from somebody else's server.
7. The directive `{pretest}`: every claim of chapter 12 as a question, without its answer.
8. A notebook, which knows no `{term}`, can link `glossary.md#term-absmax` like any heading.
"""

from __future__ import annotations

import ast
import hashlib
import html
import json
import re
import sys
from base64 import b64decode
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import _MockObject
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "qlora_lab"
sys.path.insert(0, str(ROOT))
from tools.book import expected_pages  # noqa: E402  the table of contents, read in one place

COLAB = "https://colab.research.google.com"
JUPYTER_BOOK = {"IPython"}  # Jupyter Book brings and needs it: not to be mocked


def third_party_imports(folder: Path) -> list[str]:
    """Return the top-level names that the modules of a package import from outside.

    Args:
        folder: The package's folder.

    Returns:
        Sorted names, without the standard library's and the package's own.
    """
    names = set()
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
            if isinstance(node, ast.Import):
                names.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.partition(".")[0])
    return sorted(names - set(sys.stdlib_module_names) - {folder.name} - JUPYTER_BOOK)


def launch_buttons(repository_url: str) -> dict[str, str]:
    """Return the theme's launch buttons: Colab for a GitHub address, else none."""
    return {"colab_url": COLAB} if repository_url.startswith("https://github.com/") else {}


def readable_code(docstring: str) -> str:
    """Turn `single backticks` into what reStructuredText needs for the same look.

    Args:
        docstring: A docstring, dedented.

    Returns:
        The same with expressions as literal text, each on one line; names stay as they are, for
        the default role to link them.
    """

    def replace(match: re.Match) -> str:
        code = " ".join(match[1].split())
        quoted = f"`{code}`" if re.fullmatch(r"[A-Za-z_][\w.]*(\(\))?", code) else f"``{code}``"
        return quoted + (r"\ " if match[2] else "")

    # A span may run over a line end, never over a blank line; roles and hyperlinks stay.
    span = r"(?<![`:\w\\])`((?:[^`\n]|\n(?!\s*\n))+)`(?![`_])(?=(\w)?)"
    return re.sub(span, replace, docstring)


def with_literal_blocks(lines: list[str]) -> list[str]:
    """Mark what a docstring sets in by four columns, after an empty line, as a literal block.

    Args:
        lines: A docstring's lines, dedented.

    Returns:
        The lines with `::` in front of each such block, unless it continues a list.
    """
    result: list[str] = []
    for number, line in enumerate(lines):
        above = [before for before in lines[:number] if before.strip()]
        if above and not lines[number - 1].strip() and line.strip():
            indent, last = _indent(line), above[-1]
            in_list = re.match(r"\s*([-*]|\d+\.)\s", last)
            if indent >= _indent(last) + 4 and not in_list and not last.rstrip().endswith("::"):
                result += [" " * _indent(last) + "::", ""]
        result.append(line)
    return result


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def alt_texts(notebook: dict) -> dict[str, str]:
    """Map each stored picture of a notebook to its alt text.

    Args:
        notebook: The parsed notebook.

    Returns:
        SHA-256 of the PNG's bytes (the file name that MyST-NB gives it) -> alt text.
    """
    found = {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            png = output.get("data", {}).get("image/png")
            alt = output.get("metadata", {}).get("image/png", {}).get("alt")
            if png and alt:
                found[hashlib.sha256(b64decode("".join(png))).hexdigest()] = alt
    return found


class NotInstalled:
    """An import hook under which the given packages are not there, whatever the machine has.

    autodoc mocks them while it imports a documented module, but reads the modules of base classes
    outside the mocks: with torch installed it would load torch after all.
    """

    def __init__(self, names: list[str]):
        self.names = frozenset(names)

    def find_spec(self, name: str, path=None, target=None) -> None:
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is kept out of the book's build", name=name)


class ModuleTable(SphinxDirective):
    """List every public module beside the first sentence of its docstring."""

    def run(self) -> list[nodes.Node]:
        lines = ["```{list-table}", ":widths: 30 70", ""]
        for page in expected_pages():
            folder, _, name = page.rpartition("/")
            source = PACKAGE / f"{name}.py"
            if not source.is_file():  # a module that is a folder
                source = PACKAGE / name / "__init__.py"
            if folder == "book/api" and source.is_file():
                self.env.note_dependency(str(source))
                lines += [f"* - [`{name}`]({name}.md)", f"  - {first_paragraph(source)}"]
        return self.parse_text_to_nodes("\n".join([*lines, "```"]))


class Pretest(SphinxDirective):
    """Ask for a belief and how sure it is, for each claim; `_static/claims.js` keeps the marks."""

    def run(self) -> list[nodes.Node]:
        source = PACKAGE / "assets" / "claims.json"
        self.env.note_dependency(str(source))
        asked = "".join(question(c) for c in json.loads(source.read_text(encoding="utf-8")))
        end = '<p><span class="pretest-status" role="status"></span> '
        end += '<button type="reset">Clear my marks</button></p>'
        return [nodes.raw("", f'<form class="pretest">{asked}{end}</form>', format="html")]


def question(claim: dict) -> str:
    """Return the HTML that asks about one claim."""
    answers = {"true": "true", "depends": "true of something, not of all", "false": "false"}
    sure = {"guess": "a guess", "fairly": "fairly sure", "certain": "certain"}
    number = claim["id"]
    radios = "".join(
        f'<label><input type="radio" name="claim-{number}" value="{value}"> {words}</label> '
        for value, words in answers.items()
    )
    options = "".join(f'<option value="{key}">{words}</option>' for key, words in sure.items())
    return (
        f'<fieldset data-claim="{number}"><legend>{number}. {html.escape(claim["claim"])}</legend>'
        f'{radios}<label class="sure">How sure? <select>{options}</select></label></fieldset>'
    )


def first_paragraph(source: Path) -> str:
    """Return the first paragraph of a module's docstring as one line."""
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())


def configure(app: Sphinx, config) -> None:
    """Set what depends on the sources or on the repository's address."""
    config.autodoc_mock_imports = third_party_imports(PACKAGE)
    sys.meta_path.insert(0, NotInstalled(config.autodoc_mock_imports))
    # `torch.device | str` in a signature is evaluated when a module is imported: let mocks do it.
    _MockObject.__or__ = _MockObject.__ror__ = lambda self, other: self
    config.nb_ipywidgets_js = {}
    options = config.html_theme_options
    options["launch_buttons"] = launch_buttons(options.get("repository_url", ""))


def drop_live_code(app: Sphinx) -> None:
    """Take away what Jupyter Book adds for live code: an address on every page, and an error."""
    for event in ("env-before-read-docs", "doctree-resolved"):
        for listener in list(app.events.listeners[event]):
            if listener.handler.__module__ == "sphinx_thebe":
                app.disconnect(listener.id)


def add_alt_texts(app: Sphinx, doctree: nodes.document) -> None:
    """Give each picture that a notebook cell drew the alt text stored with it."""
    source = Path(app.env.doc2path(app.env.docname))
    if source.suffix != ".ipynb":
        return
    alts = alt_texts(json.loads(source.read_text(encoding="utf-8")))
    for image in doctree.findall(nodes.image):
        alt = alts.get(Path(image["uri"]).stem)
        if alt:
            image["alt"] = alt


def add_glossary_anchors(app: Sphinx, doctree: nodes.document) -> None:
    """Let ordinary Markdown links lead to a glossary's terms, as they lead to headings."""
    metadata = app.env.metadata[app.env.docname]
    for term in doctree.findall(nodes.term):
        for anchor in term["ids"]:
            slugs = metadata.setdefault("myst_slugs", {})
            slugs.setdefault(anchor, (term.line, anchor, term.astext()))


def rewrite_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """Apply `with_literal_blocks` and `readable_code`, before napoleon reads the sections."""
    lines[:] = readable_code("\n".join(with_literal_blocks(lines))).split("\n")
    if what in ("attribute", "property"):
        # napoleon takes what stands before a colon for the type: "Bytes held: codes and scales".
        app.qlora_prose = list(lines)


def restore_prose(app, what, name, obj, options, lines: list[str]) -> None:
    """Undo napoleon where a docstring is one sentence and has no sections."""
    if what in ("attribute", "property"):
        lines[:] = app.qlora_prose


def setup(app: Sphinx) -> dict:
    """Register with Sphinx."""
    app.add_directive("module-table", ModuleTable)
    app.add_directive("pretest", Pretest)
    app.add_js_file("claims.js", loading_method="defer")
    app.add_js_file("predictions.js", loading_method="defer")
    app.connect("config-inited", configure, priority=100)
    app.connect("autodoc-process-docstring", rewrite_docstring, priority=100)
    app.connect("autodoc-process-docstring", restore_prose, priority=900)
    app.connect("builder-inited", drop_live_code)
    app.connect("doctree-read", add_alt_texts)
    app.connect("doctree-read", add_glossary_anchors)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
