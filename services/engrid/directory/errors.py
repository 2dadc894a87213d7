"""What can go wrong with the directory and the placement it holds.

DirectoryError
├── DirectoryUnavailableError  Redis or the file cannot be reached, read or locked; whether a change was made is unknown
├── CorruptDirectoryError      what is stored is not a directory of ours
├── EpochConflictError         another placement was published first
├── ShardNameTakenError        a shard of that name lives at another address
├── DirectoryChangedError      shards registered or left between a look and a change
├── ShardUnknownError          no shard of that name is registered
├── OtherHostError             a file directory was used from a second host
└── PlacementError             a placement that contradicts itself, or cannot be made (also a ValueError)
"""


class DirectoryError(Exception):
    """Any error of the directory; the message names the thing and what to do."""


class DirectoryUnavailableError(DirectoryError):
    """Lookups go on without the directory; read it again before repeating a change that may have been made."""


class CorruptDirectoryError(DirectoryError):
    """Clear the directory and let the shards register again; the placement can be rebuilt from them."""


class EpochConflictError(DirectoryError):
    """Nothing was published. Read the placement, make the change on top of it, and publish again."""

    def __init__(self, where: str, expected_epoch: int | None, actual_epoch: int | None) -> None:
        super().__init__(where, expected_epoch, actual_epoch)
        self.where = where
        self.expected_epoch = expected_epoch
        """Epoch the publisher built on; None for an empty directory."""
        self.actual_epoch = actual_epoch
        """Epoch that is published; None for an empty directory."""

    def __str__(self) -> str:
        expected, actual = (
            "no placement" if epoch is None else f"epoch {epoch}" for epoch in (self.expected_epoch, self.actual_epoch)
        )
        return f"{self.where} holds {actual}, not {expected}; read placement() and make the change on top of it"


class ShardNameTakenError(DirectoryError):
    """Nothing was registered. Choose another name, or stop or unregister the shard that has it."""


class DirectoryChangedError(DirectoryError):
    """Nothing was changed. Look again: the shards that came may serve."""


class ShardUnknownError(DirectoryError):
    """Nothing was changed; the shard may have been unregistered by another process."""


class OtherHostError(DirectoryError):
    """Nothing was registered. A file serves one host; several need Redis (--redis)."""


class PlacementError(DirectoryError, ValueError):
    """The placement was not made; the message names the table, partition or shard at fault."""
