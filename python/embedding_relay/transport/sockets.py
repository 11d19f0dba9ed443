"""ZMQ sockets of one control thread: a PULL socket that listens, and PUSH sockets that come and go with their peers."""

from __future__ import annotations

import logging
import socket
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

import zmq

from embedding_relay.protocol.errors import SettingError
from embedding_relay.protocol.messages import Address
from embedding_relay.transport.curve import OVERHEAD, Curve

logger = logging.getLogger(__name__)

# A PUSH socket that was silent this long is closed; the next message opens a new one.
IDLE_SECONDS: Final = 60.0
_HIGH_WATER: Final = 10_000
# Beyond this many the longest unused socket is closed; a closed one lingers, so that ZMQ must allow for more of them.
MAX_OUTLETS: Final = 2048
MAX_SOCKETS: Final = 4 * MAX_OUTLETS
# Anybody can invent addresses that answers go to. Those share a few sockets, and take none from who has rooms here.
MAX_COURTESIES: Final = 128
_LINGER_MS: Final = 500
_MAX_RECONNECT_MS: Final = 5_000
_MESSAGES_AT_ONCE: Final = 256
# Then the log has said it often enough.
_MAX_COMPLAINTS: Final = 1000


class Inlet:
    """Where this rank listens. Bound before the control thread starts, used by that thread only."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], host: str, max_frame: int, curve: Curve | None = None
    ) -> None:
        numeric = numeric_address(host)
        self.socket = context.socket(zmq.PULL)
        if curve:
            curve.guard(self.socket)
            max_frame += OVERHEAD
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RCVHWM, _HIGH_WATER)
        self.socket.setsockopt(zmq.MAXMSGSIZE, max_frame)  # a larger frame costs its sender the connection
        if ":" in numeric:
            self.socket.setsockopt(zmq.IPV6, 1)
        try:
            self.socket.bind(f"tcp://{Address(numeric, 0)}")
        except zmq.ZMQError as error:
            self.socket.close()
            raise SettingError(f"no control port can be opened on {host}: {error}") from None
        endpoint = self.socket.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        self.address = Address(host, int(endpoint.rstrip(b"\0").rpartition(b":")[2]))

    def messages(self) -> Iterator[tuple[str, list[bytes]]]:
        """What has arrived: (the peer's IP address, frames). Bounded, so that timers get their turn."""
        for _ in range(_MESSAGES_AT_ONCE):
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            yield _peer(frames[0]), [frame.bytes for frame in frames]

    def close(self) -> None:
        self.socket.close()


class Outlets:
    """One PUSH socket per peer address, so that messages to one address stay in order."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], curve: Curve | None = None) -> None:
        self._context = context
        self._curve = curve
        self._sockets: OrderedDict[Address, tuple[zmq.Socket[bytes], float]] = OrderedDict()
        self._courtesies: OrderedDict[Address, None] = OrderedDict()
        """Those of the addresses that have had nothing but courtesies."""
        self.dropped = 0

    def send(self, to: Address, frames: Sequence[bytes], now: float, *, courtesy: bool = False) -> None:
        """A message that cannot be sent is dropped and counted; deadlines end what waits for it."""
        try:
            is_courtesy = courtesy and (to not in self._sockets or to in self._courtesies)
            self._courtesies.pop(to, None)
            outlet = self._sockets.pop(to)[0] if to in self._sockets else self._connect(to, is_courtesy)
            self._sockets[to] = outlet, now
            if is_courtesy:
                self._courtesies[to] = None
            outlet.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # It has not read for long, its address is nonsense, or strangers have used up the sockets.
            self.dropped += 1
            if self.dropped <= _MAX_COMPLAINTS:
                logger.warning("relay message to %s dropped: %s", to, error)

    def _connect(self, to: Address, is_courtesy: bool) -> zmq.Socket[bytes]:
        if is_courtesy and len(self._courtesies) >= MAX_COURTESIES:
            self._close(next(iter(self._courtesies)))
        if len(self._sockets) >= MAX_OUTLETS:
            self._close(next(iter(self._sockets)))
        outlet = self._context.socket(zmq.PUSH)
        try:
            self._prepare(outlet, to)
        except zmq.ZMQError:
            outlet.close()
            raise
        return outlet

    def _prepare(self, outlet: zmq.Socket[bytes], to: Address) -> None:
        outlet.setsockopt(zmq.LINGER, _LINGER_MS)
        outlet.setsockopt(zmq.SNDHWM, _HIGH_WATER)
        outlet.setsockopt(zmq.RECONNECT_IVL_MAX, _MAX_RECONNECT_MS)
        if ":" in to.host:
            outlet.setsockopt(zmq.IPV6, 1)
        if self._curve:
            self._curve.introduce(outlet)
        outlet.connect(f"tcp://{to}")

    def __len__(self) -> int:
        return len(self._sockets)

    def next_wakeup(self) -> float | None:
        for _, last_used in self._sockets.values():
            return last_used + IDLE_SECONDS
        return None

    def close_idle(self, now: float) -> None:
        while (due := self.next_wakeup()) is not None and due <= now:
            self._close(next(iter(self._sockets)))

    def _close(self, address: Address) -> None:
        self._courtesies.pop(address, None)
        self._sockets.pop(address)[0].close()

    def close(self) -> None:
        for outlet, _ in self._sockets.values():
            outlet.close()
        self._sockets.clear()


def numeric_address(host: str) -> str:
    """ZMQ binds to an IP address or an interface, not to a name."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise SettingError(f"{host} is no address of this machine: {error}") from None


def _peer(frame: zmq.Frame) -> str:
    try:
        return str(frame.get("Peer-Address"))
    except zmq.ZMQError:
        return "unknown"
