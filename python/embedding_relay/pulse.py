"""Is the scheduler there? A datagram asks, and a thread of the scheduler's process answers how it is.

A frozen or dead process answers nothing, while the HTTP process in front of it goes on taking requests. The answer
comes from a thread of its own, because the scheduler's may rightly be busy for seconds, and says for how long it has.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Final

import msgspec

from embedding_relay.protocol.errors import SettingError

_LARGEST: Final = 4096
_STOP: Final = b"stop"


class Condition(msgspec.Struct, frozen=True):
    busy_for: float
    """Seconds since the scheduler's loop last came round."""
    illness: str | None = None


def name_of(host: str, port: int) -> str:
    """In Linux's abstract namespace, where nothing is left behind. One server of a machine has this address."""
    return f"\0sglang-embedding-relay/{host}/{port}"


class Pulse:
    """The scheduler's end. `illness` is asked in the answering thread."""

    def __init__(self, name: str, illness: Callable[[], str | None]) -> None:
        self._name = name
        self._illness = illness
        self._turned_at = time.monotonic()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._thread = threading.Thread(target=self._answer, name="relay-pulse", daemon=True)

    def start(self) -> None:
        try:
            self._socket.bind(self._name)
        except OSError as error:
            self._socket.close()
            raise SettingError(f"another server of this machine has the same --host and --port: {error}") from None
        self._thread.start()

    def beat(self) -> None:
        """The scheduler's loop has come round."""
        self._turned_at = time.monotonic()

    def close(self) -> None:
        if not self._thread.is_alive():
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
            last.sendto(_STOP, self._name)
        self._thread.join()
        self._socket.close()

    def _answer(self) -> None:
        while True:
            question, asker = self._socket.recvfrom(_LARGEST)
            if question == _STOP:
                return
            condition = Condition(time.monotonic() - self._turned_at, self._illness())
            with contextlib.suppress(OSError):  # the asker has gone, or does not read
                self._socket.sendto(msgspec.json.encode(condition), socket.MSG_DONTWAIT, asker)


class Asker:
    """The other end: never waits, so that an event loop can own it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind("")  # Linux chooses a name, and the answer comes back to it
        self._connected = False

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self) -> None:
        with contextlib.suppress(OSError):  # nobody is there, or its queue is full: no answer is one too
            if not self._connected:
                self._socket.connect(self._name)  # and nobody else's datagrams are taken
                self._connected = True
            self._socket.send(b"?")

    def answer(self) -> Condition | None:
        """The latest answer that has come in."""
        latest = None
        with contextlib.suppress(OSError):  # nothing more is there, or nobody
            while True:
                latest = msgspec.json.decode(self._socket.recv(_LARGEST), type=Condition)
        return latest

    def close(self) -> None:
        self._socket.close()
