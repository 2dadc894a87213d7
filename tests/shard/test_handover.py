"""The socket that hands sealed rows over: whatever one process of this host sends, the next is answered."""

import json
import socket
import time
from contextlib import contextmanager

import pytest

from engrid.client import MemoryClient
from engrid.host.handover import MAX_LINE, read_line
from engrid.rpc.errors import UnknownTableError
from engrid.shard import handover as module
from engrid.shard.handover import Handover
from engrid.shard.rows.sealed import SealedRows
from engrid.v1 import memory_pb2 as pb
from tests.shards import load_initial, local_shards, table


def finder(rows):
    def find(key):
        name, _ = key
        if name == "broken":
            raise ZeroDivisionError("of ours")
        if name != "t@1":
            raise UnknownTableError(f"no table {name}")
        return rows

    return find


@pytest.fixture
def handover(monkeypatch):
    monkeypatch.setattr(module, "REQUEST_SECONDS", 0.3)
    served = Handover(finder(SealedRows(table("t@1", optimizer=None), 0, 1000)))
    yield served
    assert served.serves
    served.close()
    assert not served.serves


@contextmanager
def connected(handover):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(20)
        client.connect(str(handover.path))
        yield client


def ask(handover, raw):
    with connected(handover) as client:
        client.sendall(raw)
        return json.loads(read_line(client))


def trickle(client):
    for _ in range(400):
        client.sendall(b" ")
        time.sleep(0.05)


def request(handover, **changes):
    return json.dumps({"instance": handover.instance, "table": "t@1", "partition": 0, **changes}).encode() + b"\n"


@pytest.mark.parametrize(
    "raw",
    [
        b"\n",
        b"[" * 4000 + b"\n",
        b"\xff\xfe\n",
        b"1" * 4000 + b"\n",
        b'{"instance": 1e999, "table": [], "partition": {}}\n',
        b"x" * (MAX_LINE + 10),
    ],
    ids=["nothing", "nested", "no text", "a number", "other types", "too long"],
)
def test_what_is_no_request_is_refused_and_the_next_is_answered(handover, raw):
    assert ask(handover, raw)["code"] == pb.BAD_REQUEST
    assert ask(handover, request(handover)) == {"start": 0, "stop": 1000}


@pytest.mark.parametrize("name", ["u" * 3900, "\u4e2d" * 600, "\U0001f600" * 300, "\x01" * 600])
def test_answer_fits_a_line_whatever_was_asked_for(handover, name):
    asked = json.dumps({"instance": handover.instance, "table": name, "partition": 0}, ensure_ascii=False).encode()
    answer = ask(handover, (asked if len(asked) < MAX_LINE else request(handover, table="u" * 3000)[:-1]) + b"\n")
    assert answer["code"] in (pb.UNKNOWN_TABLE, pb.BAD_REQUEST)
    assert ask(handover, request(handover)) == {"start": 0, "stop": 1000}


def test_fault_of_ours_is_answered_and_is_not_the_end(handover, caplog):
    answer = ask(handover, request(handover, table="broken"))
    assert answer["code"] == pb.INTERNAL
    assert "ZeroDivisionError" in answer["message"]
    assert "request for sealed rows failed" in caplog.text
    assert ask(handover, request(handover)) == {"start": 0, "stop": 1000}


def test_client_that_sends_a_byte_at_a_time_holds_the_others_up_for_no_longer_than_its_time(handover):
    with connected(handover) as slow, connected(handover) as other:
        other.sendall(request(handover))
        begun = time.monotonic()
        with pytest.raises(OSError, match=r"Broken pipe|reset"):
            trickle(slow)
        assert time.monotonic() - begun < 15, "400 bytes would take 20 s"
        assert json.loads(read_line(other)) == {"start": 0, "stop": 1000}


def test_accept_that_fails_for_a_while_is_tried_again(handover, monkeypatch):
    real, failures = handover._socket, iter([OSError(24, "Too many open files")] * 2)

    class Failing:
        def accept(self):
            for error in failures:
                raise error
            return real.accept()

        def __getattr__(self, name):
            return getattr(real, name)

    handover._socket = Failing()
    assert ask(handover, request(handover)) == {"start": 0, "stop": 1000}
    assert ask(handover, request(handover)) == {"start": 0, "stop": 1000}
    assert next(failures, None) is None


def test_socket_that_is_served_no_more_is_not_named(tmp_path):
    with local_shards(tmp_path, 1) as (shard,), MemoryClient(f"file:{tmp_path}") as client:
        load_initial(client, table("t@1", optimizer=None))
        stub = client.connections.transport("s0").stub
        assert stub.Describe(pb.DescribeRequest()).local_socket
        shard.handover.close()
        assert not stub.Describe(pb.DescribeRequest()).local_socket
