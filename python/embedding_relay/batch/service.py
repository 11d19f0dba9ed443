"""What a caller may do to a session, without HTTP: upload, split, start, pause, download, delete."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal

from embedding_relay.batch.errors import Refusal
from embedding_relay.batch.session.folder import failures
from embedding_relay.batch.session.records import Asking, BatchOrder, Session, Stage, new_session_id
from embedding_relay.batch.session.sessions import Sessions
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.tasks import Result
from embedding_relay.batch.workbook.analysis import Choices
from embedding_relay.batch.workbook.analyze import analyze
from embedding_relay.batch.workbook.upload import receive

Verb = Literal["pause", "resume", "cancel"]


class Service:
    """`wake` tells the background work of this process that there is something new to do.

    Every method may be called from any thread of any worker: nothing of a session is kept in the process.
    """

    def __init__(self, settings: Settings, sessions: Sessions, wake: Callable[[], None]) -> None:
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
            if order:
                session.begin_split(choices)  # a batch goes through all steps by itself
            self.sessions.add(session)
        except BaseException:
            folder.remove()
            raise
        if order:
            self._wake()
        return session

    def analyze_again(self, session_id: str, choices: Choices) -> Session:
        """With other choices; another sheet, for one, has other columns."""
        session = self.sessions.get(session_id)
        analysis = analyze(self._source(session), session.kind, choices, self.settings.limits)
        return self.sessions.change(session_id, lambda session: session.analyze_again(choices, analysis))

    def _source(self, session: Session) -> Path:
        source = self.sessions.folder(session.session_id).source(session.kind)
        if not source.exists():
            raise Refusal(404, f"the workbook of session {session.session_id} is gone; please upload it again")
        return source

    # ---- split

    def split(self, session_id: str, choices: Choices | None) -> Session:
        """`choices` are those of the upload unless others are given."""
        session = self.sessions.get(session_id)
        source, analysis = self._source(session), None
        if choices is not None and session.stage is Stage.ANALYZED:
            # Even if they are those of the last analysis: another caller may have it analysed again meanwhile.
            analysis = analyze(source, session.kind, choices, self.settings.limits)

        def begin(session: Session) -> None:
            session.begin_split(choices if choices is not None else session.choices)
            session.analysis = analysis or session.analysis

        session = self.sessions.change(session_id, begin)
        self._wake()
        return session

    # ---- execute

    def start(self, session_id: str, asking: Asking) -> Session:
        session = self.sessions.get(session_id)
        if session.split.is_ready() and self.sessions.folder(session_id).manifest(session.split.attempt) is None:
            raise Refusal(404, f"the tasks of session {session_id} are gone; please upload its workbook again")
        session = self.sessions.change(session_id, lambda session: session.begin_execution(asking))
        self._wake()
        return session

    def monitored(self, session_id: str) -> Session:
        """A session whose start was accepted, also while no worker has taken its run yet."""
        session = self.sessions.get(session_id)
        if not session.execution.is_accepted():
            raise Refusal(400, f"session {session_id} has no run to look at: {session.where()}")
        return session

    def wish(self, session_id: str, verb: Verb) -> Session:
        return self.sessions.change(session_id, lambda session: session.wish(verb))

    def failed_rows(self, session_id: str, skip: int, most: int) -> tuple[int, list[Result]]:
        self.sessions.get(session_id)
        return failures(self.sessions.folder(session_id).path, skip, most)

    def download(self, session_id: str) -> tuple[Path, str]:
        """The answered workbook, and the name to offer it under."""
        session = self.sessions.get(session_id)
        if not session.execution.ready_for_download:
            raise Refusal(400, f"there is nothing to download yet from session {session_id}: {session.where()}")
        path = self.sessions.folder(session_id).answers(session.kind, session.execution.attempt)
        if not path.exists():
            raise Refusal(404, f"the answers of session {session_id} are gone")
        return path, f"{Path(session.name).stem}-answers.{session.kind}"

    # ---- all

    def delete(self, session_id: str) -> None:
        """A worker that is at it stops at its next step, because the record is gone."""
        self.sessions.delete(session_id)
        self.sessions.folder(session_id).remove()
