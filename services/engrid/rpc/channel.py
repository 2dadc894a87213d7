"""Channel and server options: one place, because both ends must agree on the message limit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from .forks import check_not_forked, never_freed_in_a_child

MAX_MESSAGE_BYTES = 64 << 20
"""Largest message either side takes, in bytes. Lookups stay near 1 MiB; a push carries one worker's step."""

MAX_CALLS = 1024
"""Calls under way on one connection; a client's library holds back further ones."""

_LIMITS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]


def server_options(keepalive_seconds: float) -> list[tuple[str, int]]:
    """keepalive_seconds: how often a client's machine that is silent is asked whether it lives."""
    return [
        *_LIMITS,
        # Without this a second server binds a port in use, silently, and shares its connections.
        ("grpc.so_reuseport", 0),
        # A client whose machine froze or lost its power sends no FIN: its connection would be kept for two hours.
        ("grpc.keepalive_time_ms", int(1000 * keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", int(667 * keepalive_seconds)),
        # gRPC takes the longer of the two, and the second is a minute by default.
        ("grpc.http2.ping_timeout_ms", int(667 * keepalive_seconds)),
        ("grpc.http2.max_pings_without_data", 0),
        # Commands ask every 20 s whether we live (below); gRPC's default closes the connection of who asks twice in 5 minutes.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        # Calls of one connection at a time, refused or waiting ones included.
        ("grpc.max_concurrent_streams", MAX_CALLS),
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
    # http_proxy and the like are for the web: a proxy would refuse what goes from process to process of ours, or hang.
    ("grpc.enable_http_proxy", 0),
]

COMMAND_OPTIONS: list[tuple[str, int]] = [
    *CHANNEL_OPTIONS,
    # A call may take hours, and the other side stop for good without closing: after 40 s without a sign it has failed.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
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
    channel = grpc.insecure_channel(address, options=COMMAND_OPTIONS)
    try:
        yield channel
    except KeyboardInterrupt:
        raise
    except BaseException:
        channel.close()
        raise
    else:
        channel.close()
