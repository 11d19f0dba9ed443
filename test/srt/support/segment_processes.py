"""Processes that share memory with a test: one that writes to it for ever, one that owns some, two that ask in vain."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from embedding_relay.memory import shared_segment
from embedding_relay.memory.copying import CopyThreads
from embedding_relay.memory.plane import Entry
from embedding_relay.memory.shared_segment import NotShared, Segment, attach
from support.forks import fork

SIZE = 1 << 20
NOBODY_WE_KNOW = 12345

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@contextmanager
def process(main: Callable[..., None], *arguments: object) -> Iterator[tuple[BaseProcess, Any]]:
    """The process, and the first thing that it has to say."""
    ours, theirs = fork.Pipe()
    started = fork.Process(target=main, args=(theirs, *arguments), daemon=True)
    started.start()
    theirs.close()
    try:
        assert ours.poll(30)
        yield started, ours.recv()
    finally:
        started.kill()
        started.join()
        started.close()
        ours.close()


def ask_as_another_user(pipe: Connection, name: str) -> None:
    """Without looking at whose memory it is."""
    os.setuid(NOBODY_WE_KNOW)
    shared_segment.is_our_user = lambda _: True
    _ask(pipe, name)


def ask_from_another_network(pipe: Connection, name: str) -> None:
    assert ctypes.CDLL(None).unshare(_NEW_NETWORK) == 0
    _ask(pipe, name)


def _ask(pipe: Connection, name: str) -> None:
    try:
        attach(name, "s1", "a1")
    except NotShared as reason:
        pipe.send(str(reason))
    else:
        pipe.send("mapped")


def write_for_ever(pipe: Connection, name: str, base: int) -> None:
    """Another number each time, over the first half of the memory."""
    source = mmap.mmap(-1, SIZE)
    here, mapped, number = address_of(source), attach(name, "s1", "a1"), 0
    pipe.send("writing")
    while True:
        number += 1
        source[:] = struct.pack("<Q", number) * (SIZE // 8)
        mapped.write([Entry(here, base, SIZE // 2)], CopyThreads(1))


def own(pipe: Connection) -> None:
    segment = Segment()
    memory = segment.allocate(SIZE)
    segment.open("s1", print)
    pipe.send((segment.name, address_of(memory)))
    pipe.recv()
