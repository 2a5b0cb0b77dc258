"""``python -m spin``, which is ``spin``: see :mod:`spin.cli`."""

import os
import sys

# `python -m` looks for every package in the folder that it stands in first: in somebody's run folder, a file named
# yaml.py would be run. Stay in a checkout, where this package itself lies.
if sys.path and sys.path[0] == os.getcwd() != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
    del sys.path[0]

from spin.cli import main  # noqa: E402 - the line above comes first

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
