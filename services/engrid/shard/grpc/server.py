"""A shard as it runs: service, gRPC server and directory entry, started together and stopped together."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial

from engrid.directory import DirectoryError, ShardRecord, open_directory, this_host
from engrid.rpc.server import RpcServer
from engrid.shard.config import ShardConfig
from engrid.shard.handover import Handover
from engrid.shard.service import ShardService

from .servicer import CHECKS, PATIENT, MemoryServicer, add_to_server, pools

MEMORY_SERVICE = "engrid.v1.MemoryService"


class ShardServer:
    """Serves from construction until `stop`."""

    def __init__(self, config: ShardConfig) -> None:
        """Recovers what the shard kept, then listens and registers."""
        self.name = config.name
        self._failed = threading.Event()
        with ExitStack() as opened:
            self._directory = open_directory(config.directory)
            opened.callback(self._directory.close)
            service = self._service = ShardService(config)
            opened.callback(service.close)
            handover = self.handover = _open_handover(service) if config.shared_memory else None
            servicer = MemoryServicer(service, handover)
            self._rpc = RpcServer(
                config.listen,
                [MEMORY_SERVICE],
                partial(add_to_server, servicer),
                owner=f"shard {config.name}",
                pools=pools(config, servicer.end_idle_stream),
                checks=CHECKS,
                patient=PATIENT,
                failed=servicer.count_error,
                advertise_host=config.advertise_host,
                keepalive_seconds=config.keepalive,
            )
            opened.callback(self._stop_rpc)
            if handover is not None:
                opened.callback(handover.close)
            self._grace = 0.0
            self.address = self._rpc.address
            self._directory.register(
                ShardRecord(name=config.name, address=self.address, host=this_host(), pid=os.getpid())
            )
            service.gate.on_failure(self._on_failure)
            self._opened = opened.pop_all()

    def _on_failure(self) -> None:
        self._rpc.fail_health()
        self._failed.set()

    @property
    def failure(self) -> str:
        """Why the shard cannot go on; empty: it does."""
        return self._service.gate.failure

    def when_failed(self, call: Callable[[], None]) -> None:
        """`call` is called from a thread of its own once the shard cannot go on; its health says so already."""

        def watch() -> None:
            self._failed.wait()
            call()

        threading.Thread(target=watch, name="shard failure", daemon=True).start()

    def _stop_rpc(self) -> None:
        self._rpc.stop(self._grace)

    def stop(self, grace: float = 1.0) -> None:
        """Leaves the directory, finishes calls within `grace` seconds, and closes."""
        with suppress(DirectoryError):  # a directory that is gone must not keep us from stopping
            self._directory.unregister(self.name)
        self._grace = grace
        self._opened.close()

    def wait(self) -> None:
        """Blocks until stopped."""
        self._rpc.wait()


def _open_handover(service: ShardService) -> Handover | None:
    """None where this host has no place for the socket: sealed rows are then read over gRPC."""
    try:
        return Handover(service.sealed_rows)
    except OSError as error:
        warnings.warn(f"sealed rows cannot be mapped on this host: {error}", stacklevel=2)
        return None
