"""gRPC and fork: a forked child has gRPC's locks as they stood and none of its threads.

A call in the child waits for threads that are not there, a new channel crashed 2 of 40 children that were forked during
a call, and even freeing what gRPC made may wait for a lock that nobody holds any more. So in a child of a process that
has used gRPC everything of ours raises at once, and what gRPC made there is never freed. A child that uses none of it
notices nothing.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from dataclasses import dataclass, field

from .errors import BadRequestError


class ForkedError(BadRequestError):
    """A client is used in a process that was forked after gRPC was used. Start the process by spawn."""


@dataclass
class _Fork:
    used: bool = False
    """This process has used gRPC."""
    is_child: bool = False
    """It was forked from one that had."""
    made: weakref.WeakSet[object] = field(default_factory=weakref.WeakSet)


_fork = _Fork()


def check_not_forked() -> None:
    """Raises ForkedError in a child of a process that had used gRPC."""
    if _fork.is_child:
        raise ForkedError(
            f"process {os.getpid()} was forked from one that had used gRPC: clients and what belongs to them do not work "
            "in it. Start it by spawn (multiprocessing.get_context('spawn'); DataLoader(multiprocessing_context='spawn')), "
            "or fork before the first client is opened, and open a client of its own there"
        )


def is_forked() -> bool:
    """Whether `check_not_forked` raises."""
    return _fork.is_child


def never_freed_in_a_child(made: object) -> None:
    """Something that holds what gRPC made: a channel, a call."""
    _fork.used = True
    _fork.made.add(made)


def _in_child() -> None:
    if _fork.used:
        _fork.is_child = True
        for each in list(_fork.made):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


os.register_at_fork(after_in_child=_in_child)
