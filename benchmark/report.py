"""What the benchmarks of the transfer share: figures with their spread, tables, a JSON file and a plot of each run."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar
from xml.sax.saxutils import escape

WIDTH: Final = 720
HEIGHT: Final = 380
LEFT, RIGHT, TOP, BOTTOM = 60, 190, 30, 50
COLORS: Final = ("#1b6ca8", "#d1495b", "#2e933c", "#8d6a9f", "#e0a030", "#555555", "#00a6a6", "#b85c38")


T = TypeVar("T")


def from_turn(turn: int, candidates: Sequence[T]) -> list[T]:
    """All of them, beginning with another one in each turn."""
    first = turn % len(candidates)
    return [*candidates[first:], *candidates[:first]]


class Figures(NamedTuple):
    """Repeated measurements of one thing: the median, and the quarters on either side of it."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Figures:
        measured = sorted(values)
        if len(measured) == 1:
            return cls(measured[0], measured[0], measured[0])
        low, median, high = statistics.quantiles(measured, n=4, method="inclusive")
        return cls(low, median, high)

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.low)} to {_short(self.high)})"


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


class Table:
    """Printed row by row as Markdown, so that a page can have it as it is."""

    def __init__(self, title: str, *columns: str) -> None:
        print(f"\n{title}\n\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)

    def row(self, *cells: object) -> None:
        print(f"| {' | '.join(map(str, cells))} |", flush=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: does it work at all?")
    parser.add_argument("--out", type=Path, help="a folder for the figures as JSON and the plot as SVG")


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**20),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def describe(facts: Mapping[str, Any]) -> str:
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['system']}, "
        f"Python {facts['python']}; load before the run {facts['load_before']:.1f}"
    )


def save(folder: Path | None, name: str, facts: Mapping[str, Any], results: object, plot: str = "") -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"benchmark": name, "machine": facts, "results": results}, indent=1)
    (folder / f"{name}.json").write_text(text + "\n")
    if plot:
        (folder / f"{name}.svg").write_text(plot)


@contextlib.contextmanager
def interruptible(measured: Collection[object]) -> Iterator[None]:
    """Whoever interrupts a run that takes minutes gets what was measured until then, if there is any."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if not measured:
            raise
        print("\nInterrupted: what follows was measured until then.")


def load(folder: Path | None, name: str) -> dict[str, Any]:
    """What `save` has written there."""
    if folder is None:
        raise SystemExit("what shall be added to is looked for in the folder of --out")
    saved: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return saved


Line = Mapping[float, Figures]


def plot(title: str, x_title: str, y_title: str, lines: Mapping[str, Line]) -> str:
    """Lines with their spread over a logarithmic x axis, as SVG."""
    places = sorted({x for line in lines.values() for x in line})
    top = max(figures.high for line in lines.values() for figures in line.values()) * 1.05
    step = (WIDTH - LEFT - RIGHT) / max(1, len(places) - 1)

    def across(x: float) -> float:
        return LEFT + places.index(x) * step

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    parts = _begun(title, x_title, y_title, top, up)
    parts += [_text(across(x), HEIGHT - BOTTOM + 18, _short(x)) for x in places]
    for number, (name, line) in enumerate(lines.items()):
        parts += _drawn(name, line, number, across, up)
    return "\n".join([*parts, "</svg>", ""])


def bars(title: str, x_title: str, y_title: str, groups: Mapping[str, Mapping[str, Figures]]) -> str:
    """Groups of bars with their spread, as SVG. A name has one color in all groups."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    top = max(figures.high for group in groups.values() for figures in group.values()) * 1.05
    step = (WIDTH - LEFT - RIGHT) / len(groups)
    width = step * 0.8 / len(names)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    parts = _begun(title, x_title, y_title, top, up)
    for place, (label, group) in enumerate(groups.items()):
        left = LEFT + (place + 0.1) * step
        parts.append(_text(left + 0.4 * step, HEIGHT - BOTTOM + 18, label))
        for number, name in enumerate(names):
            if name in group:
                parts += _bar(group[name], left + number * width, 0.9 * width, number, up)
    for number, name in enumerate(names):
        parts += _legend(name, number)
    return "\n".join([*parts, "</svg>", ""])


def _bar(figures: Figures, x: float, width: float, number: int, up: Callable[[float], float]) -> Sequence[str]:
    place = f'x="{x:.1f}" y="{up(figures.median):.1f}" width="{width:.1f}"'
    height = up(0) - up(figures.median)
    spread = f"M{x + width / 2:.1f} {up(figures.low):.1f}V{up(figures.high):.1f}"
    return (
        f'<rect {place} height="{height:.1f}" fill="{COLORS[number % len(COLORS)]}"/>',
        f'<path d="{spread}" stroke="black" stroke-width="2" stroke-opacity="0.6"/>',
    )


def _begun(title: str, x_title: str, y_title: str, top: float, up: Callable[[float], float]) -> list[str]:
    """A plot with its titles and its y axis, and nothing in it."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 18, title, "start"),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_title),
        *_axis(top, y_title, up),
    ]


def _axis(top: float, y_title: str, up: Callable[[float], float]) -> list[str]:
    parts = []
    for tick in range(6):
        value = top * tick / 5
        parts.append(f'<path d="M{LEFT} {up(value):.1f}H{WIDTH - RIGHT}" stroke="#dddddd"/>')
        parts.append(_text(LEFT - 6, up(value) + 4, _short(value), "end"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<g transform="translate(14 {middle:.0f}) rotate(-90)">{_text(0, 0, y_title)}</g>')
    return parts


def _drawn(
    name: str, line: Line, number: int, across: Callable[[float], float], up: Callable[[float], float]
) -> Sequence[str]:
    color = COLORS[number % len(COLORS)]
    points = " ".join(f"{across(x):.1f},{up(line[x].median):.1f}" for x in sorted(line))
    parts = [f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>']
    for x, figures in line.items():
        spread = f"M{across(x):.1f} {up(figures.low):.1f}V{up(figures.high):.1f}"
        parts.append(f'<path d="{spread}" stroke="{color}" stroke-width="4" stroke-opacity="0.35"/>')
        parts.append(f'<circle cx="{across(x):.1f}" cy="{up(figures.median):.1f}" r="3" fill="{color}"/>')
    return [*parts, *_legend(name, number)]


def _legend(name: str, number: int) -> Sequence[str]:
    at, color = TOP + 14 + 18 * number, COLORS[number % len(COLORS)]
    return (
        f'<path d="M{WIDTH - RIGHT + 12} {at - 4}h18" stroke="{color}" stroke-width="2"/>',
        _text(WIDTH - RIGHT + 36, at, name, "start"),
    )


def _text(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
