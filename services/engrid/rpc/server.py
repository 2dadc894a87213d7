"""A gRPC server with what every Engrid process offers: health, reflection, our limits, an honest bind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from .addresses import host_port, reachable_host
from .channel import SERVER_OPTIONS
from .errors import BadRequestError


class RpcServer:
    """A started threaded server. `address` is where it listens, with the port it was given for port 0."""

    def __init__(
        self,
        listen: str,
        services: Sequence[str],
        register: Callable[[grpc.Server], None],
        *,
        threads: int,
        advertise_host: str | None = None,
    ) -> None:
        """Binds `listen` (host:port) and serves.

        services: full names to report healthy and to reflect. threads: the most calls served at a time; a
        stream holds one for its life. advertise_host: the host others reach us by; None: that of `listen`, or
        this host's address on its default interface where that is 0.0.0.0 or [::]. Raises BadRequestError where the port is taken
        or the host is not ours.
        """
        host = reachable_host(listen.rpartition(":")[0], advertise_host)
        self._server = grpc.server(ThreadPoolExecutor(threads, "rpc"), options=SERVER_OPTIONS)
        register(self._server)
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = [*services, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, self._server)
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise BadRequestError(
                f"cannot listen on {listen}: the port is in use or the host is not this machine's; "
                "choose another, or port 0 for any free one"
            ) from error
        self.address = host_port(host, port)
        self._server.start()
        for name in ("", *services):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace: float = 1.0) -> None:
        """Reports not serving, refuses new calls, cancels what is left after `grace` seconds."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()

    def wait(self) -> None:
        """Blocks until the server has stopped."""
        self._server.wait_for_termination()


def check_health(channel: grpc.Channel, *, timeout: float) -> bool:
    """Asks the standard health service; False where it answers but does not serve. Raises grpc.RpcError."""
    stub = health_pb2_grpc.HealthStub(channel)
    reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout, wait_for_ready=True)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
