"""Shards for tests: real gRPC servers on free ports, in this process or in one of their own."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

from engrid.control.tables import create_tables, load_partition
from engrid.shard.config import ShardConfig
from engrid.shard.grpc.server import ShardServer
from engrid.tables import OptimizerSpec, RowTable, TableSpec
from engrid.v1 import memory_pb2 as pb


def table(name="t", rows=1000, *, width=8, optimizer="sgd", row_format="float32", buckets=(), init_std=1.0):
    """A small table with initial values that differ from row to row."""
    return TableSpec(
        name=name,
        rows=rows,
        row_format=row_format,
        width=width,
        seed=3,
        layer=1,
        init_std=init_std,
        optimizer=OptimizerSpec(kind=optimizer) if optimizer else None,
        buckets=buckets,
    )


def load_initial(client, spec):
    """Makes a sealed table and loads it with the rows that a live one of its spec would begin with."""
    create_tables(client, [spec])
    for part in client.placement.partitions[spec.name]:
        rows = RowTable(spec, part.start, part.stop).raw(0, len(part))
        load_partition(client, spec.name, part.index, [rows.tobytes()], step=1)


def made_by(client, table):
    """The runs and steps whose results the partitions of a live table are, as their shards say."""
    client.connections.refresh()
    stubs = [client.connections.transport(shard).stub for shard in client.placement.shards]
    states = [state for stub in stubs for state in stub.Describe(pb.DescribeRequest()).partitions]
    return {(state.run, state.step) for state in states if state.table == table}


@contextmanager
def local_shards(folder, count=2, **config):
    """Shards s0, s1, ... in this process, registered in the file directory at `folder`; yields the servers."""
    servers = []
    try:
        for index in range(count):
            servers.append(ShardServer(ShardConfig(name=f"s{index}", directory=f"file:{folder}", **config)))
        yield servers
    finally:
        for server in servers:
            server.stop(0)


@contextmanager
def shard_process(folder, name="s0", *more):
    """One shard in its own process; yields (process, address). Killed at the end if it still runs."""
    command = [sys.executable, "-m", "engrid.shard", "--name", name, "--directory", f"file:{folder}", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    try:
        line = process.stdout.readline()
        assert "serves at" in line, process.stderr.read()
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()
