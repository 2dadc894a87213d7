"""When a shard makes a base: after so many bytes of log, and after rows came from outside."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from engrid.rpc.errors import DiskFullError, EngridError

from .base import begin_snapshots
from .snapshot import ImageMemory

if TYPE_CHECKING:
    from .service import ShardService

_log = logging.getLogger(__name__)


class Bases:
    """Makes bases for one shard, one at a time, in a thread of its own or in the caller's."""

    def __init__(self, service: ShardService) -> None:
        self._service = service
        self._thread: threading.Thread | None = None
        self._failed_at = 0
        """Bytes of log when a base could not be made; the next try waits for as much again."""
        self._changed = threading.Condition()

    def look(self) -> None:
        """Begins a base in the background where the log has grown by its bound; where it is twice that, waits for it.

        So what a start replays is bounded also where pushes outrun the disk. Raises DiskFullError where no base can be
        made and the log would grow without bound.
        """
        limit = self._service.config.log_bytes
        backlog = self._service.backlog_bytes()
        if backlog < limit:
            return
        with self._changed:
            if self._thread is None and backlog >= self._failed_at + limit // 4:
                self._thread = threading.Thread(target=self._make_in_background, name="engrid base", daemon=True)
                self._thread.start()
            if backlog >= 2 * limit:
                self._changed.wait_for(lambda: self._thread is None)

    def make(self) -> None:
        """Makes a base now; raises DiskFullError or SnapshotGivenUpError: the shard goes on with the old one."""
        service = self._service
        with service.saving:
            self._refuse_without_room()
            memory = ImageMemory(service.config.image_bytes)
            with service.at_rest():
                if service.journal.is_based:
                    return
                base, live = service.journal.capture()
                begin_snapshots(live, memory)
            try:
                service.journal.wait_durable(base.record)
                written = base.write(service.journal.needed_disk(), live)
            except OSError as error:
                raise DiskFullError(
                    f"shard {service.config.name} cannot write its rows to {service.config.state}: {error}"
                ) from error
            finally:
                for _, part in live:
                    part.settle_snapshot()
            service.journal.rebased(written)

    def _refuse_without_room(self) -> None:
        """Before a base takes what room there is from the log, and pushes are refused for its sake."""
        needed, free = self._service.bytes_held(), self._service.journal.needed_disk().free_bytes()
        if needed > free:
            raise DiskFullError(
                f"shard {self._service.config.name} needs {needed} bytes in {self._service.config.state} to write its "
                f"rows, and {free} are free; make room"
            )

    def close(self) -> None:
        """Waits for a base that is being made."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _make_in_background(self) -> None:
        try:
            self.make()
            self._failed_at = 0
        except EngridError as error:
            self._failed_at = self._service.backlog_bytes()
            _log.warning("%s; replay at the next start grows until one succeeds", error)
        finally:
            with self._changed:
                self._thread = None
                self._changed.notify_all()
