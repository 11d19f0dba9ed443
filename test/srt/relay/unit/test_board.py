"""What the scheduler sees of its rooms."""

import select

from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.status import Status
from embedding_relay.transport.board import Board
from embedding_relay.transport.wakeup import WakeUp

GONE = Failure(503, "gone")


def opened() -> Board:
    board = Board()
    board.wakeup.open()
    return board


def is_readable(wakeup: WakeUp) -> bool:
    return bool(select.select([wakeup.fileno()], [], [], 0)[0])


def test_a_change_wakes_and_is_drained_once() -> None:
    board = opened()
    first, second = board.open(1), board.open(2)
    assert first is not None
    assert second is not None
    assert not is_readable(board.wakeup)
    board.change(2, Status.WAITING_FOR_INPUT)
    board.change(1, Status.WAITING_FOR_INPUT)
    board.change(2, Status.SUCCESS)
    assert is_readable(board.wakeup)
    assert board.drain() == [2, 1]
    assert board.drain() == []
    assert not is_readable(board.wakeup)
    assert (first.status, second.status) == (Status.WAITING_FOR_INPUT, Status.SUCCESS)
    board.wakeup.close()


def test_a_room_that_ended_leaves_the_board_and_stays_readable() -> None:
    board = opened()
    notice = board.open(1)
    assert notice is not None
    board.change(1, Status.FAILED, GONE)
    board.change(1, Status.FAILED, Failure(500, "too late"))
    assert (len(board), notice.status, notice.failure) == (0, Status.FAILED, GONE)
    board.wakeup.close()


def test_a_room_is_followed_once_at_a_time() -> None:
    board = opened()
    kept = board.open(1)
    assert board.open(1) is None
    refused = board.refused(1, GONE)
    assert (refused.status, refused.failure) == (Status.FAILED, GONE)
    assert kept is not None
    assert kept.status is Status.BOOTSTRAPPING
    assert board.drain() == [1]
    board.wakeup.close()


def test_when_nobody_will_report_any_more_every_room_ends() -> None:
    board = opened()
    early = board.open(1)
    board.fail_all(GONE)
    late = board.open(2)
    assert early is not None
    assert late is not None
    assert (early.failure, late.failure) == (GONE, GONE)
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
