"""`sglang-relay batch run`: one workbook, answered in this process, with a progress bar; resumes an earlier run."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import hashlib
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from embedding_relay.batch.background.worker import Worker, open_part
from embedding_relay.batch.errors import Refusal, in_words
from embedding_relay.batch.progress import Progress
from embedding_relay.batch.service import Service
from embedding_relay.batch.session.folder import Reason
from embedding_relay.batch.session.records import Asking, Session, Stage, counted
from embedding_relay.batch.session.sessions import Sessions
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.store.contract import StoreAway
from embedding_relay.batch.store.opening import open_store
from embedding_relay.batch.terminal_preview import ROWS_FAILED, asking_of, choices_of, described, require_file
from embedding_relay.batch.workbook.analysis import Choices

LOOK_EVERY: Final = 0.2
# So long the same command waits when the one before it was killed: there may be another one in another window.
LEASE_SECONDS: Final = 5.0
REASONS_SHOWN: Final = 5
SUFFIXES: Final = {"xlsx": (".xlsx", ".xlsm"), "csv": (".csv", ".tsv", ".txt"), "jsonl": (".jsonl", ".ndjson")}
# 128 + SIGINT: the exit status of an interrupted command.
STOPPED: Final = 130
# The endpoint could not be used for as long as --give-up-after says.
GAVE_UP: Final = 4


def run(settings: Settings, arguments: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    workbook, out = arguments.workbook, arguments.out
    try:
        require_file(workbook)
        if not out.absolute().parent.is_dir():
            raise Refusal(400, f"{out}: there is no such directory")
        if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):
            raise Refusal(400, f"{out}: this file cannot be written")
        if out.exists() and out.samefile(workbook):
            raise Refusal(400, f"{out}: the answers would replace the workbook; name another file")
        choices, asking = choices_of(arguments), asking_of(arguments)
        place = settings.cache_dir / "terminal" / _fingerprint(workbook, choices, asking, settings.endpoint)
        if arguments.fresh:
            shutil.rmtree(place, ignore_errors=True)
        _forget_old_runs(place.parent, settings.keep_seconds)
        place.mkdir(parents=True, exist_ok=True)
        place.touch()
        own = msgspec.structs.replace(
            settings, cache_dir=place, scan_seconds=LOOK_EVERY, lease_seconds=LEASE_SECONDS, max_runs=1
        )
        again, patience = arguments.retry_failed, arguments.give_up_after
        return asyncio.run(_Terminal(own, workbook, out, choices, asking, again, patience).run())
    except (Refusal, StoreAway, OSError, ValueError) as error:
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        print(f"sglang-relay batch run: {where}{in_words(error)}", file=sys.stderr)
        return 1
    except Exception as error:
        log = settings.cache_dir / "error.log"
        with contextlib.suppress(OSError):
            log.write_text(traceback.format_exc())
        what = f"this is a bug of the command ({type(error).__name__}); {log} says where"
        print(f"sglang-relay batch run: {what}", file=sys.stderr)
        return 1


def _fingerprint(workbook: Path, choices: Choices, asking: Asking, endpoint: str) -> str:
    """Names the run: the same options for the same file resume it, anything else is another run."""
    with workbook.open("rb") as file:
        content = hashlib.file_digest(file, "sha256")
    content.update(msgspec.json.encode([choices, asking, endpoint]))
    return content.hexdigest()[:32]


def _forget_old_runs(places: Path, keep_seconds: float) -> None:
    """There is no service here that would remove expired sessions."""
    for place in places.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another command has removed it meanwhile
            if time.time() - place.stat().st_mtime > keep_seconds:
                shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """If several processes begin the same run at once, one makes the session and the others find it."""
    descriptor = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


class _Terminal:
    def __init__(
        self,
        settings: Settings,
        workbook: Path,
        out: Path,
        choices: Choices,
        asking: Asking,
        retry_failed: bool,
        give_up_after: float | None,
    ) -> None:
        self._settings = settings
        self._workbook = workbook
        self._out = out
        self._choices = choices
        self._asking = asking
        self._retry_failed = retry_failed
        self._give_up_after = give_up_after
        self._given_up = ""

    async def run(self) -> int:
        store = open_store(self._settings.store_place)
        sessions = Sessions(store, self._settings.sessions_dir, self._settings.keep_seconds)
        worker = Worker(self._settings, store, sessions)
        service = Service(self._settings, sessions, wake=worker.wake)
        try:
            with _locked(self._settings.cache_dir):
                session = await asyncio.to_thread(self._session, service)
                self._check_out(session.kind)
                if self._retry_failed and session.stage is Stage.COMPLETED and session.execution.counts.failed:
                    session = service.retry(session.session_id)
            loop, stop = asyncio.get_running_loop(), asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, stop.set)
            working = asyncio.create_task(worker.run(), name="worker")
            try:
                session = await self._through(service, session, working, stop)
            finally:
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
            if self._given_up and not session.stage.is_over():
                print(f"{self._given_up}; the same command goes on from here", file=sys.stderr)
                return GAVE_UP
            if stop.is_set() and not session.stage.is_over():
                print("stopped; the same command goes on from here", file=sys.stderr)
                return STOPPED
            return self._end(service, session)
        finally:
            store.close()

    def _session(self, service: Service) -> Session:
        """The session of an earlier start, or a new one."""
        for session in service.sessions.all():
            if session.stage is not Stage.FAILED:
                return session
            if session.split.is_ready():
                return service.retry(session.session_id)  # what was answered before the run failed is paid for
            service.delete(session.session_id)
        with self._workbook.open("rb") as file:
            return service.take_upload(file, self._workbook.name, self._choices)

    def _check_out(self, kind: str) -> None:
        """The answers are added to the workbook that was given, so the output has its kind."""
        suffixes = SUFFIXES[kind]
        if self._out.suffix.lower() not in suffixes:
            raise Refusal(400, f"{self._out}: the answered workbook is {suffixes[0]}, as the one that was given")

    async def _through(
        self, service: Service, session: Session, working: asyncio.Task[None], stop: asyncio.Event
    ) -> Session:
        assert session.analysis is not None
        model = self._asking.model or "the first that it lists"
        print(*described(session), f"  endpoint  {self._settings.endpoint}, model: {model}", sep="\n", file=sys.stderr)
        with Progress(session.analysis.rows, self._give_up_after) as progress:
            while not (session.stage.is_over() or stop.is_set() or progress.given_up):
                if working.done():
                    working.result()
                session = await asyncio.to_thread(self._next_step, service, session)
                progress.show(session)
                await asyncio.sleep(LOOK_EVERY)
            progress.show(session)
        self._given_up = progress.given_up
        return session

    def _next_step(self, service: Service, session: Session) -> Session:
        session = service.sessions.get(session.session_id)
        if open_part(session):
            return session
        try:
            if session.stage.can_split():
                return service.split(session.session_id, None)
            if session.split.is_ready() and session.stage.can_execute():
                return service.start(session.session_id, self._asking)
        except Refusal:
            # The same command in another terminal may have done this step already.
            if service.sessions.get(session.session_id) == session:
                raise
        return session

    def _end(self, service: Service, session: Session) -> int:
        if session.stage is Stage.FAILED:
            print(f"sglang-relay batch run: {session.split.error or session.execution.error}", file=sys.stderr)
            return 1
        answers, _ = service.download(session.session_id)
        partial = self._out.with_name(f".{self._out.name}.{os.getpid()}.part")
        shutil.copyfile(answers, partial)
        partial.replace(self._out)
        failed = service.failed_rows(session.session_id, 0, 0)
        for reason in failed.reasons[:REASONS_SHOWN]:
            print(_reason(reason), file=sys.stderr)
        if len(failed.reasons) > REASONS_SHOWN:
            others = sum(reason.count for reason in failed.reasons[REASONS_SHOWN:])
            print(f"{counted(others, 'row')} failed for other reasons; the workbook has all of them", file=sys.stderr)
        print(f"{self._out}: {session.execution.message}")
        if not failed.count:
            return 0
        print("the same command with --retry-failed asks the failed rows again", file=sys.stderr)
        return ROWS_FAILED


def _reason(reason: Reason) -> str:
    """`7 rows failed (2, 3, 4, 5, 6, …): 400: no`."""
    rows = [*map(str, reason.rows), *(["…"] if reason.count > len(reason.rows) else [])]
    like = " (and the like)" if reason.differs else ""
    return f"{counted(reason.count, 'row')} failed ({', '.join(rows)}): {reason.error}{like}"
