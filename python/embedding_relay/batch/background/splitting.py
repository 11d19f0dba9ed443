"""The split of one session: build the tasks from the rows, save them, read them back, and only then say ready."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final

from embedding_relay.batch.errors import Refusal, StaleJob, TooLarge
from embedding_relay.batch.session.folder import Folder, Manifest
from embedding_relay.batch.session.records import Session
from embedding_relay.batch.session.sessions import SPLIT, UPLOADED, Sessions
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.tasks import Task
from embedding_relay.batch.workbook.rows import read_tasks

REPORT_EVERY: Final = 0.25


class Split:
    """One worker's attempt. Runs in a thread; `check` raises when this worker has lost the lease."""

    def __init__(
        self, sessions: Sessions, session_id: str, folder: Folder, settings: Settings, check: Callable[[], None]
    ) -> None:
        self._sessions = sessions
        self._id = session_id
        self._folder = folder
        self._settings = settings
        self._check = check
        self._attempt = 0
        self._report_at = 0.0

    def run(self) -> None:
        session = self._sessions.change(self._id, self._take)
        self._sessions.bring(self._id, *UPLOADED)
        try:
            manifest = self._build(session)
            if not manifest.tasks:
                raise Refusal(400, "there is no row with anything to ask")
        except Refusal as refusal:
            sentence = refusal.detail
            self._move(lambda session: session.fail_split(sentence))
            return
        self._move(lambda session: session.split.mark_saving(manifest.tasks, len(manifest.batches)))
        self._folder.save_tasks(self._attempt, manifest)
        self._sessions.save(self._id, *SPLIT, verified=True)
        self._move(lambda session: session.split.mark_verifying())
        self._folder.verify_tasks(self._attempt, manifest)
        self._move(lambda session: session.split.mark_verified())
        self._move(lambda session: session.complete_split())

    def _take(self, session: Session) -> None:
        self._attempt = session.split.take()

    def _build(self, session: Session) -> Manifest:
        assert session.analysis is not None
        tasks = read_tasks(
            self._folder.source(session.kind),
            session.kind,
            session.analysis,
            session.choices,
            self._folder.path,
            self._settings.limits,
            self._settings.url_rules,
            self._advance,
        )
        return self._folder.build_tasks(self._attempt, self._limited(tasks), self._settings.batch_rows)

    def _limited(self, tasks: Iterator[Task]) -> Iterator[Task]:
        """A small upload can fill the disk: many rows, each in a long template."""
        characters = 0
        for task in tasks:
            characters += len(task.prompt)
            if characters > self._settings.limits.expanded_bytes:
                raise TooLarge(f"the prompts have more than {self._settings.expanded_mib} MiB together: split the file")
            yield task

    def _advance(self, share: float) -> None:
        self._check()
        now = time.monotonic()
        if now < self._report_at:
            return
        self._report_at = now + REPORT_EVERY
        self._move(lambda session: session.split.advance(share, "building the tasks"))

    def _move(self, by: Callable[[Session], None]) -> None:
        def ours(session: Session) -> None:
            if session.split.attempt != self._attempt:
                raise StaleJob
            by(session)

        self._check()
        self._sessions.change(self._id, ours)
