"""All sessions on a real store: ids that are none, changes that are one step or nothing, and the order of the list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from embedding_relay.batch.errors import Refusal, UnknownSession
from embedding_relay.batch.session.records import Session
from embedding_relay.batch.session.sessions import Sessions
from embedding_relay.batch.store.disk_store import DiskStore


def new_session(number: int, created_at: float = 0.0) -> Session:
    return Session(session_id=f"{number:016x}", name="a.csv", kind="csv", created_at=created_at)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    store = DiskStore.open(str(tmp_path / "store"))
    yield store
    store.close()


@pytest.fixture
def sessions(store: DiskStore, tmp_path: Path) -> Sessions:
    return Sessions(store, tmp_path / "sessions", 1000)


@pytest.mark.parametrize("session_id", ["0" * 16, "", "..", "../../etc", "A" * 16, "0" * 15, "0" * 17, "0" * 15 + "\n"])
def test_an_id_that_is_none_is_unknown_to_every_call(sessions: Sessions, session_id: str) -> None:
    assert sessions.find(session_id) is None
    for call in (sessions.get, sessions.delete, lambda unknown: sessions.change(unknown, lambda session: None)):
        with pytest.raises(UnknownSession):
            call(session_id)


def test_a_change_is_one_step_or_nothing(sessions: Sessions) -> None:
    sessions.add(new_session(1))
    session_id = f"{1:016x}"

    def rename(session: Session) -> None:
        session.name = "b.csv"

    def rename_and_refuse(session: Session) -> None:
        session.name = "c.csv"
        raise Refusal(400, "no")

    assert sessions.change(session_id, rename).name == "b.csv"
    with pytest.raises(Refusal):
        sessions.change(session_id, rename_and_refuse)
    assert sessions.get(session_id).name == "b.csv"


def test_no_session_replaces_another(sessions: Sessions) -> None:
    sessions.add(new_session(1))
    with pytest.raises(RuntimeError):
        sessions.add(new_session(1))


def test_the_latest_comes_first_and_a_record_that_cannot_be_read_is_left_out(
    sessions: Sessions, store: DiskStore
) -> None:
    for number, created_at in ((1, 20.0), (2, 30.0), (3, 10.0)):
        sessions.add(new_session(number, created_at))
    store.create(f"session:{4:016x}", b"of another version", 1000)
    assert [session.created_at for session in sessions.all()] == [30.0, 20.0, 10.0]
    sessions.delete(f"{2:016x}")
    assert [session.created_at for session in sessions.all()] == [20.0, 10.0]
