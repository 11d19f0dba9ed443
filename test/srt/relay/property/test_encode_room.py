"""The plan of one encode room over any lengths, windows and offers: every rank gets every row once and in order."""

from hypothesis import given
from hypothesis import strategies as st

from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.effects import Send, TransferEmbeddingChunk
from embedding_relay.protocol.encode.room import Destination, EncodeRoom, Shared
from embedding_relay.protocol.encode.sessions import Sessions
from embedding_relay.protocol.encode.unexpected import UnexpectedRooms
from embedding_relay.protocol.messages import Address, StatusReport, TransferEmbeddingInfo
from embedding_relay.protocol.status import EndedRooms, Status
from embedding_relay.protocol.timing import Alarms, Timing
from support.effort import effort, unhurried
from support.protocol import handshake, only

pytestmark = unhurried


def room_of(total: int, window: int, ranks: int, block_size: int) -> EncodeRoom:
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
    room.status, room.total, room.required = Status.WAITING_FOR_INPUT, total, ranks
    room.blocks = shared.pool.lease(window, 7)
    room.destinations = {str(rank): Destination(str(rank), Address("l", rank + 1)) for rank in range(ranks)}
    return room


def offer(destination: Destination, rows: int) -> None:
    destination.offer(TransferEmbeddingInfo(7, "l", 1, destination.session_id, (0,), 1, destination.sent, rows))


@given(
    total=st.integers(1, 200),
    block_size=st.integers(1, 9),
    window=st.integers(1, 12),
    ranks=st.integers(1, 3),
    data=st.data(),
)
@effort(300)
def test_every_rank_gets_every_row_once_and_in_order(
    total: int, block_size: int, window: int, ranks: int, data: st.DataObject
) -> None:
    room = room_of(total, window, ranks, block_size)
    arrived = dict.fromkeys(room.destinations, 0)
    aux = dict.fromkeys(room.destinations, 0)
    staged_rows = 0
    offers = st.integers(1, data.draw(st.sampled_from((3, 30, 300))))
    while room.unfinished:
        for destination in room.unfinished:
            offer(destination, data.draw(offers))
        assert room.can_start_chunk
        promised = {d.session_id: min(total - d.sent, d.allocated) for d in room.unfinished}
        before = dict(arrived)
        effects = room.begin_step()
        while steps := only(effects, TransferEmbeddingChunk):
            [step] = steps
            assert step.destinations
            assert 1 <= step.window.rows <= window * block_size
            staged_rows += step.window.rows if step.window.stage else 0
            for part in step.destinations:
                assert part.start_row == arrived[part.session_id]
                assert step.window.first_row <= part.start_row < part.stop_row
                assert part.stop_row <= step.window.first_row + step.window.rows
                assert part.first_row == before[part.session_id]
                arrived[part.session_id] = part.stop_row
                aux[part.session_id] += part.with_aux
                assert not part.with_aux or step.window.first_row == 0, "the aux row is in the block of row 0"
            effects = room.transferred(step.transfer_id, {}, 0.0)
        reports = {effect.to.port - 1: effect.message for effect in only(effects, Send)}
        assert reports.keys() == {int(session_id) for session_id in promised}
        for session_id, rows in promised.items():
            report, destination = reports[int(session_id)], room.destinations[session_id]
            assert isinstance(report, StatusReport)
            assert report.rows == arrived[session_id] == before[session_id] + rows
            assert (report.status is Status.SUCCESS) == (report.rows == total)
            assert not destination.has_offer
    assert set(arrived.values()) == {total}
    assert set(aux.values()) == {1}
    if ranks == 1:
        assert staged_rows == total, "no row is staged twice"
