"""A thread that asks Linux for short slices has them, and is otherwise what it was."""

import ctypes
import os
import platform
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest

from embedding_relay import threads

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}
SIZE = 48


def attributes() -> tuple[int, int, int]:
    """Of this thread: its policy, its niceness and its slice in ns, which is 0 where the kernel knows none."""
    buffer = ctypes.create_string_buffer(SIZE)
    assert ctypes.CDLL(None).syscall(SCHED_GETATTR[platform.machine()], 0, buffer, SIZE, 0) == 0
    _, policy, _, nice, _, slice_ns, _, _ = struct.unpack("=IIQiIQQQ", buffer.raw)
    return policy, nice, slice_ns


def in_a_thread(nice: int, policy: int = os.SCHED_OTHER) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """What a thread is before and after it has asked."""

    def work() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        os.setpriority(os.PRIO_PROCESS, 0, nice)
        os.sched_setscheduler(0, policy, os.sched_param(0))
        before = attributes()
        threads.ask_for_short_slices()
        return before, attributes()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@pytest.mark.parametrize("more", [0, 5])
def test_only_the_slice_changes(more: int) -> None:
    before, after = in_a_thread(os.getpriority(os.PRIO_PROCESS, 0) + more)
    assert after[:2] == before[:2]
    assert after[2] == (threads._SLICE_NS if before[2] else 0)
    assert after[2] <= before[2], "it is a shorter one"


def test_another_policy_is_somebody_elses_decision() -> None:
    before, after = in_a_thread(os.getpriority(os.PRIO_PROCESS, 0), os.SCHED_BATCH)
    assert before == after


def test_a_machine_of_another_kind_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = attributes()
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "riscv64")
        threads.ask_for_short_slices()
    assert attributes() == before


def test_threads_that_it_starts_have_it_too() -> None:
    def work() -> tuple[int, int, int]:
        threads.ask_for_short_slices()
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(attributes).result()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == in_a_thread(os.getpriority(os.PRIO_PROCESS, 0))[1]


def test_a_system_without_such_calls_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> int:
        raise OSError("not implemented")

    before = attributes()
    monkeypatch.setattr(os, "sched_getscheduler", unknown)
    threads.ask_for_short_slices()
    assert attributes() == before
