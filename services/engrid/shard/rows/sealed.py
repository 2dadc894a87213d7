"""Rows that never change, in memory that the kernel keeps from changing.

The rows of a partition of a sealed table lie in a memfd. While they are loaded this process alone maps it, writable.
Once all have come, that mapping is given up, the file is sealed, and mapped again for reading:

    F_SEAL_SHRINK, F_SEAL_GROW    nobody can truncate it: who maps it never gets SIGBUS
    F_SEAL_FUTURE_WRITE           nobody can write to it or map it writable again, we neither
    F_SEAL_SEAL                   nobody can add or take away a seal

So the descriptor can be handed to any process of this host that may read (handover.py), which then gathers rows
without asking us, and goes on doing so when we are gone.

Once sealed the rows are served, and meanwhile copied into huge pages, one piece at a time (mapping.py): the second or
so per GiB that it takes is not waited for.

Rejected: a file in /dev/shm (64 MiB in most containers, stays behind after a crash, can be truncated under its
readers); F_SEAL_WRITE (older kernels then refuse shared mappings even for reading).
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import threading

import numpy as np

from engrid.host.mapping import collapse, mapped
from engrid.rpc.errors import BadRequestError, RowWidthMismatchError
from engrid.rpc.frames import Bytes, Ids, row_view
from engrid.tables import TableSpec

_log = logging.getLogger(__name__)

F_SEAL_FUTURE_WRITE = 0x10
"""linux/fcntl.h; Linux 5.1 and later. Python 3.11 does not name it."""
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


class SealedRows:
    """Rows start..stop-1 of a sealed table: loaded once from first to last, then gathered."""

    def __init__(self, spec: TableSpec, start: int, stop: int) -> None:
        """Takes address space, and memory only as rows are loaded. Raises OSError where the system has none."""
        self.spec = spec
        self.start, self.stop = start, stop
        self.nbytes = (stop - start) * spec.row_bytes
        self._gone = threading.Event()
        self.descriptor = os.memfd_create(f"engrid {spec.name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, self.nbytes)
        self._loading: mmap.mmap | None = mmap.mmap(self.descriptor, self.nbytes)
        self._rows: Bytes = np.empty((0, spec.row_bytes), np.uint8)
        self.lock = threading.Lock()
        """Held by whoever loads."""

    def __len__(self) -> int:
        return self.stop - self.start

    def __del__(self) -> None:
        self._gone.set()
        os.close(self.descriptor)

    @property
    def loaded(self) -> bool:
        """Whether the rows are there and sealed."""
        return self._loading is None

    def write(self, at: int, raw: bytes) -> None:
        """Puts bytes of rows at a byte offset, before they are sealed; afterwards raises BadRequestError unless the
        very same bytes are there."""
        if at + len(raw) > self.nbytes:
            raise RowWidthMismatchError(f"more than the {self.nbytes} bytes of {self._name()} came")
        if self._loading is not None:
            self._loading[at : at + len(raw)] = raw
        elif not np.array_equal(self._rows.reshape(-1)[at : at + len(raw)], np.frombuffer(raw, np.uint8)):
            raise BadRequestError(
                f"{self._name()} is sealed and holds other rows than those sent; a version never changes: give "
                "these another name"
            )

    def seal(self) -> None:
        """Ends the loading; again is nothing."""
        if self._loading is None:
            return
        memory = mapped(
            self.descriptor, self.nbytes
        )  # first: where there is no room for it, the load can be sent again
        self._loading.close()
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, SEALS)
        self._rows = memory.reshape(len(self), self.spec.row_bytes)
        self._loading = None
        try:
            threading.Thread(
                target=_make_huge, args=(memory, self._gone), name="engrid huge pages", daemon=True
            ).start()
        except RuntimeError as error:
            _log.warning("%s stay in small pages: %s", self._name(), error)

    def gather(self, local_ids: Ids, out: Bytes) -> None:
        """Copies rows local_ids int64 [n], checked to be in range, into `out` [n, row_bytes], C-contiguous."""
        np.take(row_view(self._rows), local_ids, out=row_view(out), mode="clip")

    def raw(self, start: int, stop: int) -> Bytes:
        """Local rows start..stop-1 as served: uint8 [stop - start, row_bytes], read only."""
        return self._rows[start:stop]

    def _name(self) -> str:
        return f"rows {self.start}..{self.stop - 1} of table {self.spec.name}"


_making_huge = threading.Lock()


def _make_huge(memory: Bytes, gone: threading.Event) -> None:
    done = 0
    try:
        while done < memory.nbytes and not gone.is_set():
            with _making_huge:  # anew for each piece: whoever waits for it keeps its rows from being freed
                done = collapse(memory, done)
    except Exception:  # noqa: BLE001 - they are served all the same
        _log.exception("sealed rows stay in small pages")
