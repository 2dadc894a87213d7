"""The folders a shard reads and writes checkpoints in: those it was given, whatever path a client names.

Given are, by whoever starts the shard or may write its run directory, never over the network:

    --checkpoints DIR, each       else the working directory at the start (but never /)
    the run directory             where the directory is a file
    RUN_DIR/checkpoint-folders    a line each, written by a client of the same host and user (FileDirectory.allow_folder)

A path is taken for what it is once every link and `..` in it is followed. Names within a folder are names: no slash, no dots
alone. Rejected: any folder this user owns, as that is all a shard could be made to read; a list in Redis, as its network is
the one that paths come over.
"""

from __future__ import annotations

import os
from pathlib import Path

from engrid.directory import FileDirectory, open_directory
from engrid.rpc.errors import BadRequestError
from engrid.shard.config import ShardConfig
from engrid.storage.disk import LocalDisk

MAX_PATH_BYTES = 4096
MAX_FILE_NAME_BYTES = 255


class CheckpointFolders:
    """What one shard was given."""

    def __init__(self, config: ShardConfig) -> None:
        self._shard = config.name
        directory = open_directory(config.directory)
        self._run_directory = directory if isinstance(directory, FileDirectory) else None
        given = config.checkpoints or (Path.cwd(),)
        if self._run_directory is not None:
            given = (*given, self._run_directory.folder)
        self._given = [
            folder for each in given if (folder := each.resolve()) != Path("/") or each in config.checkpoints
        ]

    def disk(self, folder: str, within: str = "") -> LocalDisk:
        """The folder as it is; one that is missing is not made, as it would be this host's alone. within: the name of a
        folder in it that is meant as well, whether it is there or not.

        Raises BadRequestError, naming the shard and what it was given, where it lies elsewhere.
        """
        path = self._real(folder)
        for each in (path, self._real(str(path / within))):
            if not self._is_given(each):
                given = ", ".join(map(str, self._given)) or "none"
                raise BadRequestError(
                    f"shard {self._shard} was not given {each} (but {given}); start it with --checkpoints {path}"
                )
        if not path.is_dir():
            raise BadRequestError(f"shard {self._shard} finds no folder {folder}")
        return LocalDisk(path)

    def _real(self, folder: str) -> Path:
        if not folder.startswith("/") or "\0" in folder or len(os.fsencode(folder)) > MAX_PATH_BYTES:
            raise BadRequestError(f"folder {folder!r}: give an absolute path")
        try:
            return Path(folder).resolve()
        except (OSError, RuntimeError) as error:  # RuntimeError: links that go round
            raise BadRequestError(f"shard {self._shard} finds no folder {folder}: {error}") from error

    def _is_given(self, path: Path) -> bool:
        if any(path.is_relative_to(each) for each in self._given):
            return True
        allowed = self._run_directory.allowed_folders() if self._run_directory is not None else []
        return any(path.is_relative_to(each) for each in allowed)


def check_name(what: str, name: str) -> str:
    """The name of a file or folder in another. Raises BadRequestError where it could lead out of it."""
    if name in ("", ".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > MAX_FILE_NAME_BYTES:
        raise BadRequestError(f"{what} {name!r}: give the name of one file or folder")
    return name
