"""Give the course its public address: `make set-url`, or `make set-url URL=https://github.com/a/b`.

The address stands in one place, `_config.yml` (`repository: url:`). This writes it there and stamps
what cannot read it from there: the first cell of every notebook, and CITATION.cff. The launch
buttons are made from it when the book is built. Without an argument the clone's own `origin` is
taken. `--unset` takes the address away again everywhere.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_CONFIG_LINE = re.compile(r'^(repository:\n(?:[ \t].*\n)*?[ \t]+url: )"(.*)"$', re.MULTILINE)
_CITATION_LINE = re.compile(r"^repository-code: .*\n", re.MULTILINE)
_ADDRESS = re.compile(r"https://[A-Za-z0-9.-]+(:\d+)?(/[A-Za-z0-9._~-]+){2,}")


class AddressError(ValueError):
    """What was given is not the public address of a repository."""


def normalized(address: str) -> str:
    """Return an address as a browser takes it.

    Args:
        address: `https://host/owner/name`, with or without `.git` or a slash at the end, or the
            `git@host:owner/name.git` and `ssh://` forms that git uses.

    Returns:
        `https://host/owner/name`.

    Raises:
        AddressError: It is none of these, or carries a user name or password.
    """
    text = address.strip()
    text = re.sub(r"^(?:ssh://)?git@([^:/]+)[:/]", r"https://\1/", text)
    text = text.rstrip("/").removesuffix(".git")
    if not _ADDRESS.fullmatch(text):
        raise AddressError(
            f"{_without_password(address)!r} is not a repository's public address, "
            "which looks like https://github.com/owner/name"
        )
    return text


def _without_password(address: str) -> str:
    return re.sub(r"//[^/@]*@", "//...@", address)


def origin(root: Path = ROOT) -> str:
    """Return the address of the clone's `origin`.

    Raises:
        AddressError: There is no clone, or it has no origin.
    """
    command = ["git", "config", "--get", "remote.origin.url"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if result.returncode or not result.stdout.strip():
        raise AddressError("this clone has no origin: make set-url URL=https://github.com/...")
    return result.stdout.strip()


def configured_url(root: Path = ROOT) -> str:
    """Return the address in `_config.yml`, "" while there is none."""
    match = _CONFIG_LINE.search((root / "_config.yml").read_text(encoding="utf-8"))
    if match is None:
        raise AddressError('_config.yml has no line `url: "..."` under `repository:`')
    return match[2]


def cited_url(root: Path = ROOT) -> str:
    """Return the address in CITATION.cff, "" while there is none."""
    match = re.search(
        r'^repository-code: "(.*)"$',
        (root / "CITATION.cff").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    return match[1] if match else ""


def set_url(url: str, root: Path = ROOT) -> list[str]:
    """Write the address everywhere it has to stand.

    Args:
        url: A normalized address, or "" to take it away.
        root: The repository.

    Returns:
        The files that changed, relative to the repository.
    """
    from tools.bootstrap_cell import stamp_all

    configured_url(root)  # fails before anything is written where the line is gone
    changed = []
    for name, edit in (("_config.yml", _edit_config), ("CITATION.cff", _edit_citation)):
        path = root / name
        before = path.read_text(encoding="utf-8")
        after = edit(before, url)
        if after != before:
            path.write_text(after, encoding="utf-8", newline="\n")
            changed.append(name)
    return changed + [f"notebooks/{name}" for name in stamp_all(url, root / "notebooks")]


def _edit_config(text: str, url: str) -> str:
    return _CONFIG_LINE.sub(lambda match: f'{match[1]}"{url}"', text)


def _edit_citation(text: str, url: str) -> str:
    text = _CITATION_LINE.sub("", text)
    return f'{text.rstrip()}\nrepository-code: "{url}"\n' if url else text


def main(argv: list[str] | None = None) -> int:
    """Parse the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Set the repository's public address.")
    parser.add_argument("url", nargs="?", default="", help="default: the clone's own origin")
    parser.add_argument("--unset", action="store_true", help="take the address away")
    options = parser.parse_args(argv)
    try:
        url = "" if options.unset else normalized(options.url or origin())
        changed = set_url(url)
    except AddressError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"address: {url or '(none)'}")
    print("\n".join(f"  written: {name}" for name in changed) or "  nothing to change")
    return 0


if __name__ == "__main__":
    sys.exit(main())
