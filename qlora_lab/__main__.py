"""`python -m qlora_lab` is `qlora-lab`, for machines where scripts are not on the path."""

import sys

from qlora_lab.cli import main

if __name__ == "__main__":
    sys.exit(main())
