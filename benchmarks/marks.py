"""The marks: figures with an aim, measured in one run, ratios only, as the machine is shared and noisy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.checkpoint_marks import checkpoints, training_while_saving
from benchmarks.common import about
from benchmarks.data_marks import Figures, bulk, demo_model, per_core, token
from benchmarks.measure import Scale
from benchmarks.report import Line, check_output, draw, show, write
from benchmarks.text_marks import text
from benchmarks.train_marks import durability, pushes, training
from engrid.host.allocator import keep_buffers

Part = Callable[[ExitStack, Scale, Figures], None]


@dataclass(frozen=True)
class Mark:
    """What a figure should be."""

    aim: float
    what: str
    at_most: bool = False

    def reached(self, value: float) -> float:
        """1 or more where the aim is met."""
        return self.aim / value if self.at_most else value / self.aim

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.aim:g}"


REACHED = "of the aim; 1 meets it"
BULK = "8,192-row requests, uniform ids, over"
DATA = {
    "uncached_vs_socket": Mark(0.6, f"{BULK} a raw socket"),
    "uncached_vs_redis": Mark(10, f"{BULK} Redis MGET"),
    "uncached_vs_ray_call": Mark(4, f"{BULK} a Ray actor call"),
    "uncached_vs_mooncake": Mark(100, f"{BULK} Mooncake's EngramStore"),
    "one_token_vs_echo": Mark(2, "p50 of 16 rows, 2 shards, over an echo's", at_most=True),
    "one_token_p99_over_p50": Mark(4, "of that token", at_most=True),
    "shared_memory_vs_local": Mark(0.9, "4,096-token windows of text, over in-process"),
    "text_hot_vs_local": Mark(1.0, "gRPC, every key cached"),
    "text_warm_vs_local": Mark(0.45, "new text after a warm-up"),
    "text_cold_vs_naive": Mark(3, "no cache, over the naive path"),
    "model_prefill_vs_local": Mark(0.97, "tokens/s, gRPC with cache, over in-process"),
    "model_decode_vs_local": Mark(0.93, "the same, decoding a batch of 32"),
    "exposed_wait_share": Mark(0.02, "of that prefill", at_most=True),
    "table_4g_vs_64m": Mark(0.9, "rows per CPU second"),
    "clients_8_vs_1": Mark(0.9, "rows per CPU second, clients as processes"),
}
TRAIN = {
    "push_vs_local": Mark(0.5, "8,192 rows of 64, Adam, over torch.optim.SparseAdam"),
    "durable_vs_bound": Mark(0.75, "rows/s over the smaller of memory's and the disk's"),
    "replay_vs_live": Mark(1, "rows/s of a start's replay over live pushes"),
    "train_vs_local": Mark(0.9, "demo training tokens/s, two shards, over in-process"),
    "checkpoint_step_slowdown": Mark(1.2, "step time while rows are saved over without", at_most=True),
    "load_vs_disk": Mark(0.5, "checkpoint load over reading its files, both cold"),
}
GROUPS: dict[str, tuple[dict[str, Mark], tuple[Part, ...]]] = {
    "data": (DATA, (token, text, demo_model, per_core, bulk)),  # Ray and Mooncake last: their threads stay
    "train": (TRAIN, (pushes, durability, checkpoints, training, training_while_saving)),
}


def check_group(group: str) -> None:
    """Raises ValueError for a group that does not exist."""
    if group not in GROUPS:
        raise ValueError(f"group {group!r}: give one of {', '.join(GROUPS)}")


def run(path: Path, *, group: str, repeats: int, quick: bool) -> None:
    """Measures, writes and shows. The JSON is flat: medians by name, null where not measured, and what measured them."""
    check_group(group)
    check_output(path)
    keep_buffers()
    marks, parts = GROUPS[group]
    scale, figures, machine, begun = Scale.of(repeats, quick=quick), Figures(), about(), time.monotonic()
    for part in parts:
        with ExitStack() as stack:
            part(stack, scale, figures)
    seconds = time.monotonic() - begun
    lines = [line_of(name, mark, figures) for name, mark in marks.items()]
    beside = sorted(figures.values.keys() - marks.keys())
    lines += [Line(what="beside", path=name, unit="", values=figures.values[name]) for name in beside]
    title = f"Marks of group {group}, medians of {repeats}, {seconds:.0f} s{' (smoke run)' * quick}"
    show(title, REACHED, lines, machine)
    bars = [
        replace(line, what=line.path, path=line.note.partition(";")[0], unit=REACHED, values=line.over)
        for line in lines
        if line.over
    ]
    draw(path.with_suffix(".png"), title, bars, machine)
    flat: dict[str, object] = dict.fromkeys(marks)
    for name, values in figures.values.items():
        flat |= {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}
    write(path, flat | machine | {"repeats": repeats, "seconds": round(seconds), "smoke_run": quick})


def line_of(name: str, mark: Mark, figures: Figures) -> Line:
    values, note = figures.values.get(name, []), figures.notes.get(name, "")
    if not values:
        return Line(what="marks", path=name, unit=f"aim {mark}", note=f"not measured: {note}")
    verdict = "met" if mark.reached(statistics.median(values)) >= 1 else "MISSED"
    told = f"{verdict}; {mark.what}{'; ' * bool(note)}{note}"
    return Line(
        what="marks",
        path=name,
        unit=f"aim {mark}",
        values=values,
        over=[mark.reached(value) for value in values],
        note=told,
    )
