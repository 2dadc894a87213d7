"""Runs one shard until it is told to stop: python -m engrid.shard --listen HOST:PORT --directory URL."""

from __future__ import annotations

import sys

from engrid.host.search_path import look_last_in_the_working_folder

look_last_in_the_working_folder()
if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the working folder: a random.py or queue.py that lies there is not ours

import argparse
import signal
import threading
from pathlib import Path

from engrid.directory import DirectoryError
from engrid.host.allocator import keep_buffers
from engrid.rpc.errors import EngridError

from .config import ShardConfig
from .grpc.server import ShardServer


def serve(config: ShardConfig) -> None:
    """Serves until SIGINT or SIGTERM, then finishes what is under way. Prints one line once it serves.

    Exits with 1 if the shard cannot go on: started again, it does from its log.
    """
    keep_buffers()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    server = ShardServer(config)
    print(f"shard {server.name} serves at {server.address}", flush=True)
    server.when_failed(stop.set)
    stop.wait()
    server.stop()
    if server.failure:
        sys.exit(f"error: shard {server.name} ended: {server.failure}. Start it again: it goes on from its log")


def main() -> None:
    """Parses the command line of `python -m engrid.shard`; `engrid shard` offers the same."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--listen", default=ShardConfig.listen)
    parser.add_argument("--directory", required=True)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--checkpoints", type=Path, action="append", default=[])
    parser.add_argument("--log-bytes", type=int, default=ShardConfig.log_bytes)
    parser.add_argument("--memory-bytes", type=int)
    parser.add_argument("--advertise-host")
    options = parser.parse_args()
    try:
        serve(ShardConfig(**vars(options) | {"checkpoints": tuple(options.checkpoints)}))
    except (EngridError, DirectoryError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
