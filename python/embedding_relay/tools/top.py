"""`sglang-relay top`: both halves at a glance in a terminal, from the /metrics of the instances."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.client import HTTPException
from typing import Final

from embedding_relay.metrics import ENCODE, LANGUAGE, PREFIX

_TIMEOUT: Final = 3.0
_LARGEST_PAGE: Final = 32 << 20
_MOST_INSTANCES: Final = 200
_MOST_AT_ONCE: Final = 32
_ONCE_INTERVAL: Final = 1.0
_BAR: Final = 8
_UNITS: Final = ((1e9, "G"), (1e6, "M"), (1e3, "k"))

_OWN_SCREEN, _GIVE_BACK = "\033[?1049h\033[?25l", "\033[?25h\033[?1049l"
_HOME, _END_OF_LINE, _END_OF_SCREEN = "\033[H", "\033[K", "\033[J"


# ---- what instances say


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one instance served at one moment. Numbers of all its ranks are added up."""

    at: float
    mode: str
    numbers: Mapping[str, float]
    """Without our prefix; of requests that ended badly also `failed`."""


@dataclasses.dataclass
class Instance:
    url: str
    last: Sample | None = None
    before: Sample | None = None
    problem: str = ""
    is_silent: bool = False
    """It does not answer; else it does, and not with what we look for."""
    missed_since: float | None = None
    """By the clock on the wall."""

    @property
    def name(self) -> str:
        return self.url.removeprefix("http://")

    def hear(self, sample: Sample) -> None:
        is_new = self.last is None or sample.numbers.get("requests", 0) < self.last.numbers.get("requests", 0)
        self.before, self.last = None if is_new else self.last, sample  # a restarted one begins at zero
        self.problem, self.is_silent, self.missed_since = "", False, None

    def miss(self, problem: str, now: float, *, is_silent: bool = True) -> None:
        self.problem, self.is_silent = problem, is_silent
        self.missed_since = self.missed_since or now

    def number(self, name: str) -> float:
        return self.last.numbers.get(name, 0.0) if self.last else 0.0

    def grown(self, name: str) -> float:
        """By how much a counter has grown between the two samples."""
        if self.last is None or self.before is None:
            return 0.0
        return max(0.0, self.last.numbers.get(name, 0.0) - self.before.numbers.get(name, 0.0))

    def rate(self, name: str) -> float | None:
        if self.last is None or self.before is None:
            return None
        return self.grown(name) / max(1e-3, self.last.at - self.before.at)

    def mean(self, name: str) -> float | None:
        """Of a histogram, over the requests that ended since the sample before; None if there were none."""
        count = self.grown(f"{name}_count")
        return self.grown(f"{name}_sum") / count if count else None


class NoMetrics(Exception):
    """An instance answers, and not with what we look for."""


def understand(page: str, at: float) -> Sample:
    """Raises NoMetrics if there is nothing of ours on the page, and ValueError if it is no page of metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    numbers: dict[str, float] = {}
    modes = set()
    # Only our own lines are looked at: SGLang has thousands.
    ours = "".join(f"{line}\n" for line in page.splitlines() if line.removeprefix("# TYPE ").startswith(PREFIX))
    for family in text_string_to_metric_families(ours):
        for sample in family.samples:
            name = sample.name.removeprefix(PREFIX).removesuffix("_total")
            modes.add(sample.labels.get("mode", ""))
            if "le" in sample.labels or not math.isfinite(sample.value):
                continue
            numbers[name] = numbers.get(name, 0.0) + sample.value
            if name == "requests" and sample.labels.get("status_code") != "200":
                numbers["failed"] = numbers.get("failed", 0.0) + sample.value
    if not modes & {ENCODE, LANGUAGE}:
        raise NoMetrics
    return Sample(at, ENCODE if ENCODE in modes else LANGUAGE, numbers)


def get(url: str) -> str:
    """Raises OSError with a reason, and NoMetrics where there is no such page."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_TIMEOUT) as reply:
            return str(reply.read(_LARGEST_PAGE).decode(errors="replace"))
    except urllib.error.HTTPError as refusal:
        refusal.close()
        if refusal.code == HTTPStatus.NOT_FOUND:
            raise NoMetrics from None
        raise OSError(f"it answers {refusal.code}") from None
    except urllib.error.URLError as error:
        reason = error.reason
        raise OSError(getattr(reason, "strerror", None) or str(reason)) from None
    except (HTTPException, ValueError) as error:
        raise OSError(f"it does not speak HTTP ({type(error).__name__})") from None


def look_at(instance: Instance) -> None:
    try:
        instance.hear(understand(get(f"{instance.url}/metrics"), time.monotonic()))
    except NoMetrics:
        instance.miss("start it in a mode of the relay, with --enable-metrics", time.time(), is_silent=False)
    except ValueError:
        instance.miss("what it serves at /metrics are no metrics", time.time(), is_silent=False)
    except OSError as error:
        instance.miss(str(error), time.time())


def members_of(router: str) -> list[str]:
    """The instances that a router has now. Raises OSError, or ValueError if what answers is no router."""
    try:
        workers = json.loads(get(f"{router}/workers"))["workers"]
        found = [str(worker["url"]).rstrip("/") for worker in workers]
    except (NoMetrics, KeyError, TypeError, RecursionError, json.JSONDecodeError):
        raise ValueError("it does not list its servers at /workers, as sglang-router does") from None
    return [url for url in found if url.startswith(("http://", "https://")) and url.isprintable()][:_MOST_INSTANCES]


# ---- the screen

# What each kind of instance has in its line: title and width, all of it within 80 columns.
_WIDTH: Final = 80
_NAME_WIDTH: Final = 21
_COLUMNS: Final = {
    ENCODE: {"pool": 14, "parked": 7, "writes": 7, "req/s": 7, "tower/s": 8, "B/s": 7, "wait": 7},
    LANGUAGE: {"pool": 14, "queue": 7, "req/s": 7, "rows/s": 8, "B/s": 7, "rounds": 7, "wait": 7},
}


def screen(instances: Sequence[Instance], now: float, heading: str, paint: Paint) -> list[str]:
    """The lines, for who looks at them `now`."""
    missed = sum(instance.missed_since is not None for instance in instances)
    lines = [heading + (f"  {paint.red(f'{missed} not seen')}" if missed else "")]
    for mode in (ENCODE, LANGUAGE):
        members = [instance for instance in instances if instance.last and instance.last.mode == mode]
        if members:
            titles = "".join(f"{title:>{width}}" for title, width in _COLUMNS[mode].items())
            lines += ["", paint.bold(f"{mode.upper():{_NAME_WIDTH}}{titles}")]
        for instance in members:
            lines += _lines_of(instance, now, paint)
    if strangers := [instance for instance in instances if instance.last is None]:
        lines += ["", paint.bold("NOT SEEN YET")]
        lines += [line for instance in strangers for line in _lines_of(instance, now, paint)]
    return lines


def _lines_of(instance: Instance, now: float, paint: Paint) -> Iterator[str]:
    name = instance.name
    if len(name) >= _NAME_WIDTH:  # the end of a name tells more: the port, and of pods the number
        name = f"~{name[2 - _NAME_WIDTH :]}"
    if instance.missed_since is not None:
        since = time.strftime("%H:%M:%S", time.localtime(instance.missed_since))
        what = "no answer" if instance.is_silent else "no metrics"
        yield f"{name:{_NAME_WIDTH}}" + paint.red(f"{what} since {since} ({now - instance.missed_since:.0f} s)")
        yield paint.red(f"  {instance.problem}"[:_WIDTH])
        return
    if instance.last is None:
        return
    cells = _cells(instance)
    yield f"{name:{_NAME_WIDTH}}" + "".join(
        f"{cells[title]:>{width}}" for title, width in _COLUMNS[instance.last.mode].items()
    )
    shared = instance.number("shared_memory_peers")
    others = "language ranks" if instance.last.mode == ENCODE else "encode ranks"
    known = max(shared, instance.number("sessions") + instance.number("peers"))
    yield f"  rooms: {_short(instance.number('rooms'))}; shared memory with {shared:.0f} of {known:.0f} {others}"
    if flaws := list(_flaws_of(instance, paint)):
        yield f"  {', '.join(flaws)}"


def _flaws_of(instance: Instance, paint: Paint) -> Iterator[str]:
    """What a healthy pair has none of."""
    if failed := instance.number("failed"):
        yield paint.yellow(f"{_short(failed)} failed")
    if blocks := instance.number("quarantined_blocks"):
        yield paint.yellow(f"{_short(blocks)} blocks in quarantine")
    if overdue := instance.number("overdue_rooms"):
        yield paint.red(f"{_short(overdue)} overdue")
    if unquiet := instance.number("unquiet_rooms"):
        yield paint.yellow(f"{_short(unquiet)} unquiet")


def _cells(instance: Instance) -> dict[str, str]:
    return {
        "pool": _pool(instance),
        "parked": _short(instance.number("parked_requests")),
        "writes": _short(instance.number("transfers")),
        "queue": _short(instance.number("waiting_rooms")),
        "req/s": _short(instance.rate("requests")),
        "tower/s": _short(instance.rate("encoded_items")),
        "rows/s": _short(instance.rate("rows")),
        "B/s": _short(instance.rate("bytes")),
        "rounds": _short(instance.mean("request_rounds")),
        "wait": _seconds(instance.mean("wait_seconds")),
    }


def _pool(instance: Instance) -> str:
    blocks, free = instance.number("pool_blocks"), instance.number("free_blocks")
    used = 1 - free / blocks if blocks else 0.0
    full = min(_BAR, max(round(used * _BAR), 1 if used else 0))
    return f"{'#' * full}{'.' * (_BAR - full)} {used:.0%}"


def _short(number: float | None) -> str:
    """In five characters at most: 940, 5.2k, 81.2M; a dash for what is not known yet."""
    if number is None:
        return "-"
    for size, unit in _UNITS:
        if number >= size * 0.9995:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f}ms" if seconds < 0.9995 else f"{seconds:.3g}s"


class Paint:
    """Colours, where a terminal shows them."""

    def __init__(self, coloured: bool) -> None:
        self._coloured = coloured

    def _in(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._coloured else text

    def red(self, text: str) -> str:
        return self._in("31", text)

    def yellow(self, text: str) -> str:
        return self._in("33", text)

    def bold(self, text: str) -> str:
        return self._in("1", text)


# ---- the command


class Watch:
    """The instances that are looked at: those that were named, and those that a router has."""

    def __init__(self, urls: Sequence[str], router: str | None) -> None:
        self._named = list(urls)
        self._router = router
        self._known: dict[str, Instance] = {}
        self.problem = ""
        """With the router."""

    def refresh(self) -> list[Instance]:
        urls = [*self._named, *self._of_router()]
        self._known = {url: self._known.get(url) or Instance(url) for url in dict.fromkeys(urls)}
        instances = list(self._known.values())
        if instances:
            with ThreadPoolExecutor(min(_MOST_AT_ONCE, len(instances))) as pool:
                list(pool.map(look_at, instances))
        return instances

    def _of_router(self) -> list[str]:
        """Those it had last, while it does not answer."""
        if self._router is None:
            return []
        try:
            found = members_of(self._router)
        except (OSError, ValueError) as error:
            self.problem = f"router {self._router}: {error}"
            return [url for url in self._known if url not in self._named]
        self.problem = ""
        return found


def run(arguments: argparse.Namespace) -> int:
    watch = Watch(arguments.instances, arguments.router)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the terminal is given back then too
    try:
        return _once(watch) if arguments.once else _for_ever(watch, arguments.interval)
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:  # whoever has read our frames has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)


def _once(watch: Watch) -> int:
    """Two samples a moment apart, for the rates. 1 if an instance or the router does not answer."""
    watch.refresh()
    time.sleep(_ONCE_INTERVAL)
    instances = watch.refresh()
    print("\n".join(_frame(watch, instances, _ONCE_INTERVAL, Paint(False))))
    is_well = instances and not watch.problem and all(instance.missed_since is None for instance in instances)
    return 0 if is_well else 1


def _for_ever(watch: Watch, interval: float) -> int:
    is_terminal = sys.stdout.isatty()
    if is_terminal:
        _write(_OWN_SCREEN)
    try:
        while True:
            started = time.monotonic()
            lines = _frame(watch, watch.refresh(), interval, Paint(is_terminal))
            if is_terminal:
                height = shutil.get_terminal_size().lines - 1
                shown = lines if len(lines) <= height else [*lines[: height - 1], f"... {len(lines) - height + 1} more"]
                _write(_HOME + "".join(f"{line}{_END_OF_LINE}\n" for line in shown) + _END_OF_SCREEN)
            else:
                _write("\n".join(lines) + "\n\n")
            time.sleep(max(0.0, started + interval - time.monotonic()))
    finally:
        if is_terminal:
            _write(_GIVE_BACK)


def _frame(watch: Watch, instances: Sequence[Instance], interval: float, paint: Paint) -> list[str]:
    heading = f"sglang-relay top  {time.strftime('%H:%M:%S')}  every {interval:g} s  instances: {len(instances)}"
    lines = screen(instances, time.time(), heading, paint)
    return [*lines, "", paint.red(watch.problem)] if watch.problem else lines


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
