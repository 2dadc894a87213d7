"""A compute worker as it runs."""

from __future__ import annotations

from functools import partial

import torch

from engrid.rpc.server import RpcServer
from engrid.v1 import compute_pb2_grpc

from .config import WorkerConfig
from .servicer import ComputeServicer

COMPUTE_SERVICE = "engrid.v1.ComputeService"
THREADS = 16


class WorkerServer:
    """Serves from construction until `stop`."""

    def __init__(self, config: WorkerConfig) -> None:
        self.name = config.name
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._servicer = ComputeServicer(config)
        self._rpc = RpcServer(
            config.listen,
            [COMPUTE_SERVICE],
            partial(compute_pb2_grpc.add_ComputeServiceServicer_to_server, self._servicer),
            threads=THREADS,
            advertise_host=config.advertise_host,
        )
        self.address = self._rpc.address

    def stop(self, grace: float = 1.0) -> None:
        """Cancels what is under way after `grace` seconds, and closes."""
        self._rpc.stop(grace)
        self._servicer.close()
