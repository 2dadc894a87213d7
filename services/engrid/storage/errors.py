"""What can be wrong with checkpoints.

BadRequestError
└── CheckpointError               the checkpoint cannot be used for what was asked
    ├── CheckpointMissingError    there is none of that name, or none at all
    └── CheckpointDamagedError    bytes are not those that were written; `paths` names the files
"""

from __future__ import annotations

from collections.abc import Sequence

from engrid.rpc.errors import BadRequestError


class CheckpointError(BadRequestError):
    """The checkpoint does not hold what was asked of it, or must not be changed so. The message says which."""


class CheckpointMissingError(CheckpointError):
    """No complete checkpoint of that name. Name another, or another folder."""


class CheckpointDamagedError(CheckpointError):
    """Files are missing or hold other bytes than were written. Restore from another checkpoint or from a copy."""

    def __init__(self, message: str, paths: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.paths = tuple(paths)
