"""What a table is: its size, its row format, how its rows begin and how they are trained.

A spec travels as JSON: in the placement, in create-table requests and in checkpoint manifests. Two processes that
hold equal specs hold equal initial rows, whatever the partitioning.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

RowFormat = Literal["float32", "bfloat16", "fp8_e4m3_ue8m0"]
OptimizerKind = Literal["sgd", "adagrad", "adam"]

FP8_VALUES = 256
FP8_SCALES = 8
FP8_ROW_BYTES = FP8_VALUES + FP8_SCALES

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Names of runs, of live tables and of versions; they are also parts of file names."""
MAX_NAME = 200
"""Characters of a table's name, which a file's, of 255 bytes at most, has to hold with more."""
_STATE_FLOATS_PER_VALUE: dict[OptimizerKind, int] = {"sgd": 0, "adagrad": 0, "adam": 2}
_STATE_FLOATS_PER_ROW: dict[OptimizerKind, int] = {"sgd": 0, "adagrad": 1, "adam": 0}


def check_int(field: str, value: object, low: int, high: int) -> None:
    """Raise ValueError, naming the field, unless `value` is an integer in low..high-1."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < high:
        raise ValueError(f"{field} is {value!r}; give an integer from {low} up to {high - 1}")


def check_float(field: str, value: object, low: float, high: float) -> None:
    """Raise ValueError, naming the field, unless `value` is a number from low to below high."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value < high:
        raise ValueError(f"{field} is {value!r}; give a number from {low} to below {high}")


def check_keys(what: str, values: object, expected: set[str]) -> None:
    """Raise ValueError unless `values`, parsed JSON, is an object with exactly the `expected` keys."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} is {values!r}; give a JSON object")  # noqa: TRY004 - one error type for bad JSON
    for problem, keys in (("unknown", values.keys() - expected), ("missing", expected - values.keys())):
        if keys:
            raise ValueError(f"{what} has {problem} keys {sorted(keys)}; the keys are {sorted(expected)}")


@dataclass(frozen=True, kw_only=True)
class OptimizerSpec:
    """How gradients change rows. The learning rate and the step come with each push, not from here."""

    kind: OptimizerKind
    """sgd: row -= lr * g. adagrad: row-wise, one accumulator per row of the mean squared gradient of its values.
    adam: torch.optim.SparseAdam (docs/engram.md, section 7)."""

    beta1: float = 0.9
    """Adam's decay of the mean gradient per step the row is touched; in [0, 1)."""

    beta2: float = 0.999
    """Adam's decay of the mean squared gradient per step the row is touched; in [0, 1)."""

    eps: float = 1e-8
    """Added to the root of the mean squared gradient by adam and adagrad; in [1e-30, 1e30), so that float32 holds it."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(OptimizerKind):
            raise ValueError(f"kind is {self.kind!r}; give one of {', '.join(get_args(OptimizerKind))}")
        check_float("beta1", self.beta1, 0.0, 1.0)
        check_float("beta2", self.beta2, 0.0, 1.0)
        check_float("eps", self.eps, 1e-30, 1e30)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        return {"kind": self.kind, "beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Raises ValueError for unknown or missing keys and for values out of range."""
        check_keys("optimizer", values, {field.name for field in fields(cls)})
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """All rows of one Engram layer, its heads' buckets laid end to end (docs/engram.md, section 3).

    A table called NAME@VERSION is sealed: it is read only, its rows are loaded once, and then never change. Whoever
    names a version makes sure that the same name always means the same rows.
    """

    name: str
    """Unique in a placement; letters, digits, dot, dash and underscore, as it also names files; and @VERSION."""

    rows: int
    """Number of rows; row ids are 0..rows-1."""

    row_format: RowFormat = "float32"
    """Bytes of a row: float32, bfloat16 (both little-endian), or 256 fp8 e4m3 values then 8 ue8m0 scales."""

    width: int
    """Values per row; 256 for the fp8 format."""

    seed: int = 0
    """First word of the Philox key of the initial rows."""

    layer: int = 0
    """Engram layer as configured; second word of the Philox key. Two tables of one seed and layer begin with the same
    rows."""

    init_std: float = 0.02
    """Standard deviation of the initial values, which are uniform; 0 starts from zeros."""

    optimizer: OptimizerSpec | None = None
    """None makes the table read only: pushes are refused."""

    buckets: tuple[int, ...] = ()
    """Rows of each head, in row order, adding up to `rows`; empty if unknown. Placement prefers to cut between them."""

    def __post_init__(self) -> None:
        self._check_name()
        check_int("rows", self.rows, 1, 2**63)
        if self.row_format not in get_args(RowFormat):
            raise ValueError(f"row_format is {self.row_format!r}; give one of {', '.join(get_args(RowFormat))}")
        check_int("width", self.width, 1, 2**16)
        check_int("seed", self.seed, 0, 2**64)
        check_int("layer", self.layer, 0, 2**64)
        check_float("init_std", self.init_std, 0.0, 1e30)
        if self.optimizer is not None and not isinstance(self.optimizer, OptimizerSpec):
            raise ValueError(f"optimizer is {self.optimizer!r}; give an OptimizerSpec, or None for a read-only table")
        if self.row_format == "fp8_e4m3_ue8m0":
            if self.width != FP8_VALUES:
                raise ValueError(f"width is {self.width}; rows of format {self.row_format} have {FP8_VALUES} values")
            if self.optimizer is not None:
                raise ValueError(
                    f"optimizer is given, but rows of format {self.row_format} are read only; "
                    "give None, or train in float32 or bfloat16"
                )
        if not isinstance(self.buckets, tuple):
            raise ValueError(f"buckets is {self.buckets!r}; give a tuple of integers")  # noqa: TRY004 - as from_json
        for index, bucket in enumerate(self.buckets):
            check_int(f"buckets[{index}]", bucket, 1, 2**63)
        if self.buckets and sum(self.buckets) != self.rows:
            raise ValueError(f"buckets add up to {sum(self.buckets)}, but rows is {self.rows}; make them equal")

    def _check_name(self) -> None:
        name, at, version = self.name.partition("@") if isinstance(self.name, str) else ("", "", "")
        if not NAME.fullmatch(name) or (at and not NAME.fullmatch(version)):
            raise ValueError(
                f"name is {self.name!r}; give letters, digits, '.', '_' and '-', not starting with a sign, and for a "
                "sealed table '@' and its version"
            )
        if len(self.name) > MAX_NAME:
            raise ValueError(f"name has {len(self.name)} characters; give at most {MAX_NAME}")
        if version and self.optimizer is not None:
            raise ValueError(f"table {self.name} is sealed, so it takes no optimizer; give None")

    @property
    def version(self) -> str:
        """What the sealed rows are; empty: the table is live."""
        return self.name.partition("@")[2]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as served."""
        if self.row_format == "fp8_e4m3_ue8m0":
            return FP8_ROW_BYTES
        return self.width * (4 if self.row_format == "float32" else 2)

    @property
    def state_bytes_per_row(self) -> int:
        """Bytes a shard keeps per row beside the row: optimizer state, and the float32 master row of bfloat16."""
        if self.optimizer is None:
            return 0
        kind = self.optimizer.kind
        masters = 1 if self.row_format == "bfloat16" else 0
        return 4 * (self.width * (_STATE_FLOATS_PER_VALUE[kind] + masters) + _STATE_FLOATS_PER_ROW[kind])

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        optimizer = None if self.optimizer is None else self.optimizer.to_json()
        return plain | {"optimizer": optimizer, "buckets": list(self.buckets)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Raises ValueError for unknown or missing keys and for values out of range."""
        check_keys("table", values, {field.name for field in fields(cls)})
        if not isinstance(values["buckets"], list):
            raise ValueError(f"buckets is {values['buckets']!r}; give a JSON array of integers")  # noqa: TRY004
        optimizer = None if values["optimizer"] is None else OptimizerSpec.from_json(values["optimizer"])
        return cls(**{**values, "optimizer": optimizer, "buckets": tuple(values["buckets"])})
