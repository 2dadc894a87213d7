"""A Python of its own for what must be settled before triton is imported; it imports what this process imports."""

import os
import subprocess
import sys


def python(*arguments, **environment):
    """The finished process; no TRITON_* variable of ours reaches it but those given."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**kept, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=220,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
