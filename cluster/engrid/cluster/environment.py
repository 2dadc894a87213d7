"""What a process that we start gets of the shell's environment.

| variable | what becomes of it |
|---|---|
| http_proxy, https_proxy, grpc_proxy, all_proxy | not passed on: what our processes call is ours |
| RAY_* | not passed on to a Ray of our own; to join another they may be what it takes (RAY_AUTH_MODE, RAY_ADDRESS) |
| PYTHONPATH | passed on with absolute paths; an empty entry, which means the working folder, is left out |
| PYTHONSAFEPATH | set, and the working folder is one of ours: a random.py or ray.py beside the user is not run |
| PYTHONINSPECT, PYTHONWARNINGS, PYTHONSTARTUP, PYTHONDEBUG, PYTHONVERBOSE | not passed on: they are of the user's own Python |
| PYTHONUTF8 | set: text is UTF-8 whatever the locale |
| all else: CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS, TMPDIR, LD_LIBRARY_PATH, HOME | passed on |
"""

from __future__ import annotations

import os
from collections.abc import Mapping

PROXIES = frozenset({"http_proxy", "https_proxy", "grpc_proxy", "all_proxy", "no_proxy", "no_grpc_proxy"})
OF_THE_USERS_PYTHON = frozenset(
    {"PYTHONINSPECT", "PYTHONWARNINGS", "PYTHONSTARTUP", "PYTHONDEBUG", "PYTHONVERBOSE", "PYTHONIOENCODING"}
)


def child_environment(shell: Mapping[str, str], *, keep_ray: bool) -> dict[str, str]:
    """keep_ray: whether RAY_* variables are passed on."""
    kept = {
        name: value
        for name, value in shell.items()
        if name.lower() not in PROXIES and name not in OF_THE_USERS_PYTHON and (keep_ray or not name.startswith("RAY_"))
    }
    path = [os.path.abspath(each) for each in kept.pop("PYTHONPATH", "").split(os.pathsep) if each]  # noqa: PTH100 - keeps links
    if path:
        kept["PYTHONPATH"] = os.pathsep.join(path)
    return {**kept, "PYTHONSAFEPATH": "1", "PYTHONUTF8": "1"}
