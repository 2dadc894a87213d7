"""What a reader holds on to: the sealed tables of one version, until it lets go.

A pin is a lease at every shard, renewed by a thread for as long as the reader lives: a reader that dies lets go by
that, and one that was stopped for longer than a lease finds its tables gone at worst, never other rows under their
names. A pin is taken before its tables are known to exist, and only then are they looked for, so that nobody can drop
them in between.
"""

from __future__ import annotations

import threading
import uuid
from contextlib import suppress

import grpc

from engrid.directory import Version
from engrid.rpc.errors import EngridError, UnknownTableError, from_rpc
from engrid.rpc.forks import check_not_forked, is_forked
from engrid.v1 import memory_pb2 as pb

from .apart import Calls, apart
from .connections import Connections

LEASE_SECONDS = 30.0
RENEW_SECONDS = 8.0
PIN_ATTEMPTS = 8


class Pin:
    """Sealed tables that stay while this is held. `with`, or release."""

    def __init__(self, pins: Pins, version: Version) -> None:
        self.version = version.name
        self.tables = version.tables
        self._pins = pins

    def release(self) -> None:
        """The tables may be dropped; again is nothing. Never fails: a lease that cannot be given back runs out."""
        self._pins.release(self)

    def __enter__(self) -> Pin:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Pins:
    """All pins of one client. Threads may share it."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._reader = uuid.uuid4().hex
        self._held: list[Pin] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._renewer: threading.Thread | None = None
        self.trouble: Exception | None = None
        """Why the leases could not be renewed when it was last tried; None: they were."""

    def of_tables(self, version: Version) -> Pin:
        """Pins tables by name, be they there or still to be made.

        A shard that is away learns of it when it is back; one other is enough to keep the tables from being dropped.
        """
        check_not_forked()
        pin = Pin(self, version)
        with self._lock:
            self._held.append(pin)
            with suppress(EngridError):
                self._renew()
            if self._renewer is None or not self._renewer.is_alive():
                self._renewer = threading.Thread(target=self._keep, name="engrid pins", daemon=True)
                self._renewer.start()
        return pin

    def of_run(self, run: str) -> Pin:
        """Pins the version of a run that is current now. Raises UnknownTableError where none was published."""
        for _ in range(PIN_ATTEMPTS):
            self._connections.refresh()
            versions = self._connections.placement().versions.get(run, ())
            if not versions:
                raise UnknownTableError(f"no version of run {run!r} is published; publish one (engrid publish)")
            pin = self.of_tables(versions[-1])
            self._connections.refresh()
            if set(pin.tables) <= self._connections.placement().tables.keys():
                return pin
            pin.release()
        raise UnknownTableError(f"versions of run {run!r} were dropped as fast as they were pinned; try again")

    def renew(self) -> None:
        """Tells shards that have just got their first tables. Raises ShardUnavailableError."""
        check_not_forked()
        with self._lock:
            self._renew()

    def release(self, pin: Pin) -> None:
        """See Pin.release."""
        if is_forked():
            return
        with self._lock:
            if pin in self._held:
                self._held.remove(pin)
                with suppress(EngridError):
                    self._renew()

    def close(self) -> None:
        """Lets go of everything."""
        self._closed.set()
        if is_forked():
            return
        with self._lock:
            if self._held:
                self._held = []
                with suppress(EngridError):
                    self._renew()

    def _keep(self) -> None:
        """Goes on whatever happens: a shard that is away has its lease renewed when it is back, and what nobody thought of
        must not let all leases run out."""
        while not self._closed.wait(RENEW_SECONDS):
            try:
                with self._lock:
                    self._renew()
            except Exception as error:  # noqa: BLE001 - told by `trouble`, and tried again
                self.trouble = error
            else:
                self.trouble = None

    def _renew(self) -> None:
        """Tells every shard what is held, all at once; raises for the first that does not answer."""
        if not self._connections.epoch:
            return  # no shard is known before the first table is made; made tables are pinned by `renew`
        tables = sorted({table for pin in self._held for table in pin.tables})
        request = pb.PinRequest(reader=self._reader, tables=tables, seconds=LEASE_SECONDS if tables else 0.0)
        timeout = self._connections.config.timeout
        transports = [self._connections.transport(shard) for shard in self._connections.placement().shards]

        def ask(calls: Calls) -> list[EngridError]:
            begun = [(each, calls.add(each.future(lambda stub: stub.Pin, request, timeout))) for each in transports]
            errors = []
            for transport, call in begun:
                try:
                    call.result()
                except grpc.RpcError as error:
                    errors.append(from_rpc(error, transport.peer))
            return errors

        if errors := apart(ask):
            raise errors[0]


def tables_held(connections: Connections) -> set[str]:
    """Sealed tables that any reader has pinned, as all shards say now."""
    held: set[str] = set()
    for shard in connections.placement().shards:
        held |= set(connections.describe(shard).pinned)
    return held
