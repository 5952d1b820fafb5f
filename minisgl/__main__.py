"""`python -m minisgl` and `torchrun --nproc-per-node N minisgl` (which starts this folder as a script)."""

import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started as a folder: its modules must not shadow standard ones, and `minisgl` must be importable.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from minisgl.cli.main import main

if __name__ == "__main__":
    main()
