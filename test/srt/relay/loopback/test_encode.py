"""What an encode rank makes of each thing that the protocol asks of it, without its threads and without a peer.

The data plane, the protocol core and the transfer workers are stand-ins that move and decide nothing, and remember what
they are told. Here, because the manager's module needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from embedding_relay.config import RelayConfig
from embedding_relay.memory.plane import private_memory
from embedding_relay.observer import Summary
from embedding_relay.protocol.effects import (
    ChunkDestination,
    DropRows,
    HeldByAll,
    Note,
    ProveGone,
    StatusChanged,
    TransferEmbeddingChunk,
    Window,
)
from embedding_relay.protocol.errors import Failure, LocalError
from embedding_relay.protocol.messages import Address
from embedding_relay.protocol.status import Status
from embedding_relay.transport.encode import EncodeManager, MooncakeEmbeddingSender
from embedding_relay.transport.manager import open_rank
from support.loopback import HOST, Watches, small_layout
from support.rows import Spec, items_of, make_rows, without

LAYOUT = small_layout(hidden_size=4, dtype="float32", block_size=8, blocks=4)
GONE = Failure(502, "gone")


class NoPlane:
    """Nobody writes over it."""

    renewals = mapped = 0
    allocate = staticmethod(private_memory)
    reads_any_memory = False

    def start(self, regions: Any) -> None: ...

    def close(self) -> None: ...


class Notes:
    """Is told things, and has one answer to whatever it is asked."""

    def __init__(self, answer: Any = None) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.answer = answer

    def __getattr__(self, name: str) -> Any:
        return lambda *what: (self.told.append((name, *what)), self.answer)[1]

    def __len__(self) -> int:
        return 0


@pytest.fixture
def manager() -> Iterator[Any]:
    opened = open_rank(LAYOUT, RelayConfig(), HOST, NoPlane())  # type: ignore[arg-type]
    manager: Any = EncodeManager(opened, "a1", Address(HOST, 1), 0, 1, Watches())
    manager._core, manager._workers, manager._prover = Notes([]), Notes(), Notes()
    yield manager
    manager.close()


@pytest.fixture
def sender(manager: Any) -> MooncakeEmbeddingSender:
    """Of room 1, which the control thread has heard of."""
    sender = MooncakeEmbeddingSender(manager, 1)
    sender.init()
    manager._loop._run_calls()
    manager._core.told.clear()
    return sender


def rows(seed: int = 0) -> Any:
    return make_rows(LAYOUT, Spec(room=1, total=5, seed=seed))


# ---- the scheduler's end


@pytest.mark.parametrize("is_free", [True, False])
def test_a_room_is_expected_served_and_refused_by_whom_it_belongs_to(is_free: bool) -> None:
    manager, source = Notes(is_free), rows()
    sender = MooncakeEmbeddingSender(manager, 1)  # type: ignore[arg-type]
    sender.init()
    sender.send_embedding(source)
    sender.refuse(GONE)
    asked = [("expect", sender), ("send_embedding", 1, source), ("refuse", 1, GONE)]
    assert manager.told == [("follow", sender), *(asked if is_free else [])]


def test_a_room_can_be_refused_before_anybody_has_it() -> None:
    manager = Notes()
    MooncakeEmbeddingSender(manager, 1).refuse(GONE)  # type: ignore[arg-type]
    assert manager.told == [("refuse", 1, GONE)]


def test_rows_that_do_not_fit_are_the_callers_mistake(manager: Any) -> None:
    source = make_rows(small_layout(hidden_size=8, dtype="float32"), Spec(room=1, total=5))
    with pytest.raises(LocalError, match="do not fit"):
        manager.send_embedding(1, source)


# ---- rows, and chunks of them


def test_rows_that_are_sent_twice_are_those_that_were_sent_first(manager: Any, sender: MooncakeEmbeddingSender) -> None:
    first, second = rows(), rows(seed=2)
    manager._submit(1, first, 5.0)
    manager._submit(1, second, 6.0)
    assert manager._sources == {1: first}
    assert (sender.submitted_at, sender.rows) == (5.0, 5)
    assert manager._core.told == [("submit", 1, 5, 5.0, (), None), ("submit", 1, 5, 6.0, (), None)]
    assert manager._sizes() == {"senders": 1, "sources": 1, "workers": 0}
    manager._run([DropRows(1)], 7.0)
    assert manager._sources == {}


def test_the_core_hears_of_items_and_of_those_that_nobody_made(manager: Any) -> None:
    spec = Spec(room=2, total=40, salt=0)
    source = make_rows(LAYOUT, spec)
    items = items_of(source, spec)
    sender = MooncakeEmbeddingSender(manager, 2)
    sender.init(items)
    manager._loop._run_calls()
    name, room, _, told = manager._core.told.pop()
    assert (name, room, told) == ("expect", 2, items)
    assert sender.held == ()
    manager._run([HeldByAll(2, (0,)), HeldByAll(9, (0,))], 5.0)
    assert sender.held == (0,)
    partial = without(source, items, sender.held)
    partial.made = 17
    manager._submit(2, partial, 6.0)
    assert manager._core.told == [("submit", 2, 40, 6.0, (0,), 17)]


def test_language_ranks_learn_that_it_takes_their_word(manager: Any) -> None:
    assert manager._announcer._rank.handshake.takes_have


def chunk_for(*sessions: str) -> TransferEmbeddingChunk:
    window = Window(first_row=0, rows=5, blocks=(0,), stage=True)
    destinations = (ChunkDestination(session, (0,), 0, 0, 5, with_aux=True) for session in sessions)
    return TransferEmbeddingChunk(1, 3, window, tuple(destinations))


def test_a_chunk_goes_to_the_workers_of_its_destinations(
    manager: Any, sender: MooncakeEmbeddingSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = {"here": SimpleNamespace(buffer_pointers=(1, 2, 3, 4, 5), handshake=SimpleNamespace(memory="f1"))}
    monkeypatch.setattr(manager._core, "session", sessions.get)
    manager._submit(1, rows(), 5.0)
    manager._core.told.clear()
    manager._run([chunk_for("gone", "here")], 6.0)
    [(_, session_id, now, _, done, memory)] = manager._workers.told
    assert (session_id, now, memory) == ("here", 6.0, "f1")
    assert manager.transfer_worker("here").serves("f1")
    done("")
    manager._loop._run_calls()
    [(_, room, transfer_id, errors, _)] = manager._core.told
    assert (room, transfer_id, errors) == (1, 3, {"gone": "session gone is gone"})


def test_what_was_transferred_is_counted_before_proof_is_asked_for(
    manager: Any, sender: MooncakeEmbeddingSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(manager._core, "transferred", lambda *_: [order.append("told"), []][1])
    monkeypatch.setattr(manager._workers, "report_when_quiet", order.append)
    for room in (1, 9):
        chunk = SimpleNamespace(room=room, transfer_id=3)
        manager._transferred(SimpleNamespace(chunk=chunk, rows=5, bytes=70, errors={"one": "no", "two": "no"}), 6.0)
    assert order == ["told", "one", "two"] * 2
    assert (sender.rounds, sender.bytes) == (1, 70)
    assert manager._totals() == {"chunks": 2, "rows": 10, "bytes": 140}


# ---- the end


def test_how_a_request_went_is_told(
    manager: Any, sender: MooncakeEmbeddingSender, caplog: pytest.LogCaptureFixture
) -> None:
    manager._expect(sender, 2.0)
    sender.rounds, sender.bytes = 3, 99
    manager._submit(1, rows(), 5.0)
    with caplog.at_level("INFO"):
        manager._run([StatusChanged(1, Status.TRANSFERRING, None), StatusChanged(1, Status.SUCCESS, None)], 9.0)
    assert manager.observer.summaries == [Summary(rows=5, rounds=3, bytes=99, wait_s=3.0, transfer_s=4.0)]
    assert caplog.messages == [f"relay-encode room=1 status=Success {manager.observer.summaries[0]}"]
    assert sender.poll() is Status.SUCCESS
    assert manager._sizes()["senders"] == 0


def test_a_room_that_fails_or_had_no_rows_is_no_success(
    manager: Any, sender: MooncakeEmbeddingSender, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        manager._run([StatusChanged(1, Status.FAILED, GONE), StatusChanged(9, Status.SUCCESS, None)], 9.0)
    assert manager.observer.summaries == []
    assert caplog.messages == [f'relay-encode room=1 status=Failed reason="{GONE}"']
    assert (sender.poll(), sender.failure()) == (Status.FAILED, GONE)


# ---- the control thread


def test_what_the_control_thread_passes_on(manager: Any, caplog: pytest.LogCaptureFixture) -> None:
    question = ProveGone("one", Address(HOST, 7))
    manager._run([question, Note("something odd")], 5.0)
    assert manager._prover.told == [("ask", question)]
    assert caplog.messages == ["relay-encode something odd"]
    manager.refuse(1, GONE)
    manager._report_quiet("one")
    manager._report_proof(question, True)
    manager._loop._run_calls()
    assert [told[:-1] for told in manager._core.told] == [
        ("refuse", 1, GONE),
        ("session_quiet", "one"),
        ("proven", "one", Address(HOST, 7), True),
    ]


def test_workers_of_sessions_that_are_gone_end_with_the_tick(manager: Any) -> None:
    manager._core = Notes(["one"])
    manager._run = lambda *_: None
    manager.tick(5.0)
    assert manager._core.told == [("tick", 5.0), ("sessions",)]
    assert manager._workers.told == [("keep_only", ["one"]), ("end_idle", 5.0)]


@pytest.mark.parametrize(("core", "workers", "both"), [(None, None, None), (3.0, None, 3.0), (9.0, 4.0, 4.0)])
def test_it_wakes_for_the_first_of_both(
    manager: Any, core: float | None, workers: float | None, both: float | None
) -> None:
    manager._core, manager._workers = Notes(core), Notes(workers)
    assert manager.next_wakeup() == both


def test_nothing_is_kept_when_it_is_over(manager: Any, sender: MooncakeEmbeddingSender) -> None:
    manager._submit(1, rows(), 5.0)
    manager._close_helpers()
    assert manager._sizes() == {"senders": 0, "sources": 0, "workers": 0}
    assert manager._prover.told == [("close",)]
    assert manager._workers.told == [("close",)]
