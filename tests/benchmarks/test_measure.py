"""The parts that decide whether a figure may be believed."""

import os
import time

import numpy as np
import pytest

from benchmarks.common import HEADS, bench_table, cpu_seconds
from benchmarks.marks import Mark
from benchmarks.measure import CHECKED, Sample, Scale, gathered, rate, rows_of, uniform_steps
from benchmarks.paths import Local
from engrid.tables import RowTable


@pytest.fixture(params=[128, 264])
def spec(request):
    return bench_table(1, row_bytes=request.param)


def test_rows_made_one_by_one_are_those_of_the_table(spec):
    ids = np.array([0, 5, spec.rows - 1, 5])
    assert np.array_equal(rows_of(spec)(ids), gathered(RowTable(spec))(ids))


def test_one_row_in_a_hundred_is_compared_whatever_the_size_of_a_delivery(spec):
    expected = gathered(RowTable(spec))
    for size in (1, 16, 99, 100, 8192):
        sample, ids = Sample(expected), np.zeros(size, np.int64)
        deliveries = -(-10 * CHECKED // size)
        for _ in range(deliveries):
            sample.keep(ids, expected(ids))
        sample.compare()
        assert sample.compared == -(-deliveries * size // CHECKED)


def test_a_wrong_row_ends_the_run(spec):
    table = RowTable(spec)

    class Wrong(Local):
        def lookup(self, steps, in_flight):
            for rows in super().lookup(steps, in_flight):
                rows[:, -1] ^= 1
                yield rows

    steps = uniform_steps(spec, 8, 4)
    assert rate(Local(table), steps, 0.0, Sample(gathered(table))) > 0
    with pytest.raises(SystemExit, match="are not the rows asked for"):
        rate(Wrong(table), steps, 0.0, Sample(gathered(table)))
    with pytest.raises(SystemExit, match="3 rows came for 4 ids"):
        Sample(gathered(table)).keep(np.zeros(4, np.int64), np.zeros((3, spec.row_bytes), np.uint8))


def test_uniform_ids_of_each_head_lie_in_its_bucket(spec):
    (step,) = uniform_steps(spec, 1000, 1)
    heads = step.row_ids // spec.buckets[0]
    assert (heads == np.arange(HEADS)).all()
    assert len(np.unique(step.row_ids)) > 10_000 or spec.rows < 20_000


def test_cpu_seconds_count_the_work_of_a_process():
    before, begun = cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() - begun < 0.2:
        np.sort(np.random.default_rng(0).random(100_000))
    assert cpu_seconds(os.getpid()) - before == pytest.approx(time.process_time() - begun, abs=0.05)


def test_an_aim_may_be_a_least_or_a_most():
    assert Mark(0.5, "").reached(1.0) == 2
    assert Mark(4, "", at_most=True).reached(2.0) == 2
    assert (str(Mark(0.5, "")), str(Mark(4, "", at_most=True))) == (">= 0.5", "<= 4")


def test_a_smoke_run_is_smaller_in_every_way():
    quick, whole = Scale.of(5, quick=True), Scale.of(5, quick=False)
    for name in ("seconds", "mib", "large_mib", "steps", "calls", "peer_rows"):
        assert getattr(quick, name) < getattr(whole, name)
