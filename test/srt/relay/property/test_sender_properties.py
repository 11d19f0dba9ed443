"""The plan of one encode room over any lengths, windows and offers: every rank gets every row once and in order."""

from hypothesis import given
from hypothesis import strategies as st

from embedding_relay.protocol.encode.room import Destination, SenderRoom
from embedding_relay.protocol.messages import Address, TransferEmbeddingInfo
from embedding_relay.protocol.status import Status
from support.effort import effort, unhurried

pytestmark = unhurried


def room_of(total: int, window: int, ranks: int) -> SenderRoom:
    room = SenderRoom(7)
    room.status, room.total, room.required = Status.WAITING_FOR_INPUT, total, ranks
    room.blocks = tuple(range(window))
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
    room = room_of(total, window, ranks)
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
        while step := room.begin_step(block_size):
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
            room.note_written(room.end_step(step.transfer_id))
        for destination in room.unfinished:
            report = room.report_chunk(destination)
            assert report.rows == arrived[destination.session_id]
            assert arrived[destination.session_id] == before[destination.session_id] + promised[destination.session_id]
            assert (report.status is Status.SUCCESS) == (report.rows == total)
            assert not destination.has_offer
    assert set(arrived.values()) == {total}
    assert set(aux.values()) == {1}
    if ranks == 1:
        assert staged_rows == total, "no row is staged twice"
