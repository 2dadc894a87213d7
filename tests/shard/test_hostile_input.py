"""Whatever comes is answered or refused by a class of ours, and others are served meanwhile. More of it: `make faults`."""

import pytest

from engrid.client import MemoryClient
from engrid.control.tables import create_tables
from tests.shard.hostile_calls import adopt_anything, call_with_anything, call_with_hardly_anything, restore_anything
from tests.shards import local_shards, table


def test_messages_with_hardly_anything_in_them(tmp_path):
    with local_shards(tmp_path, 1, state=tmp_path / "state") as (shard,), MemoryClient(f"file:{tmp_path}") as client:
        call_with_hardly_anything(shard.address)
        create_tables(client, [table(), table("m@1", optimizer=None)])
        call_with_hardly_anything(shard.address)


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
