"""What the workers of the pool's tests do; a module of its own, because each worker imports it."""

import json
import os
import sys
import time
from pathlib import Path


def work(job):
    """The job's name says what happens."""
    if job["name"] == "dies":
        sys.exit(3)
    if job["name"] == "hangs":
        Path(job["result"]).write_text(str(os.getpid()), encoding="utf-8")
        time.sleep(120)
    Path(job["result"]).write_text(json.dumps(job["name"]), encoding="utf-8")
    return job["name"] != "fails"
