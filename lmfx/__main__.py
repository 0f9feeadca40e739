"""`python -m lmfx` is the `lmfx` command."""

import sys

from lmfx.cli import main

if __name__ == "__main__":
    sys.exit(main())
