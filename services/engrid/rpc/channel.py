"""Channel and server options: one place, because both ends must agree on the message limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from .forks import check_not_forked, never_freed_in_a_child

MAX_MESSAGE_BYTES = 64 << 20
"""Largest message either side takes, in bytes. Lookups stay near 1 MiB; a push carries one worker's step."""

_LIMITS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]

SERVER_OPTIONS: list[tuple[str, int]] = [
    *_LIMITS,
    # Without this a second server binds a port in use, silently, and shares its connections.
    ("grpc.so_reuseport", 0),
]

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    *_LIMITS,
    # A client must find a restarted shard at once, not after gRPC's default of up to two minutes. gRPC takes no less.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # How long one attempt may take, in spite of its name: a shard on a busy machine needs more than a moment.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 100),
    # One connection per channel object: closing a client closes what it opened, nothing shared.
    ("grpc.use_local_subchannel_pool", 1),
]


def open_channel(address: str) -> grpc.Channel:
    """A plaintext channel to host:port. Lazy: connects on first use. Raises ForkedError in a child that cannot have one."""
    check_not_forked()
    channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
    never_freed_in_a_child(channel)
    return channel


@contextmanager
def command_channel(address: str) -> Iterator[grpc.Channel]:
    """A channel for a command that Ctrl-C may cut off anywhere, also inside gRPC, which then may have a call that no thread
    of its serves: closing would wait for it for ever. So after Ctrl-C the channel is left to the end of the process."""
    channel = open_channel(address)
    try:
        yield channel
    except KeyboardInterrupt:
        raise
    except BaseException:
        channel.close()
        raise
    else:
        channel.close()
