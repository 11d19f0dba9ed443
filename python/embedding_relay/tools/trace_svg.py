"""The story of a request as a picture: SVG for a light and a dark page, with nothing in it but shapes and text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final
from xml.sax.saxutils import escape

from embedding_relay import recorder
from embedding_relay.spans import ENCODE, LANGUAGE
from embedding_relay.tools.trace_story import Lane, Story, extent
from embedding_relay.tools.trace_text import printable, summary

_WIDTH: Final = 960
_LEFT, _RIGHT, _ROW, _BAR = 190, 90, 26, 16
_TOP: Final = 64
_BOTTOM: Final = 14
_NARROWEST: Final = 1.5
_KINDS: Final = {"tower": "tower", "chunk": "chunk", "copy": "copy", "prefill": "prefill"}
_WAITS: Final = ("wait", "wait for blocks", "queue")
# Each color is light enough for a dark page and dark enough for a white one; text and lines follow the page.
_STYLE: Final = """\
.page{fill:#ffffff;stroke:#d0d7de}.text{fill:#1f2328}.faint{fill:#656d76}.grid{stroke:#d0d7de;stroke-width:1}
.other{fill:#8c959f}.wait{fill:#8c959f;fill-opacity:.25}.tower{fill:#bc6a00}.chunk{fill:#2f7de1}.copy{fill:#2a9d57}
.prefill{fill:#8b5fd6}.there{stroke:#2f7de1;stroke-width:1;fill:none}
.back{stroke:#2a9d57;stroke-width:1;stroke-dasharray:3 2;fill:none}
.token{stroke:#8b5fd6;stroke-width:2}.failed{stroke:#d1242f;stroke-width:2}
.lens{fill:#8c959f;fill-opacity:.12}
@media (prefers-color-scheme:dark){
.page{fill:#0d1117;stroke:#30363d}.text{fill:#e6edf3}.faint{fill:#9198a1}.grid{stroke:#30363d}}"""

Across = Callable[[float], float]


def drawn(story: Story, title: str = "") -> str:
    lanes, rounds = story.lanes(), story.rounds()
    upper = _Panel(lanes, 0.0, story.length, _TOP)
    parts = [*_heading(story, title), *upper.drawn(), *_marks(story, upper)]
    bottom = upper.bottom
    if rounds:
        began, ended = extent(rounds)
        lower = _Panel(rounds, began, ended, bottom + 56, row=44)
        parts = [*_lens(upper, lower), *parts, *lower.drawn(), *_messages(story, lower)]
        caption = f"the rounds, {_ms(began)} to {_ms(ended)}; lines are reports (blue) and offers (green)"
        parts.append(_text(_LEFT, lower.top - 26, caption, "faint"))
        bottom = lower.bottom
    height = bottom + _BOTTOM
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" font-family="system-ui,'
            'Segoe UI,Helvetica,Arial,sans-serif" font-size="12">',
            f"<style>{_STYLE}</style>",
            f'<rect class="page" x=".5" y=".5" width="{_WIDTH - 1}" height="{height - 1:.0f}" rx="8"/>',
            *parts,
            "</svg>",
            "",
        ]
    )


class _Panel:
    """Lanes below each other, over one stretch of time."""

    def __init__(self, lanes: Sequence[Lane], began: float, ended: float, top: float, row: int = _ROW) -> None:
        self.lanes = lanes
        self.began = began
        self.ended = max(ended, began + 1e-6)
        self.top = top
        self.row = row

    @property
    def bottom(self) -> float:
        return self.top + self.row * len(self.lanes) + 12

    def across(self, at: float) -> float:
        part = (min(max(at, self.began), self.ended) - self.began) / (self.ended - self.began)
        return _LEFT + part * (_WIDTH - _LEFT - _RIGHT)

    def middle(self, half: str) -> float:
        """Of the first lane of this half."""
        number = next(n for n, lane in enumerate(self.lanes) if lane.half == half)
        return self.top + self.row * number + self.row / 2

    def drawn(self) -> Iterator[str]:
        yield from self._axis()
        for number, lane in enumerate(self.lanes):
            middle = self.top + self.row * number + self.row / 2
            many = f" x {len(lane.spans)}" if len(lane.spans) > 1 else ""
            yield _text(14, middle + 4, lane.half, "faint")
            yield _text(76, middle + 4, lane.name + many, "text")
            yield from self._bars(lane, middle)
            yield _text(_WIDTH - 14, middle + 4, _ms(lane.seconds), "faint", "end")

    def _bars(self, lane: Lane, middle: float) -> Iterator[str]:
        kind = "wait" if lane.name in _WAITS else _KINDS.get(lane.name, "other")
        for span in lane.spans:
            left = self.across(span.began)
            right = self.across(self.ended if span.ended is None else span.ended)
            rows = f", rows {span.first_row} to {span.first_row + span.rows - 1}" if span.rows else ""
            about = escape(f"{lane.half}: {lane.name}, {_ms((span.ended or span.began) - span.began)}{rows}")
            yield (
                f'<rect class="{kind}" x="{left:.1f}" y="{middle - _BAR / 2:.1f}" '
                f'width="{max(right - left, _NARROWEST):.1f}" height="{_BAR}" rx="2"><title>{about}</title></rect>'
            )

    def _axis(self) -> Iterator[str]:
        for at in _ticks(self.began, self.ended):
            x = self.across(at)
            yield f'<path class="grid" d="M{x:.1f} {self.top - 4}V{self.bottom - 8:.1f}"/>'
            yield _text(x, self.top - 8, _ms(at), "faint", "middle")


def _heading(story: Story, title: str) -> Iterator[str]:
    yield _text(14, 24, title or f"room {story.room}", "text", bold=True)
    about = f"; {story.clocks.about}" if story.clocks.uncertain != 0 else ""
    yield _text(_WIDTH - 14, 24, printable(summary(story) + about), "faint", "end")


def _marks(story: Story, panel: _Panel) -> Iterator[str]:
    moments = [(recorder.FIRST_TOKEN, moment) for moment in (story.first(recorder.FIRST_TOKEN),) if moment]
    moments += [(recorder.FAILED, moment) for _, moment in story.failures()]
    for what, moment in moments:
        x, kind = panel.across(moment.at), "token" if what == recorder.FIRST_TOKEN else "failed"
        yield f'<path class="{kind}" d="M{x:.1f} {panel.top - 2}V{panel.bottom - 8:.1f}"/>'
        anchor, beside = ("end", -5) if x > _WIDTH / 2 else ("start", 5)
        yield _text(x + beside, panel.bottom - 2, what, "text", anchor)


def _messages(story: Story, panel: _Panel) -> Iterator[str]:
    """Reports go from the encode half to the language half, offers go back."""
    if {lane.half for lane in panel.lanes} != {ENCODE, LANGUAGE}:
        return
    upper, lower = panel.middle(ENCODE) + _BAR / 2, panel.middle(LANGUAGE) - _BAR / 2
    ways = (
        ("there", ENCODE, recorder.CHUNK_WRITTEN, LANGUAGE, recorder.COPY_BEGAN, upper, lower),
        ("back", LANGUAGE, recorder.OFFERED, ENCODE, recorder.ASKED, lower, upper),
    )
    for kind, sender, sent, receiver, received, from_y, to_y in ways:
        begins = {moment.first_row: moment.at for moment in story.moments[sender] if moment.what == sent}
        for moment in story.moments[receiver]:
            begin = begins.get(moment.first_row)
            if moment.what == received and begin is not None and begin >= panel.began:
                x = (panel.across(begin), panel.across(moment.at))
                yield f'<path class="{kind}" d="M{x[0]:.1f} {from_y:.1f}L{x[1]:.1f} {to_y:.1f}"/>'


def _lens(upper: _Panel, lower: _Panel) -> Iterator[str]:
    """Which part of the upper panel the lower one shows."""
    left, right = upper.across(lower.began), upper.across(lower.ended)
    top, foot = upper.bottom - 8, lower.top - 4
    yield (
        f'<path class="lens" d="M{left:.1f} {upper.top - 4}H{max(right, left + _NARROWEST):.1f}V{top:.1f}'
        f'L{_WIDTH - _RIGHT} {foot:.1f}V{lower.bottom - 8:.1f}H{_LEFT}V{foot:.1f}L{left:.1f} {top:.1f}Z"/>'
    )


def _ticks(began: float, ended: float) -> Iterator[float]:
    """Five or so round numbers."""
    rough = (ended - began) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    at = math.ceil(began / step) * step
    while at <= ended:
        yield at
        at += step


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1000
    return f"{milliseconds:,.0f} ms" if abs(milliseconds) >= 100 else f"{milliseconds:.3g} ms"


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start", *, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
