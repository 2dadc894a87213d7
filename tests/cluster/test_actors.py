"""The actors without Ray around them."""

import subprocess
import sys


def test_a_shard_that_cannot_go_on_takes_its_actor_with_it(tmp_path):
    """Ray then says that the actor died; a process that only looks alive would keep what is not served."""
    code = f"""
import time
from engrid.cluster.actors import ShardActor
actor = ShardActor("s0", "file:{tmp_path}", "{tmp_path}/state", 1 << 20, "127.0.0.1", [])
actor._server._service.gate.fail("a test")
time.sleep(60)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 1
    assert "shard s0 cannot go on and ends: a test" in ended.stderr
