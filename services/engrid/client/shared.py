"""Sealed tables of shards on this host, mapped: rows without a request.

All partitions of a table are mapped into one stretch of addresses, so that a whole batch is one take, dead positions
and all:

    | zeros | rows of partition 0 | .. | rows of partition 1 | .. |
            ^                          ^
            row 0 of the stretch       a multiple of a huge page and of the row: row id + shift of its partition

A dead position is id -1: the row before row 0, which is zeros. How descriptors come here is drawn in
services/engrid/shard/handover.py. A table is mapped whole or not at all; where one of its shards is elsewhere, or
hands nothing over, its rows are read over gRPC, and `reason` says why.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import os
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engrid.directory import Partition
from engrid.host.handover import MAX_LINE, read_line
from engrid.host.mapping import HUGE_PAGE, map_file, reserve, unmap
from engrid.rpc.errors import EngridError, from_message
from engrid.rpc.frames import Bytes, Ids, row_view
from engrid.tables import TableSpec
from engrid.v1 import memory_pb2 as pb

from .batch import Lookup, check_lookups, check_range, living
from .connections import Connections

HANDOVER_SECONDS = 1.0
RETRY_SECONDS = 5.0
"""A table that could not be mapped is tried again after so long."""


class CannotMapError(Exception):
    """A table cannot be mapped here; the message says why. It is read over gRPC."""


class SharedTable:
    """One sealed table, mapped for reading. Stays readable whatever becomes of the shards."""

    def __init__(self, spec: TableSpec, partitions: Sequence[Partition], descriptors: Sequence[int]) -> None:
        """descriptors: of each partition's memfd; they are not kept. Raises CannotMapError for one that is not sealed,
        or that is of another size, OSError where it cannot be mapped."""
        self.spec = spec
        width = spec.row_bytes
        step = math.lcm(HUGE_PAGE, width)
        places = [step]
        for part in partitions:
            places.append(places[-1] + -(-len(part) * width // step) * step)
        base = reserve(places[-1])
        weakref.finalize(self, unmap, base, places[-1]).atexit = False
        for part, descriptor, place in zip(partitions, descriptors, places, strict=False):
            _check_sealed(descriptor, len(part) * width, part)
            map_file(base + place, len(part) * width, descriptor)
        raw = np.ctypeslib.as_array((ctypes.c_uint8 * places[-1]).from_address(base))
        self._rows = row_view(raw.reshape(-1, width))
        self._cuts = np.array([part.start for part in partitions[1:]], np.int64)
        first = [place // width - part.start for place, part in zip(places, partitions, strict=False)]
        self._shift = first[0]
        self._jumps = np.diff(np.array(first, np.int64))

    def gather(self, ids: Ids, out: Bytes) -> None:
        """Copies the rows of int64 ids of any shape, within the table or -1 for zeros, into C-contiguous `out` of
        that shape and row_bytes."""
        flat = ids.reshape(-1)
        places = flat + self._shift
        for cut, jump in zip(self._cuts, self._jumps, strict=True):
            if jump:
                places += np.multiply(flat >= cut, jump, dtype=np.int64)
        np.take(self._rows, places, out=row_view(out.reshape(-1, self.spec.row_bytes)), mode="clip")


def _check_sealed(descriptor: int, size: int, part: Partition) -> None:
    """Unsealed memory could be truncated under us, or change."""
    name = f"{part.table}[{part.index}]"
    if os.fstat(descriptor).st_size != size:
        raise CannotMapError(f"{name} was handed over with {os.fstat(descriptor).st_size} bytes instead of {size}")
    needed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & needed != needed:
        raise CannotMapError(f"{name} was handed over unsealed")


@dataclass(frozen=True)
class _Refused:
    reason: str
    until: float


class SharedTables:
    """The mapped tables of one client. Threads may share it."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._known: dict[TableSpec, SharedTable | _Refused] = {}
        self._lock = threading.Lock()

    def table(self, spec: TableSpec, deadline: float) -> SharedTable | None:
        """A sealed table as mapped, on first use; None: read it over gRPC.

        deadline: on time.monotonic()'s clock, of the lookup that wants it; half of its time is left for the lookup.
        """
        known = self._known.get(spec)
        if isinstance(known, SharedTable):
            return known
        if known is not None and time.monotonic() < known.until:
            return None
        deadline -= (deadline - time.monotonic()) / 2
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return None  # another thread is mapping a table
        try:
            try:
                made: SharedTable | _Refused = self._open(spec, deadline)
            except (CannotMapError, EngridError, OSError, ValueError) as error:
                made = _Refused(str(error), time.monotonic() + RETRY_SECONDS)
            self._known[spec] = made
        finally:
            self._lock.release()
        return made if isinstance(made, SharedTable) else None

    def reason(self, table: str) -> str:
        """Why a table is read over gRPC; empty where it is mapped or was never asked for."""
        refused = [
            known.reason for spec, known in self._known.items() if spec.name == table and isinstance(known, _Refused)
        ]
        return refused[0] if refused else ""

    def forget(self, tables: Sequence[str]) -> None:
        """Lets go of tables by name; what is being read stays until it is read."""
        with self._lock:
            self._known = {spec: known for spec, known in self._known.items() if spec.name not in tables}

    def _open(self, spec: TableSpec, deadline: float) -> SharedTable:
        known = self._known.get(spec)
        if isinstance(known, SharedTable):
            return known
        partitions = self._connections.placement().partitions[spec.name]
        sockets = {shard: self._socket_of(shard, deadline) for shard in {part.primary for part in partitions}}
        descriptors: list[int] = []
        try:
            descriptors.extend(_receive(*sockets[part.primary], part, deadline) for part in partitions)
            return SharedTable(spec, partitions, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _socket_of(self, shard: str, deadline: float) -> tuple[str, str]:
        """Path of a shard's socket, and its instance."""
        peer = self._connections.transport(shard).peer
        reply = self._connections.describe(shard, _left(deadline, self._connections.config.timeout))
        if not reply.local_socket:
            raise CannotMapError(f"{peer} hands nothing over")
        if not os.path.exists(reply.local_socket):  # noqa: PTH110 - a socket's path is text on both sides
            raise CannotMapError(f"{peer} is not on this host: there is no {reply.local_socket}")
        return reply.local_socket, reply.instance


def _left(deadline: float, most: float) -> float:
    """Seconds, above zero; raises CannotMapError where none are left."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise CannotMapError("the lookup's time did not suffice to map it")
    return min(left, most)


def _receive(path: str, instance: str, part: Partition, deadline: float) -> int:
    """The descriptor of a partition's rows, from the shard at the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as shard:
        shard.settimeout(_left(deadline, HANDOVER_SECONDS))
        shard.connect(path)
        asked = {"instance": instance, "table": part.table, "partition": part.index}
        shard.sendall(json.dumps(asked).encode() + b"\n")
        line, descriptors, _, _ = socket.recv_fds(shard, MAX_LINE, 1)
        try:
            _check_answer(line if line.endswith(b"\n") else line + read_line(shard), part, handed=bool(descriptors))
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return descriptors[0]


def _check_answer(line: bytes, part: Partition, *, handed: bool) -> None:
    try:
        answer = json.loads(line)
        refusal = None if handed else from_message(pb.Error(code=answer["code"], message=answer["message"]))
        rows = None if refusal else (answer["start"], answer["stop"])
    except (KeyError, TypeError) as error:
        raise CannotMapError(f"the shard of {part.table}[{part.index}] answered {line!r}") from error
    if refusal is not None:
        raise refusal
    if rows != (part.start, part.stop):
        raise CannotMapError(f"{part.table}[{part.index}] was handed over with rows {rows}")


class SharedBatch:
    """All lookups of one mapped table in a batch; nothing has to be fetched. See Batch."""

    def __init__(self, table: SharedTable, lookups: Sequence[Lookup]) -> None:
        self.spec = table.spec
        self.ids: Ids = np.empty(0, np.int64)
        self.rows: Bytes = np.empty((0, table.spec.row_bytes), np.uint8)
        self._table = table
        check_lookups(lookups)
        # A copy: the caller may write to its own while these are waiting to be read.
        self._ids = np.concatenate([lookup.row_ids for lookup in lookups], axis=1)
        self.here = self._ids.size
        self._dead = any(living(lookup) is not None for lookup in lookups)

    def check_range(self) -> None:
        # A dead position is -1; as 0 it passes.
        check_range(self.spec, np.maximum(self._ids, 0) if self._dead else self._ids)

    @property
    def shape(self) -> tuple[int, int, int]:
        positions, heads = self._ids.shape
        return positions, heads, self.spec.row_bytes

    def spread(self, out: Bytes) -> Bytes:
        self._table.gather(self._ids, out)
        return out
