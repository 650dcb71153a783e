#!/bin/sh
"exec" "python3" "-I" "-S" "$0" "$@"  # fmt: skip
# The line above is the shell's, and to Python a text that leads nowhere: on to Python without packages and without the
# user's settings, as the bundle was tested. `env -S` is not everywhere.

# Run the model in this folder: `./edgectl --help`. Needs Python 3.10 or newer and nothing else.

import os
import sys

# The bundle's files are hashed: Python must not put its bytecode beside them.
sys.dont_write_bytecode = True
if sys.version_info < (3, 10):  # noqa: UP036 - this file runs on whatever Python a device has
    sys.exit("error: edgectl needs Python 3.10 or newer")
HERE = os.path.dirname(os.path.realpath(__file__))
sys.path.insert(0, HERE)

if __name__ == "__main__":
    try:
        from device.main import main  # type: ignore[import-not-found, unused-ignore]

        sys.exit(main(HERE, sys.argv[1:]))
    except KeyboardInterrupt:  # before it is looked after
        sys.exit(130)
