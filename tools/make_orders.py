"""Write the orders task to `qlora_lab/assets/orders`, one JSONL file for each split.

    python -m tools.make_orders            # writes the files
    python -m tools.make_orders --check    # only says whether they are what the generator makes

The files are shipped, so that a run needs no generator and a reader can open them; this script
and its fixed seed are how they came to be.
"""

import argparse
import json
import sys
from pathlib import Path

from qlora_lab.orders import Row, make_splits

FOLDER = Path(__file__).resolve().parent.parent / "qlora_lab" / "assets" / "orders"


def as_jsonl(rows: list[Row]) -> bytes:
    """One JSON object a line; bytes, so that Windows writes the same file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def main() -> int:
    """Write or check the files; the exit code is the number of files that differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare only")
    check = parser.parse_args().check
    FOLDER.mkdir(parents=True, exist_ok=True)
    stale = []
    for split, rows in make_splits().items():
        path = FOLDER / f"{split}.jsonl"
        wanted = as_jsonl(rows)
        if check and (not path.exists() or path.read_bytes() != wanted):
            stale.append(path.name)
        elif not check:
            path.write_bytes(wanted)
            print(f"{len(rows):5d} rows  {path.name}")
    if stale:
        print(f"not what the generator makes: {', '.join(stale)}", file=sys.stderr)
    return len(stale)


if __name__ == "__main__":
    sys.exit(main())
