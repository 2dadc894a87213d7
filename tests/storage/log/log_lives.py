"""Many lives of one log on a simulated disk: what was promised is there, once and in order, after every one of them."""

import errno
import random

from engrid.rpc.errors import DiskFullError
from engrid.storage.log.log import Log, LogFailedError
from tests.simulated_disk import CrashedError, SimulatedDisk

SEGMENT_BYTES = 400


class LogLives:
    """A log that is appended to, synced, shortened, killed and cut off from power, all by one seed.

    A life ends by kill -9 (what was written stays, unsynced) or by a power failure, at any file operation, also while
    it recovers. Raises AssertionError or CorruptLogError where a promise is broken.
    """

    def __init__(self, seed: int, *, ignore: set[str] | None = None) -> None:
        self.random = random.Random(seed)
        self.ignore = ignore or set()
        self.disk = SimulatedDisk(seed)
        self.sites: set[str] = set()
        self.payloads: dict[int, bytes] = {}
        """Of each number, what was appended last under it."""
        self.promised = 0
        """The last record that was said to be durable."""
        self.written = 0
        """The last record appended since power last failed: kill -9 takes nothing."""
        self.needed = 1
        """First record that nobody said could go."""
        self.recovered = 0
        self.cut = 0

    def run(self, lives: int = 12) -> None:
        for _ in range(lives):
            self.disk.ignore = self.ignore
            self._arrange_death()
            try:
                self._live(self._recover())
            except CrashedError:
                pass
            except (LogFailedError, DiskFullError):
                assert self.disk.fail or self.disk.capacity is not None, "the disk did not fail"
            self.sites |= set(self.disk.sites)
            self._die()
        self.disk.ignore = self.ignore
        self._recover()

    def _arrange_death(self) -> None:
        last = self.disk.operations + self.random.choice((3, 10, 40, 150))
        last -= self.random.randint(0, last - self.disk.operations)

        def before(operation: str, path: str) -> None:
            if self.disk.operations > last:
                raise CrashedError(f"at {operation} of {path}")

        self.disk.before = before
        if self.random.random() < 0.1:
            self.disk.fail = {self.random.randint(self.disk.operations, last + 1): errno.EIO}

    def _die(self) -> None:
        if self.random.random() < 0.6:
            self.disk = self.disk.crash()
            self.written = 0
        self.disk.before = lambda operation, path: None
        self.disk.fail, self.disk.capacity = {}, None

    def _recover(self) -> Log:
        log = Log(self.disk, "log", segment_bytes=SEGMENT_BYTES)
        found = [(number, bytes(payload)) for number, payload in log.recover()]
        numbers = [number for number, _ in found]
        assert numbers == list(range(log.first, log.last + 1))
        assert log.last >= self.promised, f"record {self.promised} was promised, {log.last} is the last"
        assert log.last >= self.written, f"record {self.written} was written, {log.last} is the last"
        assert log.first <= max(1, self.needed), f"record {self.needed} is gone, {log.first} is the first"
        for number, payload in found:
            assert payload == self.payloads.get(number), f"record {number} is another"
        self.recovered += len(found)
        self.cut += len([number for number in self.payloads if number > log.last])
        self.payloads = {number: payload for number, payload in self.payloads.items() if number <= log.last}
        self.promised = log.last
        return log

    def _live(self, log: Log) -> None:
        while True:
            action = self.random.random()
            if action < 0.7:
                self._append(log)
            elif action < 0.8:
                number = self.random.randint(0, log.last)
                log.wait_durable(number)
                self.promised = max(self.promised, number)
            elif action < 0.9:
                log.sync()
                self.promised = log.last
            elif action < 0.95:
                number = self.random.randint(0, log.last + 1)
                self.needed = max(self.needed, number)
                log.truncate_before(number)
            else:
                room = self.random.choice((None, 0, 30, 200))
                self.disk.capacity = None if room is None else self.disk.used() + room

    def _append(self, log: Log) -> None:
        number = log.last + 1
        pieces = [
            self.random.randbytes(self.random.choice((0, 1, 8, 50, 150))) for _ in range(self.random.randint(0, 3))
        ]
        self.payloads[number] = b"".join(pieces)
        try:
            assert log.append(pieces) == number
            self.written = number
        except DiskFullError:
            del self.payloads[number]
