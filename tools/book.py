"""Build the web book, count its pages, say where it is and, on a terminal, serve it.

`python -m tools.book` builds from the notebooks' stored outputs; nothing is executed.
`--strict` makes every warning an error and starts from nothing, as `make test` does.

Jupyter Book has been seen to succeed without writing a page (when its version 2 met a
configuration of version 1), so a build counts as good only when each page of the table of
contents is there.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
LOG = ROOT / "_build" / "book.log"
HOST = "127.0.0.1"  # this machine only: the book is nobody else's business


class BuildError(RuntimeError):
    """The book could not be built as it has to be."""


def pages_of(toc: dict) -> list[str]:
    """Return every document of a Jupyter Book table of contents, in reading order.

    Args:
        toc: The parsed `_toc.yml`.

    Returns:
        Paths without suffix, as the table of contents gives them.
    """
    pages = [toc["root"]] if "root" in toc else []
    if "file" in toc:
        pages.append(toc["file"])
    for key in ("parts", "chapters", "sections"):
        for entry in toc.get(key, []):
            pages += pages_of(entry)
    return pages


def expected_pages(root: Path = ROOT) -> list[str]:
    """Return the documents that the built book must contain."""
    import yaml

    return pages_of(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8")))


def missing_pages(html: Path, pages: list[str]) -> list[str]:
    """Return the pages that are not there, or hold no article."""
    missing = []
    for page in pages:
        path = html / f"{page}.html"
        if not path.is_file() or "<article" not in path.read_text(encoding="utf-8"):
            missing.append(page)
    return missing


def build(strict: bool = False) -> int:
    """Build the book into `_build/html`.

    Args:
        strict: Remove the pages of an earlier build first, and turn warnings into errors.

    Returns:
        The number of pages, all of them checked to be there.

    Raises:
        BuildError: Sphinx failed or warned (strict), or a page is missing.
    """
    if strict and HTML.exists():
        shutil.rmtree(HTML)  # a page left over from an earlier build must not be counted
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()"]
    # --all: Sphinx's own idea of what has changed knows nothing of docstrings in modules, of our
    # extension, or of a page that went away.
    command += ["build", str(ROOT), "--path-output", str(ROOT), "-q", "--all"]
    command += ["-W", "--keep-going"] if strict else []
    LOG.parent.mkdir(exist_ok=True)
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONUTF8": "1", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    lines = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout).splitlines()  # colours are for terminals
    LOG.write_text("\n".join(lines) + "\n", encoding="utf-8")
    complaints = [line for line in lines if _is_complaint(line)]
    if result.returncode or (strict and complaints):
        raise BuildError("\n".join(complaints or lines[-25:]))
    pages = expected_pages()
    missing = missing_pages(HTML, pages)
    if missing:
        raise BuildError(f"the build succeeded without these pages: {', '.join(missing)}")
    # Sphinx leaves a page as it is when nothing in it changed; "built since" looks at this file.
    (HTML / "index.html").touch()
    for line in complaints:
        print(line, file=sys.stderr)
    return len(pages)


def _is_complaint(line: str) -> bool:
    return any(word in line for word in ("WARNING:", "ERROR:", "CRITICAL:", "Error:"))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        """A line for each request would bury the address that the reader needs."""


def serve(port: int, html: Path = HTML) -> ThreadingHTTPServer:
    """Return a server for the built pages, bound but not yet running.

    Raises:
        BuildError: The port is taken, or may not be used.
    """
    try:
        return ThreadingHTTPServer((HOST, port), partial(_Quiet, directory=str(html)))
    except OSError as error:
        raise BuildError(
            f"port {port} cannot be used ({error.strerror}): choose another, "
            f"make book PORT={port % 65535 + 1}"
        ) from None
    except OverflowError:
        raise BuildError(f"port {port} is none: choose one from 1024 to 65535") from None


def main(argv: list[str] | None = None) -> int:
    """Parse the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Build the web book and serve it.")
    parser.add_argument("--strict", action="store_true", help="warnings are errors")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument(
        "--serve",
        choices=["auto", "always", "never"],
        default="auto",
        help="auto: only on a terminal",
    )
    options = parser.parse_args(argv)
    wanted = options.serve == "always" or (options.serve == "auto" and sys.stdout.isatty())
    try:
        # Before the build: a reader should not wait half a minute to learn that the port is taken.
        server = serve(options.port) if wanted else None
        start = time.monotonic()
        count = build(options.strict)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{count} pages in {time.monotonic() - start:.0f} s: {HTML / 'index.html'}", flush=True)
    if server is None:
        return 0
    print(f"Read it at http://localhost:{options.port} (Ctrl-C ends)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
