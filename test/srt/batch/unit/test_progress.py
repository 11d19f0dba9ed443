"""The progress bar: what stands before it, what is said above it, and when it gives up."""

from __future__ import annotations

import io

import pytest
import tqdm

from embedding_relay.batch.progress import LONGEST, Progress
from embedding_relay.batch.session.records import Counts, ExecutionProgress, Session

AWAY = "cannot reach the endpoint http://10.11.12.13:30000/behind/a/proxy (connection refused); asking again every 4 s"
TOTAL = 12_000


def session(counts: Counts, message: str = "running") -> Session:
    execution = ExecutionProgress(total=TOTAL, counts=counts, message=counts.waiting or message)
    return Session(session_id="a", name="a.csv", kind="csv", created_at=0, execution=execution)


def away(done: int = 0) -> Session:
    return session(Counts(done=done, failed=done // 10, waiting=AWAY, trouble="cannot reach"))


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 80 columns. tqdm is told so: this is no terminal that it could ask."""
    out = io.StringIO()
    real = tqdm.tqdm

    def on_80_columns(**options: object) -> object:
        return real(**{**options, "dynamic_ncols": False}, ncols=80, file=out, ascii=True, mininterval=0)

    on_80_columns.write = real.write  # type: ignore[attr-defined]
    monkeypatch.setattr(tqdm, "tqdm", on_80_columns)
    return out


def last_line(screen: io.StringIO) -> str:
    return screen.getvalue().split("\r")[-1]


def test_bar_and_count_are_there_whatever_is_said(screen: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(TOTAL) as progress:
        for shown in (away(3456), session(Counts(done=3456, failed=345), "a message of no end " * 9)):
            progress.show(shown)
            line = last_line(screen)
            assert len(line) <= 80
            assert f"{3456 + 345}/{TOTAL}" in line
            assert "|#" in line, "the bar itself"
            assert "345 failed" in line
        progress.show(away(3456))
        assert last_line(screen).startswith("cannot reach: ")
    assert "connection refused" in capsys.readouterr().err


def test_what_stands_before_the_bar_is_cut(screen: io.StringIO) -> None:
    with Progress(TOTAL) as progress:
        progress.show(session(Counts(), "x" * 99))
        assert last_line(screen).startswith("x" * (LONGEST - 1) + "…: ")


def test_the_reason_is_said_once_and_its_end_too(screen: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(TOTAL, give_up_after=60) as progress:
        for shown in (away(5), away(5), session(Counts(done=5)), away(5), session(Counts(done=6)), away(6)):
            progress.show(shown)
    sentence = f"{AWAY.partition(';')[0]}; waiting for it, up to 60 s"
    assert capsys.readouterr().err.splitlines() == [sentence, "the endpoint answers again", sentence]


def test_it_gives_up_when_told_to(screen: io.StringIO) -> None:
    now = 0.0
    with Progress(TOTAL, give_up_after=60, clock=lambda: now) as progress:
        progress.show(away())
        now = 59.0
        progress.show(session(Counts()))  # it looks better for a moment
        progress.show(away())
        assert not progress.given_up
        now = 60.0
        progress.show(session(Counts()))
        assert not progress.given_up, "just now it is being asked"
        progress.show(away())
        assert progress.given_up == f"gave up after 60 s: {AWAY.partition(';')[0]}"


@pytest.mark.parametrize(("give_up_after", "quiet"), [(20, 5.0), (600, 60.0)])
def test_trouble_after_a_quiet_time_is_new_trouble(screen: io.StringIO, give_up_after: float, quiet: float) -> None:
    """Rows may take longer to answer than it waits: then none has ended between two troubles of a moment."""
    now = 0.0
    with Progress(TOTAL, give_up_after=give_up_after, clock=lambda: now) as progress:
        for _ in range(3):
            progress.show(away())
            now += 0.5 * give_up_after
            progress.show(session(Counts(running=4)))
            now += quiet + 0.1
            progress.show(session(Counts(running=4)))
        progress.show(away())
        now += give_up_after - 0.1
        progress.show(away())
        assert not progress.given_up
        progress.show(session(Counts(running=4)))
        now += 0.9 * quiet  # less is a moment of hope
        progress.show(away())
        assert progress.given_up


def test_a_row_that_ended_begins_the_time_anew(screen: io.StringIO) -> None:
    now = 0.0
    with Progress(TOTAL, give_up_after=60, clock=lambda: now) as progress:
        for done in range(5):
            progress.show(away(done))
            now += 50
        assert not progress.given_up


def test_without_being_told_it_waits(screen: io.StringIO) -> None:
    now = 0.0
    with Progress(TOTAL, clock=lambda: now) as progress:
        progress.show(away())
        now = 1e6
        progress.show(away())
        assert not progress.given_up
