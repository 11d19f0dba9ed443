"""Memory that is used again: how much is kept, and for whom."""

from embedding_relay.memory.reuse import ReusedMemory


def test_no_more_is_kept_than_was_asked_for() -> None:
    memory = ReusedMemory(3 << 20)
    taken = [memory.take(1 << 20) for _ in range(5)]
    assert memory.kept == 0
    taken.clear()
    assert memory.kept == 3 << 20
    large = memory.take(4 << 20)
    del large
    assert memory.kept == 3 << 20, "one that is larger than all is not kept at all"
    memory.clear()
    assert memory.kept == 0
    last = memory.take(1 << 20)
    del last
    assert memory.kept == 0


def test_a_small_request_does_not_take_the_memory_of_a_large_one() -> None:
    memory = ReusedMemory(1 << 30)
    large = memory.take(64 << 20)
    del large
    small = memory.take(2 << 20)
    assert memory.kept == 64 << 20
    fitting = memory.take(60 << 20)
    assert memory.kept == 0
    assert (small.numel(), fitting.numel()) == (2 << 20, 60 << 20)
