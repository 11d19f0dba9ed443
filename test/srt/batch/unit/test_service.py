"""What two callers may do to one session between two steps of a call, without HTTP; the store is a real diskcache."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from embedding_relay.batch.service import Service
from embedding_relay.batch.session.records import Session
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
    settings = Settings(endpoint="http://127.0.0.1:1", cache_dir=tmp_path)
    store = open_store(settings.store_place)
    yield Service(settings, Interrupted(store, settings.sessions_dir, 1000), wake=lambda: None)
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
