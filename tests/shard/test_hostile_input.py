"""Whatever comes is answered or refused by a class of ours, and others are served meanwhile. More of it: `make faults`."""

import pytest

from tests.shard.hostile_calls import adopt_anything, call_with_anything, restore_anything
from tests.shards import local_shards


@pytest.mark.parametrize("seed", [1, 2])
def test_messages_that_nobody_meant(tmp_path, seed):
    with local_shards(tmp_path, 1) as (shard,):
        call_with_anything(tmp_path, shard.address, seed, 150)


def test_placements_that_nobody_meant(tmp_path):
    with local_shards(tmp_path, 1, state=tmp_path / "state") as (shard,):
        adopt_anything(tmp_path, shard.address, 1, 200)
    with local_shards(tmp_path, 1, state=tmp_path / "state"):
        """What was adopted is read again."""


def test_manifests_that_nobody_meant(tmp_path):
    with local_shards(tmp_path, 1):
        restore_anything(tmp_path, 1, 200)
