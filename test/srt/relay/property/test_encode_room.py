"""The plan of one encode room over any lengths, windows and offers: every rank gets every row once and in order."""

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.effects import EncodeEffect, Send, TransferEmbeddingChunk
from embedding_relay.protocol.encode.room import Destination, EncodeRoom, Shared
from embedding_relay.protocol.encode.sessions import Sessions
from embedding_relay.protocol.encode.unexpected import UnexpectedRooms
from embedding_relay.protocol.ended import EndedRooms
from embedding_relay.protocol.messages import Address, Item, StatusReport, TransferEmbeddingInfo
from embedding_relay.protocol.status import Status
from embedding_relay.protocol.timing import Alarms, Timing
from support.effort import effort, unhurried
from support.protocol import handshake, only

pytestmark = unhurried


def room_of(total: int, window: int, ranks: int, block_size: int, items: Sequence[Item] = ()) -> EncodeRoom:
    timing = Timing()
    shared = Shared(
        pool=BlockPool(window),
        block_size=block_size,
        timing=timing,
        sessions=Sessions(handshake()),
        alarms=Alarms(),
        unexpected=UnexpectedRooms(timing),
        ended=EndedRooms(timing),
    )
    room = EncodeRoom(7, shared, 0.0)
    room.expect(0.0, items)
    room.status, room.total, room.ready, room.required = Status.WAITING_FOR_INPUT, total, total, ranks
    room.blocks = shared.pool.lease(window, 7)
    room.destinations = {str(rank): Destination(str(rank), Address("l", rank + 1)) for rank in range(ranks)}
    return room


def offer(destination: Destination, rows: int) -> int:
    """For the rows after those for which there is an offer. Return where it ends."""
    first = destination.sent + destination.allocated
    destination.offer(TransferEmbeddingInfo(7, "l", 1, destination.session_id, (0,), 1, first, rows))
    return first + rows


@given(
    total=st.integers(1, 200),
    block_size=st.integers(1, 9),
    window=st.integers(1, 12),
    ranks=st.integers(1, 3),
    data=st.data(),
)
@effort(200)
def test_every_rank_gets_every_row_once_and_in_order(
    total: int, block_size: int, window: int, ranks: int, data: st.DataObject
) -> None:
    room = room_of(total, window, ranks, block_size)
    arrived, reported, aux = (dict.fromkeys(room.destinations, 0) for _ in range(3))
    ends: dict[str, list[int]] = {session_id: [] for session_id in room.destinations}
    staged_rows = 0
    offers = st.integers(1, data.draw(st.sampled_from((3, 30, 300))))
    ahead = st.booleans() if data.draw(st.booleans()) else st.just(False)
    effects: list[EncodeEffect] = []
    while waiting := room.unfinished:
        for destination in waiting:
            if not destination.has_offer or (destination.ahead is None and data.draw(ahead)):
                ends[destination.session_id].append(offer(destination, data.draw(offers)))
        if not only(effects, TransferEmbeddingChunk):
            assert room.can_start_chunk
            effects = room.begin_step()
        [step] = only(effects, TransferEmbeddingChunk)
        assert step.destinations
        assert 1 <= step.window.rows <= window * block_size
        staged_rows += step.window.rows if step.window.stage else 0
        for part in step.destinations:
            assert part.start_row == arrived[part.session_id]
            assert step.window.first_row <= part.start_row < part.stop_row
            assert part.stop_row <= step.window.first_row + step.window.rows
            assert part.first_row == reported[part.session_id]
            arrived[part.session_id] = part.stop_row
            aux[part.session_id] += part.with_aux
            assert not part.with_aux or step.window.first_row == 0, "the aux row is in the block of row 0"
        effects = room.transferred(step.transfer_id, {}, 0.0)
        reports = {effect.to.port - 1: effect.message for effect in only(effects, Send)}
        assert not reports or len(reports) == len(waiting), "all of them have a part in every chunk"
        for rank, report in reports.items():
            assert isinstance(report, StatusReport)
            assert report.rows == arrived[str(rank)] == min(total, ends[str(rank)].pop(0))
            assert (report.status is Status.SUCCESS) == (report.rows == total)
            reported[str(rank)] = report.rows
    assert set(arrived.values()) == {total}
    assert set(aux.values()) == {1}
    if ranks == 1:
        assert staged_rows == total, "no row is staged twice"


@st.composite
def items_of(draw: st.DrawFn, total: int) -> list[Item]:
    """Some with equal keys, some that cannot be kept, some in two runs, and text in between."""
    edges = sorted(draw(st.sets(st.integers(0, total), min_size=2, max_size=12)))
    runs = list(itertools.pairwise(edges))
    keys = st.sampled_from(["", *(f"{number:032x}" for number in range(4))])
    items = []
    while runs:
        count = draw(st.integers(1, 2))
        items.append(Item(draw(keys), tuple(runs[:count])))
        runs = runs[count + draw(st.integers(0, 1)) :]
    return items


@given(
    total=st.integers(2, 120),
    block_size=st.integers(1, 9),
    window=st.integers(1, 12),
    ranks=st.integers(1, 3),
    data=st.data(),
)
@effort(100)
def test_rows_are_written_when_they_are_made_or_left_out_as_promised(
    total: int, block_size: int, window: int, ranks: int, data: st.DataObject
) -> None:
    items = data.draw(items_of(total))
    room = room_of(total, window, ranks, block_size, items)
    room.ready = 0
    written: dict[str, set[int]] = {session_id: set() for session_id in room.destinations}
    left_out: dict[str, set[int]] = {session_id: set() for session_id in room.destinations}
    promised: dict[str, set[str]] = {session_id: set() for session_id in room.destinations}
    held: dict[str, tuple[Item, ...]] = {}
    offers = st.integers(1, data.draw(st.sampled_from((3, 30, 300))))
    effects: list[EncodeEffect] = []
    while waiting := room.unfinished:
        for destination in waiting:
            if not destination.has_offer:
                offer(destination, data.draw(offers))
            if data.draw(st.booleans()):
                keys = data.draw(st.sets(st.sampled_from([f"{number:032x}" for number in range(5)])))
                room.items.promise(destination.session_id, keys)
                promised[destination.session_id] |= keys
        if not only(effects, TransferEmbeddingChunk):
            if not room.can_start_chunk:
                assert room.ready < total, "everything is made, and nothing is written"
                effects = room.more_rows(data.draw(st.integers(room.ready + 1, total)), (), 0.0)
                continue
            effects = room.begin_step()
        [step] = only(effects, TransferEmbeddingChunk)
        assert step.window.first_row + step.window.rows <= room.ready
        for part in step.destinations:
            assert part.stop_row <= room.ready
            out = {row for start, stop in part.left_out for row in range(start, stop)}
            assert out <= set(range(part.start_row, part.stop_row))
            written[part.session_id] |= set(range(part.start_row, part.stop_row)) - out
            left_out[part.session_id] |= out
        effects = room.transferred(step.transfer_id, {}, 0.0)
        for effect in only(effects, Send):
            assert isinstance(effect.message, StatusReport)
            session_id = str(effect.to.port - 1)
            assert set(held.get(session_id, ())) <= set(effect.message.held), "what was held is held"
            held[session_id] = effect.message.held
    for session_id in room.destinations:
        rows = {row for item in held[session_id] for start, stop in item.runs for row in range(start, stop)}
        assert rows == left_out[session_id]
        assert written[session_id] == set(range(total)) - rows
        assert {item.key for item in held[session_id]} <= promised[session_id]
