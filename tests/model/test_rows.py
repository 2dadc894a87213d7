import pytest

from engrid.model.rows import InProcessTables
from engrid.tables import RowOutOfRangeError, RowTable
from tests.conformance.row_source import RowSourceConformance, Tables
from tests.shards import table


class TestInProcessTables(RowSourceConformance):
    @pytest.fixture
    def tables(self):
        spec = table(rows=800, buckets=(400, 400))
        return Tables(InProcessTables({1: RowTable(spec)}), spec, RowOutOfRangeError, ValueError)
