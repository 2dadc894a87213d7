"""The mathematics of a table's rows, in numpy alone: what a table is, its initial rows, formats and optimizers.

Shards hold a RowTable per partition, the model's in-process tables one per table; both therefore compute the same
bits. This package imports nothing else of ours.
"""

from .errors import NonFiniteGradientError, ReadOnlyTableError, RowOutOfRangeError, TableError
from .finite import magnitude
from .formats import decode_rows, encode_rows
from .gradients import sum_duplicates
from .initial import initial_rows
from .optimizers import check_learning_rate
from .row_table import RowTable
from .spec import NAME, OptimizerKind, OptimizerSpec, RowFormat, TableSpec, check_float, check_int, check_keys

__all__ = [
    "NAME",
    "NonFiniteGradientError",
    "OptimizerKind",
    "OptimizerSpec",
    "ReadOnlyTableError",
    "RowFormat",
    "RowOutOfRangeError",
    "RowTable",
    "TableError",
    "TableSpec",
    "check_float",
    "check_int",
    "check_keys",
    "check_learning_rate",
    "decode_rows",
    "encode_rows",
    "initial_rows",
    "magnitude",
    "sum_duplicates",
]
