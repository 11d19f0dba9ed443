"""What a caller may do to a session, without HTTP: upload, split, start, pause, download, delete."""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal

from embedding_relay.batch.errors import Refusal
from embedding_relay.batch.preview import analysis_with, first_tasks
from embedding_relay.batch.session.folder import MANIFEST, Failures, failures, results_of
from embedding_relay.batch.session.records import (
    Asking,
    BatchOrder,
    Session,
    SplitStatus,
    Stage,
    new_session_id,
)
from embedding_relay.batch.session.sessions import RESULTS, SPLIT, UPLOADED, Sessions
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.tasks import Result, Task
from embedding_relay.batch.workbook.analysis import Analysis, Choices
from embedding_relay.batch.workbook.analyze import analyze
from embedding_relay.batch.workbook.upload import receive

Verb = Literal["pause", "resume", "cancel"]


class Service:
    """`wake` tells the background work of this process that there is something new to do, and in which session.

    Every method may be called from any thread of any worker: nothing of a session is kept in the process.
    """

    def __init__(self, settings: Settings, sessions: Sessions, wake: Callable[[str], None]) -> None:
        self.settings = settings
        self.sessions = sessions
        self._wake = wake

    # ---- analyse

    def take_upload(self, file: IO[bytes], name: str, choices: Choices, order: BatchOrder | None = None) -> Session:
        """A new session for this file, analysed; none is left behind when the file is refused."""
        session_id = new_session_id()
        folder = self.sessions.folder(session_id)
        folder.make()
        try:
            with folder.upload.open("wb") as kept:
                shutil.copyfileobj(file, kept)
            kind, source = receive(folder.upload, name, folder.path, self.settings.limits)
            session = Session(
                session_id=session_id,
                name=Path(name.replace("\\", "/")).name[:200] or f"workbook.{kind}",
                kind=kind,
                created_at=time.time(),
                choices=choices,
                order=order,
            )
            session.mark_analyzed(analyze(source, kind, choices, self.settings.limits))
            self.sessions.save(session_id, *UPLOADED)
            if order:
                session.begin_split(choices)  # a batch goes through all steps by itself
            self.sessions.add(session)
        except BaseException:
            folder.remove()
            raise
        if order:
            self._wake(session_id)
        return session

    def analyze_again(self, session_id: str, choices: Choices) -> Session:
        """With other choices; another sheet, for one, has other columns."""
        session = self.sessions.get(session_id)
        analysis = analyze(self._source(session), session.kind, choices, self.settings.limits)
        return self.sessions.change(session_id, lambda session: session.analyze_again(choices, analysis))

    def _source(self, session: Session) -> Path:
        self.sessions.bring(session.session_id, *UPLOADED)
        source = self.sessions.folder(session.session_id).source(session.kind)
        if not source.exists():
            raise Refusal(404, f"the workbook of session {session.session_id} is gone; please upload it again")
        return source

    def first_tasks(
        self, session_id: str, choices: Choices | None, most: int
    ) -> tuple[Session, Choices, Analysis, list[Task]]:
        """The tasks of the first rows, and under which choices: those of the session unless others are given.

        Tasks that are saved stay as they are, so for them no other choices are possible.
        """
        session = self.sessions.get(session_id)
        if choices is None or session.split.is_ready():
            choices = session.choices
        folder = self.sessions.folder(session_id)
        if not session.split.is_ready():
            self._source(session)
        self.sessions.bring(session_id, *UPLOADED, *SPLIT)
        analysis = analysis_with(folder, session, choices, self.settings)
        return session, choices, analysis, first_tasks(folder, session, choices, self.settings, most)

    # ---- split

    def split(self, session_id: str, choices: Choices | None) -> Session:
        """`choices` are those of the upload unless others are given."""
        return self._split(session_id, choices, Session.begin_split)

    def _split(
        self, session_id: str, choices: Choices | None, begin_with: Callable[[Session, Choices], None]
    ) -> Session:
        session = self.sessions.get(session_id)
        source, analysis = self._source(session), None
        if choices is not None and session.stage is Stage.ANALYZED:
            # Even if they are those of the last analysis: another caller may have it analysed again meanwhile.
            analysis = analyze(source, session.kind, choices, self.settings.limits)

        def begin(session: Session) -> None:
            begin_with(session, choices if choices is not None else session.choices)
            session.analysis = analysis or session.analysis

        session = self.sessions.change(session_id, begin)
        self._wake(session_id)
        return session

    # ---- execute

    def run(self, session_id: str, choices: Choices | None, asking: Asking) -> Session:
        """All that is left to do up to the answers: split it if it is not split, and start it when its tasks are ready.

        A session that is split has its choices, so none may be given for it.
        """
        session = self.sessions.get(session_id)
        if session.split.status is SplitStatus.NOT_STARTED:

            def begin(session: Session, chosen: Choices) -> None:
                session.begin_split(chosen)
                session.begin_run(asking)

            return self._split(session_id, choices, begin)
        if choices is not None and choices != session.choices:
            raise Refusal(400, f"this session cannot be split in another way: {session.where()}")
        if session.split.is_ready():
            return self.start(session_id, asking)
        return self.sessions.change(session_id, lambda session: session.begin_run(asking))

    def start(self, session_id: str, asking: Asking) -> Session:
        session = self.sessions.get(session_id)
        self.sessions.bring(session_id, f"tasks.{session.split.attempt}/{MANIFEST}")
        if session.split.is_ready() and self.sessions.folder(session_id).manifest(session.split.attempt) is None:
            raise Refusal(404, f"the tasks of session {session_id} are gone; please upload its workbook again")
        session = self.sessions.change(session_id, lambda session: session.begin_execution(asking))
        self._wake(session_id)
        return session

    def retry(self, session_id: str, change: Callable[[Asking], Asking] = lambda asking: asking) -> Session:
        """Ask the rows again that have no answer, with the options of the run as `change` makes them."""
        session = self.sessions.change(session_id, lambda session: session.retry(change(session.asking)))
        self._wake(session_id)
        return session

    def monitored(self, session_id: str) -> Session:
        """A session whose start was accepted, also while no worker has taken its run yet."""
        session = self.sessions.get(session_id)
        if not session.execution.is_accepted():
            raise Refusal(400, f"session {session_id} has no run to look at: {session.where()}")
        return session

    def wish(self, session_id: str, verb: Verb) -> Session:
        return self.sessions.change(session_id, lambda session: session.wish(verb))

    def failed_rows(self, session_id: str, skip: int, most: int) -> Failures:
        session = self.sessions.get(session_id)
        self.sessions.bring(session_id, *RESULTS)
        return failures(self.sessions.folder(session_id).path, session.execution.set_aside, skip, most)

    def answers(self, session_id: str, skip: int, most: int) -> list[tuple[Task, Result | None]]:
        """What was asked and what was answered so far, in the order of the rows; None while a row has no result."""
        session = self.monitored(session_id)
        if not session.split.is_ready():
            return []
        self.sessions.bring(session_id, *SPLIT, *RESULTS)
        folder = self.sessions.folder(session_id)
        tasks = list(itertools.islice(folder.tasks(session.split.attempt, skip), most))
        found = results_of(folder.path, {task.row for task in tasks}, session.execution.set_aside)
        return [(task, found.get(task.row)) for task in tasks]

    def download(self, session_id: str) -> tuple[Path, str]:
        """The answered workbook, and the name to offer it under."""
        session = self.sessions.get(session_id)
        if not session.execution.ready_for_download:
            raise Refusal(400, f"there is nothing to download yet from session {session_id}: {session.where()}")
        path = self.sessions.folder(session_id).answers(session.kind, session.execution.attempt)
        self.sessions.bring(session_id, path.name)
        if not path.exists():
            raise Refusal(404, f"the answers of session {session_id} are gone")
        return path, f"{Path(session.name).stem}-answers.{session.kind}"

    # ---- all

    def delete(self, session_id: str) -> None:
        """A worker that is at it stops at its next step, because the record is gone."""
        self.sessions.delete(session_id)
        self.sessions.remove_files(session_id)
