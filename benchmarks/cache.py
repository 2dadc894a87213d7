"""What the client's row cache holds of real text, and what probing it costs beside an in-process gather.

    python -m benchmarks.cache [--row-bytes 128 264] [--repeats 7] [--json build/cache.json]

Ids are Python's standard library through DeepSeek's tokenizer and the paper preset, its tables scaled to --head-rows; all
windows are 4,096 tokens. `local` is np.take of the undeduplicated row ids from the whole table. Paths take turns within
a repeat, every repeat of `warm` on text not seen before, with a gather from the table standing in for the wire. Ratios
are time of local over time of the path: 1 is as fast as local, more is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.text import STANDARD_LIBRARY, WINDOW, Text
from engrid.addressing.spec import PRESETS
from engrid.client.cache.key_cache import AGE_PERIOD, Column, KeyCache, Plan
from engrid.client.cache.sets import BOOKKEEPING_BYTES
from engrid.rpc.frames import row_view

HEADS = PRESETS["paper"].heads
ENGINES = ["numpy", *(["numba"] if find_spec("numba") else [])]
Window = tuple[np.ndarray, np.ndarray]
"""Keys [orders, T] and row ids [T, orders * K]."""


def text_windows(folder: Path, tokens: int, head_rows: int) -> list[Window]:
    """The Python files of a folder, cut into windows that follow one another."""
    text = Text(tokens, folder)
    steps = text.steps(text.hasher("paper", head_rows))
    return [(np.stack([keys for _, keys in step.orders]), step.row_ids) for step in steps]


def uniform_windows(count: int, head_rows: int, rows: int) -> list[Window]:
    """Keys drawn evenly from as many as a head has rows."""
    rng = np.random.default_rng(1)
    spread = np.random.default_rng(2).integers(0, rows, (2, head_rows, HEADS))
    windows = []
    for _ in range(count):
        keys = rng.integers(0, head_rows, (2, WINDOW))
        windows.append((keys, np.concatenate([spread[order][keys[order]] for order in range(2)], axis=1)))
    return windows


def agent_windows(text: list[Window], count: int) -> list[Window]:
    """Twelve prompts over and over; every fourth window is new text."""
    return [text[turn % 12] if turn % 4 else text[12 + turn // 4] for turn in range(count)]


def cache_of(entries: int, entry_bytes: int, **options: str) -> KeyCache:
    """Of about so many entries, with staging for a whole window."""
    staging = 2 * WINDOW
    budget = entries * (entry_bytes + BOOKKEEPING_BYTES) + (1 + staging) * entry_bytes
    return KeyCache(budget, entry_bytes, staging_entries=staging, **options)  # type: ignore[arg-type]


def columns_of(cache: KeyCache, keys: np.ndarray) -> list[Column]:
    return [Column(cache.tag("text", order, "1"), keys[order - 2]) for order in (2, 3)]


def hit_rates(windows: list[Window], entries: int, policy: str) -> dict[str, float]:
    """Shares over the last three quarters of the windows."""
    cache = cache_of(entries, 8, policy=policy)
    tags = [cache.tag("text", order, "1") for order in (2, 3)]
    before = [cache.counts(tag) for tag in tags]
    for number, (keys, _) in enumerate(windows):
        if number == len(windows) // 4:
            before = [cache.counts(tag) for tag in tags]
        with cache.probe(columns_of(cache, keys)) as plan:
            cache.admit(plan)
    after = [cache.counts(tag) for tag in tags]
    positions = (len(windows) - len(windows) // 4) * WINDOW
    return {
        "hit_2": (after[0].hits - before[0].hits) / positions,
        "hit_3": (after[1].hits - before[1].hits) / positions,
        "wire": sum(new.fetched - old.fetched for new, old in zip(after, before, strict=True)) / positions / 2,
        "inserted": sum(new.insertions - old.insertions for new, old in zip(after, before, strict=True))
        / positions
        / 2,
    }


class Paths:
    """The ways to the rows of a window, into one reused output."""

    def __init__(self, table: np.ndarray, entries: int) -> None:
        self.row_bytes = table.shape[1]
        self.table = row_view(table)
        self.out = np.empty((WINDOW, 2 * HEADS, self.row_bytes), np.uint8)
        self.caches = {engine: cache_of(entries, HEADS * self.row_bytes, engine=engine) for engine in ENGINES}
        self.spent: dict[str, dict[str, float]] = {engine: {} for engine in ENGINES}

    def local(self, window: Window) -> None:
        ids = window[1].reshape(-1)
        out = self.out.reshape(-1, self.row_bytes)[: len(ids)]
        np.take(self.table, ids, out=row_view(out), mode="clip")

    def cached(self, engine: str, window: Window) -> Plan:
        """As the client does it; `spent` says on what."""
        cache, (keys, row_ids) = self.caches[engine], window
        times = [time.perf_counter()]
        plan = cache.probe(columns_of(cache, keys))
        times.append(time.perf_counter())
        if len(plan.staging):
            self.fetch(plan, row_ids)
        times.append(time.perf_counter())
        plan.take(self.out[: keys.shape[1]])
        times.append(time.perf_counter())
        if len(plan.staging):
            cache.admit(plan)
        plan.close()
        times.append(time.perf_counter())
        for name, begin, end in zip(("probe", "fetch", "take", "admit"), times, times[1:], strict=False):
            self.spent[engine][name] = self.spent[engine].get(name, 0) + end - begin
        return plan

    def fetch(self, plan: Plan, row_ids: np.ndarray) -> None:
        """The stand-in for the wire."""
        by_order = (row_ids[:, :HEADS], row_ids[:, HEADS:])
        ids = np.concatenate([ids[where] for ids, where in zip(by_order, plan.missing, strict=True)]).reshape(-1)
        np.take(self.table, ids, out=row_view(plan.staging.reshape(-1, self.row_bytes)), mode="clip")

    def check(self, windows: list[Window]) -> None:
        for window in windows:
            self.local(window)
            wanted = self.out[: len(window[1])].copy()
            for engine in ENGINES:
                self.out[:] = 0
                self.cached(engine, window)
                if not np.array_equal(self.out[: len(wanted)], wanted):
                    raise SystemExit(f"{engine}: the cache gave other rows than the table")


def seconds(call: Callable[[Window], object], windows: list[Window], rounds: int = 1) -> float:
    begun = time.perf_counter()
    for _ in range(rounds):
        for window in windows:
            call(window)
    return time.perf_counter() - begun


def compare(paths: Paths, batches: Iterator[list[Window]], rounds: int = 1) -> dict[str, object]:
    """Each engine over local, batch by batch; which goes first changes."""
    ratios: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    ways: dict[str, Callable[[Window], object]] = {"local": paths.local}
    ways |= {engine: (lambda window, engine=engine: paths.cached(engine, window)) for engine in ENGINES}
    paths.spent = {engine: {} for engine in ENGINES}
    for turn, batch in enumerate(batches):
        order = list(ways) if turn % 2 else list(reversed(ways))
        took = {name: seconds(ways[name], batch, rounds) for name in order}
        for engine in ENGINES:
            ratios[engine].append(took["local"] / took[engine])
    shares = {
        engine: {name: spent / sum(parts.values()) for name, spent in parts.items()}
        for engine, parts in paths.spent.items()
    }
    return {
        engine: {
            "min": min(values),
            "median": statistics.median(values),
            "max": max(values),
            "shares": shares[engine],
        }
        for engine, values in ratios.items()
    }


def timings(
    table: np.ndarray, text: list[Window], uniform: list[Window], given: argparse.Namespace
) -> dict[str, object]:
    repeats, per_repeat = given.repeats, 8
    result: dict[str, object] = {}
    hot = text[:4]  # few enough that no set gets more keys than it holds
    paths = Paths(table, given.entries)
    paths.check(hot)
    for engine in ENGINES:
        if any(len(paths.cached(engine, window).staging) for window in hot):
            raise SystemExit("text hot: a key was not held")
    result["text hot"] = compare(paths, iter([hot] * repeats), rounds=4)
    for tokens, rounds in ((256, 30), (1, 400)):
        short = [(keys[:, -tokens:].copy(), row_ids[-tokens:]) for keys, row_ids in hot]
        paths.check(short)
        result[f"text hot, {tokens} tokens"] = compare(paths, iter([short] * repeats), rounds=rounds)
    for name, windows in (("text warm", text), ("uniform warm", uniform)):
        new = len(windows) - repeats * per_repeat
        for engine in ENGINES:
            for window in windows[:new]:
                paths.cached(engine, window)
        result[name] = compare(
            paths, (windows[start : start + per_repeat] for start in range(new, len(windows), per_repeat))
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", type=Path, default=STANDARD_LIBRARY, help="folder of Python files; the standard library's"
    )
    parser.add_argument("--row-bytes", type=int, nargs="*", default=[128, 264], help="none: hit rates alone")
    parser.add_argument("--head-rows", type=int, default=1 << 19, help="rows per head, rounded up to primes")
    parser.add_argument("--tokens", type=int, default=1_500_000)
    parser.add_argument("--entries", type=int, default=100_000, help="n-grams the timed caches hold")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("build/cache.json"))
    given = parser.parse_args()

    text = text_windows(given.text, given.tokens, given.head_rows)
    rows = int(max(row_ids.max() for _, row_ids in text)) + 1
    uniform = uniform_windows(len(text) // 2, given.head_rows, rows)
    result: dict[str, object] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores for all processes",
        "windows": len(text),
        "age_period": AGE_PERIOD,
        "entries": given.entries,
        "hit_rates": {
            f"{workload}, {entries} entries, {policy}": hit_rates(windows, entries, policy)
            for workload, windows in (
                ("text", text),
                ("agent", agent_windows(text, len(text))),
                ("uniform", uniform),
            )
            for entries in (16_384, 32_768, 100_000)
            for policy in ("recency", "frequency")
        },
        "timings": {},
    }
    for row_bytes in given.row_bytes:
        table = np.random.default_rng(0).integers(0, 256, (rows, row_bytes), np.uint8)
        result["timings"][f"{row_bytes} bytes"] = timings(table, text, uniform, given)  # type: ignore[index]
        del table
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    show(result)
    print(f"written to {given.json}")


def show(result: dict) -> None:
    console = Console(width=120)
    rates = Table(title=f"Hit rates, {result['windows']} windows of {WINDOW} tokens", box=None)
    for name in ("workload, entries, policy", "2-grams held", "3-grams held", "of rows on the wire", "inserted"):
        rates.add_column(name)
    for name, figures in result["hit_rates"].items():
        rates.add_row(name, *(f"{figure:.3f}" for figure in figures.values()))
    console.print(rates)
    times = Table(title=f"Time of local over time of the cache, {result['machine']}", box=None)
    for name in ("rows", "workload", "engine", "min", "median", "max", "probe", "fetch", "take", "admit"):
        times.add_column(name)
    for width, workloads in result["timings"].items():
        for workload, engines in workloads.items():
            for engine, figures in engines.items():
                ratios = [f"{figures[key]:.2f}" for key in ("min", "median", "max")]
                times.add_row(width, workload, engine, *ratios, *(f"{s:.0%}" for s in figures["shares"].values()))
    console.print(times)


if __name__ == "__main__":
    main()
