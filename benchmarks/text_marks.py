"""The marks on real text: 4,096-token windows of a sealed table in two shards, by shared memory, cache and wire.

Every figure is time of one window at a time in this process (`local`) over time of the path, for the same windows. Where
rows travel, two windows are under way, as a prompt's next chunk is asked for before one is computed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from benchmarks.baselines.naive import NaiveClient
from benchmarks.baselines.naive import content as naive_content
from benchmarks.common import ROW_BYTES, load_sealed, start_baseline, start_shards
from benchmarks.data_marks import Figures
from benchmarks.measure import Path, Sample, Scale, Step, gathered, rate
from benchmarks.paths import Engrid, Local, Naive
from benchmarks.peers import UNCACHED
from benchmarks.text import WINDOW, Text, head_rows, text_table
from engrid.client import ClientConfig, MemoryClient
from engrid.tables import RowTable

HOT_WINDOWS = 2
"""So few that every set of the cache has room for its keys."""
NEW_WINDOWS = 24
"""Of text not seen before, in each repeat of the warm cache."""
WARM_UP = 240
"""Windows of text read before those."""
AHEAD = 2
"""Windows under way where rows travel."""
ONE_PASS = 0.0
"""Seconds."""
CACHED = ClientConfig(shared_memory=False, cache_bytes=128 << 20)
"""Some 115,000 n-grams."""
CLIENTS = {"shared": ClientConfig(), "hot": CACHED, "warm": CACHED, "cold": UNCACHED}


def text(stack: ExitStack, scale: Scale, figures: Figures) -> None:
    """All paths take turns within each repeat."""
    warm_up = 2 if scale.quick else WARM_UP
    read = Text((warm_up + NEW_WINDOWS * scale.repeats + 1) * WINDOW)
    hasher = read.hasher("paper", head_rows("paper", scale.mib))
    steps = read.steps(hasher)
    spec = text_table(hasher, "paper", name="bench@1")
    table = RowTable(spec)
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    start_shards(stack, folder, 2)
    clients = {name: stack.enter_context(MemoryClient(f"file:{folder}", how)) for name, how in CLIENTS.items()}
    load_sealed(clients["cold"], spec, table)
    for client in clients.values():
        client.connections.refresh()
    paths: dict[str, Path] = {name: Engrid(client, spec.name) for name, client in clients.items()}
    local, sample = Local(table), Sample(gathered(table))
    naive, naive_sample = start_naive(stack, spec.rows)

    def beside_local(name: str, path: str, windows: Sequence[Step], seconds: float, in_flight: int = 1) -> float:
        theirs = rate(local, windows, seconds, sample, 1)
        ours = rate(paths[path], windows, seconds, sample, in_flight)
        figures.add(name, ours / theirs)
        return ours

    few, hot = steps[: min(scale.steps, 16)], steps[:HOT_WINDOWS]
    for path, windows in (("warm", steps[:warm_up]), ("hot", hot), ("hot", hot), ("shared", few), ("cold", few)):
        rate(paths[path], windows, ONE_PASS, sample, 1)
    asked = clients["hot"].traffic.rows
    for repeat in range(scale.repeats):
        beside_local("shared_memory_vs_local", "shared", few, scale.seconds)
        beside_local("text_hot_vs_local", "hot", hot, scale.seconds)
        new = warm_up + repeat * NEW_WINDOWS
        beside_local("text_warm_vs_local", "warm", steps[new : new + NEW_WINDOWS], ONE_PASS, AHEAD)
        ours = beside_local("text_cold_vs_local", "cold", few, scale.seconds, AHEAD)
        figures.add("text_cold_vs_naive", ours / rate(naive, few, scale.seconds, naive_sample, 1))
    if late := clients["hot"].traffic.rows - asked:
        figures.notes["text_hot_vs_local"] = f"{late} rows were asked for all the same"
    shares = {
        order: count.hits / (count.hits + count.misses)
        for order, count in clients["warm"].caches.counts(spec.name).items()
    }
    held = ", ".join(f"{share:.0%} of {order}-grams" for order, share in shares.items())
    figures.notes["text_warm_vs_local"] = f"held, warm-up included: {held}"


def start_naive(stack: ExitStack, rows: int) -> tuple[Naive, Sample]:
    """A table of as many rows over two shards of the naive path."""
    half = -(-rows // 2)
    options = ("--rows", str(half), "--row-bytes", str(ROW_BYTES))
    client = NaiveClient([start_baseline(stack, "naive", *options) for _ in range(2)], half, ROW_BYTES)
    stack.callback(client.close)
    known = naive_content(half, ROW_BYTES, 0)
    return Naive(client), Sample(lambda ids: np.asarray(known[ids % half]))
