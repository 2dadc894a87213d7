"""A compute worker as it runs."""

from __future__ import annotations

from functools import partial

import torch

from engrid.rpc.calls import at_most
from engrid.rpc.pools import Pool
from engrid.rpc.server import CONTROL, RpcServer
from engrid.v1 import compute_pb2_grpc

from .config import WorkerConfig
from .servicer import ComputeServicer

COMPUTE_SERVICE = "engrid.v1.ComputeService"
MAX_PROMPT_BYTES = 16 << 20
"""Of a request to generate or to train."""
CHECKS = {"Generate": at_most(MAX_PROMPT_BYTES), "Train": at_most(MAX_PROMPT_BYTES)}


def pools(patience: float) -> list[Pool]:
    """Which calls share threads. patience: seconds that a client may leave a reply untaken."""
    return [
        Pool(name="generations", methods=frozenset({"Generate"}), threads=16, waiting=32, patience=patience),
        # One trains at a time; a second is there to be refused by name.
        Pool(name="trainings", methods=frozenset({"Train"}), threads=2, waiting=4, patience=patience),
        Pool(name="loads of a model", methods=frozenset({"LoadModel"}), threads=2, waiting=16, patience=patience),
        Pool(name=CONTROL, methods=frozenset({"Describe", "StopTraining"}), threads=16, waiting=256, patience=2.0),
    ]


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
            owner=f"worker {config.name}",
            pools=pools(config.reply_timeout),
            checks=CHECKS,
            advertise_host=config.advertise_host,
        )
        self.address = self._rpc.address

    def stop(self, grace: float = 1.0) -> None:
        """Cancels what is under way after `grace` seconds, and closes."""
        self._rpc.stop(grace)
        self._servicer.close()
