"""What the scheduler sees of its rooms. Here, because the manager's module needs torch."""

import select

from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.status import Status
from embedding_relay.threads import WakeUp
from embedding_relay.transport.manager import RoomEnd, StatusBoard

GONE = Failure(503, "gone")


def opened() -> StatusBoard:
    board = StatusBoard()
    board.wakeup.open()
    return board


def follow(board: StatusBoard, room: int) -> RoomEnd:
    end = RoomEnd(room)
    assert board.follow(end)
    return end


def is_readable(wakeup: WakeUp) -> bool:
    return bool(select.select([wakeup.fileno()], [], [], 0)[0])


def test_a_change_wakes_and_is_drained_once() -> None:
    board = opened()
    first, second = follow(board, 1), follow(board, 2)
    assert not is_readable(board.wakeup)
    board.change(2, Status.WAITING_FOR_INPUT)
    board.change(1, Status.WAITING_FOR_INPUT)
    board.change(2, Status.SUCCESS)
    assert is_readable(board.wakeup)
    assert board.drain() == [2, 1]
    assert board.drain() == []
    assert not is_readable(board.wakeup)
    assert (first.poll(), second.poll()) == (Status.WAITING_FOR_INPUT, Status.SUCCESS)
    board.wakeup.close()


def test_a_room_that_ended_leaves_the_board_and_stays_readable() -> None:
    board = opened()
    end = follow(board, 1)
    board.change(1, Status.FAILED, GONE)
    board.change(1, Status.FAILED, Failure(500, "too late"))
    assert (len(board), end.poll(), end.failure()) == (0, Status.FAILED, GONE)
    assert board.status(1) is None
    board.wakeup.close()


def test_a_room_is_followed_once_at_a_time() -> None:
    board = opened()
    kept, refused = follow(board, 1), RoomEnd(1)
    assert not board.follow(refused)
    assert refused.poll() is Status.FAILED
    assert refused.failure() == Failure(409, "room 1 is in use by another request")
    assert kept.poll() is board.status(1) is Status.BOOTSTRAPPING
    assert is_readable(board.wakeup)
    assert board.drain() == [1]
    board.wakeup.close()


def test_when_nobody_will_report_any_more_every_room_ends() -> None:
    board = opened()
    early = follow(board, 1)
    board.fail_all(GONE)
    late = follow(board, 2)
    assert (early.failure(), late.failure()) == (GONE, GONE)
    assert board.drain() == [1, 2]
    assert len(board) == 0
    board.wakeup.close()


def test_setting_a_closed_wakeup_touches_nobody_elses_descriptor() -> None:
    wakeup = WakeUp()
    wakeup.set()
    wakeup.clear()
    wakeup.open()
    wakeup.close()
    wakeup.set()
    wakeup.clear()
    wakeup.close()
    assert wakeup.fileno() == -1
