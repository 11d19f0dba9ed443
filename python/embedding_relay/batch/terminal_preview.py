"""`sglang-relay batch preview`: what a run would ask, in the terminal; what `batch run` says of it before it asks."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from embedding_relay.batch import preview as ahead
from embedding_relay.batch.errors import Refusal, in_words
from embedding_relay.batch.service import Service
from embedding_relay.batch.session.records import Asking, Session, counted
from embedding_relay.batch.session.sessions import Sessions
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.store.contract import StoreAway
from embedding_relay.batch.store.opening import open_store
from embedding_relay.batch.tasks import Outcome
from embedding_relay.batch.workbook.analysis import Choices

# The exit status when all was done that could be, and rows have no answer. 1 is: nothing was done.
ROWS_FAILED: Final = 3


def preview(settings: Settings, arguments: argparse.Namespace) -> int:
    """Nothing of it is kept: its session is in a directory that is removed at the end."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        require_file(arguments.workbook)
        with tempfile.TemporaryDirectory(prefix="sglang-relay-") as place:
            settings = msgspec.structs.replace(settings, cache_dir=Path(place))
            store = open_store(settings.store_place)
            try:
                sessions = Sessions(store, settings.sessions_dir, settings.keep_seconds)
                service = Service(settings, sessions, wake=lambda session_id: None)
                with arguments.workbook.open("rb") as file:
                    session = service.take_upload(file, arguments.workbook.name, choices_of(arguments))
                return asyncio.run(_preview(service, session, asking_of(arguments), arguments.rows, arguments.try_them))
            finally:
                store.close()
    except (Refusal, StoreAway, OSError, ValueError) as error:
        print(f"sglang-relay batch preview: {in_words(error)}", file=sys.stderr)
        return 1


async def _preview(service: Service, session: Session, asking: Asking, rows: int, try_them: bool) -> int:
    """What a run of this workbook would ask, and with `try_them` what is answered to its first rows."""
    for line in described(session):
        print(line)
    _, _, _, tasks = service.first_tasks(session.session_id, None, rows)
    folder = service.sessions.folder(session.session_id).path
    if not try_them:
        endpoint = await ahead.look_at_endpoint(service.settings)
        print(f"  endpoint  {endpoint.error or f'{endpoint.url}, model {asking.model or endpoint.model}'}")
        for task in tasks:
            print(*_asked(ahead.question_of(task, folder)), sep="\n")
        return 1 if endpoint.error else 0
    trial = await ahead.try_tasks(service.settings, session, tasks, asking, folder)
    print(f"  endpoint  {service.settings.endpoint}, model {trial.model}")
    for task, tried in zip(tasks, trial.rows, strict=True):
        print(*_asked(ahead.question_of(task, folder)), sep="\n")
        answer = tried.result.answer or f"FAILED: {tried.result.error}"
        print(_indented(answer, f"  -> {tried.seconds:.1f} s: "))
    assert session.analysis is not None
    estimate = ahead.estimate(trial, session.analysis.rows, service.settings.concurrency)
    if estimate is None:
        print("no row was answered, so nothing can be said about the whole workbook")
        return ROWS_FAILED
    print(
        f"{counted(estimate.rows, 'row')} like these: about {estimate.prompt_tokens:,} tokens in and "
        f"{estimate.completion_tokens:,} out; {_duration(estimate.seconds)} if the endpoint answers "
        f"{estimate.in_flight} requests at a time as fast as these"
    )
    failed = any(tried.result.outcome is not Outcome.DONE for tried in trial.rows)
    return ROWS_FAILED if failed else 0


def described(session: Session) -> list[str]:
    """The workbook in a few lines: how many rows, and which sheet and columns were chosen, and why."""
    analysis = session.analysis
    assert analysis is not None
    lines = [f"{session.name}: {counted(analysis.rows, 'row')}"]
    lines += [f"  {why.what:<9} {_one_line(why.name)} ({why.reason})" for why in ahead.whys(analysis, session.choices)]
    return lines + [f"  note      {note}" for note in analysis.notes]


def _asked(question: ahead.Question) -> Iterator[str]:
    pictures = [picture.url or "(in the workbook)" for picture in question.pictures]
    pictures += [f"and {question.more_pictures} more"] * bool(question.more_pictures)
    yield f"row {question.row}" + (f", pictures: {', '.join(pictures)}" if pictures else "")
    yield _indented((question.error and f"CANNOT BE ASKED: {question.error}") or question.prompt, "  ")


def _indented(text: str, first: str) -> str:
    """What a cell or an answer says, without what a terminal would take for commands."""
    lines = ["".join(c if c.isprintable() else " " for c in line) for line in text.splitlines()] or [""]
    return "\n".join((first if number == 0 else " " * len(first)) + line for number, line in enumerate(lines))


def _one_line(text: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def require_file(workbook: Path) -> None:
    if not workbook.is_file():
        raise Refusal(400, f"{workbook}: there is no such file")


def asking_of(arguments: argparse.Namespace) -> Asking:
    return Asking(
        model=arguments.model,
        system=arguments.system,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
    )


def choices_of(arguments: argparse.Namespace) -> Choices:
    columns = arguments.image_columns
    return Choices(
        sheet=arguments.sheet,
        prompt_column=arguments.prompt_column,
        image_columns=None if columns is None else tuple(name for name in columns if name),
        template=arguments.template,
    )
