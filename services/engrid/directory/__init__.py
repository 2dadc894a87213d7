"""Where shards register and the placement lives: a file on one host, Redis in a cluster.

The directory is asked when processes start and when the placement changes, never by a lookup.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from .errors import (
    CorruptDirectoryError,
    DirectoryError,
    DirectoryUnavailableError,
    EpochConflictError,
    OtherHostError,
    PlacementError,
    ShardNameTakenError,
    ShardUnknownError,
)
from .file import FileDirectory
from .placement import EMPTY_PLACEMENT, Partition, Placement, with_shards, with_tables, with_version, without_tables
from .records import Directory, ShardRecord, process_lives, this_host
from .versions import Version

__all__ = [
    "EMPTY_PLACEMENT",
    "CorruptDirectoryError",
    "Directory",
    "DirectoryError",
    "DirectoryUnavailableError",
    "EpochConflictError",
    "FileDirectory",
    "OtherHostError",
    "Partition",
    "Placement",
    "PlacementError",
    "ShardNameTakenError",
    "ShardRecord",
    "ShardUnknownError",
    "Version",
    "open_directory",
    "process_lives",
    "this_host",
    "with_shards",
    "with_tables",
    "with_version",
    "without_tables",
]


def open_directory(url: str) -> Directory:
    """Return the directory at `url`: a folder ("/run/engrid", "file:/run/engrid") or "redis://host:port[/database]".

    Nothing is read or connected to yet. Several directories share a Redis by "?prefix=NAME". Raises ValueError for
    another scheme, and DirectoryError where redis:// is asked for and the redis package is missing.
    """
    parts = urlsplit(url)
    if parts.scheme in ("redis", "rediss"):
        try:
            from .redis import RedisDirectory
        except ModuleNotFoundError as error:
            if error.name != "redis":
                raise
            raise DirectoryError(f"{url} needs the redis package: pip install 'engrid[redis]'") from error
        return RedisDirectory(url)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost") or not parts.path:
            raise ValueError(f"directory {url!r} names no local folder; give file:/absolute/path")
        return FileDirectory(Path(unquote(parts.path)))
    if not url or "://" in url:
        raise ValueError(f"directory {url!r} is unknown; give a folder, file:/path or redis://host:port")
    return FileDirectory(Path(url))
