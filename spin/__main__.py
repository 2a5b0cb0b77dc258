"""``python -m spin``: see :mod:`spin.cli`."""

import sys

from spin.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
