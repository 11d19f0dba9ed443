"""Ranks of one host that share rows, without a transfer: what one has received, and processes that borrow or lend."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from embedding_relay.memory.buffers import ReceivedRows, bytes_for, rows_in
from embedding_relay.memory.device import HOST
from embedding_relay.memory.layout import Aux, BufferLayout
from embedding_relay.memory.shared_rows import Borrower, Lender
from support.forks import fork
from support.loopback import small_layout

LAYOUT = small_layout()
LIMIT = 8 << 20


def until(condition: Callable[[], bool], patience: float = 30.0) -> None:
    """For what another thread does within microseconds."""
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.0005)


def filled(lender: Lender, total: int, value: int, layout: BufferLayout = LAYOUT) -> ReceivedRows:
    """A request of so many rows in the lender's memory, all of them this value."""
    aux = Aux(total, mrope_delta=-value, has_mrope=True, media_items=value)
    rows = rows_in(lender.take(bytes_for(total, layout)), aux, layout)
    for column in rows.columns:
        column.fill_(value)
    return rows


def is_all(rows: ReceivedRows, value: int) -> bool:
    return all(bool((column == value).all()) for column in rows.columns)


@dataclass
class Heard:
    """What a borrower was given, and has not let go."""

    rows: dict[int, ReceivedRows] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)

    def give(self, number: int, rows: ReceivedRows) -> None:
        self.rows[number] = rows

    def wait_for(self, number: int) -> ReceivedRows:
        until(lambda: number in self.rows)
        return self.rows[number]


# ---- other processes


def _connected(name: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(name)
    return connection


def borrow_for_ever(pipe: Connection, name: str) -> None:
    heard = Heard()
    borrower = Borrower(_connected(name), LAYOUT, HOST)
    borrower.start(heard.give, pipe.send)
    pipe.send(is_all(heard.wait_for(0), 7))
    threading.Event().wait()


def lend_for_ever(_: Connection, name: str) -> None:
    lender = Lender({1: _connected(name)}, LIMIT)
    lender.start(lambda: None, print)
    lender.lend(0, filled(lender, 100, 7))
    threading.Event().wait()


@contextmanager
def other_process(main: Callable[[Connection, str], None]) -> Iterator[tuple[Any, Any, socket.socket]]:
    """The process, its pipe, and our end of the connection."""
    name = f"\0relay-test-{secrets.token_hex(8)}"
    pipe, theirs = fork.Pipe()
    with closing(pipe), closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as listener:
        listener.bind(name)
        listener.listen()
        process = fork.Process(target=main, args=(theirs, name), daemon=True)
        process.start()
        theirs.close()
        try:
            connection, _ = listener.accept()
            yield process, pipe, connection
        finally:
            process.kill()
            process.join()
            process.close()
