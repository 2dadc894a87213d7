"""Row ids and keys as they are given: made int64 arrays of our own, or refused by name.

The caller's memory is the caller's: what a batch is checked against must be what it is read by, also after the caller
has written other ids into the same array.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from engrid.rpc.errors import BadRequestError, RowOutOfRangeError
from engrid.rpc.frames import Ids
from engrid.rpc.wire import MAX_NAME_BYTES

IdsLike = npt.ArrayLike
"""Integers that become int64."""


def check_text(what: str, given: object) -> None:
    """Raises BadRequestError for what is no text of at most MAX_NAME_BYTES bytes of UTF-8."""
    try:
        size = len(given.encode()) if isinstance(given, str) else None
    except UnicodeEncodeError:
        size = None
    if size is None:
        raise BadRequestError(f"{what} {given!r}: give the name of the {what}")
    if size > MAX_NAME_BYTES:
        raise BadRequestError(f"the name of the {what} has {size} bytes; give {MAX_NAME_BYTES} at most")


def as_integer(given: object) -> int | None:
    """A whole number of any integer type, numpy's included; None for what is none, a bool included."""
    return int(given) if isinstance(given, int | np.integer) and not isinstance(given, bool) else None


def check_number(what: str, given: object) -> int:
    """A step or attempt as int; raises BadRequestError for what is no whole number from 0."""
    number = as_integer(given)
    if number is None or not 0 <= number < 2**63:
        raise BadRequestError(f"{what} is {given!r}; give a whole number from 0")
    return number


def as_ids(given: Any, what: str, dimensions: int) -> Ids:
    """int64 of any integers (a list, int32, uint64 ...); the very array where it is int64 already, so not to be kept.

    what: begins the errors. Raises BadRequestError for floats, bools and other things and for another number of
    dimensions, RowOutOfRangeError for numbers beyond int64.
    """
    if isinstance(given, np.ndarray) and given.dtype == np.int64 and given.ndim == dimensions and given.dtype.isnative:
        return given
    try:
        array = np.asarray(given)
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRequestError(f"{what} are no array of whole numbers: {error}") from error
    if array.size == 0 and not isinstance(given, np.ndarray):
        array = array.astype(np.int64)  # an empty list is float64 to numpy
    if array.ndim != dimensions:
        shape = {1: "[n]", 2: "[positions, heads]"}[dimensions]
        raise BadRequestError(f"{what} must be {shape}, not {list(array.shape)}")
    if array.dtype.kind in "fO" and not isinstance(given, np.ndarray):
        values = np.asarray(given, object).reshape(
            -1
        )  # numpy makes floats of integers that no type of its holds together
        if all(type(value) is int for value in values):
            raise RowOutOfRangeError(f"{what}: {max(values, key=abs)} is beyond int64")
    if array.dtype.kind not in "iu":
        raise BadRequestError(f"{what} must be whole numbers (int64), not {array.dtype}")
    if array.dtype.kind == "u" and array.size and int(array.max()) >= 2**63:
        raise RowOutOfRangeError(f"{what}: {int(array.max())} is beyond int64")
    ids: Ids = array.astype(np.int64)
    return ids
