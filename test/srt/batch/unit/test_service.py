"""What callers may do to a session, without HTTP and without a worker that takes it; the store is a real diskcache."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embedding_relay.batch.background.splitting import Split
from embedding_relay.batch.errors import Refusal
from embedding_relay.batch.service import Service
from embedding_relay.batch.session.records import Asking, ExecutionStatus, Session
from embedding_relay.batch.session.sessions import Sessions
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.store.opening import open_store
from embedding_relay.batch.workbook.analysis import Choices


class Interrupted(Sessions):
    """`meanwhile` happens once, right after a session was read: what another worker does before this one goes on."""

    meanwhile: Callable[[], object] | None = None

    def get(self, session_id: str) -> Session:
        session = super().get(session_id)
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return session


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with opened(tmp_path) as service:
        yield service


@contextmanager
def opened(where: Path) -> Iterator[Service]:
    """As one worker process has it; nothing takes what it accepts."""
    settings = Settings(endpoint="http://127.0.0.1:1", cache_dir=where)
    store = open_store(settings.store_place)
    yield Service(settings, Interrupted(store, settings.sessions_dir, 1000), wake=lambda session_id: None)
    store.close()


def test_a_split_asks_what_its_caller_chose_whatever_another_one_looks_at(service: Service) -> None:
    """One presses Split; in that moment another one looks how the same workbook is with another column."""
    one, other = Choices(prompt_column="one"), Choices(prompt_column="other")
    session = service.take_upload(io.BytesIO(b"one,other\na,b\n"), "a.csv", one)
    assert isinstance(service.sessions, Interrupted)
    service.sessions.meanwhile = lambda: service.analyze_again(session.session_id, other)
    session = service.split(session.session_id, one)
    assert session.analysis is not None
    assert (session.choices.prompt_column, session.analysis.prompt_column) == ("one", "one")


def test_a_start_that_was_accepted_can_be_looked_at_whoever_is_asked(service: Service, tmp_path: Path) -> None:
    session_id = split_session(service)
    with pytest.raises(Refusal, match="has no run to look at: it is split and has not been started"):
        service.monitored(session_id)
    service.start(session_id, Asking())
    with opened(tmp_path) as other:
        for asked in (service, other):
            assert asked.monitored(session_id).execution.status is ExecutionStatus.INITIALIZING


def test_a_run_that_failed_before_a_worker_could_begin_it_can_be_looked_at(service: Service) -> None:
    session_id = split_session(service)
    service.start(session_id, Asking())
    service.sessions.change(session_id, lambda session: session.fail_execution("its results cannot be read"))
    assert service.monitored(session_id).execution.error == "its results cannot be read"


def test_a_split_that_failed_leaves_no_run_to_look_at(service: Service) -> None:
    session = service.take_upload(io.BytesIO(b"one\na\n"), "a.csv", Choices())
    service.split(session.session_id, None)
    service.sessions.change(session.session_id, lambda session: session.fail_split("its workbook is damaged"))
    with pytest.raises(Refusal, match="its workbook is damaged"):
        service.monitored(session.session_id)


def split_session(service: Service) -> str:
    """As a worker leaves it."""
    session_id = service.take_upload(io.BytesIO(b"one\na\n"), "a.csv", Choices()).session_id
    service.split(session_id, None)
    folder = service.sessions.folder(session_id)
    Split(service.sessions, session_id, folder, service.settings, lambda: None).run()
    return session_id
