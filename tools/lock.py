"""Write constraints.txt from what is installed: every version that requirements.txt brings along.

Left out is what must not bind others: the package itself, local paths, what only the benchmark
uses, and local version labels (torch 2.13.0+cpu becomes 2.13.0, which any build satisfies).
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The installer, the course itself, and torchao, which is pinned where it is used.
LEFT_OUT = {"pip", "qlora-lab", "torchao"}
# Needed on other systems than the one that this file is made on.
ELSEWHERE = {"appnope": "1.0.0", "colorama": "0.4.6", "pywinpty": "3.1.2"}
HEAD = """\
# Locks what the requirements files bring along; they pin the direct dependencies themselves.
# Written by `make lock` (tools/lock.py) from an environment with requirements.txt and
# requirements-lab.txt.
"""


def locked(distributions: dict[str, str]) -> str:
    """Return the text of a constraints file.

    Args:
        distributions: Installed distribution -> version.
    """
    kept = dict(ELSEWHERE)
    for name, version in distributions.items():
        # nvidia's and triton's wheels are PyTorch's business: it pins them itself, by platform.
        if name.lower() in LEFT_OUT or re.match(r"nvidia|triton|cuda", name.lower()):
            continue
        kept[name] = version.partition("+")[0]
    return HEAD + "".join(f"{name}=={kept[name]}\n" for name in sorted(kept, key=str.lower))


def main() -> int:
    """Write constraints.txt."""
    found = {dist.name: dist.version for dist in metadata.distributions() if dist.name}
    (ROOT / "constraints.txt").write_text(locked(found), encoding="utf-8", newline="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
