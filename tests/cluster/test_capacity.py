"""What fits where, said before anything starts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engrid.cluster.capacity import largest_share, memory_here, memory_joined
from engrid.cluster.config import ClusterConfig, ClusterError


def node(name, memory=0.0, compute=0.0, *, alive=True):
    resources = {"engrid_memory": memory, "engrid_compute": compute}
    return {"Alive": alive, "NodeManagerAddress": name, "NodeID": name * 8, "Resources": resources}


@given(st.lists(st.integers(0, 60), min_size=1, max_size=4), st.integers(1, 6))
def test_largest_share_is_the_largest_that_fits(offers, count):
    fits = [share for share in range(1, 61) if sum(offer // share for offer in offers) >= count]
    assert largest_share(offers, count) == max(fits, default=0)


def test_more_than_the_machine_has_is_refused_with_what_it_has(tmp_path):
    with pytest.raises(ClusterError, match=r"2 shards of 90000 GiB need 180000 GiB, this machine has .* Nothing was"):
        memory_here(ClusterConfig(run_dir=tmp_path, memory_gib=90_000))


def test_a_share_of_half_of_what_is_free_by_default(tmp_path):
    one, four = (memory_here(ClusterConfig(run_dir=tmp_path, shards=shards)) for shards in (1, 4))
    assert one // 4 == pytest.approx(four, rel=0.1)


def test_joined_shards_get_the_most_they_can_have_alike(tmp_path):
    config = ClusterConfig(run_dir=tmp_path, shards=3, workers=1, redis="redis://r:1")
    nodes = [node("a", memory=1000), node("b", memory=700), node("c", compute=1), node("d", memory=9e9, alive=False)]
    assert memory_joined(config, nodes, {"engrid_memory": 1700, "engrid_compute": 1}) == 500
    assert memory_joined(config, nodes, {"engrid_memory": 900, "engrid_compute": 1}) == 300


@pytest.mark.parametrize(
    ("changes", "nodes", "taken", "match"),
    [
        ({"redis": None}, [node("a", 100, 1), node("b", 100)], {}, "spans 2 hosts .a, b., .* give --redis"),
        ({"shards": 3}, [node("a", compute=1)], {}, "3 shards need 1 of the Ray resource engrid_memory each"),
        ({"shards": 3, "memory_gib": 1}, [node("a", 2047, 1)], {}, "3 shards need 1024 .* room for 1 .*a: 2047"),
        ({"workers": 2}, [node("a", 4096, 1)], {}, "2 workers need 1 of the Ray resource engrid_compute"),
        ({"workers": 2}, [node("a", 4096, 2)], {"engrid_compute": 1}, "room for 1 .*a: 2; 1 in all not taken"),
    ],
)
def test_what_does_not_fit_is_named_with_what_the_nodes_offer(tmp_path, changes, nodes, taken, match):
    config = ClusterConfig(**{"run_dir": tmp_path, "redis": "redis://r:1", **changes})
    with pytest.raises(ClusterError, match=match):
        memory_joined(config, nodes, {"engrid_memory": 9e9, "engrid_compute": 99} | taken)


@pytest.mark.parametrize("changes", [{"shards": 0}, {"workers": -1}, {"memory_gib": 0}])
def test_a_bad_field_is_named(tmp_path, changes):
    with pytest.raises(ValueError, match=next(iter(changes)).partition("_")[0]):
        ClusterConfig(run_dir=tmp_path, **changes)
