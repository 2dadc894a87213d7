"""What a run leaves: one JSON file, one picture beside it, one table on the terminal."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Line:
    """One thing measured in one way."""

    what: str
    path: str
    unit: str
    values: list[float] = field(default_factory=list)
    """One per repeat; none where it could not be measured."""
    over: list[float] = field(default_factory=list)
    """Of each repeat, the ratio the table's title names."""
    note: str = ""


def check_output(path: Path) -> None:
    """Raises OSError now, and not after minutes of measuring, where the file cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8"):
        pass


def write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    Console().print(f"written to {path} and {path.with_suffix('.png').name}", highlight=False)


def finish(path: Path, title: str, over: str, lines: Sequence[Line], machine: dict[str, str]) -> None:
    """over: what the ratio of a line is."""
    show(title, over, lines, machine)
    draw(path.with_suffix(".png"), title, lines, machine)
    write(path, {"about": machine, "title": title, "ratio": over, "lines": [asdict(line) for line in lines]})


def show(title: str, over: str, lines: Sequence[Line], machine: dict[str, str]) -> None:
    table = Table(title=title, caption=machine_line(machine))
    for name in ("measured", "path", "min", "median", "max", "unit", over, "note"):
        table.add_column(name, justify="right" if name in ("min", "median", "max", over) else "left")
    before = None
    for line in lines:
        if before is not None and line.what != before:
            table.add_section()
        spread = (min(line.values), statistics.median(line.values), max(line.values)) if line.values else ()
        cells = [figure(value) for value in spread] or ["", "", ""]
        ratio = figure(statistics.median(line.over)) if line.over else ""
        table.add_row(line.what if line.what != before else "", line.path, *cells, line.unit, ratio, line.note)
        before = line.what
    Console(width=160).print(table, highlight=False)


def machine_line(machine: dict[str, str]) -> str:
    return ", ".join(f"{machine[name]}" for name in ("cpu", "cores", "load", "system")) + (
        f", Python {machine['python']}, {machine['versions']}; {machine['date']}"
    )


def figure(value: float) -> str:
    """Three digits that count."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.{2 if abs(value) >= 1 else 3}f}"


def family(line: Line) -> str:
    """What bars of one colour have in common: the path, however many requests in flight and whatever it is beside."""
    return line.path.partition(",")[0].partition(" beside ")[0]


def draw(path: Path, title: str, lines: Sequence[Line], machine: dict[str, str]) -> None:
    """A bar per line that was measured, units apart; the ends of the whiskers are min and max."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    measured = [line for line in lines if line.values]
    units = list(dict.fromkeys(line.unit for line in measured)) or [""]
    counts = [max(1, sum(line.unit == unit for line in measured)) for unit in units]
    figure_, axes = plt.subplots(
        len(units),
        1,
        figsize=(9, 1.5 + 0.26 * sum(counts) + 0.7 * len(units)),
        dpi=110,
        layout="constrained",
        squeeze=False,
        height_ratios=counts,
    )
    colors = {name: f"C{at % 10}" for at, name in enumerate(dict.fromkeys(map(family, measured)))}
    colors |= {"met": "C0", "MISSED": "C1"}
    for axis, unit in zip(axes[:, 0], units, strict=True):
        of_unit = [line for line in measured if line.unit == unit]
        middles = [statistics.median(line.values) for line in of_unit]
        spread = [
            [middle - min(line.values) for line, middle in zip(of_unit, middles, strict=True)],
            [max(line.values) - middle for line, middle in zip(of_unit, middles, strict=True)],
        ]
        axis.barh(range(len(of_unit)), middles, xerr=spread, color=[colors[family(line)] for line in of_unit])
        axis.set_yticks(range(len(of_unit)), [f"{line.what}  {line.path}" for line in of_unit], fontsize=7)
        axis.invert_yaxis()
        if middles and max(middles) > 50 * min(middles) > 0:
            axis.set_xscale("log")
        axis.set_xlabel(unit)
        axis.grid(axis="x", alpha=0.3)
    figure_.suptitle(f"{title}\n{machine['cpu']}, {machine['cores']}, {machine['date']}", fontsize=9)
    figure_.savefig(path)
    plt.close(figure_)
