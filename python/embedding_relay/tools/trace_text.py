"""The story of a request for a terminal of 80 columns: bars by lane, then the moments of both halves side by side."""

from __future__ import annotations

import datetime
import textwrap
from collections.abc import Iterator, Sequence
from typing import Final

from embedding_relay import recorder
from embedding_relay.recorder import Moment
from embedding_relay.spans import ENCODE, LANGUAGE
from embedding_relay.tools.trace_story import HALVES, OF_ROUNDS, Lane, Story, extent, in_words

WIDTH: Final = 80
_HALF, _NAME, _BAR, _COLUMN = 8, 17, 40, 34
# Of many rounds so many are told at the beginning, and one at the end.
_FIRST_ROUNDS: Final = 3


def lines(story: Story, *, every_round: bool = False, plain: bool = False) -> Iterator[str]:
    """`plain`: for a terminal that shows ASCII only."""
    yield from _head(story)
    yield ""
    yield from _chart(story.lanes(), 0.0, story.length, plain)
    if rounds := story.rounds():
        began, ended = extent(rounds)
        yield ""
        yield f"the rounds, from {began * 1000:,.1f} to {ended * 1000:,.1f} ms:"
        yield from _chart(rounds, began, ended, plain)
    yield ""
    yield from _moments(story, every_round)


def summary(story: Story) -> str:
    """What the first lines and the picture say of it."""
    parts = []
    if (totals := story.totals) is not None:
        parts.append(f"{totals.rows:,} rows in {counted(totals.rounds, 'round')}, {totals.bytes:,} bytes")
    if (token := story.first(recorder.FIRST_TOKEN)) is not None:
        parts.append(f"first token after {token.at * 1000:,.1f} ms")
    parts += [f"the {half} half failed" for half, _ in story.failures()]
    return "; ".join(parts) or "under way, or forgotten in part"


def counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _head(story: Story) -> Iterator[str]:
    began = datetime.datetime.fromtimestamp(story.began_at, datetime.UTC)
    yield f"room {story.room}, {began:%Y-%m-%d %H:%M:%S}.{began.microsecond // 1000:03d} UTC"
    yield from textwrap.wrap(summary(story), WIDTH)
    yield story.clocks.about
    for half, moment in story.failures():
        yield from textwrap.wrap(f"{half}: {printable(moment.text)}", WIDTH, subsequent_indent="  ")
    for sentence in story.missing:
        yield from textwrap.wrap(sentence, WIDTH)
    if story.rounds_left_out:
        yield f"the last {counted(story.rounds_left_out, 'round')} were not noted one by one"


def _chart(lanes: Sequence[Lane], began: float, ended: float, plain: bool) -> Iterator[str]:
    left, full, right = ("|", "#", "|") if plain else ("▕", "█", "▏")
    per_cell = max(ended - began, 1e-9) / _BAR
    for lane in lanes:
        cells = [" "] * _BAR
        for span in lane.spans:
            first = min(_BAR - 1, int((span.began - began) / per_cell))
            last = min(_BAR - 1, int(((ended if span.ended is None else span.ended) - began) / per_cell))
            cells[first : last + 1] = [full] * (last + 1 - first)
        many = f" x{len(lane.spans)}" if len(lane.spans) > 1 else ""
        open_end = "?" if any(span.ended is None for span in lane.spans) else " "
        took = f"{lane.seconds * 1000:8,.1f} ms{open_end}"
        yield f"{lane.half:{_HALF}} {lane.name + many:{_NAME}}{left}{''.join(cells)}{right}{took}".rstrip()


def _moments(story: Story, every_round: bool) -> Iterator[str]:
    yield f"{'ms':>8}  {ENCODE:{_COLUMN}}  {LANGUAGE}".rstrip()
    hidden = range(0) if every_round else _hidden_rows(story.first_rows())
    all_of_it = [(moment, half) for half in HALVES for moment in story.moments.get(half, ()) if _is_told(story, moment)]
    skipped = False
    for moment, half in sorted(all_of_it, key=lambda item: item[0].at):
        if moment.what in OF_ROUNDS and moment.first_row in hidden:
            if not skipped:
                yield f"{'':8}  ... more rounds: --rounds shows all"
                skipped = True
            continue
        said = _shortened(in_words(moment))
        column = f"{said:{_COLUMN}}" if half == ENCODE else f"{'':{_COLUMN}}  {said}"
        yield f"{moment.at * 1000:8,.1f}  {column}".rstrip()


def _is_told(story: Story, moment: Moment) -> bool:
    """A chunk and a copy are told at their end, unless that has not come."""
    end = {recorder.CHUNK_BEGAN: recorder.CHUNK_WRITTEN, recorder.COPY_BEGAN: recorder.COPIED}.get(moment.what)
    return end is None or not any(
        other.what == end and other.first_row == moment.first_row for noted in story.moments.values() for other in noted
    )


def _hidden_rows(first_rows: Sequence[int]) -> range:
    """Rounds in the middle of many, by the row that they begin with."""
    if len(first_rows) <= _FIRST_ROUNDS + 2:
        return range(0)
    return range(first_rows[_FIRST_ROUNDS], first_rows[-1])


def _shortened(text: str) -> str:
    text = printable(text)
    return text if len(text) <= _COLUMN else text[: _COLUMN - 3] + "..."


def printable(text: str) -> str:
    """A reason may quote anything."""
    return "".join(character if character.isprintable() else "?" for character in text)


def one_line(story: Story) -> str:
    """For a list of requests."""
    began = datetime.datetime.fromtimestamp(story.began_at, datetime.UTC)
    return f"{began:%H:%M:%S}  {story.room:<19}  {summary(story)}"
