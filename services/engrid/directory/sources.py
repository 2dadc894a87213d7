"""Where a store is found: a folder, Redis, or any of its shards. What is written is understood, or refused; never guessed.

    a path object             that folder, whatever its name
    file:PATH                 that folder; PATH is taken as it is: nothing in it is decoded, # and ? are letters
    /PATH  ./PATH  ~/PATH  A/B   that folder, where it holds no colon before its first slash
    redis://  rediss://  unix://   Redis
    HOST:PORT, [IPV6]:PORT    a shard, or for an option that takes Redis alone, Redis

Everything else is refused: a bare word might be a host or a folder, and `localhost:6379` where a directory is asked for
might be Redis or a shard.
"""

import os
import pwd
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

REDIS_SCHEMES = ("redis://", "rediss://", "unix://")
ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]|[A-Za-z0-9_](?:[A-Za-z0-9_.-]*)):([0-9]{1,5})", re.ASCII)

HOST = re.compile(r"[\w.:%-]+")
SECONDS = re.compile(r"[0-9]{1,4}(\.[0-9]{1,9})?", re.ASCII)


@dataclass(frozen=True)
class FolderSource:
    """A directory file lies in this folder."""

    path: Path


@dataclass(frozen=True)
class RedisSource:
    """The directory lies in Redis."""

    url: str


@dataclass(frozen=True)
class ShardSource:
    """host:port of any shard, which knows the placement."""

    address: str


def read_source(source: str | os.PathLike[str]) -> FolderSource | RedisSource | ShardSource:
    """Raises ValueError, naming the forms, for what is none of them or might be two; TypeError for what is no text or path."""
    if isinstance(source, os.PathLike):
        return FolderSource(_folder(os.fsdecode(source), source))
    if not isinstance(source, str):
        raise TypeError(f"{source!r} is no directory: give a path object or text, not {type(source).__name__}")
    if source.startswith(REDIS_SCHEMES):
        return RedisSource(check_redis(source))
    if source.startswith("file:"):
        return FolderSource(_folder(source.removeprefix("file:"), source))
    if is_address(source):
        return ShardSource(source)
    first, slash, rest = source.partition("/")
    if (source and first in ("", ".", "..", "~")) or (slash and rest[:1] != "/" and not set(first) & {":", "@", "~"}):
        return FolderSource(_folder(source, source))
    raise ValueError(
        f"{masked(source)!r} is no directory: give a folder (/PATH, ./PATH or file:PATH), redis://HOST:PORT, "
        "or for a client HOST:PORT of a shard"
    )


def folder_source(path: os.PathLike[str]) -> str:
    """The text that `read_source` reads as this folder, from whatever working folder."""
    absolute = os.path.abspath(path)  # noqa: PTH100 - pathlib's follows links
    return "file:/" + absolute.lstrip("/")


def redis_url(text: str) -> str:
    """An option that takes Redis and nothing else: a URL, or host:port. Raises ValueError, naming the form."""
    if is_address(text):
        return f"redis://{text}"
    if not text.startswith(REDIS_SCHEMES):
        raise ValueError(
            f"{masked(text)!r} names no Redis: give redis://HOST:PORT, rediss://HOST:PORT or unix:///SOCKET"
        )
    return check_redis(text)


def check_redis(url: str) -> str:
    """The URL; raises ValueError, without its password, for one that redis-py would take for another."""
    shown = masked(url)
    parts = urlsplit(url)
    try:
        port = parts.port
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise ValueError(
            f"{shown!r} is no URL of Redis; write #, ?, / and @ in a password as %23, %3F, %2F and %40"
        ) from None
    if parts.fragment or url != url.strip() or any(ord(letter) < 32 for letter in url):
        raise ValueError(f"{shown!r} is no URL of Redis; write # in a password as %23, and no blanks around it")
    if parts.scheme == "unix":
        if parts.hostname or port is not None or not parts.path.strip("/"):
            raise ValueError(
                f"{shown!r} names no socket; give unix:///PATH with three slashes, and ?db=N for a database"
            )
    elif not parts.hostname or port == 0 or not HOST.fullmatch(parts.hostname):
        raise ValueError(f"{shown!r} names no host; give {parts.scheme}://HOST:PORT")
    elif not re.fullmatch(r"/?|/[0-9]{1,9}", parts.path):
        raise ValueError(f"{shown!r}: database {parts.path[1:]!r} is no number; give {parts.scheme}://HOST:PORT/0")
    _check_options(shown, pairs, has_database=parts.scheme != "unix" and len(parts.path) > 1)
    return url


def _check_options(shown: str, pairs: list[tuple[str, str]], *, has_database: bool) -> None:
    """redis-py would pass over these, or take one of two that contradict each other."""
    query = dict(pairs)
    if len(query) < len(pairs):
        raise ValueError(f"{shown!r} gives an option twice; give each once")
    if named := sorted({"host", "port", "path"} & query.keys()):
        raise ValueError(f"{shown!r}: {named[0]} is no option; it stands before the ?")
    if has_database and "db" in query:
        raise ValueError(f"{shown!r} names two databases; give /N or ?db=N")
    if not re.fullmatch("[0-9]{1,9}", query.get("db", "0")):
        raise ValueError(f"{shown!r}: database {query['db']!r} is no number; give ?db=0")
    for name in ("socket_timeout", "socket_connect_timeout"):
        if not SECONDS.fullmatch(query.get(name, "1")) or not 0 < float(query.get(name, "1")) <= 3600:
            raise ValueError(f"{shown!r}: {name} is no number of seconds; give more than 0, at most 3600")
    if query.get("prefix") == "":
        raise ValueError(f"{shown!r}: the prefix is empty; give ?prefix=NAME, or none")


def is_address(text: str) -> bool:
    """Whether the text is host:port and nothing else."""
    found = ADDRESS.fullmatch(text)
    return found is not None and 0 < int(found[1]) <= 65535


def masked(source: object) -> str:
    """The source as it may be shown: who logs in, and with which password, is cut out of a URL."""
    text = str(source)
    if text.startswith(("file:", "/", ".", "~")) or not isinstance(source, str):
        return text
    scheme, slashes, rest = text.rpartition("://") if "://" in text else ("", "", text)
    login, at, where = rest.rpartition("@")
    hidden = f"{scheme}{slashes}{'***' if login else ''}{at}{where}"
    return re.sub(r"(?i)((?:^|[?&;])(?:user(?:name)?|pass(?:word)?)=)[^&#]*", r"\1***", hidden)


def _folder(path: str, source: str | os.PathLike[str]) -> Path:
    if not path or "\0" in path:
        raise ValueError(f"{source!r} names no folder; give file:/PATH")
    if isinstance(source, str) and path.startswith("//"):
        raise ValueError(
            f"{source!r}: a path is taken as it is and is no URL of a host; give file:/PATH with one slash, no %20 for a blank"
        )
    if isinstance(source, str) and not source.startswith("file:") and path.startswith("~"):
        return expand_home(Path(path))
    return Path(path)


def expand_home(path: Path) -> Path:
    """The path with ~ expanded; an empty HOME is none, and this user's home is asked of the system.

    Raises ValueError where the system knows none.
    """
    first = path.parts[0] if path.parts else ""
    if not first.startswith("~"):
        return path
    try:
        home = (
            Path(os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir)
            if first == "~"
            else Path(first).expanduser()
        )
    except (KeyError, RuntimeError):
        home = Path()
    if not home.is_absolute():
        raise ValueError(f"{first} names no home folder that this system knows")
    return home.joinpath(*path.parts[1:])
