"""Copies that are divided among threads are whole when they have been waited for, and what fails in one is said."""

import threading
from collections.abc import Iterator, Sequence

import pytest

from embedding_relay.memory import copying
from embedding_relay.memory.copying import CopyThreads

LARGE = 64 << 20


@pytest.fixture
def four() -> Iterator[CopyThreads]:
    threads = CopyThreads(4)
    yield threads
    threads.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("relay-copy")]


@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 5, 7, 64, 65])
def test_every_piece_is_copied_once_in_groups_of_neighbours(four: CopyThreads, pieces: int) -> None:
    groups: list[list[int]] = []
    four.run(lambda group: groups.append(list(group)), range(pieces), LARGE)
    assert sorted(piece for group in groups for piece in group) == list(range(pieces))
    assert len(groups) == min(4, -(-pieces // -(-pieces // 4)))
    assert all(group == list(range(group[0], group[-1] + 1)) for group in groups)


def test_the_groups_run_beside_each_other(four: CopyThreads) -> None:
    meeting = threading.Barrier(4)
    four.run(lambda group: meeting.wait(10) and None, range(4), LARGE)


def test_little_is_copied_by_the_thread_that_asks(four: CopyThreads) -> None:
    seen: list[tuple[threading.Thread, int]] = []
    four.run(lambda group: seen.append((threading.current_thread(), len(group))), range(9), LARGE // 64)
    assert seen == [(threading.current_thread(), 9)]


@pytest.mark.parametrize("broken", [0, 3])
def test_a_failure_is_raised_when_nobody_copies_any_more(four: CopyThreads, broken: int) -> None:
    ended: list[int] = []
    slow = threading.Event()

    def copy(group: Sequence[int]) -> None:
        if broken in group:
            slow.set()
            raise MemoryError("none left")
        assert slow.wait(10)
        ended.extend(group)

    with pytest.raises(MemoryError, match="none left"):
        four.run(copy, range(4), LARGE)
    assert sorted(ended) == [piece for piece in range(4) if piece != broken]


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (7, 1), (8, 2), (16, 4), (128, 4)])
def test_a_machine_with_few_cores_copies_with_one_thread(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    monkeypatch.setattr(copying, "usable_cores", lambda: cores)
    made = CopyThreads()
    groups: list[int] = []
    made.run(lambda group: groups.append(len(group)), range(16), LARGE)
    made.close()
    assert len(groups) == threads
