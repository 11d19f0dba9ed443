"""The recorders of an instance's processes, asked by one of them: datagrams between processes of one user."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
from typing import Final

import msgspec

from embedding_relay.memory.shared_segment import NotShared, check_user
from embedding_relay.pulse import socket_name
from embedding_relay.recorder import Moment, Recorder

logger = logging.getLogger(__name__)

MOST_REQUESTS: Final = 50
_LARGEST: Final = 1 << 17
_CREDENTIALS: Final = struct.Struct("iII")  # of the process that has sent a datagram, as the kernel notes them
_ROOT: Final = 0
_PATIENCE: Final = 2.0


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Either about one room, or which the latest are."""

    room: int | None = None
    latest: int = 0


class Answer(msgspec.Struct, frozen=True):
    rooms: list[tuple[int, float]] = []
    """The latest, with the time of their first moment."""
    moments: list[Moment] = []
    """Of the room that was asked about."""


def name_of_scheduler(host: str, port: int, dp_rank: int = 0) -> str:
    return f"{socket_name(host, port, dp_rank)}/moments"


def name_of_http_process(host: str, port: int, number: int = 0) -> str:
    """An instance may have several (`--tokenizer-worker-num`): each takes the first number that is free."""
    return f"{socket_name(host, port)}/http/{number}/moments"


class Teller:
    """Answers for the recorder of its process, in a thread that sleeps until somebody asks."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._socket: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._closing = False

    def start(self, *names: str) -> None:
        """Under the first of these names that is free."""
        if not self._recorder.is_on:
            return
        try:
            check_user()
            self._socket = _bound_to_first(names)
        except (NotShared, OSError) as error:
            logger.warning("relay: no trace of requests can be read from this process: %s", error)
            return
        self._thread = threading.Thread(target=self._answer, args=(self._socket,), name="relay-trace", daemon=True)
        self._thread.start()

    def close(self) -> None:
        if self._thread is None or self._socket is None or not self._thread.is_alive():
            return
        self._closing = True
        with _datagram_socket() as last:
            last.sendto(b"", self._socket.getsockname())
        self._thread.join()

    def _answer(self, bound: socket.socket) -> None:
        with bound:
            while True:
                question, asker, is_ours = _receive(bound)
                if self._closing:
                    return
                if not is_ours:
                    continue
                # No question, the asker has gone, or something of SGLang's cannot be read: the next one is answered.
                with contextlib.suppress(Exception):
                    answer = self._answer_to(msgspec.json.decode(question, type=Question))
                    bound.sendto(msgspec.json.encode(answer), socket.MSG_DONTWAIT, asker)

    def _answer_to(self, question: Question) -> Answer:
        if question.room is not None:
            return Answer(moments=self._recorder.moments(question.room))
        return Answer(rooms=self._recorder.latest(min(question.latest, MOST_REQUESTS)))


def ask(name: str, question: Question, patience: float = _PATIENCE) -> Answer | None:
    """None if no process of this user answers under this name. Waits, so it is for a thread that may."""
    with _datagram_socket() as asking, contextlib.suppress(OSError, msgspec.MsgspecError):
        asking.settimeout(patience)
        asking.bind("")  # Linux chooses a name, and the answer comes back to it
        asking.connect(name)
        asking.send(msgspec.json.encode(question))
        answer, _, is_ours = _receive(asking)
        return msgspec.json.decode(answer, type=Answer) if is_ours else None
    return None


def _datagram_socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return made


def _bound_to_first(names: tuple[str, ...]) -> socket.socket:
    made = _datagram_socket()
    problem = OSError("it has no name")
    for name in names:
        try:
            made.bind(name)
            return made
        except OSError as error:
            problem = error
    made.close()
    raise problem


def _receive(where: socket.socket) -> tuple[bytes, str, bool]:
    """What somebody said, who, and whether that is a process of our own user or root's."""
    said, notes, _, sender = where.recvmsg(_LARGEST, socket.CMSG_SPACE(_CREDENTIALS.size))
    users = [
        _CREDENTIALS.unpack(note)[1]
        for level, kind, note in notes
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
    ]
    return said, sender, users in ([os.geteuid()], [_ROOT])
