"""The ranks of one instance: how the first hears what became of a room on the others, and when all have it.

SGLang gives every rank of an instance the same messages in the same order. Each language rank receives the rows of a
room for itself, and one may be slower than another or fail alone; so the first rank decides for all of them, when it
knows how the room ended on each, and says so in that stream of messages. This module carries what the others say to it.
It is about one instance: the protocol between an encode and a language instance knows nothing of it.
"""

from __future__ import annotations

import hmac
import logging
import secrets
import threading
from collections.abc import Iterator
from typing import Annotated, Final

import msgspec
import zmq

from embedding_relay.protocol.errors import INTERNAL, Failure
from embedding_relay.protocol.messages import Address
from embedding_relay.transport.curve import Authenticator, Curve
from embedding_relay.transport.sockets import Listener

logger = logging.getLogger(__name__)

_LONGEST_FRAME: Final = 64 * 1024
_LINGER_MS: Final = 500

# ---- when a room has ended


class RoomEnded(msgspec.Struct, frozen=True, tag=True):
    """On one rank: well, if there is no failure. `number` counts the rooms that the instance has asked for."""

    number: int
    failure: Failure | None = None


class Unhealthy(msgspec.Struct, frozen=True, tag=True):
    """A rank has lost something that it cannot work without, and the instance with it."""

    reason: str


Report = RoomEnded | Unhealthy


class _Said(msgspec.Struct, frozen=True):
    rank: Annotated[int, msgspec.Meta(ge=0)]
    report: Report


class Agreement:
    """Of all ranks about each room: it has ended well when it has on every rank, and badly as soon as it has on one.

    Every room is decided: each rank ends its own within a deadline, and says so. Should that word be lost, or the rank
    have stopped, the room fails for all when it has been over on another for `patience` seconds.
    """

    def __init__(self, ranks: int, patience: float) -> None:
        self._everyone = frozenset(range(ranks))
        self._patience = patience
        self._well: dict[int, set[int]] = {}
        """By room: the ranks on which it has ended well. The rooms that wait longest come first."""
        self._give_up_at: dict[int, float] = {}
        self._decided: dict[int, Failure | None] = {}

    def begin(self, number: int) -> None:
        self._well[number] = set()

    def hear(self, rank: int, ended: RoomEnded, now: float) -> None:
        """What is said about a room that is decided, or was never asked for, changes nothing."""
        if (well := self._well.get(ended.number)) is None:
            return
        if ended.failure is not None:
            self._decide(ended.number, ended.failure)
            return
        well.add(rank)
        if well == self._everyone:
            self._decide(ended.number, None)
        else:
            self._give_up_at.setdefault(ended.number, now + self._patience)

    def _decide(self, number: int, failure: Failure | None) -> None:
        del self._well[number]
        self._give_up_at.pop(number, None)
        self._decided[number] = failure

    def take_decided(self, now: float) -> tuple[tuple[int, Failure | None], ...]:
        """What was decided since the last call, in that order."""
        for number in [late for late, at in self._give_up_at.items() if at <= now]:
            missing = ", ".join(map(str, sorted(self._everyone - self._well[number])))
            text = f"rank {missing} of the language instance has not said within {self._patience:g} s that it has"
            self._decide(number, Failure(INTERNAL, f"{text} the rows that another rank has"))
        decided, self._decided = tuple(self._decided.items()), {}
        return decided

    def __len__(self) -> int:
        return len(self._well)


# ---- how the first rank hears of it


class Meeting(msgspec.Struct, frozen=True):
    """Where the first rank listens, and the word by which it knows its own ranks. Sent over SGLang's own connections
    between the processes of an instance, and to nobody else.
    """

    address: Address
    word: str


class Reports:
    """The first rank's end. Used by one thread, which polls `sockets` if it wants to sleep."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], listener: Listener, authenticator: Authenticator | None
    ) -> None:
        self._context = context
        self._listener = listener
        self._authenticator = authenticator
        self._word = secrets.token_hex(32)
        self.refused = 0
        """Messages of others, or that are none."""

    @classmethod
    def open(cls, host: str, key: bytes | None = None) -> Reports:
        """On any free port of `host`, which the other ranks can reach; with a `key`, encrypted."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            curve = Curve(key) if key else None
            authenticator = Authenticator.open(context, curve) if curve else None
            return cls(context, Listener.open(context, host, _LONGEST_FRAME, curve), authenticator)
        except BaseException:
            context.destroy(linger=0)
            raise

    @property
    def meeting(self) -> Meeting:
        return Meeting(self._listener.address, self._word)

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        return [self._listener.socket, *([self._authenticator.socket] if self._authenticator else [])]

    def drain(self) -> Iterator[tuple[int, Report]]:
        """What has arrived, with the rank that says it."""
        if self._authenticator:
            self._authenticator.answer()
        for _, frames in self._listener.messages():
            said = self._read(frames)
            if said is None:
                self.refused += 1
            else:
                yield said.rank, said.report

    def _read(self, frames: list[bytes]) -> _Said | None:
        if len(frames) != 2 or not hmac.compare_digest(frames[0], self._word.encode()):
            return None
        try:
            return msgspec.json.decode(frames[1], type=_Said)
        except msgspec.DecodeError:
            return None

    def close(self) -> None:
        self._context.destroy(linger=0)


class Reporter:
    """Another rank's end. Any thread may use it: a rank whose control thread has died must still say so."""

    def __init__(self, meeting: Meeting, rank: int, key: bytes | None = None) -> None:
        self._meeting = meeting
        self._rank = rank
        self._curve = Curve(key) if key else None
        self._lock = threading.Lock()
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._push: zmq.Socket[bytes] | None = None

    def start(self) -> None:
        self._context = zmq.Context()
        push = self._push = self._context.socket(zmq.PUSH)
        push.setsockopt(zmq.LINGER, _LINGER_MS)
        push.setsockopt(zmq.SNDHWM, 0)  # one report for each room that waits: their number is bounded
        if ":" in self._meeting.address.host:
            push.setsockopt(zmq.IPV6, 1)
        if self._curve:
            self._curve.present(push)
        push.connect(f"tcp://{self._meeting.address}")

    def say(self, report: Report) -> None:
        """Never waits. Lost if the first rank has ended, and the instance with it."""
        said = msgspec.json.encode(_Said(self._rank, report))
        with self._lock:
            if self._push is None:
                return
            try:
                self._push.send_multipart([self._meeting.word.encode(), said], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                logger.error("relay: the first rank of this instance cannot be told of %s: %s", report, error)

    def close(self) -> None:
        with self._lock:
            if self._context is not None:
                self._context.destroy(linger=_LINGER_MS)
            self._context = self._push = None
