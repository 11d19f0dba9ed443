"""What a Mooncake engine looks like from outside, for tests of peers that do what no real engine can be made to do.

It answers at a handshake port and acknowledges writes at a data port. It writes nothing to memory, takes one connection
at a time, and knows no other message than these two.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any, Final

_LENGTH: Final = struct.Struct("<Q")
_HEADER: Final = struct.Struct("<QQB7x")  # length, address, what to do
_DONE: Final = struct.pack("<Q", 0x4D435456 << 32)
_RESET: Final = struct.pack("ii", 1, 0)


class EngineStandIn:
    """Listens in this process. What a test changes in `says` holds for the next question."""

    def __init__(self, host: str) -> None:
        self.says: dict[str, Any] = {"name": "stand-in", "protocol": "tcp", "tcp_proto_version": 2}
        self.acknowledges = True
        self.has_left_unread = threading.Event()
        """It has begun to read a write that it does not acknowledge, and stopped."""
        self.connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._handshake = self._listen(host, self._answer)
        self._data = self._listen(host, self._take)
        self.says["tcp_data_port"] = self._data.getsockname()[1]
        self.says["buffers"] = [{"name": "stand-in", "addr": 4096, "length": 1 << 30}]
        self.session_id = f"{host}:{self._handshake.getsockname()[1]}"

    def _listen(self, host: str, serve: Callable[[socket.socket], None]) -> socket.socket:
        listener = socket.create_server((host, 0))

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with contextlib.suppress(OSError, struct.error):
                    serve(connection)

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        self._threads.append(thread)
        return listener

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            (length,) = _LENGTH.unpack(connection.recv(_LENGTH.size, socket.MSG_WAITALL))
            connection.recv(length, socket.MSG_WAITALL)
            answer = b"\x01" + json.dumps(self.says).encode()
            connection.sendall(_LENGTH.pack(len(answer)) + answer)

    def _take(self, connection: socket.socket) -> None:
        while True:
            header = connection.recv(_HEADER.size, socket.MSG_WAITALL)
            if len(header) < _HEADER.size:
                connection.close()
                return  # only tried out
            if connection not in self.connections:
                self.connections.append(connection)
            if not self.acknowledges:
                self.has_left_unread.set()
                return
            length, _, _ = _HEADER.unpack(header)
            while length:
                length -= len(connection.recv(min(length, 1 << 20)))
            connection.sendall(_DONE)

    # ---- what happens to it

    def stop_listening(self, *, at_handshake: bool = True) -> None:
        for listener in (self._data, self._handshake) if at_handshake else (self._data,):
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
            listener.close()

    def read_to_the_end(self) -> None:
        for connection in self.connections:
            while connection.recv(1 << 20):
                pass
            connection.close()

    def reset(self) -> None:
        """As something in between does: whoever has the other end learns nothing about what was read."""
        for connection in self.connections:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            connection.close()

    def close(self) -> None:
        self.stop_listening()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # somebody may be waiting for what comes next
            connection.close()
        for thread in self._threads:
            thread.join(10)
