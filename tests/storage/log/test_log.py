"""The log: its bytes, damage, group commit, failures of the disk. What crashes do to it: test_log_lives.py."""

import errno
import os
import random
import threading
from collections import Counter

import pytest

from engrid.rpc.errors import DiskFullError, ShardUnavailableError
from engrid.storage.log.log import Backlog, Log, LogFailedError
from engrid.storage.log.segments import CorruptLogError, checksum
from tests.simulated_disk import SimulatedDisk

FIRST = "log/0000000000000001.log"


def opened(disk, **options) -> Log:
    log = Log(disk, "log", **options)
    for _ in log.recover():
        pass
    return log


def records(disk, **options) -> list[tuple[int, bytes]]:
    return [(number, bytes(payload)) for number, payload in Log(disk, "log").recover(**options)]


@pytest.fixture
def disk() -> SimulatedDisk:
    return SimulatedDisk()


def test_golden_bytes(disk):
    log = opened(disk)
    log.append([b"ab", memoryview(b"c")])
    log.sync()
    log.append([])
    header = b"EngrLog\x01" + (1).to_bytes(8, "little") + bytes(4)
    first = b"EnRc" + bytes(4) + (1).to_bytes(8, "little") + (0).to_bytes(8, "little") + (3).to_bytes(8, "little")
    first += bytes.fromhex("c2412435")
    crc = checksum([first]).to_bytes(4, "little")
    second = b"EnRc" + crc + (2).to_bytes(8, "little") + (1).to_bytes(8, "little") + bytes(8) + bytes(4)
    expected = header + checksum([header]).to_bytes(4, "little") + first + crc + b"abc"
    expected += second + checksum([second]).to_bytes(4, "little")
    assert disk.read(FIRST) == expected
    assert crc.hex() == "835bb7ed"


def test_records_come_back_in_order_over_many_segments(disk):
    log = opened(disk, segment_bytes=100)
    payloads = [bytes([number]) * number for number in range(1, 41)]
    assert [log.append([payload]) for payload in payloads] == list(range(1, 41))
    log.close()
    assert len(disk.names("log")) > 5
    assert records(disk) == list(enumerate(payloads, 1))
    assert records(disk, start=30) == list(enumerate(payloads, 1))[29:]
    log = opened(disk)
    assert (log.first, log.last, log.durable) == (1, 40, 40)
    assert log.append([b"more"]) == 41


def test_a_record_may_be_larger_than_what_is_read_at_a_time(disk, monkeypatch):
    monkeypatch.setattr("engrid.storage.log.segments._WINDOW_BYTES", 50)
    log = opened(disk)
    payloads = [os.urandom(size) for size in (0, 1, 300, 10, 50, 51, 9, 2000, 0, 3)]
    for payload in payloads:
        log.append([payload])
    assert [payload for _, payload in records(disk)] == payloads


def test_nothing_is_taken_before_recovery_or_after_close(disk):
    log = Log(disk, "log")
    with pytest.raises(LogFailedError, match="not recovered yet"):
        log.append([b"x"])
    log = opened(disk)
    log.close()
    with pytest.raises(LogFailedError, match="closed"):
        log.append([b"x"])


def test_backlog_counts_what_lies_behind_a_record(disk):
    log = opened(disk, segment_bytes=100)
    for size in range(20):
        log.append([bytes(size)])
    assert log.after(20) == Backlog(0, 0)
    assert log.after(18) == Backlog(2, 2 * 40 + 18 + 19)
    assert log.after(0) == Backlog(20, 20 * 40 + 190)
    log.truncate_before(15)
    first = log.first
    assert 10 < first <= 15
    assert log.after(0) == log.after(first - 1) == Backlog(21 - first, sum(40 + size for size in range(first - 1, 20)))
    assert log.after(18) == Backlog(2, 2 * 40 + 18 + 19)
    assert log.after(99) == Backlog(0, 0)


def test_segments_that_nobody_needs_go_and_the_number_goes_on(disk):
    log = opened(disk, segment_bytes=100)
    for _ in range(20):
        log.append([b"x" * 30])
    log.truncate_before(21)
    assert len(disk.names("log")) == 1
    disk = disk.crash()
    assert records(disk)[-1] == (20, b"x" * 30)
    log = opened(disk, segment_bytes=100)
    assert log.append([b"y"]) == 21
    with pytest.raises(CorruptLogError, match="log begins with record 19; record 5 is needed"):
        records(disk, start=5)


def test_a_log_shorter_than_what_is_known_to_be_durable_is_refused(disk):
    log = opened(disk)
    log.append([b"x"])
    log.close()
    assert records(disk, at_least=1)
    with pytest.raises(CorruptLogError, match=r"log ends with record 1, but record 2 was durable.*no damage is seen"):
        records(disk, at_least=2)


def test_a_missing_segment_is_refused(disk):
    log = opened(disk, segment_bytes=100)
    for _ in range(12):
        log.wait_durable(log.append([b"x" * 30]))
    names = disk.names("log")
    disk.remove(f"log/{names[2]}")
    with pytest.raises(CorruptLogError, match=f"{names[3]}, byte 0: record 5 is missing: .* begins with record 7"):
        records(disk)


def test_a_newer_version_is_refused_by_name(disk):
    header = b"EngrLog\x02" + (1).to_bytes(8, "little") + bytes(4)
    opened(disk).close()
    disk.remove(FIRST)
    file = disk.create(FIRST)
    file.write([header, checksum([header]).to_bytes(4, "little")])
    with pytest.raises(CorruptLogError, match="version 2; this shard reads version 1"):
        records(disk)


# -- damage


def damaged_log(seed: int) -> tuple[SimulatedDisk, dict[int, bytes], int]:
    """A log over several segments; every record below the number returned is followed by a header that says it is safe."""
    chance = random.Random(seed)
    disk = SimulatedDisk(seed)
    log = opened(disk, segment_bytes=300)
    payloads, proven = {}, 0
    for number in range(1, 20):
        payloads[number] = chance.randbytes(chance.randint(0, 100))
        proven = log.durable
        log.append([payloads[number]])
        if chance.random() < 0.4:
            log.sync()
    log.close()
    return disk, payloads, proven


def offsets(disk: SimulatedDisk) -> list[tuple[str, int, int, int]]:
    """(path, start, stop, number) of each record, its segment's header counted to the first."""
    out, number = [], 0
    for name in disk.names("log"):
        start, at = 0, 24
        size = disk.size(f"log/{name}")
        while at < size:
            number += 1
            at += 40 + int.from_bytes(disk.read(f"log/{name}", at + 24, 8), "little")
            out.append((f"log/{name}", start, at, number))
            start = at
    return out


@pytest.mark.parametrize("seed", range(150))
def test_a_flipped_bit_never_yields_a_wrong_record_and_is_refused_where_the_record_was_safe(seed):
    disk, payloads, proven = damaged_log(seed)
    chance = random.Random(seed)
    path, start, stop, number = chance.choice(offsets(disk))
    byte = chance.randrange(start, stop)
    disk.flip(path, byte, chance.randrange(8))
    before = {name: disk.read(f"log/{name}") for name in disk.names("log")}
    if number <= proven:
        at = 0 if start == 0 and byte < 24 else max(start, 24)
        with pytest.raises(
            CorruptLogError, match=rf"^{path}, byte {at}: record {number} is not intact: .* was durable"
        ):
            records(disk)
        assert {name: disk.read(f"log/{name}") for name in disk.names("log")} == before
    else:
        assert dict(records(disk)) == {n: payload for n, payload in payloads.items() if n < number}
        assert dict(records(disk.crash())) == {n: payload for n, payload in payloads.items() if n < number}


def test_every_bit_of_a_safe_record_is_watched():
    disk = SimulatedDisk()
    log = opened(disk)
    for payload in (b"one", b"two", b"three"):
        log.wait_durable(log.append([payload]))
    log.close()
    for byte in range(24 + 40 + 3 + 40 + 3):
        for bit in range(8):
            disk.flip(FIRST, byte, bit)
            with pytest.raises(CorruptLogError, match=f"^{FIRST}, byte|is a log of version"):
                records(disk)
            disk.flip(FIRST, byte, bit)
    assert [payload for _, payload in records(disk)] == [b"one", b"two", b"three"]


def test_a_later_record_that_survived_alone_is_dropped_and_does_not_come_back():
    disk = SimulatedDisk()
    log = opened(disk)
    log.wait_durable(log.append([b"safe"]))
    for payload in (b"torn", b"whole"):
        log.append([payload])
    disk.flip(FIRST, 24 + 44 + 40, 0)
    assert records(disk) == [(1, b"safe")]
    log = opened(disk)
    assert log.append([b"same"]) == 2
    log.sync()
    assert records(disk.crash()) == [(1, b"safe"), (2, b"same")]


# -- threads


def test_one_sync_serves_all_that_wait(disk):
    syncs = Counter()
    gate = threading.Event()

    def before(operation: str, path: str) -> None:
        syncs[operation] += 1
        if operation == "sync" and syncs["sync"] == 2:
            gate.wait(10)

    disk.before = before
    log = opened(disk)
    assert syncs["sync"] == 1
    leader = threading.Thread(target=lambda: log.wait_durable(log.append([b"first"])))
    leader.start()
    while syncs["sync"] < 2:
        threading.Event().wait(0.001)
    numbers = [log.append([b"x"]) for _ in range(20)]
    assert log.durable == 0
    followers = [threading.Thread(target=log.wait_durable, args=(number,)) for number in numbers]
    for thread in followers:
        thread.start()
    gate.set()
    for thread in (leader, *followers):
        thread.join(10)
    assert log.durable == 21
    assert syncs["sync"] == 3


def test_many_threads_append_and_wait(disk):
    log = opened(disk, segment_bytes=2000)
    written: dict[int, bytes] = {}

    def work(worker: int) -> None:
        for index in range(200):
            payload = f"{worker}:{index}".encode()
            number = log.append([payload])
            written[number] = payload
            if index % 7 == 0:
                log.wait_durable(number)
                assert log.durable >= number
            if index % 50 == 49:
                log.truncate_before(number - 400)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    first = log.first
    log.sync()
    after = disk.crash()
    assert records(after) == [(number, written[number]) for number in range(first, 1201)]
    assert first > 300


# -- a disk that fails


def test_a_failed_sync_is_for_good(disk):
    log = opened(disk)
    log.wait_durable(log.append([b"safe"]))
    number = log.append([b"lost"])
    disk.fail[disk.operations + 1] = errno.EIO
    with pytest.raises(LogFailedError, match=r"a sync failed: .*Input/output error.*log/0000000000000001\.log"):
        log.wait_durable(number)
    for call in (lambda: log.wait_durable(number), log.sync, lambda: log.append([b"x"])):
        with pytest.raises(LogFailedError, match="a sync failed"):
            call()
    log.wait_durable(1)
    assert isinstance(LogFailedError("x"), ShardUnavailableError)


def test_all_that_wait_learn_that_the_sync_failed(disk):
    log = opened(disk)
    number = log.append([b"x"])
    gate, failed = threading.Event(), []

    def before(operation: str, path: str) -> None:
        if operation == "sync":
            gate.wait(10)
            raise OSError(errno.EIO, "gone", path)

    def wait() -> None:
        try:
            log.wait_durable(number)
        except LogFailedError as error:
            failed.append(str(error))

    disk.before = before
    threads = [threading.Thread(target=wait) for _ in range(5)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(10)
    assert len(failed) == 5


@pytest.mark.parametrize("room", range(0, 200, 7))
def test_a_full_disk_refuses_the_record_and_goes_on_once_there_is_room(disk, room):
    log = opened(disk, segment_bytes=100)
    log.append([b"a" * 40])
    disk.capacity = disk.used() + room
    taken, refused = ["a" * 40], []
    for letter in "bcdef":
        try:
            log.append([letter.encode() * 40])
            taken.append(letter * 40)
        except DiskFullError as error:
            refused.append(str(error))
    assert refused
    assert all("make room on the disk" in message for message in refused)
    log.sync()
    disk.capacity = None
    log.append([b"g" * 40])
    taken.append("g" * 40)
    log.sync()
    assert [payload.decode() for _, payload in records(disk.crash())] == taken


def test_a_record_that_cannot_be_taken_back_ends_the_log(disk):
    log = opened(disk)
    log.append([b"a"])
    disk.capacity = disk.used() + 10
    disk.fail[disk.operations + 2] = errno.EIO
    with pytest.raises(
        LogFailedError, match=r"writing record 2 failed \(.*No space.*\), and what was written could not be taken back"
    ):
        log.append([b"b"])
    disk.capacity = None
    with pytest.raises(LogFailedError):
        log.append([b"c"])
    assert records(disk) == [(1, b"a")]


def test_a_disk_that_became_read_only_is_named(disk):
    log = opened(disk)
    disk.read_only = True
    with pytest.raises(LogFailedError, match=r"writing record 1 failed \(.*Read-only.*log/0000000000000001\.log"):
        log.append([b"b"])
    with pytest.raises(LogFailedError, match=r"the log in log cannot be recovered: .*Read-only"):
        records(disk)
