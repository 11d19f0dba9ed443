"""What took how long within one half of a request: spans between the moments that were noted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from embedding_relay import recorder
from embedding_relay.recorder import Moment

ENCODE: Final = "encode"
LANGUAGE: Final = "language"


class Span(NamedTuple):
    """`ended` is None for what had not ended when it was asked about, or never will."""

    name: str
    began: float
    ended: float | None
    first_row: int = 0
    rows: int = 0
    bytes: int = 0


class _Kind(NamedTuple):
    name: str
    begin: str
    end: str
    is_sglangs: bool = False
    """SGLang has a span of its own for it."""


# In the order in which a request meets them.
_KINDS: Final = {
    ENCODE: (
        _Kind("preprocess", recorder.RECEIVED, recorder.PREPARED, is_sglangs=True),
        _Kind("wait", recorder.PARKED, recorder.TOWER_BEGAN),
        _Kind("tower", recorder.TOWER_BEGAN, recorder.TOWER_ENDED),
        _Kind("chunk", recorder.CHUNK_BEGAN, recorder.CHUNK_WRITTEN),
    ),
    LANGUAGE: (
        _Kind("tokenize", recorder.RECEIVED, recorder.PREPARED, is_sglangs=True),
        _Kind("wait for blocks", recorder.PARKED, recorder.OFFERED),
        _Kind("copy", recorder.COPY_BEGAN, recorder.COPIED),
        _Kind("prefix", recorder.PREFIX_BEGAN, recorder.PREFIX_ENDED),
        _Kind("queue", recorder.HANDED_OVER, recorder.PREFILL_BEGAN, is_sglangs=True),
        _Kind("prefill", recorder.PREFILL_BEGAN, recorder.PREFILL_ENDED, is_sglangs=True),
    ),
}


def names(half: str) -> list[str]:
    return [kind.name for kind in _KINDS[half]]


def spans(half: str, moments: Iterable[Moment], *, with_sglangs: bool = True) -> list[Span]:
    """Of one half, whose moments are in order of time. Of one kind, what begins first ends first."""
    by_what: dict[str, list[Moment]] = {}
    for moment in moments:
        by_what.setdefault(moment.what, []).append(moment)
    found = []
    for kind in _KINDS[half]:
        if kind.is_sglangs and not with_sglangs:
            continue
        ends = by_what.get(kind.end, [])
        for number, begin in enumerate(by_what.get(kind.begin, [])):
            end = ends[number] if number < len(ends) else None
            size = end.bytes if end else 0
            rows = (end.rows if end else 0) or begin.rows
            found.append(Span(kind.name, begin.at, end.at if end else None, begin.first_row, rows, size))
    return found
