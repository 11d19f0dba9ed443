"""One request's story: what two instances have noted of it, on one clock, divided into lanes, rounds and totals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from embedding_relay import recorder
from embedding_relay.recorder import MOST_ROUNDS, Moment
from embedding_relay.spans import ENCODE, LANGUAGE, Span, names, spans

HALVES: Final = (ENCODE, LANGUAGE)
OF_ROUNDS: Final = frozenset(
    (recorder.ASKED, recorder.OFFERED, recorder.CHUNK_BEGAN, recorder.CHUNK_WRITTEN, recorder.COPY_BEGAN)
) | {recorder.COPIED}
_ROUND_SPANS: Final = {ENCODE: "chunk", LANGUAGE: "copy"}
# Shown larger if they would have less than this part of the picture.
_SMALL_PART: Final = 0.25


class Request(msgspec.Struct):
    room: int
    moments: list[Moment]


class Told(msgspec.Struct):
    """What `/relay/trace` of an instance says."""

    mode: str
    machine: str
    monotonic: float
    wall: float
    requests: list[Request]
    silent: list[str] = []


class Clocks(NamedTuple):
    """How much the encode half's times are moved to be on the language half's clock, and how wrong that may be."""

    shift: float = 0.0
    uncertain: float | None = 0.0
    """In seconds; None where nothing says."""
    about: str = "one clock"


class Lane(NamedTuple):
    half: str
    name: str
    spans: Sequence[Span]

    @property
    def seconds(self) -> float:
        """In which at least one of them lasted: two chunks may be with the workers at a time."""
        total, until = 0.0, 0.0
        for span in sorted(self.spans, key=lambda span: span.began):
            ended = span.ended or span.began
            total += max(0.0, ended - max(span.began, until))
            until = max(until, ended)
        return total


@dataclasses.dataclass(frozen=True)
class Story:
    """All times are in seconds since its first moment."""

    room: int
    began_at: float
    """By the wall clock of the language instance, or of the encode instance alone."""
    moments: Mapping[str, Sequence[Moment]]
    clocks: Clocks
    missing: Sequence[str] = ()
    """Sentences about what is not here."""

    def first(self, what: str, half: str | None = None) -> Moment | None:
        found = (m for name in HALVES if half in (None, name) for m in self.moments.get(name, ()) if m.what == what)
        return next(found, None)

    @property
    def length(self) -> float:
        return max((m.at for moments in self.moments.values() for m in moments), default=0.0)

    @property
    def totals(self) -> Moment | None:
        return self.first(recorder.COMPLETE) or self.first(recorder.SENT)

    def failures(self) -> Iterator[tuple[str, Moment]]:
        for half in HALVES:
            yield from ((half, m) for m in self.moments.get(half, ()) if m.what == recorder.FAILED)

    def lanes(self) -> list[Lane]:
        found = []
        for half in HALVES:
            of_half = spans(half, self.moments.get(half, ()))
            for name in names(half):
                if same := [span for span in of_half if span.name == name]:
                    found.append(Lane(half, name, same))
        return found

    def rounds(self) -> list[Lane]:
        """The lanes of the rounds, if there are several and they are hard to see among the rest."""
        lanes = [lane for lane in self.lanes() if lane.name == _ROUND_SPANS[lane.half]]
        if not any(len(lane.spans) > 1 for lane in lanes):
            return []
        began, ended = extent(lanes)
        return lanes if ended - began < _SMALL_PART * self.length else []

    def first_rows(self) -> list[int]:
        """Of each round."""
        rows = {m.first_row for moments in self.moments.values() for m in moments if m.what in OF_ROUNDS}
        return sorted(rows)

    @property
    def rounds_left_out(self) -> int:
        totals = self.totals
        return max(0, totals.rounds - MOST_ROUNDS) if totals else 0


def extent(lanes: Iterable[Lane]) -> tuple[float, float]:
    """From the first beginning to the last end of any of their spans."""
    times = [at for lane in lanes for span in lane.spans for at in (span.began, span.ended or span.began)]
    return min(times), max(times)


def tell(room: int, told: Iterable[Told]) -> Story | None:
    """None if nobody knows of the room. Of two instances of one mode the one that knows most counts."""
    halves: dict[str, tuple[Told, list[Moment]]] = {}
    for one in told:
        for request in one.requests:
            known = halves.get(one.mode)
            if request.room == room and (known is None or len(known[1]) < len(request.moments)):
                halves[one.mode] = (one, request.moments)
    if not halves:
        return None
    clocks = Clocks()
    moments = {half: list(noted) for half, (_, noted) in halves.items()}
    if set(HALVES) <= halves.keys():
        clocks = line_up(halves[ENCODE], halves[LANGUAGE])
        moments[ENCODE] = [msgspec.structs.replace(m, at=m.at + clocks.shift) for m in moments[ENCODE]]
    reference = halves.get(LANGUAGE) or next(iter(halves.values()))
    began = min(m.at for noted in moments.values() for m in noted)
    since = {
        half: [msgspec.structs.replace(m, at=m.at - began) for m in sorted(noted, key=lambda m: m.at)]
        for half, noted in moments.items()
    }
    wall = began - reference[0].monotonic + reference[0].wall
    return Story(room, wall, since, clocks, list(_missing(halves)))


def _missing(halves: Mapping[str, tuple[Told, list[Moment]]]) -> Iterator[str]:
    for half in HALVES:
        if half not in halves:
            yield f"nothing of the {half} half: no {half} instance that was asked knows of this request"
            continue
        one = halves[half][0]
        if one.silent:
            yield f"the {half} instance's {' and '.join(sorted(set(one.silent)))} did not answer"


def line_up(encode: tuple[Told, Sequence[Moment]], language: tuple[Told, Sequence[Moment]]) -> Clocks:
    """No message arrives before it is sent: each pair of sending and arrival bounds how far the clocks are apart."""
    (encode_says, on_encode), (language_says, on_language) = encode, language
    if encode_says.machine == language_says.machine:
        return Clocks(about="one clock: both halves are on one machine")
    asked = _by_row(on_encode, recorder.ASKED, at_end=False)
    offered = _by_row(on_language, recorder.OFFERED, at_end=False)
    written = _by_row(on_encode, recorder.CHUNK_WRITTEN, at_end=True)
    reported = _by_row(on_language, recorder.COPY_BEGAN, at_end=True)
    at_most = min((asked[row] - offered[row] for row in asked.keys() & offered.keys()), default=math.inf)
    at_least = max((written[row] - reported[row] for row in written.keys() & reported.keys()), default=-math.inf)
    if math.isfinite(at_most) and math.isfinite(at_least):
        ahead, uncertain = (at_most + at_least) / 2, abs(at_most - at_least) / 2
        pairs = len(asked.keys() & offered.keys()) + len(written.keys() & reported.keys())
        about = f"two clocks, lined up by {pairs} messages to within {uncertain * 1000:.1f} ms"
        return Clocks(-ahead, uncertain, about)
    shift = (encode_says.wall - encode_says.monotonic) - (language_says.wall - language_says.monotonic)
    return Clocks(shift, None, "two clocks, each as its machine has it: no messages to line them up by")


def _by_row(moments: Iterable[Moment], what: str, *, at_end: bool) -> dict[int, float]:
    """When it happened first, by the row that it begins or ends with."""
    found: dict[int, float] = {}
    for moment in moments:
        if moment.what == what:
            found.setdefault(moment.first_row + (moment.rows if at_end else 0), moment.at)
    return found


# ---- in words


def in_words(moment: Moment) -> str:
    rows = f"{moment.first_row}-{moment.first_row + moment.rows - 1}"
    match moment.what:
        case recorder.RECEIVED:
            return "request received"
        case recorder.PREPARED:
            return "prompt processed"
        case recorder.PARKED:
            return "waits for the other half"
        case recorder.ASKED:
            return f"asked for rows from {moment.first_row} on"
        case recorder.OFFERED if moment.first_row:
            return f"resume: blocks for row {moment.first_row} on"
        case recorder.OFFERED:
            return f"blocks offered for {moment.rows} rows"
        case recorder.TOWER_BEGAN:
            return "vision tower begins"
        case recorder.TOWER_ENDED:
            return f"vision tower ends: {moment.rows} rows"
        case recorder.CHUNK_BEGAN:
            return f"writes rows {rows}"
        case recorder.CHUNK_WRITTEN:
            return f"rows {rows} written"
        case recorder.SENT:
            return f"all {moment.rows} rows sent"
        case recorder.COPY_BEGAN:
            return f"report of rows {rows}"
        case recorder.COPIED:
            return f"rows {rows} copied"
        case recorder.COMPLETE:
            return f"all {moment.rows} rows are here"
        case recorder.HANDED_OVER:
            return "handed over to SGLang"
        case _:
            return moment.what
