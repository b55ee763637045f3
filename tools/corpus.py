"""The pretraining corpus: Python source that is present wherever the requirements are.

Three pools of files, because the held-out text is standard-library code and nearby text teaches
most:

* ``core``: the standard library without its tests,
* ``tests``: the standard library's own tests (absent from some Python builds),
* ``packages``: the `.py` files of the pinned packages, at most a few megabytes of each so that
  no single project sets the tone.

A fourth, ``definitions``, repeats functions and small classes of the other three as texts of
their own.

A language model that has seen its exam proves nothing, and Python code is copied a lot
(`multiprocess` is `multiprocessing`, pip vendors `tomllib`). So every training file that shares
with any held-out file either

* a normalised function body of six lines or more (docstring, comments and layout removed), or
* a run of 50 word-or-punctuation tokens (comments and docstrings included)

is dropped whole. :func:`overlaps` is that rule; `tests/test_corpus.py` proves it with planted
copies.
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import re
import sysconfig
import textwrap
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from qlora_lab import heldout_dir

MIN_BODY_LINES = 6
RUN_LENGTH = 50
MAX_PACKAGE_BYTES = 5_000_000
PACKAGES = [
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "numpy", "pandas",
    "networkx", "sympy", "mpmath", "matplotlib", "huggingface_hub", "tokenizers", "safetensors",
    "pyarrow", "pip", "setuptools", "pygments", "jinja2", "rich", "fsspec", "packaging", "click",
    "tqdm", "multiprocess", "dill", "sphinx", "docutils", "jupyter_book", "nbformat", "nbclient",
    "nbconvert", "jupyter_client", "jupyter_core", "ipykernel", "IPython", "traitlets", "tornado",
    "sqlalchemy", "requests", "urllib3", "httpx", "anyio", "yaml", "jsonschema", "hypothesis",
    "pytest", "_pytest", "markdown_it", "myst_parser", "bs4", "jedi", "parso", "prompt_toolkit",
    "PIL", "fontTools", "babel", "dateutil", "aiohttp", "attr", "psutil", "debugpy",
]  # fmt: skip

_TOKEN = re.compile(r"\w+|[^\w\s]")


def read_text(path: Path) -> str | None:
    """The file as text, or None where it is not UTF-8 or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):
        return None
    return text.replace("\r\n", "\n") if text.strip() else None


def function_bodies(source: str) -> set[str]:
    """Normalised bodies of all functions with at least six lines once normalised.

    `ast.unparse` removes comments, layout and quoting style; the docstring is taken off by hand.
    Source that this Python cannot parse yields nothing: the token rule still covers it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return set()
    bodies = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        statements = node.body
        if ast.get_docstring(node, clean=False) is not None:
            statements = statements[1:]
        if not statements or node.end_lineno - statements[0].lineno + 1 < 2:
            continue
        lines = [line.strip() for s in statements for line in ast.unparse(s).splitlines()]
        if len(lines) >= MIN_BODY_LINES:
            bodies.add("\n".join(lines))
    return bodies


def token_runs(source: str, length: int = RUN_LENGTH) -> np.ndarray:
    """Sorted unique 64-bit hashes of every run of `length` tokens, as a 1-D uint64 array.

    The hash of a run is a polynomial over its tokens' hashes modulo 2**64. A collision can only
    drop a file too many, never keep one too many.
    """
    tokens = _TOKEN.findall(source)
    if len(tokens) < length:
        return np.empty(0, dtype=np.uint64)
    cache: dict[str, int] = {}
    ids = np.fromiter(
        (cache[t] if t in cache else cache.setdefault(t, _hash64(t)) for t in tokens),
        dtype=np.uint64,
        count=len(tokens),
    )
    runs = np.zeros(len(tokens) - length + 1, dtype=np.uint64)
    factor = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for offset in range(length):
            runs = runs * factor + ids[offset : offset + len(runs)]
    return np.unique(runs)


def _hash64(token: str) -> int:
    return int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "little")


class HeldOut:
    """What must not occur in a training file: bodies and token runs of the held-out files."""

    def __init__(self, texts: list[str]):
        self.bodies = set().union(*(function_bodies(t) for t in texts))
        self.runs = np.unique(np.concatenate([token_runs(t) for t in texts]))

    def overlaps(self, source: str) -> str | None:
        """Why this source may not be trained on ("body" or "run"), or None if it may."""
        if len(self.runs):
            runs = token_runs(source)
            where = np.searchsorted(self.runs, runs)
            where[where == len(self.runs)] = 0
            if (self.runs[where] == runs).any():
                return "run"
        return None if self.bodies.isdisjoint(function_bodies(source)) else "body"


def definitions(texts: list[str]) -> list[str]:
    """Functions, methods and small classes cut out of `texts`, each one a text of its own.

    A file begins with a docstring and imports; who has only read files has never seen a text
    that begins with ``def``, nor one that ends where the function ends. Kept are, moved to column 0
    and without their own docstring, those of 3 to 24 lines (classes: to 40) and two statements or
    more in which no line occurs three times. Their order is that of the texts; no copies.
    """
    found: dict[str, None] = {}
    for text in texts:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        lines = text.split("\n")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                cut = _cut(node, lines)
                if cut:
                    found[cut] = None
    return list(found)


def _cut(node: ast.FunctionDef | ast.ClassDef, lines: list[str]) -> str | None:
    """One definition as :func:`definitions` keeps it, or None."""
    wanted = list(range(node.lineno - 1, node.end_lineno))
    if ast.get_docstring(node, clean=False) is not None:
        doc = node.body[0]
        wanted = [i for i in wanted if not doc.lineno - 1 <= i <= doc.end_lineno - 1]
    kept = [lines[i] for i in wanted]
    if not 3 <= len(kept) <= (40 if isinstance(node, ast.ClassDef) else 24):
        return None
    cut = textwrap.dedent("\n".join(line.rstrip() for line in kept)).strip("\n") + "\n"
    seen = Counter(line.strip() for line in cut.split("\n") if line.strip())
    if max(seen.values()) >= 3 or not cut.startswith(("def ", "class ")):
        return None
    try:  # a string over several lines may have been moved, a one-line body taken away
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(cut)
    except (SyntaxError, ValueError):
        return None
    statements = sum(isinstance(n, ast.stmt) for n in ast.walk(tree))
    methods = any(isinstance(n, ast.FunctionDef) for n in ast.walk(tree))  # no lists of constants
    return cut if len(tree.body) == 1 and statements >= 3 and methods else None


def heldout_texts() -> dict[str, str]:
    """The shipped held-out modules, name -> source text."""
    return {p.name: p.read_text("utf-8") for p in sorted(Path(heldout_dir()).glob("*.py.txt"))}


def _python_files(root: Path, skip: frozenset[str] = frozenset()) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in skip and f != "__pycache__")
        found += [Path(folder) / n for n in sorted(names) if n.endswith(".py")]
    return found


def candidate_files() -> dict[str, list[tuple[str, Path]]]:
    """Pool name -> (name without the machine's folders, path), before the held-out filter."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    site = Path(sysconfig.get_path("purelib"))
    skip = frozenset({"site-packages", "test", "tests", "dist-packages", "lib2to3"})
    core = [(f"stdlib/{p.relative_to(stdlib).as_posix()}", p) for p in _python_files(stdlib, skip)]
    tests = [
        (f"stdlib/{p.relative_to(stdlib).as_posix()}", p)
        for folder in ("test", "unittest/test", "idlelib/idle_test", "distutils/tests")
        for p in _python_files(stdlib / folder)
    ]
    packages = []
    for name in PACKAGES:
        files = [(p.relative_to(site).as_posix(), p) for p in _python_files(site / name)]
        random.Random(name).shuffle(files)
        budget = MAX_PACKAGE_BYTES
        for item in files:
            budget -= item[1].stat().st_size
            if budget < 0:
                break
            packages.append(item)
    return {"core": core, "tests": tests, "packages": packages}


def build(progress=print) -> tuple[dict[str, list[str]], dict]:
    """Read, de-duplicate and filter the three pools.

    Returns:
        pools: pool name -> texts, in an order that depends only on the files' names.
        report: counts, bytes, dropped files with the reason, and the corpus hash.
    """
    held = heldout_texts()
    guard = HeldOut(list(held.values()))
    held_names = {name.removesuffix(".txt") for name in held}
    pools: dict[str, list[str]] = {}
    report: dict = {"heldout_files": len(held), "pools": {}, "dropped": []}
    seen: set[bytes] = set()
    digest = hashlib.sha256()
    for pool, files in candidate_files().items():
        texts = []
        for name, path in files:
            text = read_text(path)
            if text is None or len(text) > 400_000:
                continue
            key = hashlib.sha256(text.encode()).digest()
            if key in seen:
                continue
            seen.add(key)
            # Another Python's version of a held-out module shares its name but perhaps no run.
            if pool == "core" and name.removeprefix("stdlib/") in held_names:
                report["dropped"].append([name, "is held out"])
                continue
            why = guard.overlaps(text)
            if why:
                report["dropped"].append([name, why])
                continue
            texts.append(text)
            digest.update(key)
        pools[pool] = texts
        size = sum(len(t.encode()) for t in texts)
        report["pools"][pool] = {"files": len(texts), "bytes": size}
        progress(f"{pool}: {len(texts)} files, {size / 1e6:.1f} MB")
    report["sha256"] = digest.hexdigest()
    progress(f"dropped because of the held-out text: {len(report['dropped'])} files")
    return pools, report
