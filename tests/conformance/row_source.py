"""What every RowSource must do. A test class inherits this and gives a `tables` fixture:

source: the RowSource; spec: its TableSpec of layer 1, 2 heads of equal buckets; out_of_range: the error it raises.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from engrid.addressing.lookup import Lookup
from engrid.tables import initial_rows


@dataclass
class Tables:
    source: object
    spec: object
    out_of_range: type[Exception]
    bad_input: type[Exception]


def lookup(ids, *, order=2, layer=1):
    ids = np.asarray(ids, np.int64)
    return Lookup(layer=layer, order=order, keys=ids[:, 0].copy() if ids.shape[1] else ids.sum(1), row_ids=ids)


def take(tables, ids):
    values = initial_rows(tables.spec, 0, tables.spec.rows)[np.maximum(ids, 0)]
    values[np.asarray(ids) < 0] = 0
    return torch.from_numpy(values)


class RowSourceConformance:
    def test_rows_are_bit_equal_to_a_plain_take(self, tables):
        ids = np.random.default_rng(0).integers(0, 400, (50, 1)) + np.array([[0, 400]])
        rows = tables.source.prefetch([lookup(ids)]).rows(1)
        assert rows.dtype == torch.float32
        assert torch.equal(rows, take(tables, ids))

    def test_orders_lie_side_by_side(self, tables):
        first, second = np.array([[1, 401], [2, 402]]), np.array([[3, 403], [4, 404]])
        rows = tables.source.prefetch([lookup(first), lookup(second, order=3)]).rows(1)
        assert torch.equal(rows, take(tables, np.hstack([first, second])))

    def test_duplicates_come_back_at_every_position(self, tables):
        ids = np.array([[5, 405]] * 7 + [[6, 406]] + [[5, 405]])
        assert torch.equal(tables.source.prefetch([lookup(ids)]).rows(1), take(tables, ids))

    def test_dead_positions_are_zeros(self, tables):
        ids = np.array([[7, 407], [-1, -1], [8, 408]])
        rows = tables.source.prefetch([lookup(ids)]).rows(1)
        assert (rows[1] == 0).all()
        assert torch.equal(rows, take(tables, ids))

    def test_all_dead(self, tables):
        assert (tables.source.prefetch([lookup(np.full((3, 2), -1))]).rows(1) == 0).all()

    def test_empty_batch(self, tables):
        assert tables.source.prefetch([lookup(np.empty((0, 2)))]).rows(1).shape == (0, 2, tables.spec.width)

    def test_several_under_way_in_any_order(self, tables):
        batches = [np.array([[start, 400 + start]]) for start in range(10)]
        pending = [tables.source.prefetch([lookup(ids)]) for ids in batches]
        for ids, rows in reversed(list(zip(batches, pending, strict=True))):
            assert torch.equal(rows.rows(1), take(tables, ids))

    @pytest.mark.parametrize("bad", [800, 2**40])
    def test_out_of_range_is_an_error(self, tables, bad):
        with pytest.raises(tables.out_of_range):
            tables.source.prefetch([lookup([[1, bad]])]).rows(1)

    def test_id_below_minus_one_is_an_error(self, tables):
        with pytest.raises((tables.out_of_range, tables.bad_input)):
            tables.source.prefetch([lookup([[-2, -2]])]).rows(1)

    def test_partly_dead_is_an_error(self, tables):
        with pytest.raises((tables.out_of_range, tables.bad_input)):
            tables.source.prefetch([lookup([[1, -1]])]).rows(1)

    def test_wrong_dtype_is_an_error(self, tables):
        ids = np.array([[1, 401]], np.float32)
        with pytest.raises(tables.bad_input):
            tables.source.prefetch([Lookup(layer=1, order=2, keys=np.zeros(1, np.int64), row_ids=ids)]).rows(1)

    def test_wrong_shape_is_an_error(self, tables):
        ids = np.array([[1, 401]])
        with pytest.raises(tables.bad_input):
            tables.source.prefetch([Lookup(layer=1, order=2, keys=np.zeros(2, np.int64), row_ids=ids)]).rows(1)
