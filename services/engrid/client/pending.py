"""A batch under way: sent when made, waited for when its rows are asked for.

Each shard gets one request for all tables, cut where the reply would pass the size that travels best. Replies
are copied into the tables' buffers by the transport's threads as they come.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engrid.rpc.errors import BadRequestError, EngridError, ShardUnavailableError, WrongEpochError
from engrid.rpc.forks import check_not_forked, is_forked
from engrid.rpc.frames import Bytes, row_view
from engrid.rpc.wire import MAX_TABLES
from engrid.tables import TableSpec

from .batch import Batch
from .connections import Connections
from .routing import Piece
from .transport import Call, Wanted


@dataclass
class Traffic:
    """What was asked for over the wire."""

    requests: int = 0
    rows: int = 0
    bytes: int = 0
    """Of rows on the wire."""
    here: int = 0
    """Rows that were on this host already: in memory shared with a shard, or in the cache."""


def new_buffer(shape: tuple[int, int, int]) -> Bytes:
    """Not initialised."""
    return np.empty(shape, np.uint8)


def _checked(out: object, table: str, shape: tuple[int, int, int]) -> Bytes:
    """The array, if rows can be written to it as they are; numpy would convert, spread over a larger one, or fill a copy."""
    wanted = f"table {table}: the buffer for its rows must be writable C-contiguous uint8 {list(shape)}"
    if not isinstance(out, np.ndarray):
        raise BadRequestError(f"{wanted}, not {type(out).__name__}")
    if out.dtype != np.uint8 or out.shape != shape or not out.flags.c_contiguous or not out.flags.writeable:
        flags = "" if out.flags.c_contiguous and out.flags.writeable else ", read-only or with gaps"
        raise BadRequestError(f"{wanted}, not {out.dtype} {list(out.shape)}{flags}")
    return out


_Part = tuple[Batch, Piece]


@dataclass(frozen=True)
class _Sent:
    """A request under way to one shard, and by what it was routed."""

    call: Call
    parts: list[_Part]
    epoch: int
    address: str


class Pending:
    """Made by MemoryClient.prefetch. Ask for the rows once per table, from one thread."""

    def __init__(
        self,
        connections: Connections,
        batches: Mapping[str, Batch],
        wanted: Wanted,
        traffic: Sequence[Traffic],
    ) -> None:
        """traffic: the counts to add to."""
        self._connections = connections
        self._batches = batches
        self._wanted = wanted
        self._traffic = traffic
        self._failed: EngridError | None = None
        self._sent: list[_Sent] = []
        """Under way; what is answered is taken out once its rows are in place."""
        self._stale: list[_Part] = []
        """To be sent once more, as who was asked does not hold them or is away."""
        self.step = 0
        """Once rows were waited for: all live ones hold this step. 0: none came."""
        here = sum(batch.here for batch in batches.values())
        for each in traffic:
            each.here += here
        try:
            self._send([(batch, Piece("", slice(0, len(batch.ids)), batch.ids)) for batch in batches.values()])
        except BaseException:
            self.cancel()
            raise

    def rows(self, table: str, buffer: Callable[[tuple[int, int, int]], Bytes] = new_buffer) -> Bytes:
        """uint8 [T, heads of all orders, row_bytes] of a table of the batch; dead positions are zeros.

        buffer: gives the array to put them in, uint8 and C-contiguous, for a shape; another is refused (BadRequestError),
        and the rows may be asked for again. Raises DeadlineExceededError or ShardUnavailableError naming the shard, or what the shard answered; of every table, once it has failed. Where
        Ctrl-C interrupts it, it may be called again.
        """
        check_not_forked()
        if table not in self._batches:
            raise BadRequestError(f"table {table!r} was not in this prefetch ({', '.join(self._batches) or 'empty'})")
        if self._failed is not None:
            raise self._failed
        try:
            self._wait()
        except EngridError as error:
            self._failed = error
            self.cancel()
            raise
        batch = self._batches[table]
        return batch.spread(_checked(buffer(batch.shape), table, batch.shape))

    def cancel(self) -> None:
        """Gives up what is still under way; again is nothing."""
        if not is_forked():
            for sent in self._sent:
                sent.call.cancel()

    def _wait(self) -> None:
        """Every step can be taken again: it may be interrupted anywhere."""
        while self._sent or self._stale:
            while self._sent:
                self._wait_for(self._sent[0])
                self._sent.pop(0)
            if self._stale:
                self._send_again()

    def _wait_for(self, sent: _Sent) -> None:
        try:
            sent.call.wait()
            self.step = min(self.step or sent.call.step, sent.call.step)
        except (WrongEpochError, ShardUnavailableError) as error:
            if not self._is_outdated(sent, error):
                raise self._connections.advised(error) from error.__cause__
            self._stale.extend(sent.parts)

    def _is_outdated(self, sent: _Sent, error: EngridError) -> bool:
        """Whether the shard has moved since, being started again at another address, or a newer placement is known."""
        shard, moved = sent.parts[0][1].shard, isinstance(error, WrongEpochError)

        def outdated() -> bool:
            newer = moved and self._connections.epoch > sent.epoch
            return newer or self._connections.address(shard) != sent.address

        if not outdated():
            self._connections.refresh(self._wanted.deadline)
        if moved and not outdated():
            raise WrongEpochError(
                f"shard {shard} does not hold rows that the newest placement known (epoch {sent.epoch}) gives it",
                epoch=sent.epoch,
            ) from error
        return outdated()

    def _send_again(self) -> None:
        for batch, _ in self._stale:
            self._check_same_table(batch.spec)
        self._send(self._stale)
        self._stale = []

    def _check_same_table(self, spec: TableSpec) -> None:
        """Row ids of another table of the same name would be answered with rows that mean nothing."""
        newest, _ = self._connections.table(spec.name, self._wanted.deadline)
        if newest != spec:
            raise WrongEpochError(
                f"table {spec.name} was replaced by one of another spec while it was read; hash the ids anew",
                epoch=self._connections.epoch,
            )

    def _send(self, parts: Sequence[_Part]) -> None:
        owner = weakref.ref(self)
        by_shard: dict[str, list[_Part]] = {}
        for batch, whole in parts:
            _, route = self._connections.table(batch.spec.name, self._wanted.deadline)
            for piece in route.split(whole.ids):
                by_shard.setdefault(piece.shard, []).append((batch, _within(whole, piece)))
        for shard, of_shard in by_shard.items():
            epoch, transport = self._connections.epoch, self._connections.transport(shard)
            for request in _requests(of_shard, self._connections.config.request_bytes):
                call = transport.lookup(
                    [(batch.spec.name, piece.ids, batch.spec.row_bytes) for batch, piece in request],
                    self._wanted,
                    epoch=epoch,
                    deliver=_Placer(request),
                )
                call.owner = owner
                self._sent.append(_Sent(call, request, epoch, transport.address))
                self._count(request)

    def _count(self, request: Sequence[_Part]) -> None:
        for traffic in self._traffic:
            traffic.requests += 1
            traffic.rows += sum(len(piece.ids) for _, piece in request)
            traffic.bytes += sum(len(piece.ids) * batch.spec.row_bytes for batch, piece in request)


class _Placer:
    """Copies the rows of one reply to their places."""

    def __init__(self, request: Sequence[_Part]) -> None:
        self._request = request

    def __call__(self, replies: Sequence[memoryview]) -> None:
        for (batch, piece), raw in zip(self._request, replies, strict=True):
            items = row_view(batch.rows)
            items[piece.where] = np.frombuffer(raw, items.dtype)


def _within(whole: Piece, part: Piece) -> Piece:
    """`part`, whose positions count from the start of `whole`, in the positions of the batch."""
    if isinstance(whole.where, slice):
        first = whole.where.start
        if first == 0:
            return part
        if isinstance(part.where, slice):
            return Piece(part.shard, slice(part.where.start + first, part.where.stop + first), part.ids)
        return Piece(part.shard, part.where + first, part.ids)
    return Piece(part.shard, whole.where[part.where], part.ids)


def _requests(parts: Sequence[_Part], size: int) -> Iterator[list[_Part]]:
    """The parts in requests whose replies are at most `size` bytes (or one row), of as many tables as a shard takes."""
    request: list[_Part] = []
    room = size
    for batch, piece in parts:
        row_bytes = batch.spec.row_bytes
        left = piece
        while len(left.ids):
            fit = room // row_bytes
            if (fit == 0 and request) or len(request) == MAX_TABLES:
                yield request
                request, room = [], size
                continue
            head, *tail = _cut(left, max(1, fit))
            request.append((batch, head))
            room -= len(head.ids) * row_bytes
            if not tail:
                break
            left = tail[0]
    if request:
        yield request


def _cut(piece: Piece, rows: int) -> tuple[Piece, ...]:
    """The first `rows` rows and the rest, where there is one."""
    if len(piece.ids) <= rows:
        return (piece,)
    if isinstance(piece.where, slice):
        middle = piece.where.start + rows
        wheres: tuple[slice | np.ndarray, ...] = (slice(piece.where.start, middle), slice(middle, piece.where.stop))
    else:
        wheres = (piece.where[:rows], piece.where[rows:])
    return (
        Piece(piece.shard, wheres[0], piece.ids[:rows]),
        Piece(piece.shard, wheres[1], piece.ids[rows:]),
    )
