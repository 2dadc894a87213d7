"""When a shard makes a base: after so many bytes of log, and after rows came from outside."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from engrid.rpc.errors import DeadlineExceededError, DiskFullError, EngridError, OutOfMemoryError
from engrid.shard.gate import LONGEST_WAIT
from engrid.shard.journal.base import begin_snapshots
from engrid.shard.rows.snapshot import ImageMemory

if TYPE_CHECKING:
    from engrid.shard.service import ShardService

REST_SECONDS = 60.0
"""For which a base waits for steps that are being applied; pushes wait meanwhile."""
CLOSE_SECONDS = 10.0

_log = logging.getLogger(__name__)


class Bases:
    """Makes bases for one shard, one at a time, in a thread of its own or in the caller's."""

    def __init__(self, service: ShardService) -> None:
        self._service = service
        self._thread: threading.Thread | None = None
        self._memory: ImageMemory | None = None
        """Of the base that is being written."""
        self._failed_at = 0
        """Bytes of log when a base could not be made; the next try waits for as much again."""
        self._changed = threading.Condition()

    def look(self) -> None:
        """Begins a base in the background where the log has grown by its bound."""
        limit = self._service.config.log_bytes
        backlog = self._service.backlog_bytes()
        if backlog < limit:
            return
        with self._changed:
            if self._thread is None and backlog >= self._failed_at + limit // 4:
                self._thread = threading.Thread(target=self._make_in_background, name="engrid base", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError as error:  # no more threads can be had
                    self._thread = None
                    self._told(error)

    def wait_for_room(self, deadline: float) -> None:
        """Before a push is taken, where the log is at twice its bound: until the base that is being made is. So what a start
        replays is bounded also where pushes outrun the disk. Raises DeadlineExceededError: nothing was taken."""
        if self._service.backlog_bytes() < 2 * self._service.config.log_bytes:
            return
        with self._changed:
            left = max(0.0, min(deadline - time.monotonic(), LONGEST_WAIT))
            if not self._changed.wait_for(lambda: self._thread is None, left):
                raise DeadlineExceededError(
                    f"shard {self._service.config.name} still wrote its rows to {self._service.config.state}, and takes no "
                    "push before its log can be cut; push again"
                )

    def make(self) -> None:
        """Makes a base now; raises DiskFullError, SnapshotGivenUpError, OutOfMemoryError or DeadlineExceededError: the shard
        goes on with the old one."""
        gate = self._service.gate
        with gate.hold(self._service.saving, time.monotonic() + LONGEST_WAIT, "another save to end"):
            self.make_in_turn()

    def make_in_turn(self) -> None:
        """The same for who holds `saving`."""
        service = self._service
        self.refuse_without_room()
        memory = self._memory = ImageMemory(service.config.image_bytes)
        try:
            with service.at_rest(time.monotonic() + REST_SECONDS):
                if service.journal.is_based:
                    return
                base, live = service.journal.capture()
                begin_snapshots(live, memory)
            try:
                service.journal.wait_durable(base.record)
                written = base.write(service.journal.needed_disk(), live)
            finally:
                for _, part in live:
                    part.settle_snapshot()
        except OSError as error:
            raise DiskFullError(
                f"shard {service.config.name} cannot write its rows to {service.config.state}: {error}"
            ) from error
        except MemoryError as error:
            raise OutOfMemoryError(f"shard {service.config.name} has no memory to write its rows: {error}") from error
        finally:
            self._memory = None
        service.journal.rebased(written)

    def refuse_without_room(self) -> None:
        """Before a base takes what room there is from the log, and pushes are refused for its sake. Raises DiskFullError."""
        needed, free = self._service.journal.rows.live_nbytes, self._service.journal.needed_disk().free_bytes()
        if needed > free:
            raise DiskFullError(
                f"shard {self._service.config.name} needs {needed} bytes in {self._service.config.state} to write its "
                f"rows, and {free} are free; make room"
            )

    def close(self) -> None:
        """Gives up a base that is being made, and waits for its thread."""
        if (memory := self._memory) is not None:
            memory.give_up("the shard is being stopped")
        if (thread := self._thread) is not None:
            thread.join(CLOSE_SECONDS)

    def _make_in_background(self) -> None:
        try:
            self.make()
            self._failed_at = 0
        except Exception as error:  # noqa: BLE001 - whatever it was, pushes that wait for it go on, and it is told
            self._told(error)
        finally:
            with self._changed:
                self._thread = None
                self._changed.notify_all()

    def _told(self, error: Exception) -> None:
        self._failed_at = self._service.backlog_bytes()
        unforeseen = None if isinstance(error, EngridError) else error
        _log.warning(
            "%s; replay at the next start grows until one succeeds", str(error) or repr(error), exc_info=unforeseen
        )
