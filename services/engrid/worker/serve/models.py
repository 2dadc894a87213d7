"""The models that a worker has loaded: a few, by name, so that each request is answered by the model it names."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from engrid.client import ClientConfig, MemoryClient
from engrid.directory import DirectoryError
from engrid.rpc.errors import BadRequestError, CancelledError, EngridError
from engrid.worker.config import WorkerConfig
from engrid.worker.saved_model import SavedModel, open_checkpoint, open_published

from .engine import Engine
from .sealed_tables import prune, serve_tables

LOAD_POLL_SECONDS = 0.1


class ModelNotLoadedError(Exception):
    """The model a request names is not here; the message says which are."""


class Models:
    """Those used last stay, `config.models` of them; the tables of the others are let go. Threads may share it."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._client: MemoryClient | None = None
        self._closed = False
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        self._lock = threading.Lock()
        """Of the fields above, for a moment; never while something is loaded."""
        self._loading = threading.Lock()

    def close(self) -> None:
        """Closes the connection to memory; a load under way fails."""
        with self._lock:
            self._closed, client, self._client = True, self._client, None
            self._engines.clear()
        if client is not None:
            client.close()

    def load(self, checkpoint: Path, is_wanted: Callable[[], bool]) -> Engine:
        """The model of a checkpoint, loaded unless it is here. Raises CheckpointError, EngridError, DirectoryError.

        is_wanted: whether the caller still waits; a load that nobody waits for is not begun, and raises CancelledError.
        """
        with self._one_at_a_time(is_wanted):
            return self._load(open_checkpoint(checkpoint))

    def load_published(self, run: str, is_wanted: Callable[[], bool]) -> Engine:
        """The model of a run's current version. Raises UnknownTableError where none is published, CheckpointError where
        its dense weights are not to be found."""
        with self._one_at_a_time(is_wanted), ExitStack() as stack:
            client = self._connect()
            pin = stack.enter_context(client.pins.of_run(run))
            version = next(each for each in client.placement.versions[run] if each.name == pin.version)
            return self._load(open_published(run, version))

    def named(self, name: str) -> Engine:
        """The model of that name. Raises ModelNotLoadedError."""
        with self._lock:
            if name not in self._engines:
                known = ", ".join(self._engines) or "none"
                raise ModelNotLoadedError(
                    f"model {name} is not loaded here; load its checkpoint again (loaded: {known})"
                )
            self._engines.move_to_end(name)
            return self._engines[name]

    def names(self) -> list[str]:
        """Of all, that used last at the end."""
        with self._lock:
            return list(self._engines)

    @property
    def last(self) -> Engine | None:
        """The one loaded or used last."""
        with self._lock:
            return next(reversed(self._engines.values()), None)

    @contextmanager
    def _one_at_a_time(self, is_wanted: Callable[[], bool]) -> Iterator[None]:
        while not self._loading.acquire(timeout=LOAD_POLL_SECONDS):
            if not is_wanted():
                raise CancelledError("the caller has gone while another model was loaded")
        try:
            yield
        finally:
            self._loading.release()

    def _load(self, saved: SavedModel) -> Engine:
        client = None if saved.model.engram is None else self._connect()
        with self._lock:
            engine = self._engines.get(saved.model_name)
        if engine is None or engine.saved.path != saved.path:
            engine = Engine(saved, client, self._config.device)
        elif client is not None:
            serve_tables(saved, client).release()  # a shard may have come back without its rows
        dropped = []
        with self._lock:
            self._engines[saved.model_name] = engine
            self._engines.move_to_end(saved.model_name)
            while len(self._engines) > self._config.models:
                dropped.append(self._engines.popitem(last=False)[1])
        runs = {saved.run, *(each.saved.run for each in dropped)}
        dropped.clear()  # lets go of their tables, but for those that still generate
        for run in sorted(runs):
            self._drop_unused(run)
        return engine

    def _connect(self) -> MemoryClient:
        with self._lock:
            if self._closed:
                raise BadRequestError("the worker is being stopped")
            if self._client is None:
                self._client = connect(self._config)
            return self._client

    def _drop_unused(self, run: str) -> None:
        """Versions of the run that were loaded before, if nobody else reads them. Failing, they stay for next time."""
        if self._client is not None:
            with suppress(EngridError, DirectoryError, OSError):
                prune(self._client, run)


def connect(config: WorkerConfig) -> MemoryClient:
    """A client of a worker's own memory store."""
    client_config = ClientConfig(
        push_timeout=config.push_timeout, shared_memory=config.shared_memory, cache_bytes=config.cache_bytes
    )
    return MemoryClient(config.directory, client_config)
