"""Rows by key: what was fetched once from a sealed version is not fetched again.

A key stands for the K rows of its order, so an entry holds K * row_bytes bytes end to end, and a cache holds entries of
one such width. All of them, a row of zeros and the staging rows lie in one slab, so that a batch reaches its output by
a single take, wherever its rows were found:

    slab     | set 0: 8 entries | set 1 | ... | set S-1 | zeros | staging: rows on their way in |
                     ^               ^                     ^         ^
    slots    [ position 0, 1, 2, ... of every column: an index into the slab ]

    plan = cache.probe([Column(tag, keys), ...])    # hits are entries, distinct missing keys get staging rows
    ids = row_ids[plan.missing[0]]                  # fetch these rows straight into plan.staging
    plan.take(out)                                  # every position, duplicates and all
    cache.admit(plan)                               # keeps what deserves to be kept
    plan.close()

Exactness. A tag names the content a key is valid in: (table, order, version). It chooses the set together with the
key, lies beside the key in the entry, and both are compared in full: there are no false hits. Tags are never given
out twice, so an entry that outlives its version matches nothing. Only sealed versions may be cached.

Plans. Many may be open at once (prefetching). An entry remembers the newest plan that points at it and is not given
away while that plan or an older one is open, so a plan's rows stay put however long it waits; the same number tells
entries' ages apart. Staging is handed out in contiguous pieces; a plan that finds none large enough gets rows of its
own and is counted in `spilled`: it costs a pass more and is as right.

Admission. An entry counts the batches that used it, a sketch of small counters does so for keys not held, and both
are halved now and then. The r-th most frequent newcomer of a set replaces its r-th least frequent entry where it is
asked for at least as often; equals yield to the newer. So several keys enter a set per batch, and a stretch of keys
seen once does not empty it of what is used every batch. docs/cache.md has what this is worth beside plain LRU.

Threads. Any thread may probe, admit, drop or count: one lock per cache. A plan belongs to one thread at a time, and
its take needs no lock. numba, where installed, makes probe and admit a loop without the GIL; the numpy way beside it
does the same in whole-batch calls (cache_sets.py, cache_numba.py).

Rejected: handing the staging row over as the entry instead of copying it (the next batch's staging would lie in
pieces); locking hits by a count per entry (duplicates in a batch make it a sort); a byte of the key's hash compared
first (the set's keys are one cache line anyway).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from importlib.util import find_spec
from typing import Literal

import numpy as np

from engrid.rpc.frames import Bytes, Ids, row_view

from .sets import BOOKKEEPING_BYTES, FREQUENCY, RECENCY, WAYS, Bools, Engine, Found, NumpyEngine, Sets

AGE_PERIOD = 8
"""Frequencies are halved each time so many positions per entry were probed."""


@dataclass(frozen=True)
class Column:
    """One lookup of a probe."""

    tag: int
    """From KeyCache.tag; once per probe."""
    keys: Ids
    """int64 [T]."""
    alive: Bools | None = None
    """[T]; False: a dead position, whose rows are zeros. None: all live."""


@dataclass
class TagCounts:
    """What became of one tag's keys."""

    hits: int = 0
    """Positions whose rows were held."""
    misses: int = 0
    """Positions whose rows were not."""
    fetched: int = 0
    """Distinct missing keys: what goes over the wire."""
    insertions: int = 0
    evictions: int = 0
    """Entries that lost their place to another key."""

    def __add__(self, other: TagCounts) -> TagCounts:
        return TagCounts(*(ours + theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True)))


class KeyCache:
    """A set-associative cache of one entry width in a fixed amount of memory."""

    def __init__(
        self,
        budget: int,
        entry_bytes: int,
        *,
        staging_entries: int | None = None,
        policy: Literal["frequency", "recency"] = "frequency",
        engine: Literal["auto", "numba", "numpy"] = "auto",
    ) -> None:
        """budget: bytes for entries, their bookkeeping and staging; a probe's own arrays (some 50 bytes a position)
        come on top. entry_bytes: K * row_bytes. staging_entries: distinct missing keys that may be under way; None: an
        eighth of the budget. policy: recency is plain LRU. engine: auto takes numba where it is installed.

        Raises ValueError for a budget below one set, naming the least it takes.
        """
        if entry_bytes < 1:
            raise ValueError(f"entry_bytes {entry_bytes}: an entry holds at least one byte")
        if staging_entries is not None and staging_entries < 0:
            raise ValueError(f"staging_entries {staging_entries}: give 0 or more")
        whole = entry_bytes + BOOKKEEPING_BYTES
        staging = max(1, budget // whole // 8) if staging_entries is None else staging_entries
        count = (budget - (1 + staging) * entry_bytes) // (WAYS * whole)
        if count < 1:
            least = WAYS * whole + (2 if staging_entries is None else 1 + staging) * entry_bytes
            raise ValueError(
                f"a cache budget of {budget} bytes is smaller than one set of {WAYS} entries of {entry_bytes} bytes; "
                f"give at least {least}"
            )
        self.entry_bytes = entry_bytes
        self.entries = count * WAYS
        """Keys that can be held."""
        self.nbytes = self.entries * whole + (1 + staging) * entry_bytes
        """Bytes of the budget that are used."""
        self.spilled = 0
        """Plans that found no room in staging."""
        self._engine = _engine(engine)
        self._sets = Sets(count, RECENCY if policy == "recency" else FREQUENCY)
        self._slab: Bytes = np.empty((self.entries + 1 + staging, entry_bytes), np.uint8)
        self._slab[self.entries] = 0
        self._tags: dict[tuple[str, int, str], int] = {}
        self._counts: dict[int, TagCounts] = {}
        self._next_tag = 1
        self._next_plan = 1
        self._open: dict[int, weakref.ref[Plan]] = {}
        self._probed = 0
        self._lock = threading.Lock()

    def tag(self, table: str, order: int, version: str) -> int:
        """The tag of a table's order in a sealed version: the same until it is dropped, never one dropped before."""
        with self._lock:
            name = (table, order, version)
            if name not in self._tags:
                self._tags[name] = self._next_tag
                self._counts[self._next_tag] = TagCounts()
                self._next_tag += 1
            return self._tags[name]

    def drop(self, tag: int) -> None:
        """Frees a tag's entries and forgets it; plans that point at them can still be taken."""
        with self._lock:
            self._check_tag(tag)
            self._tags = {name: other for name, other in self._tags.items() if other != tag}
            del self._counts[tag]
            self._sets.free(tag)

    def drop_tables(self, tables: Collection[str]) -> None:
        """Drops every tag of the tables."""
        with self._lock:
            tags = [tag for (table, _, _), tag in self._tags.items() if table in tables]
        for tag in tags:
            self.drop(tag)

    def counts_of(self, table: str) -> dict[int, TagCounts]:
        """The counts of a table's orders, whatever the version."""
        with self._lock:
            return {order: replace(self._counts[tag]) for (name, order, _), tag in self._tags.items() if name == table}

    def counts(self, tag: int) -> TagCounts:
        """A copy, as they stand."""
        with self._lock:
            self._check_tag(tag)
            return replace(self._counts[tag])

    def probe(self, columns: Sequence[Column]) -> Plan:
        """Finds keys, all columns equally long; see Plan for what to do next. Raises ValueError for a tag unknown,
        dropped or given twice, and for keys or `alive` of a wrong type or shape."""
        keys_CT, alive_CT = _stack(columns)
        tags = [column.tag for column in columns]
        if len(set(tags)) < len(tags):
            raise ValueError(f"tags {tags}: give each once in a probe; join the keys of its columns")
        with self._lock:
            for tag in tags:
                self._check_tag(tag)
            number, self._next_plan = self._next_plan, self._next_plan + 1
            start, room = self._widest_staging()
            found = self._engine.probe(self._sets, keys_CT, alive_CT, np.array(tags, np.int32), number, start)
            plan = self._plan(number, tags, keys_CT, found, start, room)
            self._open[number] = weakref.ref(plan)
            self._probed += keys_CT.size
            for column, tag in enumerate(tags):
                counts = self._counts[tag]
                counts.hits += int(found.hits_C[column])
                counts.misses += int(found.misses_C[column])
                counts.fetched += len(plan.missing[column])
            return plan

    def admit(self, plan: Plan) -> int:
        """Keeps the rows in a plan's staging where they deserve it, as copies; returns how many keys were admitted.

        Only once all of staging was received. Keys of a tag dropped meanwhile, and keys that another plan brought
        in, are passed over.
        """
        with self._lock:
            plan.check_open()
            if self._probed >= AGE_PERIOD * self.entries:
                self._sets.age()
                self._probed = 0
            if not len(plan.keys_M):
                return 0
            tags_M = np.repeat(np.array(plan.tags, np.int32), np.diff(plan.bounds))
            known = np.arange(len(tags_M))
            if any(tag not in self._counts for tag in plan.tags):
                known = np.flatnonzero(np.isin(tags_M, list(self._counts)))
            try:
                chosen, entries, before = self._engine.admit(
                    self._sets,
                    plan.keys_M[known],
                    tags_M[known],
                    plan.estimates_M[known],
                    plan.number,
                    min(self._living()),
                )
                row_view(self._slab)[entries] = row_view(plan.staging)[known[chosen]]
            except BaseException:
                # Ctrl-C: entries may be given to keys whose rows have not come. What they hold is not known any more.
                for tag in self._counts:
                    self._sets.free(tag)
                raise
            for tag, counts in self._counts.items():
                counts.insertions += int(np.count_nonzero(tags_M[known[chosen]] == tag))
                counts.evictions += int(np.count_nonzero(before == tag))
            return len(chosen)

    def _plan(self, number: int, tags: list[int], keys_CT: Ids, found: Found, start: int, room: int) -> Plan:
        missing = len(found.positions_M)
        slots = found.slots_TC
        spill = missing > room
        if spill:
            self.spilled += 1
            staging: Bytes = np.empty((missing, self.entry_bytes), np.uint8)
            # Beyond the slab, so that take can tell them from rows in it.
            slots[slots >= start] += len(self._slab) - start
        else:
            staging = self._slab[start : start + missing]
        return Plan(self._slab, number, tags, keys_CT, found, staging, 0 if spill else start, spill=spill)

    def _living(self) -> dict[int, Plan]:
        """Plans that are open, by number. One that was let go of unclosed is closed by that."""
        living = {}
        for number, reference in list(self._open.items()):
            plan = reference()
            if plan is None or plan.closed:
                del self._open[number]
            else:
                living[number] = plan
        return living

    def _widest_staging(self) -> tuple[int, int]:
        """First row and length of the largest piece of staging that no plan holds."""
        held = sorted((plan.staging_start, len(plan.staging)) for plan in self._living().values() if plan.staging_start)
        start, room, cursor = self.entries + 1, 0, self.entries + 1
        for begin, length in [*held, (len(self._slab), 0)]:
            if begin - cursor > room:
                start, room = cursor, begin - cursor
            cursor = begin + length
        return start, room

    def _check_tag(self, tag: int) -> None:
        if tag not in self._counts:
            raise ValueError(f"tag {tag} was not given out by this cache, or was dropped")


class Plan:
    """Where a probe's rows are and what is missing. Close it (or use `with`) once it was taken and admitted.

    Until then its entries stay and its staging is its own. After a failure or a cancelled fetch do not close it but let
    go of it: whoever may still write to `staging` must hold the plan, and the last to let go frees it.
    """

    def __init__(
        self,
        slab: Bytes,
        number: int,
        tags: Sequence[int],
        keys_CT: Ids,
        found: Found,
        staging: Bytes,
        staging_start: int,
        *,
        spill: bool,
    ) -> None:
        self.number = number
        self.tags = tags
        self.slots: Ids = found.slots_TC
        """[T, columns]."""
        self.bounds = found.bounds
        """Column c's missing keys have staging rows bounds[c] up to bounds[c + 1]."""
        self.missing = [
            found.positions_M[begin:end] for begin, end in zip(found.bounds, found.bounds[1:], strict=False)
        ]
        """For each column, a position of every distinct missing key, in the order of staging."""
        self.keys_M: Ids = np.concatenate([keys[where] for keys, where in zip(keys_CT, self.missing, strict=True)])
        self.estimates_M = found.estimates_M
        self.staging = staging
        """uint8 [missing keys of all columns, entry_bytes], to receive their rows."""
        self.staging_start = staging_start
        """First row in the slab; 0: outside it."""
        self.hits = int(found.hits_C.sum())
        """Positions whose rows were held."""
        self.closed = False
        self._slab = slab
        self._spill = spill

    def take(self, out: Bytes, columns: slice = slice(None)) -> None:
        """Writes the rows of all positions: out is uint8, contiguous, [T, columns, entry_bytes] in any shape of that
        size. Only once staging was received; `columns` takes a table's part of the probe."""
        self.check_open()
        slots = self.slots[:, columns].reshape(-1)
        size = len(slots) * self._slab.shape[1]
        if out.dtype != np.uint8 or not out.flags.c_contiguous or out.size != size:
            raise ValueError(f"out must be contiguous uint8 of {size} bytes, not {out.dtype} {list(out.shape)}")
        rows = row_view(out.reshape(len(slots), self._slab.shape[1]))
        np.take(row_view(self._slab), slots, out=rows, mode="clip")
        if self._spill:
            outside = np.flatnonzero(slots >= len(self._slab))
            rows[outside] = row_view(self.staging)[slots[outside] - len(self._slab)]

    def close(self) -> None:
        """Gives up the entries and the staging rows; again is nothing."""
        self.closed = True

    def check_open(self) -> None:
        if self.closed:
            raise ValueError("the plan is closed: its rows may be others' by now; probe again")

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _engine(name: Literal["auto", "numba", "numpy"]) -> Engine:
    installed = find_spec("numba") is not None
    if name == "numba" and not installed:
        raise ValueError("numba is not installed: pip install 'engrid[fast]', or take engine numpy")
    if name == "numpy" or not installed:
        return NumpyEngine()
    # Ctrl-C in the middle of an import leaves half a module behind; no signal reaches another thread.
    with ThreadPoolExecutor(1, "engrid numba") as thread:
        return thread.submit(_numba_engine).result()


def _numba_engine() -> Engine:
    from .numba_sets import NumbaEngine

    return NumbaEngine()


def _stack(columns: Sequence[Column]) -> tuple[Ids, Bools | None]:
    if not columns:
        raise ValueError("a probe needs at least one column")
    length = len(columns[0].keys)
    for column in columns:
        if column.keys.dtype != np.int64 or column.keys.shape != (length,):
            raise ValueError(f"keys must be int64 [{length}], not {column.keys.dtype} {list(column.keys.shape)}")
        if column.alive is not None and (column.alive.dtype != np.bool_ or column.alive.shape != (length,)):
            raise ValueError(f"alive must be bool [{length}], not {column.alive.dtype} {list(column.alive.shape)}")
    keys_CT = np.stack([column.keys for column in columns])
    if all(column.alive is None for column in columns):
        return keys_CT, None
    everywhere = np.ones(length, np.bool_)
    return keys_CT, np.stack([everywhere if column.alive is None else column.alive for column in columns])
