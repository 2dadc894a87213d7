"""A gRPC server with what every Engrid process offers: health, reflection, our limits, an honest bind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from .addresses import host_port, reachable_host
from .calls import Check, Handled, Rules
from .channel import server_options
from .errors import BadRequestError
from .pools import InPlace, Pool, PoolThreads, on_threads, refusal
from .stalls import StallWatch

KEEPALIVE_SECONDS = 30.0
"""From one question to a silent client's machine to the next; it has two thirds of that to answer."""
CONTROL = "control calls"
"""Name of the pool that answers health checks; a server puts its own short calls there."""
_WATCHES = Pool(
    name="health watches and reflections", methods=frozenset({"Watch", "ServerReflectionInfo"}), threads=8, waiting=8
)


class RpcServer:
    """A started threaded server. `address` is where it listens, with the port it was given for port 0."""

    def __init__(
        self,
        listen: str,
        services: Sequence[str],
        register: Callable[[grpc.Server], None],
        *,
        owner: str,
        pools: Sequence[Pool],
        checks: Mapping[str, Check],
        patient: frozenset[str] = frozenset(),
        failed: Callable[[], object] = bool,
        advertise_host: str | None = None,
        keepalive_seconds: float = KEEPALIVE_SECONDS,
    ) -> None:
        """Binds `listen` (host:port) and serves.

        services: full names to report healthy and to reflect. owner: whose server it is, for messages ("shard s0"). pools:
        where the methods of `services` run, each in one of them; one is named CONTROL and answers health checks as well.
        checks, patient, failed: see Rules. advertise_host: the host others reach us by; None: that of `listen`, or this
        host's address on its default interface where that is 0.0.0.0 or [::]. Raises BadRequestError where the port is taken
        or the host is not ours.
        """
        host = reachable_host(listen.rpartition(":")[0], advertise_host)
        pools = (*pools, _WATCHES)
        self._stalls = StallWatch(min(pool.patience for pool in pools), failed)
        self._threads = {pool: PoolThreads(pool) for pool in pools}
        self._server = grpc.server(InPlace(1), options=server_options(keepalive_seconds))
        registered = _Registered()
        register(registered)  # type: ignore[arg-type] # what generated code asks of a server
        self._health = health.HealthServicer(experimental_non_blocking=False)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, registered)
        names = [*services, health.SERVICE_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, registered)
        rules = Rules(checks=checks, patient=patient, watch=self._stalls, failed=failed)
        self._server.add_generic_rpc_handlers((_Handlers(registered.handlers, self._threads, rules, owner),))
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise BadRequestError(
                f"cannot listen on {listen}: the port is in use or the host is not this machine's; "
                "choose another, or port 0 for any free one"
            ) from error
        self.address = host_port(host, port)
        self._server.start()
        self._services = ("", *services)
        self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for name in self._services:
            self._health.set(name, status)

    def fail_health(self) -> None:
        """Reports not serving, and goes on answering."""
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    def stop(self, grace: float = 1.0) -> None:
        """Reports not serving, refuses new calls, cancels what is left after `grace` seconds."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()
        self._stalls.close()
        for threads in self._threads.values():
            threads.shutdown(wait=False)

    def wait(self) -> None:
        """Blocks until the server has stopped."""
        self._server.wait_for_termination()


class _Registered:
    """Stands for a server while generated code registers with it: keeps the handlers by /SERVICE/METHOD."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """Those are what is registered below, in another form."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        self.handlers |= {f"/{service}/{name}": handler for name, handler in handlers.items()}


class _Handlers(grpc.GenericRpcHandler):
    """Gives each call its handler, or the one that refuses it where its pool is full."""

    def __init__(
        self, handlers: Mapping[str, Any], pools: Mapping[Pool, PoolThreads], rules: Rules, owner: str
    ) -> None:
        pool_of = {method: pool for pool in pools for method in pool.methods}
        control = next(pool for pool in pools if pool.name == CONTROL)
        self._handlers = {}
        for path, handler in handlers.items():
            pool = pool_of.get(path.rpartition("/")[2], control)
            handled = Handled(path, handler, rules, patience=pool.patience)
            made = handled.over(partial(on_threads, threads=pools[pool]))
            self._handlers[path] = (made, pools[pool], refusal(pool, owner))

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        known = self._handlers.get(details.method)
        if known is None:
            return None
        handler, threads, refuse = known
        return handler if threads.admits() else refuse


def check_health(channel: grpc.Channel, *, timeout: float) -> bool:
    """Asks the standard health service; False where it answers but does not serve. Raises grpc.RpcError."""
    stub = health_pb2_grpc.HealthStub(channel)
    reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout, wait_for_ready=True)
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
