#!/usr/bin/env python3
"""Run the model in this folder: `./edgectl --help`. Needs Python 3.10 or newer and nothing else."""

import sys
from pathlib import Path

# The bundle's files are hashed: Python must not put its bytecode beside them.
sys.dont_write_bytecode = True
if sys.version_info < (3, 10):  # noqa: UP036 - this file runs on whatever Python a device has
    sys.exit("error: edgectl needs Python 3.10 or newer")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

if __name__ == "__main__":
    from device.cli import main  # type: ignore[import-not-found, unused-ignore]

    sys.exit(main(HERE, sys.argv[1:]))
