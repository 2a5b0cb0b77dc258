"""docs/many_hosts.md: its torchrun command, as two hosts of one process each on this machine."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.recipes.helpers import CONFIG, REPO, environment, free_port, metrics_of, start, tiny_overrides


@pytest.mark.slow
def test_the_documented_command_on_two_hosts(tmp_path):
    """Both end with 0, one run is written, and only the first host's screen tells of it."""
    text = (REPO / "docs" / "many_hosts.md").read_text(encoding="utf-8")
    documented = re.search(r"^torchrun .*$", text, flags=re.MULTILINE)[0]
    port = str(free_port())
    hosts = []
    for rank in (0, 1):
        words = shlex.split(documented.replace("$NODE_RANK", str(rank)).replace("$HEAD", "127.0.0.1"))
        assert words[0] == "torchrun" and words[-1].startswith("output_dir=")
        words[0:1] = [sys.executable, "-m", "torch.distributed.run"]
        words[words.index("--nproc_per_node") + 1] = "1"
        words[words.index("--master_port") + 1] = port
        words[words.index("--config") + 1] = str(CONFIG)
        words[-1:] = [*tiny_overrides(tmp_path / "out"), "max_iterations=1", "max_epochs=1", "limit_train_batches=2"]
        env = {**environment(), "GLOO_SOCKET_IFNAME": "lo"}
        hosts.append(start(words, cwd=tmp_path, env=env, stderr=subprocess.PIPE))
    try:
        ends = [host.communicate(timeout=120) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0], ends[0][1][-2000:] + ends[1][1][-2000:]
    assert "Finished after 2 steps" in ends[0][1] and "Iteration 0" in ends[0][0]
    assert "Finished" not in ends[1][1] and "Iteration" not in ends[1][0] and "step" not in ends[1][1]
    assert [row["step"] for row in metrics_of(tmp_path / "out")] == [0, 1, 2]
    assert os.listdir(tmp_path) == ["out"]
