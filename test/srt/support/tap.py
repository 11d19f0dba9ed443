"""Somebody on the way between two TCP peers: passes every byte on, and keeps a copy."""

from __future__ import annotations

import contextlib
import socket
import threading

from embedding_relay.protocol.messages import Address


class Tap:
    def __init__(self, to: Address) -> None:
        self._to = to
        self._ends: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.said = bytearray()
        """By those who connected."""
        self.answered = bytearray()
        self._listener = socket.create_server((to.host, 0))
        self.address = Address(to.host, self._listener.getsockname()[1])
        self._start(self._accept)

    def _start(self, work: object, *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, name="tap")  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection((self._to.host, self._to.port))
                self._ends += [near, far]
                self._start(_pass_on, near, far, self.said)
                self._start(_pass_on, far, near, self.answered)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # ends accept(), which a close does not
        self._threads[0].join()
        for end in self._ends:
            with contextlib.suppress(OSError):  # its peer has ended it
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()
        for end in (self._listener, *self._ends):
            end.close()

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pass_on(source: socket.socket, target: socket.socket, copy: bytearray) -> None:
    with contextlib.suppress(OSError):  # either end may go first
        while part := source.recv(65536):
            copy += part
            target.sendall(part)
        target.shutdown(socket.SHUT_WR)
