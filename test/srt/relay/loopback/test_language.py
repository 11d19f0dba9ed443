"""What a language rank makes of each thing that the protocol asks of it, without its threads and without a peer.

The buffers are real; the data plane and the protocol core are stand-ins that move and decide nothing, and remember what
they are told. Here, because the manager's module needs torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embedding_relay.config import RelayConfig
from embedding_relay.memory.layout import AUX
from embedding_relay.memory.plane import private_memory
from embedding_relay.observer import Summary
from embedding_relay.protocol.effects import CopyAhead, CopyOut, Deliver, LookUp, Send, StatusChanged
from embedding_relay.protocol.errors import Failure, LocalError
from embedding_relay.protocol.messages import Address, Item, TransferEmbeddingInfo
from embedding_relay.protocol.status import Status
from embedding_relay.transport.language import LanguageManager, MooncakeEmbeddingReceiver
from embedding_relay.transport.manager import open_rank
from support.loopback import HOST, Watches, small_layout
from support.rows import LIMITS, Spec, difference, make_rows

LAYOUT = small_layout(hidden_size=4, dtype="float32", block_size=8, blocks=4)
GONE = Failure(502, "gone")


class NoPlane:
    """Nobody writes to it."""

    session_id, renewals, memory_name, mapped = "127.0.0.1:1", 0, "", 0
    allocate = staticmethod(private_memory)

    def start(self, regions: Any) -> None: ...

    def close(self) -> None: ...

    def has_read_everything(self, writer: str) -> bool:
        return True


class Core:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *what, **more: self.told.append((name, *what, *more.values())) or []


@pytest.fixture
def manager() -> Iterator[Any]:
    opened = open_rank(LAYOUT, RelayConfig(), HOST, NoPlane())  # type: ignore[arg-type]
    manager: Any = LanguageManager(opened, ranks=1, max_rows=100, limits=LIMITS, observer=Watches())
    manager._core = Core()
    yield manager
    manager.close()


@pytest.fixture
def receiver(manager: Any) -> MooncakeEmbeddingReceiver:
    """Of room 1, which the control thread has."""
    receiver = MooncakeEmbeddingReceiver(manager, "peer:1", 1)
    receiver.start()
    manager._loop._run_calls()
    manager._core.told.clear()
    return receiver


# ---- the scheduler's end


class Manager:
    def __init__(self, is_free: bool) -> None:
        self.is_free, self.asked = is_free, list[Any]()

    def follow(self, end: object) -> bool:
        return self.is_free

    def request(self, receiver: object, hint_rows: int | None) -> None:
        self.asked.append(hint_rows)

    def cancel(self, room: int, failure: Failure | None) -> None:
        self.asked.append(failure)


def test_a_room_is_asked_for_and_cancelled_by_whom_it_belongs_to() -> None:
    for is_free in (True, False):
        manager: Any = Manager(is_free)
        receiver = MooncakeEmbeddingReceiver(manager, "peer:1", 1)
        receiver.abort(GONE)
        assert manager.asked == [], "nothing was asked for"
        receiver.start(7)
        receiver.abort(GONE)
        assert manager.asked == ([7, GONE] if is_free else [])


@pytest.mark.parametrize("status", [Status.SUCCESS, Status.FAILED])
def test_a_room_that_has_ended_is_not_cancelled(status: Status) -> None:
    manager: Any = Manager(is_free=True)
    receiver = MooncakeEmbeddingReceiver(manager, "peer:1", 1)
    receiver.start()
    receiver.change(status, None)
    receiver.abort(GONE)
    assert manager.asked == [None]


def test_there_are_no_rows_before_the_end() -> None:
    manager: Any = Manager(is_free=True)
    receiver = MooncakeEmbeddingReceiver(manager, "peer:1", 1)
    target: Any = SimpleNamespace()
    for status, some in ((Status.TRANSFERRING, target), (Status.SUCCESS, None)):
        receiver.change(status, None)
        receiver.target = some
        with pytest.raises(LocalError, match=f"it is {status.name}"):
            receiver.rows()
    receiver.target = target
    assert receiver.rows() is target


# ---- offers


def offer(sent_tokens: int) -> Send:
    info = TransferEmbeddingInfo(1, HOST, 1, "127.0.0.1:1", (0,), 1, sent_tokens, 8)
    return Send(to=Address(HOST, 1), message=info)


def test_an_offer_that_is_said_again_counts_once(manager: Any, receiver: MooncakeEmbeddingReceiver) -> None:
    for sent in (0, 0):
        manager._send(offer(sent))
    first = receiver.offered_at
    assert first is not None
    for sent in (0, 8, 8, 16):
        manager._send(offer(sent))
    assert receiver.offered_at == first
    assert (receiver.resumes, manager._totals()["resumes"]) == (2, 2)


# ---- rows that have landed


def lands(manager: Any, total: int) -> Any:
    """All rows of a request, in block 0."""
    source = make_rows(LAYOUT, Spec(room=1, total=total))
    manager._buffers.stage(source, 0, total, (0,))
    return source


def copy_out(manager: Any, *, first_row: int = 0, capacity: int = 8, room: int = 1) -> tuple[Any, ...]:
    """What the core is told."""
    manager._copy_out(CopyOut(room, (0,), first_row, capacity, max_rows=100), 1.0)
    return manager._core.told.pop()  # type: ignore[no-any-return]


def test_rows_are_copied_and_counted(manager: Any, receiver: MooncakeEmbeddingReceiver) -> None:
    source = lands(manager, 5)
    assert copy_out(manager) == ("copied", 1, 5, 5, 1.0)
    assert receiver.target is not None
    assert difference(LAYOUT, source, receiver.target) is None
    media = sum(stop - start for start, stop in source.media_runs)
    size = 5 * (4 + 12 + 16) + 64 + media * 16
    assert receiver.bytes == size
    assert manager._totals().items() >= {"chunks": 1, "resumes": 0, "rows": 5, "bytes": size}.items()


def test_no_more_rows_are_copied_than_there_is_room_for(manager: Any, receiver: MooncakeEmbeddingReceiver) -> None:
    source = lands(manager, 5)
    assert copy_out(manager, capacity=3) == ("copied", 1, 3, 5, 1.0)
    manager._buffers.stage(source, 3, 2, (0,))
    assert copy_out(manager, capacity=3, first_row=3) == ("copied", 1, 2, 5, 1.0)


@pytest.mark.parametrize(("total", "is_possible"), [(-1, False), (0, False), (1, True), (100, True), (101, False)])
def test_a_length_that_cannot_be_takes_no_memory(
    manager: Any, receiver: MooncakeEmbeddingReceiver, total: int, is_possible: bool
) -> None:
    manager._buffers._small[AUX][0, 0, 0] = total
    assert (copy_out(manager, capacity=1)[2:4] == (0, total)) is not is_possible
    assert (receiver.target is not None) is is_possible


def test_rows_of_a_room_that_has_failed_are_not_copied(manager: Any) -> None:
    assert copy_out(manager, room=9) == ("copied", 9, 0, 0, 1.0)


def test_no_memory_for_a_prompt_fails_its_room(
    manager: Any, receiver: MooncakeEmbeddingReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_target(aux: object) -> None:
        raise RuntimeError("not enough memory")

    lands(manager, 5)
    monkeypatch.setattr(manager._buffers, "make_target", make_target)
    assert copy_out(manager) == ("copy_failed", 1, "not enough memory", 1.0)
    assert manager._totals()["chunks"] == 0


@pytest.mark.parametrize(
    ("value", "is_possible"),
    [(1e30, True), (-1e30, True), (1.1e30, False), (-1.1e30, False), (float("nan"), False), (float("inf"), False)],
)
def test_embeddings_that_no_model_makes_fail_their_room(
    manager: Any, receiver: MooncakeEmbeddingReceiver, value: float, is_possible: bool
) -> None:
    source = make_rows(LAYOUT, Spec(room=1, total=5))
    source.segments[-1][1][-1, -1] = value
    manager._buffers.stage(source, 0, 5, (0,))
    told = copy_out(manager)
    if is_possible:
        assert told[0] == "copied"
    else:
        assert told[0] == "refuse_rows"
        assert told[2].startswith("rows 0 to 4 have embeddings from ")
        assert receiver.bytes == 0


def test_what_is_wrong_with_all_rows_is_said_when_the_last_are_here(
    manager: Any, receiver: MooncakeEmbeddingReceiver
) -> None:
    source = make_rows(LAYOUT, Spec(room=1, total=5))
    source.media_items += 1
    manager._buffers.stage(source, 0, 5, (0,))
    assert copy_out(manager, capacity=4)[0] == "copied"
    manager._buffers.stage(source, 4, 1, (0,))
    assert copy_out(manager, capacity=4, first_row=4)[0] == "refuse_rows"


# ---- rows that are copied before their report


def test_rows_are_not_copied_twice(manager: Any, receiver: MooncakeEmbeddingReceiver) -> None:
    source = lands(manager, 5)
    ahead = CopyAhead(1, (0,), first_row=0, stop_row=3, max_rows=100)
    manager._copy_ahead(ahead)
    assert receiver.target is not None
    assert torch.equal(receiver.target.fill_ids[:3], source.fill_ids[:3])
    lands_again = make_rows(LAYOUT, Spec(room=2, total=5, seed=9))
    manager._buffers.stage(lands_again, 0, 5, (0,))
    manager._copy_ahead(ahead)
    assert copy_out(manager) == ("copied", 1, 5, 5, 1.0)
    assert torch.equal(receiver.target.fill_ids[:3], source.fill_ids[:3])
    assert torch.equal(receiver.target.fill_ids[3:], lands_again.fill_ids[3:])
    assert manager._totals()["rows"] == 5
    assert manager._totals()["chunks"] == 1


def test_what_is_wrong_with_rows_that_were_copied_early_is_said_with_their_report(
    manager: Any, receiver: MooncakeEmbeddingReceiver
) -> None:
    source = make_rows(LAYOUT, Spec(room=1, total=5))
    source.segments[0][1][0, 0] = float("nan")
    manager._buffers.stage(source, 0, 5, (0,))
    manager._copy_ahead(CopyAhead(1, (0,), 0, 4, 100))
    assert manager._core.told == []
    assert copy_out(manager)[0] == "refuse_rows"


@pytest.mark.parametrize("total", [-1, 0, 101])
def test_early_rows_of_a_length_that_cannot_be_take_no_memory(
    manager: Any, receiver: MooncakeEmbeddingReceiver, total: int
) -> None:
    manager._buffers._small[AUX][0, 0, 0] = total
    manager._copy_ahead(CopyAhead(1, (0,), 0, 4, 100))
    manager._copy_ahead(CopyAhead(9, (0,), 0, 4, 100))
    assert receiver.target is None


def test_no_memory_for_early_rows_is_said_with_their_report(
    manager: Any, receiver: MooncakeEmbeddingReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_target(aux: object) -> None:
        raise MemoryError("not enough memory")

    lands(manager, 5)
    monkeypatch.setattr(manager._buffers, "make_target", make_target)
    manager._copy_ahead(CopyAhead(1, (0,), 0, 4, 100))
    assert copy_out(manager) == ("copy_failed", 1, "not enough memory", 1.0)


# ---- items whose rows are kept


def item_of(source: Any) -> Item:
    """The first media rows of a request."""
    return Item("a" * 32, (source.media_runs[0],))


def keep(manager: Any, source: Any, room: int = 50) -> Item:
    """As after a room that had these rows."""
    item, rows = item_of(source), manager._buffers.make_target(source.aux)
    for start, values in source.segments:
        rows.embeddings[start : start + len(values)] = values
    rows.items[:] = source.items
    manager._repeats.begin(room)
    manager._repeats.look_up(room, (item,))
    manager._repeats.end(room, rows)
    return item


def test_what_a_room_needs_is_looked_for_and_promised(manager: Any, receiver: MooncakeEmbeddingReceiver) -> None:
    item = keep(manager, make_rows(LAYOUT, Spec(room=1, total=5)))
    manager._run([LookUp(1, (item, Item("b" * 32, ((9, 10),))))], 1.0)
    assert manager._core.told.pop() == ("holds", 1, (item.key,), 1.0)


def test_a_room_is_asked_for_with_what_its_client_calls_its_pictures(manager: Any) -> None:
    source = make_rows(LAYOUT, Spec(room=1, total=5))
    item = keep(manager, source)
    manager._repeats._cache.remember("picture", item.key)
    MooncakeEmbeddingReceiver(manager, "peer:1", 3, sources=("picture",), items=7).start()
    manager._loop._run_calls()
    name, room, peer, _, _, held, items = manager._core.told.pop()
    assert (name, room, peer, held, items) == ("request", 3, "peer:1", (item.key,), 7)


def test_rows_that_are_kept_are_copied_from_there(manager: Any, receiver: MooncakeEmbeddingReceiver) -> None:
    source = make_rows(LAYOUT, Spec(room=1, total=5))
    item = keep(manager, source)
    manager._repeats.look_up(1, (item,))
    lands(manager, 5)
    start, stop = item.runs[0]
    manager._buffers._wide["input_embeddings"][start:stop] = 0  # nobody has written them
    manager._copy_out(CopyOut(1, (0,), 0, 8, max_rows=100, held=(item,)), 1.0)
    assert manager._core.told.pop() == ("copied", 1, 5, 5, 1.0)
    assert receiver.target is not None
    assert difference(LAYOUT, source, receiver.target) is None
    media = sum(last - first for first, last in source.media_runs) - item.rows
    assert receiver.bytes == 5 * (4 + 12 + 16) + 64 + media * 16
    receiver.offered_at = receiver.requested_at
    manager._run([Deliver(room=1, rows=5, rounds=1)], 17.0)
    assert manager.observer.summaries.pop().cached == item.rows


def test_rows_of_another_number_than_are_kept_fail_the_room(manager: Any, receiver: MooncakeEmbeddingReceiver) -> None:
    item = keep(manager, make_rows(LAYOUT, Spec(room=1, total=5)))
    manager._repeats.look_up(1, (item,))
    lands(manager, 5)
    manager._copy_out(CopyOut(1, (0,), 0, 8, max_rows=100, held=(Item(item.key, ((0, 5),)),)), 1.0)
    name, room, flaw, _ = manager._core.told.pop()
    assert (name, room) == ("refuse_rows", 1)
    assert flaw == f"5 rows of an item were left out because they are kept here, but {item.rows} are"


@pytest.mark.parametrize("status", [Status.SUCCESS, Status.FAILED])
def test_a_room_that_is_over_pins_nothing(manager: Any, receiver: MooncakeEmbeddingReceiver, status: Status) -> None:
    item = keep(manager, make_rows(LAYOUT, Spec(room=1, total=5)))
    manager._repeats.look_up(1, (item,))
    assert manager._repeats._cache.held(1, item.key) is not None
    manager._changed(StatusChanged(1, Status.TRANSFERRING, None))
    assert manager._repeats._cache.held(1, item.key) is not None
    manager._changed(StatusChanged(1, status, GONE if status is Status.FAILED else None))
    assert manager._repeats._cache.held(1, item.key) is None


def test_encode_ranks_learn_whether_anything_is_kept() -> None:
    for size, takes in ((None, True), (0, False)):
        opened = open_rank(LAYOUT, RelayConfig(row_cache_bytes=size), HOST, NoPlane())  # type: ignore[arg-type]
        manager = LanguageManager(opened, ranks=1, max_rows=100, limits=LIMITS, observer=Watches())
        assert manager._core._shared.register.handshake.takes_manifest is takes
        manager.close()


def test_what_is_kept_is_forgotten_when_the_scheduler_says_so(manager: Any) -> None:
    keep(manager, make_rows(LAYOUT, Spec(room=1, total=5)))
    assert manager._sizes()["row_cache_items"] == 1
    manager.forget_rows()
    manager._loop._run_calls()
    assert manager._sizes()["row_cache_items"] == 0


# ---- the end


def test_how_a_request_went_is_told(manager: Any, receiver: MooncakeEmbeddingReceiver) -> None:
    receiver.requested_at, receiver.offered_at, receiver.bytes = 10.0, 12.0, 99
    manager._run([Deliver(room=1, rows=5, rounds=3)], 17.0)
    assert manager.observer.summaries == [Summary(rows=5, rounds=3, bytes=99, wait_s=2.0, transfer_s=5.0)]
    assert receiver.rounds == 3


def test_the_scheduler_hears_of_its_rows_before_those_who_watch(
    manager: Any, receiver: MooncakeEmbeddingReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Status] = []
    monkeypatch.setattr(manager.observer, "succeeded", lambda _: told.append(receiver.poll()))
    receiver.offered_at = receiver.requested_at
    manager._run([Deliver(room=1, rows=5, rounds=3), StatusChanged(1, Status.SUCCESS, None)], 17.0)
    assert told == [Status.SUCCESS]


def test_a_room_that_has_failed_keeps_its_reason_and_no_rows(
    manager: Any, receiver: MooncakeEmbeddingReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    lands(manager, 5)
    copy_out(manager, capacity=3)
    with caplog.at_level("INFO"):
        manager._changed(StatusChanged(1, Status.FAILED, GONE))
    assert caplog.messages == [f'relay room=1 status=Failed reason="{GONE}"']
    assert (receiver.poll(), receiver.failure(), receiver.target) == (Status.FAILED, GONE, None)
    assert manager._sizes()["receivers"] == 0


def test_a_room_that_has_failed_and_is_not_known_here_is_no_matter(manager: Any) -> None:
    manager._changed(StatusChanged(9, Status.FAILED, GONE))


def test_a_room_that_has_succeeded_keeps_its_rows(manager: Any, receiver: MooncakeEmbeddingReceiver) -> None:
    lands(manager, 5)
    copy_out(manager)
    manager._changed(StatusChanged(1, Status.TRANSFERRING, None))
    assert manager._sizes()["receivers"] == 1
    manager._changed(StatusChanged(1, Status.SUCCESS, None))
    assert receiver.rows().total == 5
    assert manager._sizes()["receivers"] == 0


def test_nothing_is_kept_when_it_is_over(manager: Any, receiver: MooncakeEmbeddingReceiver) -> None:
    manager._close_helpers()
    assert manager._sizes()["receivers"] == 0
