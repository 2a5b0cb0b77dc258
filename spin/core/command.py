"""Commands of this package, as a person can paste them."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path


def spin_command(*words: object) -> str:
    """``spin WORDS`` in one line for the shell that this program was started from: by its name, if that is the script
    of this interpreter, else by the interpreter's path."""
    script = shutil.which("spin")
    is_own = script is not None and Path(script).absolute() == Path(sys.executable).absolute().with_name("spin")
    return shlex.join([*(["spin"] if is_own else [sys.executable, "-m", "spin"]), *map(str, words)])
