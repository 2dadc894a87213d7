"""The Ray actors: shells around a shard and a compute worker. Their gRPC servers run in the actor's own process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any


class ShardActor:
    """Hosts one shard."""

    def __init__(
        self, name: str, directory: str, state: str, memory_bytes: int, host: str | None, checkpoints: list[str]
    ) -> None:
        """state: folder where all of the cluster's shards keep their placement, each in its own. host: None asks Ray.
        checkpoints: folders they may use for checkpoints."""
        from engrid.host.allocator import keep_buffers
        from engrid.rpc.addresses import host_port
        from engrid.shard.config import ShardConfig
        from engrid.shard.grpc.server import ShardServer

        keep_buffers()
        self._state = Path(state, name)
        listen = host_port(host or node_address(), 0)
        self._server = ShardServer(
            ShardConfig(
                name=name,
                listen=listen,
                directory=directory,
                state=self._state,
                memory_bytes=memory_bytes,
                checkpoints=tuple(Path(folder) for folder in checkpoints),
            )
        )
        self._server.when_failed(self._end)

    def _end(self) -> None:
        """A shard that cannot go on takes its process with it, so that Ray knows."""
        self._server.stop()
        os._exit(1)

    def address(self) -> str:
        """host:port it serves at."""
        return self._server.address

    def stop(self, keep_rows: bool) -> None:  # noqa: FBT001 - an actor's call
        """Leaves the directory and closes. keep_rows: as it is to be started again; else it forgets all it has kept."""
        self._server.stop()
        if not keep_rows:
            shutil.rmtree(self._state, ignore_errors=True)


class ComputeActor:
    """Hosts one compute worker, on a GPU where Ray gave it one."""

    def __init__(self, name: str, directory: str, host: str | None) -> None:
        from engrid.host.allocator import keep_buffers
        from engrid.rpc.addresses import host_port
        from engrid.worker.config import WorkerConfig
        from engrid.worker.server import WorkerServer

        keep_buffers()
        listen = host_port(host or node_address(), 0)
        device = "cuda" if gpus_given() else "cpu"
        self._server = WorkerServer(
            WorkerConfig(name=name, listen=listen, directory=directory, device=device, threads=cores_per_worker())
        )

    def address(self) -> str:
        """host:port it serves at."""
        return self._server.address

    def stop(self, keep_rows: bool) -> None:  # noqa: ARG002, FBT001 - as a shard's
        """Cancels what is under way and closes."""
        self._server.stop()


def node_address() -> str:
    """The address other nodes reach this one by."""
    import ray

    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def cores_per_worker() -> int:
    """This node's cores over the workers it has room for. Ray would give an actor that reserves no CPU one thread."""
    import ray

    from .config import COMPUTE_RESOURCE

    here = ray.get_runtime_context().get_node_id()
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    room = next(node["Resources"][COMPUTE_RESOURCE] for node in nodes if node["NodeID"] == here)
    return max(1, int(len(os.sched_getaffinity(0)) // room))


def gpus_given() -> list[Any]:
    """GPUs Ray has set aside for this actor."""
    import ray

    return list(ray.get_gpu_ids())
