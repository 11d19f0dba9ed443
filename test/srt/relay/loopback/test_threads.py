"""No thread of ours ends unnoticed: whatever kills one, its instance reports itself unhealthy, and all are answered."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import pytest

from embedding_relay.config import MOONCAKE, SHARED_MEMORY, RelayConfig
from embedding_relay.memory import shared_segment
from embedding_relay.memory.plane import Unreachable
from embedding_relay.memory.shared_segment import Segment, attach
from embedding_relay.protocol.messages import Address
from embedding_relay.protocol.status import Status
from embedding_relay.registry import client
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer
from embedding_relay.transport.encode import EncodeManager, MooncakeEmbeddingSender
from embedding_relay.transport.language import LanguageManager
from embedding_relay.transport.manager import MooncakeEmbeddingManager
from support.loopback import (
    HOST,
    EncodeInstance,
    LanguageRank,
    assert_all_given_back,
    encode_instance,
    language_rank,
    small_layout,
    wait_until,
)
from support.rooms import next_room
from support.rows import LIMITS, Spec, make_rows

LAYOUT = small_layout()
# Longer than the tests: an answer that comes is not a deadline's.
PATIENT = RelayConfig(bootstrap_timeout=100, waiting_timeout=100, heartbeat_interval=100, data_plane=MOONCAKE)
DEATHS = [ZeroDivisionError("a bug"), SystemExit("leave"), KeyboardInterrupt("stop")]


def dies(death: BaseException) -> Callable[..., NoReturn]:
    def die(*_: object, **__: object) -> NoReturn:
        raise type(death)(*death.args)  # one that was raised keeps all that its traceback knows

    return die


@pytest.fixture(scope="module")
def encode() -> Iterator[EncodeInstance]:
    with encode_instance(LAYOUT, PATIENT) as instance:
        yield instance


@contextmanager
def encode_here() -> Iterator[tuple[MooncakeEmbeddingManager, MooncakeEmbeddingBootstrapServer]]:
    """An encode rank and its registry in this process, for things to be done to them."""
    registry = MooncakeEmbeddingBootstrapServer(HOST, 0)
    registry.start()
    manager = EncodeManager.open(LAYOUT, PATIENT, host=HOST, bootstrap=Address(HOST, registry.port))
    manager.start()
    try:
        yield manager, registry
    finally:
        manager.close()
        registry.close()


def becomes_unhealthy(manager: MooncakeEmbeddingManager) -> str:
    deadline = time.monotonic() + 20
    while manager.healthy():
        assert time.monotonic() < deadline, "it never said that it is unhealthy"
        time.sleep(0.01)
    return str(manager.unhealthy_reason)


@pytest.mark.parametrize("death", DEATHS)
def test_control(encode: EncodeInstance, room: int, death: BaseException) -> None:
    """Every open room ends, and every later one at once."""
    manager = LanguageManager.open(LAYOUT, PATIENT, host=HOST, ranks=1, max_rows=1000, limits=LIMITS)
    manager.start()
    rank = LanguageRank(manager, LAYOUT)
    try:
        receivers = rank.start(encode.peer, room)
        encode.expect(Spec(room, 100, held=True))
        wait_until(lambda: receivers[room].poll() is Status.WAITING_FOR_INPUT, manager, 20)
        assert manager.healthy()
        manager._loop.post(dies(death))
        rank.wait(receivers.values())
        later = rank.start(encode.peer, next_room())
        rank.wait(later.values())
        assert manager.unhealthy_reason == f"relay-control died: {death!r}"
        for receiver in (*receivers.values(), *later.values()):
            failure = receiver.failure()
            assert failure is not None
            assert (failure.code, failure.text) == (503, manager.unhealthy_reason)
    finally:
        manager.close()


@pytest.mark.parametrize("death", DEATHS)
def test_shared_memory(death: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gets the memory any more, so no new encode instance could write to this one."""
    monkeypatch.setattr(Segment, "_hear", dies(death))
    monkeypatch.setattr(shared_segment, "_ANSWER_TIMEOUT", 0.2)
    manager = LanguageManager.open(
        LAYOUT,
        dataclasses.replace(PATIENT, data_plane=SHARED_MEMORY),
        host=HOST,
        ranks=1,
        max_rows=1000,
        limits=LIMITS,
    )
    manager.start()
    with pytest.raises(Unreachable, match="does not answer"):
        attach(manager.plane.memory_name, manager.plane.session_id, "a1")
    assert becomes_unhealthy(manager) == f"relay-shared-memory died: {death!r}"
    manager.close()


@pytest.mark.parametrize("death", DEATHS)
@pytest.mark.parametrize("what", ["link", "note_renewal"])
def test_transfer(room: int, what: str, death: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first job or in the middle of one: all jobs are answered, and the rooms end on either side."""
    with encode_here() as (manager, registry), language_rank(LAYOUT, PATIENT) as language:
        monkeypatch.setattr(manager.plane, what, dies(death))
        if what == "note_renewal":
            monkeypatch.setattr("embedding_relay.transport.workers.plan_chunk", dies(death))
        rooms = [room, next_room(), next_room()]
        senders = [MooncakeEmbeddingSender(manager, room) for room in rooms]
        receivers = language.start(f"{HOST}:{registry.port}", *rooms, hint_rows=128)
        for sender in senders:
            sender.init()
        for sender in senders:
            wait_until(lambda: sender.poll() is not Status.BOOTSTRAPPING, manager, 20)  # noqa: B023
            sender.send_embedding(make_rows(LAYOUT, Spec(sender.room, 300)))
        language.wait(receivers.values())
        for end in (*senders, *receivers.values()):
            if isinstance(end, MooncakeEmbeddingSender):
                wait_until(lambda: end.poll() is Status.FAILED, manager, 20)  # noqa: B023
            failure = end.failure()
            assert failure is not None
            assert failure.code == 502, failure
        assert becomes_unhealthy(manager).startswith("relay-transfer-")
        assert repr(death) in becomes_unhealthy(manager)


@pytest.mark.parametrize("death", DEATHS)
def test_lookup(encode: EncodeInstance, room: int, death: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's thread ends: who waits is answered, and the next lookup works."""
    with language_rank(LAYOUT, PATIENT) as language:
        with monkeypatch.context() as patch:
            patch.setattr(client, "look_up", dies(death))
            receivers = language.start(encode.peer, room)
            language.wait(receivers.values())
            failure = receivers[room].failure()
            assert failure is not None
            assert (failure.code, type(death).__name__ in failure.text) == (502, True), failure
        language.receive(encode, Spec(next_room(), 300))
        assert_all_given_back(language)


@pytest.mark.parametrize("death", DEATHS)
def test_announce(death: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "announce", dies(death))
    with encode_here() as (manager, _):
        assert becomes_unhealthy(manager) == f"relay-announce died: {death!r}"


@pytest.mark.parametrize("death", [SystemExit("leave"), KeyboardInterrupt("stop"), None])
def test_bootstrap(death: BaseException | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lives in another process than the scheduler, which misses it from afar, whatever its end was."""
    monkeypatch.setattr(client, "_CHECK_EVERY", 0.05)
    with encode_here() as (manager, registry):
        deadline = time.monotonic() + 20
        while not manager.reachable():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert manager.healthy()
        if death is None:
            registry.close()
        else:
            assert registry._loop is not None
            registry._loop.call_soon_threadsafe(dies(death))
        assert becomes_unhealthy(manager).startswith("the bootstrap registry is gone: ")


def test_bootstrap_that_cannot_begin_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiohttp.web.AppRunner.setup", dies(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        MooncakeEmbeddingBootstrapServer(HOST, 0).start()
