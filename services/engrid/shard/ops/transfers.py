"""Whole partitions over the wire: Load and Export.

Rows that come are checked, and wait for their turn, before anything is changed. Then the partition serves nothing until all
are in their place, and is looked up again by its key each time, as its table may have been made anew meanwhile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from engrid.rpc.errors import BadRequestError, WrongEpochError
from engrid.shard.core.messages import PartitionKey
from engrid.shard.rows.partitions import AnyPartition, SealedPartition, refuse_empty
from engrid.v1 import memory_pb2 as pb

from . import loading, requests

if TYPE_CHECKING:
    from engrid.shard.service import ShardService

EXPORT_CHUNK_BYTES = 1 << 20


class Transfers:
    """Those of one shard."""

    def __init__(self, service: ShardService) -> None:
        self._service, self._name = service, service.config.name
        self._core, self._rows = service.journal.core, service.journal.rows

    def load(self, chunks: Iterator[pb.LoadChunk], *, deadline: float) -> int:
        """Overwrites one partition once all of its rows have come; returns their number."""
        service, first = self._service, next(chunks, None)
        if first is None:
            raise BadRequestError("load: the stream held no chunk")
        requests.check_load(first)
        key: PartitionKey = (first.table, first.partition)
        part = self._partition_to_load(key, deadline)
        whole = itertools.chain([first], self._checked_chunks(first, chunks))
        if isinstance(part, SealedPartition):
            with service.memory(f"load {key[0]}[{key[1]}]"):
                loading.receive_sealed(part, key, whole)
            with service.gate.stepped:
                self._refuse_replaced(key, part)
                # No run's: a commit of the run that made them must not find them.
                service.journal.loaded(key, first.step, "", 0, rows_kept=False)
            return part.stop - part.start
        with service.memory(f"load {key[0]}[{key[1]}]"):
            pieces = loading.receive(part, key, whole)
        with (
            service.gate.hold(service.loading, deadline, "other rows that are being loaded"),
            service.keeping_rows(deadline),
        ):
            with service.at_rest(deadline):  # a step decided before must not be applied to the rows that come
                self._refuse_replaced(key, part)
                with service.deciding("a load"):
                    service.journal.loading(key, first.step, first.run, first.attempt)
            with service.memory(f"load {key[0]}[{key[1]}], which holds no rows now"):
                loading.put(part, pieces)
            with service.gate.stepped:
                self._refuse_replaced(key, part)
                self._core.loaded(key, first.step, first.run, first.attempt)
        return part.stop - part.start

    @staticmethod
    def _checked_chunks(first: pb.LoadChunk, chunks: Iterator[pb.LoadChunk]) -> Iterator[pb.LoadChunk]:
        for chunk in chunks:
            requests.check_chunk(first, chunk)
            yield chunk

    def _refuse_replaced(self, key: PartitionKey, part: AnyPartition) -> None:
        """Under the lock: raises WrongEpochError if the table was dropped or made anew while its rows came."""
        if not self._rows.holds(key) or self._rows.partition(key) is not part:
            raise WrongEpochError(
                f"{key[0]}[{key[1]}] on shard {self._name} was dropped or made anew while its rows came; load them again",
                epoch=self._core.epoch,
            )

    def _partition_to_load(self, key: PartitionKey, deadline: float) -> AnyPartition:
        service = self._service
        with service.gate.hold(service.adopting, deadline, "a placement"):
            state = self._core.partitions.get(key)
            if state is not None and state.empty and self._core.placement is not None and not self._rows.holds(key):
                with service.memory(f"hold {key[0]}[{key[1]}]"):
                    made = self._rows.allocate(self._core.placement, [key])
                with service.gate.stepped:
                    self._rows.replace(self._core.placement, made, [])
            return self._rows.partition(key)

    def export(self, request: pb.ExportRequest) -> Iterator[pb.ExportChunk]:
        """Rows of one partition in order, about a MiB at a time. Raises WrongEpochError if other rows came meanwhile."""
        service, key = self._service, (request.table, request.partition)
        if self._core.empty(request.table):
            refuse_empty(self._name, request.table)
        part, state = self._rows.partition(key), self._core.partitions.get(key)
        run = state.run if state else ""
        row_bytes = part.rows.spec.row_bytes
        asked = request.rows_per_chunk or EXPORT_CHUNK_BYTES // row_bytes
        per_chunk = max(1, min(asked, service.config.max_reply_bytes // row_bytes))
        count = part.stop - part.start
        for start in range(0, count, per_chunk):
            service.gate.refuse_failed()
            raw = part.copy_out(start, min(start + per_chunk, count))
            if state is None or self._core.partitions.get(key) is not state or state.run != run:
                raise WrongEpochError(
                    f"{key[0]}[{key[1]}] on shard {self._name} got other rows while it was exported; export it again",
                    epoch=self._core.epoch,
                )
            yield pb.ExportChunk(rows=raw, step=state.step)
