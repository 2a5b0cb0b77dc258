"""Two ranks look for the newest whole state, of which each reads a part. Argument: a run with states 1 (whole) to 3."""

import sys

from spin.checkpoint import SPINCheckpointer
from spin.core.ranks import init_world, shutdown

found = SPINCheckpointer("unused", sys.argv[1], "LLAMA3_2").latest("auto", init_world("cpu"))
assert found.name == "step_00000001", found
shutdown()
