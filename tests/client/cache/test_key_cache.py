"""The cache gives the rows of the key and tag asked for or says they are missing; both engines, one suite.

Rows are made from (tag's name, key), so a row of another key, tag or version shows wherever it turns up.
"""

import gc
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engrid.client.cache import key_cache as cache_module
from engrid.client.cache.key_cache import Column, KeyCache
from engrid.client.cache.sets import BOOKKEEPING_BYTES, WAYS, NumpyEngine

WIDTH = 24


def budget_of(sets, staging, width=WIDTH):
    return sets * WAYS * (width + BOOKKEEPING_BYTES) + (1 + staging) * width


@pytest.fixture(params=["numpy", "numba"])
def engine(request):
    if request.param == "numba":
        pytest.importorskip("numba")
    return request.param


@pytest.fixture
def make(engine):
    def make(sets=1, staging=64, **options):
        return KeyCache(budget_of(sets, staging), WIDTH, staging_entries=staging, engine=engine, **options)

    return make


def content(tag, keys):
    """uint8 [n, WIDTH]: tag, key and their product, as different for different (tag, key) as can be."""
    keys = np.asarray(keys, np.int64)
    return np.stack([np.full(len(keys), tag), keys, keys * 31 + tag], axis=1).astype(np.int64).view(np.uint8)


def fill(plan, columns):
    """Receives the rows of all missing keys."""
    for number, column in enumerate(columns):
        part = plan.staging[plan.bounds[number] : plan.bounds[number + 1]]
        part[:] = content(column.tag, column.keys[plan.missing[number]])


def expected(columns):
    rows = np.stack([content(column.tag, column.keys) for column in columns], axis=1)
    for number, column in enumerate(columns):
        if column.alive is not None:
            rows[~column.alive, number] = 0
    return rows


def taken(plan):
    out = np.full((*plan.slots.shape, WIDTH), 77, np.uint8)
    plan.take(out)
    return out


def fetch(cache, *columns):
    """A whole batch; returns the distinct keys fetched."""
    columns = [Column(tag, np.asarray(keys, np.int64)) for tag, keys in columns]
    with cache.probe(columns) as plan:
        fill(plan, columns)
        assert np.array_equal(taken(plan), expected(columns))
        cache.admit(plan)
        return len(plan.staging)


def held(cache, tag, keys):
    """Which of the keys are in the cache, as bool per key; counts as a use."""
    keys = np.asarray(keys, np.int64)
    with cache.probe([Column(tag, keys)]) as plan:
        return plan.slots[:, 0] < cache.entries


KEYS = st.one_of(st.integers(-4, 12), st.sampled_from([-(2**63), 2**63 - 1, 2**40, -(2**40)]))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_position_gets_the_rows_of_its_key_and_tag(make, data):
    """Random batches over random tags, several plans open at once, finished in any order, tags dropped between."""
    cache = make(
        sets=data.draw(st.integers(1, 3)),
        staging=data.draw(st.sampled_from([0, 1, 5, 40])),
        policy=data.draw(st.sampled_from(["frequency", "recency"])),
    )
    names = [("t", 2, "1"), ("t", 3, "1"), ("u", 2, "1"), ("t", 2, "2")]
    under_way = []
    for _ in range(data.draw(st.integers(1, 12))):
        match data.draw(st.sampled_from(["probe", "probe", "probe", "finish", "finish", "drop"])):
            case "probe":
                chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
                length = data.draw(st.integers(0, 20))
                columns = [column(data, cache.tag(*name), length) for name in chosen]
                under_way.append((cache.probe(columns), columns))
                check_missing(*under_way[-1])
            case "finish" if under_way:
                plan, columns = under_way.pop(data.draw(st.integers(0, len(under_way) - 1)))
                finish(cache, plan, columns, data.draw(st.sampled_from(["take", "take+admit", "admit+take", "fail"])))
            case "drop":
                cache.drop(cache.tag(*data.draw(st.sampled_from(names))))
    for plan, columns in under_way:
        finish(cache, plan, columns, "admit+take")


def column(data, tag, length):
    keys = np.array(data.draw(st.lists(KEYS, min_size=length, max_size=length)), np.int64)
    alive = None
    if data.draw(st.booleans()):
        alive = np.array(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)), bool)
    return Column(tag, keys, alive)


def check_missing(plan, columns):
    for number, column in enumerate(columns):
        where = plan.missing[number]
        assert len(where) == plan.bounds[number + 1] - plan.bounds[number]
        assert len(set(column.keys[where])) == len(where), "a key is fetched once"
        assert column.alive is None or column.alive[where].all(), "a dead position is never fetched"


def finish(cache, plan, columns, how):
    if how == "fail":
        return  # let go of, not closed
    fill(plan, columns)
    if how == "admit+take":
        cache.admit(plan)
    assert np.array_equal(taken(plan), expected(columns))
    if how == "take+admit":
        cache.admit(plan)
    plan.close()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), repeat=st.integers(1, 4))
def test_what_fits_is_fetched_once_and_then_held(make, seed, repeat):
    cache = make(sets=64, staging=512)
    tags = cache.tag("t", 2, "1"), cache.tag("t", 3, "1")
    rng = np.random.default_rng(seed)
    batch = [(tag, rng.permutation(np.repeat(rng.integers(-(2**63), 2**63, 40), repeat))) for tag in tags]
    assert fetch(cache, *batch) == 80
    assert fetch(cache, *batch) == 0
    counts = cache.counts(tags[0])
    assert (counts.hits, counts.misses, counts.fetched) == (40 * repeat, 40 * repeat, 40)
    assert (counts.insertions, counts.evictions) == (40, 0)


def test_one_set_takes_as_many_keys_of_a_batch_as_it_has_entries(make):
    cache = make()
    tag = cache.tag("t", 2, "1")
    assert fetch(cache, (tag, range(WAYS + 3))) == WAYS + 3
    assert held(cache, tag, range(WAYS + 3)).sum() == WAYS


def test_the_same_key_in_other_tables_orders_and_versions_is_another_key(make):
    cache = make()
    tags = [cache.tag("t", 2, "1"), cache.tag("t", 3, "1"), cache.tag("u", 2, "1"), cache.tag("t", 2, "2")]
    assert len(set(tags)) == 4
    assert cache.tag("t", 2, "1") == tags[0]
    assert fetch(cache, (tags[0], [7])) == 1
    for tag in tags[1:]:
        assert fetch(cache, (tag, [7])) == 1
    assert fetch(cache, *((tag, [7]) for tag in tags)) == 0


def test_keys_of_entries_never_filled_are_not_held(make):
    cache = make(sets=3)
    assert not held(cache, cache.tag("t", 2, "1"), np.zeros(20)).any()


def test_a_dropped_tag_is_gone_and_its_number_is_not_given_out_again(make):
    cache = make()
    old, other = cache.tag("t", 2, "1"), cache.tag("t", 3, "1")
    fetch(cache, (other, [1, 2, 3]))
    for _ in range(2):
        fetch(cache, (old, [1, 2, 3, 4, 5]))
    cache.drop(old)
    new = cache.tag("t", 2, "1")
    assert new not in (old, other)
    assert not held(cache, new, [1, 2, 3]).any()
    assert held(cache, other, [1, 2, 3]).all()
    for use in (cache.drop, cache.counts, lambda tag: cache.probe([Column(tag, np.zeros(1, np.int64))])):
        with pytest.raises(ValueError, match=f"tag {old} "):
            use(old)
    assert fetch(cache, (new, range(100, 105))) == 5
    assert held(cache, new, range(100, 105)).all()
    assert cache.counts(other).evictions == 0, "the entries freed are filled first"


def test_a_plan_outlives_the_drop_of_its_tag(make):
    cache = make()
    old = cache.tag("t", 2, "1")
    fetch(cache, (old, range(WAYS)))
    columns = [Column(old, np.arange(WAYS + 4))]
    plan = cache.probe(columns)
    cache.drop(old)
    new = cache.tag("t", 2, "2")
    fetch(cache, (new, range(WAYS)))
    fill(plan, columns)
    assert cache.admit(plan) == 0
    assert np.array_equal(taken(plan), expected(columns))


def test_entries_of_an_open_plan_are_not_given_away(make):
    cache = make(policy="recency")
    tag = cache.tag("t", 2, "1")
    fetch(cache, (tag, range(WAYS)))
    columns = [Column(tag, np.arange(5))]
    plan = cache.probe(columns)
    fetch(cache, (tag, range(100, 120)))
    assert held(cache, tag, range(WAYS)).tolist() == [True] * 5 + [False] * 3
    assert np.array_equal(taken(plan), expected(columns))
    plan.close()
    fetch(cache, (tag, range(200, 220)))
    assert not held(cache, tag, range(WAYS)).any()


def test_a_key_two_plans_fetched_is_held_once(make):
    cache = make()
    tag = cache.tag("t", 2, "1")
    columns = [Column(tag, np.arange(4))]
    plans = [cache.probe(columns) for _ in range(2)]
    for plan, admitted in zip(plans, (4, 0), strict=True):
        fill(plan, columns)
        assert cache.admit(plan) == admitted
    assert cache.counts(tag).insertions == 4


def test_what_is_used_every_batch_outlasts_a_flood_of_what_is_not(make):
    survivors = {}
    for policy in ("frequency", "recency"):
        cache = make(sets=4, policy=policy)
        tag = cache.tag("t", 2, "1")
        for _ in range(4):
            fetch(cache, (tag, range(8)))
        fetch(cache, (tag, range(1000, 1060)))
        survivors[policy] = held(cache, tag, range(8)).sum()
    assert survivors["frequency"] == 8
    assert survivors["recency"] < 4


def test_a_newcomer_asked_for_more_often_gets_the_place_of_the_least_used(make):
    cache = make()
    tag = cache.tag("t", 2, "1")
    fetch(cache, (tag, range(WAYS)))
    fetch(cache, (tag, range(1, WAYS)))
    fetch(cache, (tag, range(1, WAYS)))
    assert fetch(cache, (tag, [50])) == 1
    assert held(cache, tag, [50, 0]).tolist() == [True, False]
    counts = cache.counts(tag)
    assert (counts.insertions, counts.evictions) == (WAYS + 1, 1)


def test_what_was_hot_once_is_forgotten(make):
    cache = make()
    tag = cache.tag("t", 2, "1")
    for _ in range(40):
        fetch(cache, (tag, range(WAYS)))
    for batch in range(40):
        fetch(cache, (tag, np.repeat([1000 + batch % 4, 2000 + batch], 8)))
    assert held(cache, tag, range(1000, 1004)).all()


def test_more_misses_than_staging_get_rows_of_their_own(make):
    cache = make(sets=8, staging=5)
    tag = cache.tag("t", 2, "1")
    fetch(cache, (tag, range(3)))
    assert cache.spilled == 0
    assert fetch(cache, (tag, [2, 1, 0, *range(10, 20), 10, 2])) == 10
    assert cache.spilled == 1
    assert fetch(cache, (tag, range(10, 20))) == 0


def test_staging_is_not_shared_by_open_plans_and_comes_back(make):
    cache = make(sets=8, staging=10)
    tag = cache.tag("t", 2, "1")
    batches = [[Column(tag, np.arange(4) + start)] for start in (0, 10, 20)]
    plans = [cache.probe(columns) for columns in batches]
    assert cache.spilled == 1
    for plan, columns in zip(plans, batches, strict=True):
        fill(plan, columns)
    for plan, columns in zip(plans, batches, strict=True):
        assert np.array_equal(taken(plan), expected(columns))
    plans[0].close()
    assert cache.probe(batches[0]).staging.base is plans[0].staging.base
    del plans, plan
    gc.collect()
    fetch(cache, (tag, range(30, 40)))
    assert cache.spilled == 1, "a plan let go of gives its staging back"


def test_a_table_takes_its_columns_of_a_probe(make):
    cache = make(sets=8)
    keys = np.array([3, 1, 3], np.int64)
    columns = [Column(cache.tag(table, order, "1"), keys + order) for table in "ab" for order in (2, 3)]
    with cache.probe(columns) as plan:
        fill(plan, columns)
        for part in (slice(0, 2), slice(2, 4)):
            out = np.empty((3, 2, WIDTH), np.uint8)
            plan.take(out, part)
            assert np.array_equal(out, expected(columns[part]))


def test_engines_find_what_the_other_admitted():
    pytest.importorskip("numba")
    from engrid.client.cache.numba_sets import NumbaEngine

    keys = np.random.default_rng(3).integers(-(2**63), 2**63, 300)
    for first, second in ((NumpyEngine(), NumbaEngine()), (NumbaEngine(), NumpyEngine())):
        cache = KeyCache(budget_of(4000, 400), WIDTH, staging_entries=400)
        tags = cache.tag("t", 2, "1"), cache.tag("t", 3, "1")
        cache._engine = first
        assert fetch(cache, (tags[0], keys), (tags[1], keys)) == 600
        cache._engine = second
        assert fetch(cache, (tags[0], keys), (tags[1], keys)) == 0


def test_engines_decide_alike(make, engine):
    """By count: which of several equals gets the last place of a set may differ."""
    rng = np.random.default_rng(5)
    batches = [(rng.zipf(1.2, 300) % 4000).astype(np.int64) for _ in range(60)]
    fetched = []
    for name in {"numpy", engine}:
        cache = KeyCache(budget_of(40, 300), WIDTH, staging_entries=300, engine=name)
        tag = cache.tag("t", 2, "1")
        fetched.append(sum(fetch(cache, (tag, keys)) for keys in batches))
    assert max(fetched) < 1.01 * min(fetched)


def test_threads_share_a_cache(make):
    """A small cache, so that what one thread points at is what the others want to replace."""
    cache = make(sets=4, staging=60)
    failures = []

    def work(seed):
        rng = np.random.default_rng(seed)
        mine = []
        for turn in range(150):
            tags = [cache.tag("t", order, "1") for order in (2, 3)]
            columns = [Column(tag, rng.integers(0, 60, 25)) for tag in tags]
            plan = cache.probe(columns)
            mine.append((plan, columns))
            fill(plan, columns)
            if turn % 3:
                plan, columns = mine.pop(int(rng.integers(len(mine))))
                cache.admit(plan)
                if not np.array_equal(taken(plan), expected(columns)):
                    failures.append((seed, turn))
                plan.close()
            if len(mine) > 3:
                mine.clear()

    def run(seed):
        try:
            work(seed)
        except Exception as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert cache.counts(cache.tag("t", 2, "1")).evictions > 0


@pytest.mark.parametrize("staging", [None, 0, 7])
def test_a_budget_below_one_set_says_the_least_it_takes(engine, staging):
    with pytest.raises(ValueError, match="smaller than one set") as refused:
        KeyCache(1, WIDTH, staging_entries=staging, engine=engine)
    least = int(str(refused.value).split()[-1])
    cache = KeyCache(least, WIDTH, staging_entries=staging, engine=engine)
    assert cache.entries == WAYS
    assert cache.nbytes <= least
    with pytest.raises(ValueError, match=f"at least {least}"):
        KeyCache(least - 1, WIDTH, staging_entries=staging, engine=engine)


@pytest.mark.parametrize("budget", [10_000, 123_456, 1 << 20])
def test_a_budget_is_kept_and_used(budget, engine):
    cache = KeyCache(budget, WIDTH, engine=engine)
    arrays = [cache._slab, *(value for value in vars(cache._sets).values() if isinstance(value, np.ndarray))]
    assert sum(array.nbytes for array in arrays) == cache.nbytes
    assert budget - budget_of(1, -1) < cache.nbytes <= budget


@pytest.mark.parametrize(
    ("keys", "alive", "message"),
    [
        (np.zeros(2, np.int32), None, "keys must be int64 .2., not int32"),
        (np.zeros((2, 2), np.int64), None, "keys must be int64"),
        (np.zeros(2, np.int64), np.zeros(3, bool), "alive must be bool .2., not bool .3."),
        (np.zeros(2, np.int64), np.zeros(2, np.uint8), "alive must be bool"),
    ],
)
def test_columns_of_a_wrong_shape_or_type_are_refused(make, keys, alive, message):
    cache = make()
    with pytest.raises(ValueError, match=message):
        cache.probe([Column(cache.tag("t", 2, "1"), keys, alive)])


def test_a_probe_is_of_columns_of_one_length_each_of_its_own_tag(make):
    cache = make()
    first, second = cache.tag("t", 2, "1"), cache.tag("t", 3, "1")
    for columns, message in (
        ([], "at least one"),
        ([Column(first, np.zeros(2, np.int64)), Column(second, np.zeros(3, np.int64))], "int64 .2."),
        ([Column(first, np.zeros(2, np.int64)), Column(first, np.zeros(2, np.int64))], "once in a probe"),
    ):
        with pytest.raises(ValueError, match=message):
            cache.probe(columns)


@pytest.mark.parametrize(
    "out", [np.empty((3, WIDTH), np.uint8), np.empty((2, WIDTH), np.int8), np.empty((2, 2 * WIDTH), np.uint8)[:, ::2]]
)
def test_an_output_that_does_not_fit_is_refused(make, out):
    cache = make()
    with pytest.raises(ValueError, match="contiguous uint8 of 48 bytes"):
        cache.probe([Column(cache.tag("t", 2, "1"), np.zeros(2, np.int64))]).take(out)


def test_a_closed_plan_is_refused(make):
    cache = make()
    plan = cache.probe([Column(cache.tag("t", 2, "1"), np.zeros(2, np.int64))])
    plan.close()
    plan.close()
    with pytest.raises(ValueError, match="closed"):
        plan.take(np.empty((2, WIDTH), np.uint8))
    with pytest.raises(ValueError, match="closed"):
        cache.admit(plan)


@pytest.mark.parametrize(("width", "staging"), [(0, None), (8, -1)])
def test_sizes_that_make_no_sense_are_refused(width, staging):
    with pytest.raises(ValueError, match=r"entry_bytes 0|staging_entries -1"):
        KeyCache(1 << 20, width, staging_entries=staging, engine="numpy")


def test_without_numba_numpy_serves_and_numba_by_name_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(cache_module, "find_spec", lambda name: None)
    cache = KeyCache(1 << 20, WIDTH)
    assert isinstance(cache._engine, NumpyEngine)
    with pytest.raises(ValueError, match="pip install"):
        KeyCache(1 << 20, WIDTH, engine="numba")


def test_numba_is_imported_only_by_a_cache_that_uses_it():
    code = (
        "import sys; from engrid.client.cache.key_cache import KeyCache; import engrid.client;"
        "KeyCache(1 << 20, 8, engine='numpy'); assert 'numba' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)
