"""Where shards register and the placement lives: a file on one host, Redis in a cluster.

The directory is asked when processes start and when the placement changes, never by a lookup.
"""

import os

from .errors import (
    CorruptDirectoryError,
    DirectoryChangedError,
    DirectoryError,
    DirectoryUnavailableError,
    EpochConflictError,
    OtherHostError,
    PlacementError,
    ShardNameTakenError,
    ShardUnknownError,
)
from .file import FileDirectory
from .placement import (
    EMPTY_PLACEMENT,
    Partition,
    Placement,
    with_rollback,
    with_shards,
    with_tables,
    with_version,
    without_tables,
)
from .records import Directory, ShardRecord, process_lives, this_host
from .sources import (
    FolderSource,
    RedisSource,
    ShardSource,
    expand_home,
    folder_source,
    is_address,
    masked,
    read_source,
    redis_url,
)
from .versions import Version

__all__ = [
    "EMPTY_PLACEMENT",
    "CorruptDirectoryError",
    "Directory",
    "DirectoryChangedError",
    "DirectoryError",
    "DirectoryUnavailableError",
    "EpochConflictError",
    "FileDirectory",
    "FolderSource",
    "OtherHostError",
    "Partition",
    "Placement",
    "PlacementError",
    "ShardNameTakenError",
    "ShardRecord",
    "ShardSource",
    "ShardUnknownError",
    "Version",
    "expand_home",
    "folder_source",
    "is_address",
    "masked",
    "open_directory",
    "process_lives",
    "read_source",
    "redis_url",
    "this_host",
    "with_rollback",
    "with_shards",
    "with_tables",
    "with_version",
    "without_tables",
]


def open_directory(source: str | os.PathLike[str]) -> Directory:
    """Return the directory in a folder (a path object, "/run/engrid", "file:/run/engrid") or at "redis://host:port[/database]".

    Nothing is read or connected to yet. Several directories share a Redis by "?prefix=NAME". Raises ValueError for
    anything else, an address without redis:// too, and DirectoryError where the redis package is missing.
    """
    found = read_source(source)
    if isinstance(found, FolderSource):
        return FileDirectory(found.path)
    if isinstance(found, RedisSource):
        return _open_redis(found.url)
    raise ValueError(
        f"directory {found.address!r} is an address: give redis://{found.address} for Redis, or "
        f"./{found.address} for a folder of that name"
    )


def _open_redis(url: str) -> Directory:
    try:
        from .redis import RedisDirectory
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise DirectoryError(f"{masked(url)} needs the redis package: pip install 'engrid[redis]'") from error
    return RedisDirectory(url)
