"""The directory in Redis, for a cluster. Redis holds two keys under a prefix and is not asked by any lookup.

    PREFIX:shards      hash   name -> record as JSON
    PREFIX:placement   string JSON

A change watches its key, reads, checks, and writes in a transaction that Redis refuses if the key changed meanwhile;
then it starts again. Each refusal means that another process's change went through, so some process always advances.
Commands are never repeated after a broken connection: the change may have been made.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.client import Pipeline
from redis.retry import Retry

from .errors import CorruptDirectoryError, DirectoryUnavailableError, EpochConflictError, ShardUnknownError
from .placement import Placement
from .records import ShardRecord, check_epoch_rises, check_name_is_free, check_registered
from .sources import check_redis, masked

_TIMEOUT_SECONDS = 5.0
_DEFAULT_PREFIX = "engrid"


class RedisDirectory:
    """Keys under the prefix of `url`: redis://[user:password@]host:port[/database][?prefix=engrid].

    unix:///SOCKET[?db=0] is a socket of this host. Other options of redis-py, such as socket_timeout (seconds, 5 here), follow by &.
    """

    def __init__(self, url: str) -> None:
        """Connects at the first call; raises ValueError for a URL Redis cannot take."""
        bare, _, options = check_redis(url).partition("?")
        query = dict(parse_qsl(options))
        prefix = query.pop("prefix", _DEFAULT_PREFIX)
        address = f"{bare}?{urlencode(query)}" if query else bare
        self._shards = f"{prefix}:shards"
        self._placement = f"{prefix}:placement"
        self._where = f"Redis {_place(bare)} (prefix {prefix})"
        try:
            self._redis = redis.Redis.from_url(
                address,
                socket_timeout=_TIMEOUT_SECONDS,
                socket_connect_timeout=_TIMEOUT_SECONDS,
                retry=Retry(NoBackoff(), 0),
            )
            self._redis.connection_pool.make_connection()
        except (TypeError, ValueError, redis.RedisError) as error:
            raise ValueError(f"{masked(url)!r}: redis-py does not take an option of it: {error}") from None

    def register(self, record: ShardRecord) -> None:
        """See Directory.register."""

        def change(pipe: Pipeline) -> None:
            stored = pipe.hget(self._shards, record.name)
            check_name_is_free(self._where, None if stored is None else self._record(stored), record)
            pipe.multi()
            pipe.hset(self._shards, record.name, json.dumps(record.to_json()))

        self._change(self._shards, change)

    def unregister(self, name: str) -> None:
        """See Directory.unregister."""
        with self._errors():
            removed = self._redis.hdel(self._shards, name)
        if not removed:
            raise ShardUnknownError(f"no shard {name} in {self._where}; known are {sorted(self.shards())}")

    def shards(self) -> dict[str, ShardRecord]:
        """See Directory.shards."""
        with self._errors():
            stored = self._redis.hgetall(self._shards)
        records = [self._record(each) for each in stored.values()]
        return {record.name: record for record in records}

    def placement(self) -> Placement | None:
        """See Directory.placement."""
        with self._errors():
            return self._read_placement(self._redis.get(self._placement))

    def publish(self, placement: Placement, *, expected_epoch: int | None) -> None:
        """See Directory.publish."""
        check_epoch_rises(placement, expected_epoch)

        def change(pipe: Pipeline) -> None:
            published = self._read_placement(pipe.get(self._placement))
            actual = published.epoch if published else None
            if actual != expected_epoch:
                raise EpochConflictError(self._where, expected_epoch, actual)
            pipe.multi()
            pipe.set(self._placement, json.dumps(placement.to_json()))

        self._change(self._placement, change)

    def clear(self, *, registered: Mapping[str, ShardRecord] | None = None) -> None:
        """See Directory.clear. Values that cannot be read are removed too where nothing is expected."""
        if registered is None:
            with self._errors():
                self._redis.delete(self._shards, self._placement)
            return

        def change(pipe: Pipeline) -> None:
            found = [self._record(each) for each in pipe.hgetall(self._shards).values()]
            check_registered(self._where, {record.name: record for record in found}, registered)
            pipe.multi()
            pipe.delete(self._shards, self._placement)

        self._change(self._shards, change)

    def close(self) -> None:
        """See Directory.close."""
        self._redis.close()

    def _change(self, key: str, change: Callable[[Pipeline], None]) -> None:
        """Let `change` read `key`, check it, and queue its writes, until no other process writes in between."""
        with self._errors(), self._redis.pipeline() as pipe:
            while True:
                pipe.watch(key)  # type: ignore[no-untyped-call]
                change(pipe)
                try:
                    pipe.execute()
                except redis.WatchError:
                    continue
                return

    def _record(self, stored: Any) -> ShardRecord:
        with self._corrupt(self._shards):
            return ShardRecord.from_json(json.loads(stored))

    def _read_placement(self, stored: Any) -> Placement | None:
        with self._corrupt(self._placement):
            return None if stored is None else Placement.from_json(json.loads(stored))

    @contextmanager
    def _corrupt(self, key: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError) as error:
            raise CorruptDirectoryError(f"key {key} of {self._where} is no directory: {error}; clear it") from error

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            if isinstance(error, redis.ResponseError) and str(error).startswith("WRONGTYPE"):
                raise CorruptDirectoryError(f"{self._where} holds other data: {error}; choose a ?prefix=") from error
            raise DirectoryUnavailableError(
                f"{self._where} does not serve: {error}; check that it runs and that this host may connect"
            ) from error


def _place(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return parts.path
    host = f"[{parts.hostname}]" if ":" in str(parts.hostname) else parts.hostname
    return f"{host}:{parts.port or 6379}"
