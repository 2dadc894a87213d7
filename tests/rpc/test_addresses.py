"""A server that listens everywhere is registered by an address that others can reach."""

import socket

import pytest

from engrid.client import MemoryClient
from engrid.control.tables import create_tables
from engrid.directory import is_address
from engrid.rpc.addresses import host_port, is_wildcard, reachable_host
from engrid.rpc.errors import BadRequestError
from tests.shards import local_shards, table


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "::", "0", "[::ffff:0.0.0.0]", ""])
def test_every_form_of_all_interfaces_is_seen(host):
    assert is_wildcard(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost", "10.0.0.1", "no-such-host.invalid"])
def test_a_host_of_its_own_is_registered_as_it_is(host):
    assert not is_wildcard(host)
    assert reachable_host(host, None) == host


def test_an_ipv6_address_gets_brackets_once():
    assert host_port("::1", 5) == host_port("[::1]", 5) == "[::1]:5"
    assert host_port("h", 5) == "h:5"


@pytest.mark.parametrize("told", ["", "0.0.0.0", "[::]", "host:80", "[::1]:80", "http://host"])
def test_a_host_that_nobody_can_reach_is_refused(told):
    with pytest.raises(BadRequestError, match="give --advertise-host a name"):
        reachable_host("0.0.0.0", told)


def test_a_host_without_a_default_interface_is_asked_for_one(monkeypatch):
    def no_route(*_):
        raise OSError(101, "Network is unreachable")

    class Unrouted(socket.socket):
        connect = no_route

    monkeypatch.setattr(socket, "socket", Unrouted)
    with pytest.raises(BadRequestError, match=r"listening on 0\.0\.0\.0, all interfaces, .*give --advertise-host"):
        reachable_host("0.0.0.0", None)


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "[::1]:0"])
def test_clients_reach_a_shard_wherever_it_listens(tmp_path, listen):
    told = None if listen == "[::1]:0" else "localhost"
    with local_shards(tmp_path, 1, listen=listen, advertise_host=told) as (shard,):
        assert is_address(shard.address)
        with MemoryClient(tmp_path) as client:
            create_tables(client, [table()])
            assert client.placement.shards["s0"] == shard.address
