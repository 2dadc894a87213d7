"""Channels from process to process of ours: made in one place, and no proxy of the shell's between."""

import re
from pathlib import Path

import grpc
import pytest

from engrid.rpc.channel import CHANNEL_OPTIONS, COMMAND_OPTIONS, command_channel
from engrid.rpc.server import check_health
from tests.clusters import ENVIRONMENT
from tests.shards import local_shards, shard_process

ROOT = Path(__file__).parents[2]


def test_channels_are_made_in_one_place():
    made = {
        str(path.relative_to(ROOT))
        for root in ("services", "cluster", "model")
        for path in (ROOT / root).rglob("*.py")
        if re.search(r"\b(in)?secure_channel\(", path.read_text(encoding="utf-8"))
    }
    assert made == {"services/engrid/rpc/channel.py"}
    assert ("grpc.enable_http_proxy", 0) in CHANNEL_OPTIONS
    assert set(CHANNEL_OPTIONS) <= set(COMMAND_OPTIONS)


@pytest.mark.parametrize("name", ["grpc_proxy", "https_proxy", "http_proxy"])
def test_a_command_reaches_a_shard_past_a_proxy_that_is_not_there(tmp_path, name, monkeypatch):
    for each in ENVIRONMENT:
        if each.lower().endswith("no_proxy"):
            monkeypatch.delenv(each)
    monkeypatch.setenv(name, "http://127.0.0.1:1")
    with local_shards(tmp_path, 1) as (shard,), command_channel(shard.address) as channel:
        assert check_health(channel, timeout=20.0)


@pytest.mark.faults
def test_a_call_to_a_process_that_stopped_for_good_ends(tmp_path):
    """Long before its own deadline: the other side gives no sign of life."""
    with shard_process(tmp_path) as (process, address), command_channel(address) as channel:
        assert check_health(channel, timeout=20.0)
        process.send_signal(19)
        with pytest.raises(grpc.RpcError) as failed:
            check_health(channel, timeout=200.0)
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
