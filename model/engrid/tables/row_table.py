"""The rows of one contiguous range of a table, with their optimizer state, as flat arrays.

Local row i is row start + i of the table: an array index, so there is no hash table and no key miss. A RowTable holds
no lock: whoever shares it between threads keeps `apply` and `load` apart from `gather`.
"""

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .errors import NonFiniteGradientError, ReadOnlyTableError, RowOutOfRangeError
from .finite import Bounds, largest, magnitude
from .formats import Bytes, Floats, decode_rows, encode_rows
from .initial import fill_initial_rows
from .optimizers import SCRATCHES, check_learning_rate, new_state, update_rows
from .spec import OptimizerSpec, TableSpec

Ids = npt.NDArray[np.int64]

_BLOCK_VALUES = 1 << 16
"""Values updated at a time: the scratch of an optimizer (3 x 256 KiB) stays in the cache."""

_INITIAL_VALUES = 1 << 17
"""Initial values made and encoded at a time."""


class RowTable:
    """Rows start..stop-1 of the table `spec` (all rows by default), holding their initial values."""

    def __init__(self, spec: TableSpec, start: int = 0, stop: int | None = None, *, filled: bool = True) -> None:
        """filled: False leaves the rows undefined, for whoever overwrites all of them and their state, and then measures.

        Raises ValueError where the range is empty or leaves the table, MemoryError where it does not fit."""
        self.spec = spec
        self.start = start
        self.stop = spec.rows if stop is None else stop
        if not 0 <= self.start < self.stop <= spec.rows:
            raise ValueError(f"range {self.start}..{self.stop} of table {spec.name}; give one within 0..{spec.rows}")
        rows = self.stop - self.start
        self._rows: Bytes = np.empty((rows, spec.row_bytes), np.uint8)
        self._opaque = self._rows.view(f"V{spec.row_bytes}").reshape(-1)
        self._block = max(1, _BLOCK_VALUES // spec.width)
        self._state: dict[str, Floats] = {}
        if spec.optimizer is not None:
            self._state = new_state(spec.optimizer, rows, spec.width)
            if spec.row_format == "bfloat16":
                self._state["master"] = np.empty((rows, spec.width), np.float32)
        self.torn = False
        """An update was interrupted: some of its rows are written and others not."""
        self._bounds = Bounds(math.inf, math.inf, math.inf)
        self._rows_tried = rows
        if filled:
            self._fill_initial()
            self._bounds = Bounds(2 * spec.init_std)  # of a uniform distribution: sqrt(3) times at most

    def _fill_initial(self) -> None:
        spec, rows = self.spec, len(self)
        chunk = max(1, _INITIAL_VALUES // spec.width)
        for first in range(0, rows, chunk):
            values = np.empty((min(chunk, rows - first), spec.width), np.float32)
            fill_initial_rows(spec, self.start + first, values)
            self._rows[first : first + len(values)] = encode_rows(values, spec.row_format)
            if "master" in self._state:
                self._state["master"][first : first + len(values)] = values

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows and of their optimizer state."""
        return self._rows.nbytes + sum(array.nbytes for array in self._state.values())

    def gather(self, local_ids: Ids, out: Bytes) -> None:
        """Copy rows `local_ids` int64 [n] into `out` uint8 [n, row_bytes], C-contiguous; the GIL is released.

        Raises RowOutOfRangeError before anything is written.
        """
        self._check_ids(local_ids)
        if out.shape != (len(local_ids), self.spec.row_bytes) or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(
                f"out is {out.dtype} {out.shape}; give C-contiguous uint8 [{len(local_ids)}, {self.spec.row_bytes}]"
            )
        np.take(self._opaque, local_ids, out=out.view(self._opaque.dtype).reshape(-1), mode="clip")

    def apply(
        self, local_ids: Ids, grads: Floats, step: int, learning_rate: float, checked: float | None = None
    ) -> None:
        """Let the optimizer update rows `local_ids` int64 [u], rising and distinct, by `grads` float32 [u, width].

        `step` counts from 1 and sets Adam's bias correction. bfloat16 rows are the rounded float32 master rows.
        checked: an upper bound on |grads|, from a caller that knows the update to be finite (`check`, `stays_finite`).
        Raises ReadOnlyTableError, RowOutOfRangeError, NonFiniteGradientError or ValueError before anything is changed,
        and MemoryError: then nothing was changed unless `torn` is set.
        """
        if checked is None:
            checked = self.check(local_ids, grads, step, learning_rate)
        optimizer = self._check_update(local_ids, grads, step, learning_rate)
        scratch = self._scratch(len(local_ids))
        weights = self._weights()
        self.torn = True
        for first in range(0, len(local_ids), self._block):
            ids = local_ids[first : first + self._block]
            updated = update_rows(
                optimizer,
                weights,
                self._state,
                ids,
                grads[first : first + self._block],
                step=step,
                learning_rate=learning_rate,
                scratch=scratch[:, : len(ids)],
            )
            if self.spec.row_format == "bfloat16":
                rounded = encode_rows(updated, "bfloat16")
                np.put(self._opaque, ids, rounded.view(self._opaque.dtype).reshape(-1), mode="clip")
        self._bounds = self._bounds.after(optimizer, self.spec.width, checked, step, learning_rate)
        self.torn = False

    def check(self, local_ids: Ids, grads: Floats, step: int, learning_rate: float) -> float:
        """Raise what `apply` would, and change nothing; return an upper bound on |grads|."""
        self._check_update(local_ids, grads, step, learning_rate)
        size = magnitude(np.ascontiguousarray(grads))
        if not self.stays_finite(size, step, learning_rate):
            self.try_update(local_ids, grads, step, learning_rate)
        return size

    def stays_finite(self, grads: float, step: int, learning_rate: float) -> bool:
        """Whether an update by any gradients no larger than `grads` surely leaves numbers; False: `try_update` says."""
        optimizer = self.spec.optimizer
        return (
            optimizer is not None and self._bounds.after(optimizer, self.spec.width, grads, step, learning_rate).known
        )

    def try_update(self, local_ids: Ids, grads: Floats, step: int, learning_rate: float) -> None:
        """Compute what `apply` would write, and write nothing.

        Raises NonFiniteGradientError, naming the first row that would hold NaN or infinity, and what `apply` raises.
        """
        optimizer = self._check_update(local_ids, grads, step, learning_rate)
        if self._measure_for(optimizer, grads, step, learning_rate):
            return
        scratch = self._scratch(len(local_ids))
        weights = self._weights()
        with np.errstate(all="ignore"):
            for first in range(0, len(local_ids), self._block):
                ids = local_ids[first : first + self._block]
                rows = weights[ids]
                state = {name: array[ids] for name, array in self._state.items() if name != "master"}
                update_rows(
                    optimizer,
                    rows,
                    state,
                    np.arange(len(ids)),
                    grads[first : first + self._block],
                    step=step,
                    learning_rate=learning_rate,
                    scratch=scratch[:, : len(ids)],
                )
                served = decode_rows(encode_rows(rows, self.spec.row_format), self.spec.row_format, self.spec.width)
                self._refuse_not_finite(ids, {"values": served, **state}, step)

    def _measure_for(self, optimizer: OptimizerSpec, grads: Floats, step: int, learning_rate: float) -> bool:
        """Measures anew if that may help, and once per as many rows tried as there are; whether it has helped."""
        size = magnitude(np.ascontiguousarray(grads))
        if not Bounds(0.0).after(optimizer, self.spec.width, size, step, learning_rate).known:
            return False
        self._rows_tried += len(grads)
        if self._rows_tried < len(self):
            return False
        self._rows_tried = 0
        self.measure()
        return self.stays_finite(size, step, learning_rate)

    def _refuse_not_finite(self, ids: Ids, results: dict[str, Floats], step: int) -> None:
        for name, array in results.items():
            finite = np.isfinite(array).reshape(len(ids), -1).all(axis=1)
            if not finite.all():
                row = self.start + int(ids[~finite][0])
                raise NonFiniteGradientError(
                    f"table {self.spec.name}: step {step} would leave NaN or infinity in row {row} ({name}); nothing was "
                    "applied. Skip the step or lower the learning rate"
                )

    def measure(self) -> None:
        """To be called once rows or state were written from outside (`arrays`): how large they are is found anew."""
        if self.spec.optimizer is None:
            return
        squares = [self._state[name] for name in ("exp_avg_sq", "sum") if name in self._state]
        negative = any(len(array) and not array.min() >= 0 for array in squares)
        self._bounds = Bounds(
            weights=largest(self._weights()),
            mean=largest(self._state["exp_avg"]) if "exp_avg" in self._state else 0.0,
            square=math.inf if negative else max(map(largest, squares), default=0.0),
        )

    def _check_update(self, local_ids: Ids, grads: Floats, step: int, learning_rate: float) -> OptimizerSpec:
        optimizer = self.spec.optimizer
        if optimizer is None:
            raise ReadOnlyTableError(f"table {self.spec.name} has no optimizer, so its rows take no gradients")
        self._check_ids(local_ids)
        if (local_ids[1:] <= local_ids[:-1]).any():
            raise ValueError(f"local_ids for table {self.spec.name} are not rising and distinct; use sum_duplicates")
        if grads.shape != (len(local_ids), self.spec.width) or grads.dtype != np.float32:
            expected = f"float32 [{len(local_ids)}, {self.spec.width}]"
            raise ValueError(f"grads is {grads.dtype} {grads.shape}; give {expected}")
        if step < 1:
            raise ValueError(f"step is {step}; steps count from 1")
        check_learning_rate(learning_rate)
        return optimizer

    def _weights(self) -> Floats:
        return self._state["master"] if "master" in self._state else self._rows.view(np.float32)

    def _scratch(self, rows: int) -> Floats:
        return np.empty((SCRATCHES, min(self._block, rows), self.spec.width), np.float32)

    def raw(self, start: int, stop: int) -> Bytes:
        """Return local rows start..stop-1 as served, uint8 [stop - start, row_bytes]: a read-only live view."""
        self._check_range(start, stop)
        view = self._rows[start:stop]
        view.flags.writeable = False
        return view

    def load(self, start: int, raw: Bytes) -> None:
        """Replace local rows start, start + 1, ... by `raw` uint8 [n, row_bytes].

        Their optimizer state begins anew: zeros, and as master rows the values of `raw`. A checkpoint's state is
        written into `arrays()` after this.
        """
        if raw.ndim != 2 or raw.shape[1] != self.spec.row_bytes or raw.dtype != np.uint8:
            raise ValueError(f"raw is {raw.dtype} {raw.shape}; give uint8 [n, {self.spec.row_bytes}]")
        self._check_range(start, start + len(raw))
        self._rows[start : start + len(raw)] = raw
        if self.spec.optimizer is not None:
            came = largest(decode_rows(np.ascontiguousarray(raw), self.spec.row_format, self.spec.width))
            self._bounds = replace(self._bounds, weights=max(self._bounds.weights, came))
        for name, array in self._state.items():
            if name == "master":
                decode_rows(np.ascontiguousarray(raw), "bfloat16", self.spec.width, out=array[start : start + len(raw)])
            else:
                array[start : start + len(raw)] = 0

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return all that a checkpoint holds of these rows, live: `rows` uint8 [n, row_bytes], and the state by name.

        Whoever writes into them writes all of them, as bfloat16 rows are the rounded master rows, and then measures.
        """
        return {"rows": self._rows, **self._state}

    def state_arrays(self) -> dict[str, Floats]:
        """Return the live state by name, first dimension the local row: what `new_state` names, and master."""
        return dict(self._state)

    def _check_ids(self, local_ids: Ids) -> None:
        if local_ids.dtype != np.int64 or local_ids.ndim != 1:
            raise ValueError(f"local_ids is {local_ids.dtype} {local_ids.shape}; give int64 [n]")
        # Seen as unsigned, negative ids are the largest: one pass finds both ends.
        if len(local_ids) and local_ids.view(np.uint64).max() >= len(self):
            outside = local_ids[(local_ids < 0) | (local_ids >= len(self))][0]
            raise RowOutOfRangeError(
                f"row {self.start + int(outside)} of table {self.spec.name} is outside"
                f" rows {self.start}..{self.stop - 1} held here; check the spec the id was hashed with"
            )

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise RowOutOfRangeError(
                f"rows {self.start + start}..{self.start + stop - 1} of table {self.spec.name} are not all in"
                f" rows {self.start}..{self.stop - 1} held here"
            )
