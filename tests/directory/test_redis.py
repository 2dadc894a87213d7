import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import redis

from engrid.directory import (
    CorruptDirectoryError,
    DirectoryUnavailableError,
    ShardNameTakenError,
    ShardRecord,
    open_directory,
)
from engrid.directory import redis as redis_module
from tests.conformance.directory import DirectoryConformance, full_placement, record
from tests.redis_server import RedisServer, running_redis


@pytest.fixture
def url(redis_server: RedisServer) -> str:
    return f"{redis_server.url}/0?prefix={uuid.uuid4().hex}"


class TestRedisDirectory(DirectoryConformance):
    pass


def test_directories_of_one_server_are_apart_by_prefix_and_database(redis_server: RedisServer) -> None:
    urls = [f"{redis_server.url}/1?prefix=a", f"{redis_server.url}/1?prefix=b", f"{redis_server.url}/2?prefix=a"]
    directories = [open_directory(each) for each in urls]
    for port, directory in enumerate(directories, 5000):
        directory.register(record(port=port))
    directories[0].clear()
    assert [len(directory.shards()) for directory in directories] == [0, 1, 1]
    for directory in directories:
        directory.close()


def test_a_name_on_another_host_is_not_given_away(url: str) -> None:
    directory = open_directory(url)
    away = ShardRecord(name="s0", address="10.0.0.2:5000", host="elsewhere/1234", pid=1)
    directory.register(away)
    with pytest.raises(ShardNameTakenError, match=r"on host elsewhere/1234, where .* cannot see whether it lives"):
        directory.register(record())
    assert directory.shards() == {"s0": away}
    directory.unregister("s0")
    directory.register(record())
    directory.close()


def test_a_server_that_is_not_there_is_named_at_once() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        directory = open_directory(f"redis://127.0.0.1:{port}")
        started = time.monotonic()
        for call in (
            directory.placement,
            directory.shards,
            directory.clear,
            lambda: directory.register(record()),
            lambda: directory.unregister("s0"),
            lambda: directory.publish(full_placement(), expected_epoch=None),
        ):
            with pytest.raises(DirectoryUnavailableError, match=rf"Redis 127\.0\.0\.1:{port} .*check that it runs"):
                call()
        assert time.monotonic() - started < 2
        directory.close()


@pytest.mark.parametrize(("seconds", "query"), [(0.2, ""), (30.0, "?prefix=x&socket_timeout=0.2")])
def test_a_server_that_does_not_answer_costs_the_timeout(
    seconds: float, query: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_module, "_TIMEOUT_SECONDS", seconds)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        directory = open_directory(f"redis://127.0.0.1:{port}/0{query}")
        started = time.monotonic()
        with pytest.raises(DirectoryUnavailableError, match=f"Redis 127.0.0.1:{port}".replace(".", r"\.")):
            directory.placement()
        assert 0.1 < time.monotonic() - started < 2
        directory.close()
        silent.setblocking(False)
        silent.accept()[0].close()
        with pytest.raises(BlockingIOError):  # it was tried once
            silent.accept()


def test_the_directory_goes_on_when_the_server_comes_back(tmp_path: Path) -> None:
    with running_redis(tmp_path) as server:
        directory = open_directory(server.url)
        directory.register(record())
        server.stop()
        with pytest.raises(DirectoryUnavailableError):
            directory.shards()
        server.start()
        assert directory.shards() == {}
        directory.publish(full_placement(), expected_epoch=None)
        server.stop()
        server.start()
        assert directory.placement() is None
        directory.close()


def test_other_data_under_the_keys_is_named_and_can_be_cleared(url: str, redis_server: RedisServer) -> None:
    directory = open_directory(url)
    prefix = url.rpartition("=")[2]
    with redis.Redis(port=redis_server.port) as client:
        client.set(f"{prefix}:shards", "text")
        with pytest.raises(CorruptDirectoryError, match="holds other data: WRONGTYPE"):
            directory.shards()
        directory.clear()
        client.hset(f"{prefix}:shards", "s0", "{}")
        with pytest.raises(CorruptDirectoryError, match=f"key {prefix}:shards of Redis .*missing keys"):
            directory.register(record())
        client.set(f"{prefix}:placement", '{"epoch": 1')
        with pytest.raises(CorruptDirectoryError, match=f"key {prefix}:placement of Redis"):
            directory.publish(full_placement(), expected_epoch=None)
    directory.clear()
    assert directory.shards() == {}
    assert directory.placement() is None
    directory.close()


def test_only_redis_urls_import_redis() -> None:
    script = (
        "from engrid.directory import open_directory\n"
        "open_directory('/nowhere')\n"
        "print([name for name in ('redis', 'torch', 'ray', 'grpc') if name in sys.modules])\n"
        "open_directory('redis://127.0.0.1:1')\n"
        "print([name for name in ('redis', 'torch', 'ray', 'grpc') if name in sys.modules])\n"
    )
    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n{script}"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n['redis']\n"
