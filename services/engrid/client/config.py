"""How a client behaves; one place for its defaults."""

from __future__ import annotations

from dataclasses import dataclass

MOST_SECONDS = 1e7
"""Longest that anything may be waited for, some months: a lock's clock ends, and so does the wire's."""


@dataclass(frozen=True, kw_only=True)
class ClientConfig:
    """Deadlines and sizes of one client."""

    timeout: float = 5.0
    """Seconds a lookup may take from prefetch to rows, where the call names none."""
    push_timeout: float = 60.0
    """Seconds a push or commit may take; so long is a shard waited for that is being started again."""
    admin_timeout: float = 300.0
    """Seconds for creating, loading and exporting tables."""
    begin_timeout: float = 10.0
    """Seconds all shards have to begin a checkpoint; training stands still meanwhile."""
    checkpoint_timeout: float = 3600.0
    """Seconds for writing or reading all of a checkpoint."""
    request_bytes: int = 1 << 20
    """Size in bytes of the reply a single request asks for; larger lookups are split and pipelined."""
    max_in_flight: int = 256
    """Requests waiting for a reply on one stream; more wait, within their deadline."""
    shared_memory: bool = True
    """Map sealed tables of shards on this host and read them without asking, where that is possible."""
    cache_bytes: int = 64 << 20
    """Memory for rows of sealed tables read over gRPC, by key; 0: none. Per width of entry (heads times row bytes)."""

    def __post_init__(self) -> None:
        for name in ("timeout", "push_timeout", "admin_timeout", "begin_timeout", "checkpoint_timeout"):
            if not 0 < getattr(self, name) <= MOST_SECONDS:  # nor NaN
                raise ValueError(f"{name} is {getattr(self, name)}; give seconds above 0, up to {MOST_SECONDS:.0f}")
        if self.request_bytes < 1 or self.max_in_flight < 1:
            raise ValueError("request_bytes and max_in_flight must be at least 1")
        if self.cache_bytes < 0:
            raise ValueError(f"cache_bytes {self.cache_bytes}: give bytes, or 0 for no cache")
