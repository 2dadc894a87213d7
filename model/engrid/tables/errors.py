"""What can go wrong with the rows of a table.

TableError
├── RowOutOfRangeError      a row id outside the range this table or partition holds (also an IndexError)
├── ReadOnlyTableError      gradients for a table without an optimizer
└── NonFiniteGradientError  a gradient that is NaN or infinite, or would make rows so (also a ValueError)
"""


class TableError(Exception):
    """Any error about the rows of a table; the message names the table or the row, and the remedy."""


class RowOutOfRangeError(TableError, IndexError):
    """A row id is outside the rows held; nothing was read or written. Check the spec the id was hashed with."""


class ReadOnlyTableError(TableError):
    """Gradients came for a table without an optimizer; nothing was changed. Create the table with one."""


class NonFiniteGradientError(TableError, ValueError):
    """A gradient is NaN or infinite, or what it leads to; nothing was changed. Skip the step or lower the learning rate."""
