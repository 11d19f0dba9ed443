"""The live stream of a run, as the client of one call gets it; the store is a diskcache that can be said to be away."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from embedding_relay.batch.background.splitting import Split
from embedding_relay.batch.http import calls
from embedding_relay.batch.service import Service
from embedding_relay.batch.session.records import Asking, Counts, Session
from embedding_relay.batch.session.sessions import Sessions
from embedding_relay.batch.settings import Settings
from embedding_relay.batch.store.contract import StoreAway
from embedding_relay.batch.store.opening import open_store
from embedding_relay.batch.workbook.analysis import Choices


class SometimesAway(Sessions):
    """Cannot be read as often as `away` says; Redis that is restarted looks like this."""

    away = 0

    def get(self, session_id: str) -> Session:
        if self.away:
            self.away -= 1
            raise StoreAway("it is away")
        return super().get(session_id)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(calls, "STREAM_EVERY", 0.01)
    settings = Settings(endpoint="http://127.0.0.1:1", cache_dir=tmp_path)
    store = open_store(settings.store_place)
    yield Service(settings, SometimesAway(store, settings.sessions_dir, 1000), wake=lambda session_id: None)
    store.close()


def started_session(service: Service) -> str:
    session_id = service.take_upload(io.BytesIO(b"one\na\n"), "a.csv", Choices()).session_id
    service.split(session_id, None)
    Split(service.sessions, session_id, service.sessions.folder(session_id), service.settings, lambda: None).run()
    service.start(session_id, Asking())
    return session_id


async def chunks_of(service: Service, session_id: str) -> Any:
    """What is sent; the one who reads goes away after the last thing that he waits for."""

    async def is_disconnected() -> bool:
        return False

    request = SimpleNamespace(
        app=SimpleNamespace(state=SimpleNamespace(service=service, closing=threading.Event())),
        is_disconnected=is_disconnected,
    )
    return (await calls.execution_stream(request, session_id)).body_iterator  # type: ignore[arg-type]


def event(chunk: Any) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(bytes(chunk).removeprefix(b"data: "))
    return decoded


def test_it_begins_with_the_start_and_outlasts_a_store_that_is_away(service: Service) -> None:
    session_id = started_session(service)

    def end(session: Session) -> None:
        session.execution.take()
        session.execution.mark_running()
        session.mark_saving()
        session.complete_execution(Counts(done=1))

    async def watch() -> list[dict[str, Any]]:
        chunks = await chunks_of(service, session_id)
        first = event(await anext(chunks))
        service.sessions.change(session_id, end)
        assert isinstance(service.sessions, SometimesAway)
        service.sessions.away = 3
        return [first, *[event(chunk) async for chunk in chunks]]

    first, last = asyncio.run(watch())
    assert (first["status"], first["ready_for_monitoring"]) == ("initializing", False)
    assert (last["status"], last["stage"]) == ("completed", "completed")


def test_it_says_when_the_session_is_gone(service: Service) -> None:
    session_id = started_session(service)

    async def watch() -> list[bytes]:
        chunks = await chunks_of(service, session_id)
        await anext(chunks)
        service.delete(session_id)
        return [bytes(chunk) async for chunk in chunks]

    (last,) = asyncio.run(watch())
    assert last.startswith(b"event: gone\n")
