"""A split on a real store and a real disk: ready only when saved, and nothing said by a worker that lost its lease."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding_relay.batch.background.splitting import Split
from embedding_relay.batch.errors import NotWhatWasSaved, StaleJob
from embedding_relay.batch.session import folder as folder_module
from embedding_relay.batch.session.records import Session, SplitStatus, Stage, new_session_id
from embedding_relay.batch.session.sessions import Sessions
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.store.disk_store import DiskStore
from embedding_relay.batch.workbook.analysis import Choices
from embedding_relay.batch.workbook.analyze import analyze


class Place:
    def __init__(self, path: Path) -> None:
        self.settings = Settings(endpoint="http://unused", cache_dir=path, batch_rows=2)
        self.store = DiskStore.open(str(path / "store"))
        self.sessions = Sessions(self.store, self.settings.sessions_dir, 1000)

    def session(self, content: str = "prompt\none\ntwo\nthree\n") -> str:
        """A session whose split has been asked for."""
        session = Session(session_id=new_session_id(), name="a.csv", kind="csv", created_at=time.time())
        folder = self.sessions.folder(session.session_id)
        folder.make()
        folder.source("csv").write_text(content)
        session.mark_analyzed(analyze(folder.source("csv"), "csv", Choices(), self.settings.limits))
        session.begin_split(Choices())
        self.sessions.add(session)
        return session.session_id

    def split(self, session_id: str, check: bool = True) -> Split:
        def lost() -> None:
            raise StaleJob

        folder = self.sessions.folder(session_id)
        return Split(self.sessions, session_id, folder, self.settings, (lambda: None) if check else lost)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.store.close()


def test_a_split_saves_its_tasks_and_says_so(place: Place) -> None:
    session_id = place.session()
    place.split(session_id).run()
    session = place.sessions.get(session_id)
    assert (session.stage, session.split.status, session.split.progress) == (
        *(Stage.SPLIT_COMPLETE, SplitStatus.COMPLETED),
        100,
    )
    assert (session.split.tasks, session.split.batches, session.split.attempt) == (3, 2, 1)
    assert [task.prompt for task in place.sessions.folder(session_id).tasks(1)] == ["one", "two", "three"]


def test_it_is_not_ready_while_it_is_saved(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    session_id = place.session()
    seen: list[tuple[SplitStatus, float, bool]] = []
    move_into_place = folder_module.move_into_place

    def watched(partial: Path, final: Path) -> None:
        split = place.sessions.get(session_id).split
        seen.append((split.status, split.progress, split.is_ready()))
        move_into_place(partial, final)

    monkeypatch.setattr(folder_module, "move_into_place", watched)
    place.split(session_id).run()
    assert seen == [(SplitStatus.SAVING, 90, False)]


def test_what_was_saved_is_read_back_before_it_is_ready(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that keeps something else: the worker raises, and the session is as it was while it was verified."""
    session_id = place.session()
    move_into_place = folder_module.move_into_place

    def damaging(partial: Path, final: Path) -> None:
        (partial / "000001.jsonl").write_bytes(b"{}\n")
        move_into_place(partial, final)

    monkeypatch.setattr(folder_module, "move_into_place", damaging)
    with pytest.raises(NotWhatWasSaved):
        place.split(session_id).run()
    split = place.sessions.get(session_id).split
    assert (split.status, split.progress, split.is_ready()) == (SplitStatus.SAVING, 95, False)


def test_a_workbook_that_cannot_be_split_fails_the_session(place: Place) -> None:
    session_id = place.session()
    place.sessions.folder(session_id).source("csv").write_text('prompt\n"one\n')
    place.split(session_id).run()
    session = place.sessions.get(session_id)
    assert (session.stage, session.split.status) == (Stage.FAILED, SplitStatus.FAILED)
    assert "never closed" in session.split.error


def test_a_worker_that_lost_its_lease_says_nothing(place: Place) -> None:
    session_id = place.session()
    with pytest.raises(StaleJob):
        place.split(session_id, check=False).run()
    split = place.sessions.get(session_id).split
    assert (split.status, split.is_ready()) == (SplitStatus.PROCESSING, False)


def test_a_worker_that_was_overtaken_changes_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its building and its saving another one takes the split, and completes it."""
    session_id = place.session()
    save_tasks, others = folder_module.Folder.save_tasks, [place.split(session_id)]

    def overtaken(*arguments: object) -> None:
        if others:
            others.pop().run()
        save_tasks(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(folder_module.Folder, "save_tasks", overtaken)
    with pytest.raises(StaleJob):
        place.split(session_id).run()
    split = place.sessions.get(session_id).split
    assert (split.status, split.attempt, split.progress) == (SplitStatus.COMPLETED, 2, 100)
    assert len(list(place.sessions.folder(session_id).tasks(2))) == 3
