"""The ZMQ sockets of one control thread: one that listens (PULL), and one per peer to send through (PUSH)."""

from __future__ import annotations

import ipaddress
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
MAX_PEERS: Final = 2048
MAX_SOCKETS: Final = 4 * MAX_PEERS
# Anybody can have answers sent to invented addresses. These share few sockets, and cost no peer with a request its own.
MAX_STRANGERS: Final = 128
_LINGER_MS: Final = 500
_MAX_RECONNECT_MS: Final = 5_000
_MESSAGES_AT_ONCE: Final = 256
# Dropped messages that the log names; the ones after these are only counted.
_MAX_LOGGED_DROPS: Final = 1000


class Listener:
    """Where this rank receives control messages. Opened before the control thread starts, used by that thread only."""

    def __init__(self, bound: zmq.Socket[bytes], address: Address) -> None:
        self.socket = bound
        self.address = address

    @classmethod
    def open(
        cls, context: zmq.Context[zmq.Socket[bytes]], host: str, max_frame: int, curve: Curve | None = None
    ) -> Listener:
        """Listen on any free port of `host`; a larger frame than `max_frame` costs its sender the connection."""
        numeric = numeric_address(host)
        pull = context.socket(zmq.PULL)
        if curve:
            curve.require(pull)
        pull.setsockopt(zmq.LINGER, 0)
        pull.setsockopt(zmq.RCVHWM, _HIGH_WATER)
        pull.setsockopt(zmq.MAXMSGSIZE, max_frame + (OVERHEAD if curve else 0))
        if ":" in numeric:
            pull.setsockopt(zmq.IPV6, 1)
        try:
            pull.bind(f"tcp://{Address(numeric, 0)}")
        except zmq.ZMQError as error:
            pull.close()
            raise SettingError(f"no control port can be opened on {host}: {error}") from None
        endpoint = pull.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        return cls(pull, Address(host, int(endpoint.rstrip(b"\0").rpartition(b":")[2])))

    def messages(self) -> Iterator[tuple[str, list[bytes]]]:
        """What has arrived: (the peer's IP address, frames). Bounded, so that timers get their turn."""
        for _ in range(_MESSAGES_AT_ONCE):
            if not int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:  # a fraction of what an error costs
                return
            try:
                first = self.socket.recv(zmq.NOBLOCK, copy=False)
                others = self.socket.recv_multipart(zmq.NOBLOCK) if first.more else []
            except zmq.Again:  # it was said that there is one
                return
            yield _sender(first), [first.bytes, *others]

    def close(self) -> None:
        self.socket.close()


class PeerSockets:
    """One PUSH socket per peer address, so that messages to one address stay in order."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], curve: Curve | None = None) -> None:
        self._context = context
        self._curve = curve
        self._sockets: OrderedDict[Address, tuple[zmq.Socket[bytes], float]] = OrderedDict()
        """Each with the time of its last message, the longest unused first."""
        self._strangers: OrderedDict[Address, None] = OrderedDict()
        """Those of the addresses that were only ever sent to as strangers."""
        self.dropped = 0

    def send(self, to: Address, frames: Sequence[bytes], now: float, *, to_stranger: bool = False) -> None:
        """A message that cannot be sent is dropped and counted; deadlines end what waits for it."""
        try:
            is_stranger = to_stranger and (to not in self._sockets or to in self._strangers)
            self._strangers.pop(to, None)
            push = self._sockets.pop(to)[0] if to in self._sockets else self._connect(to, is_stranger)
            self._sockets[to] = push, now
            if is_stranger:
                self._strangers[to] = None
            push.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # The peer has not read for long, its address is nonsense, or the process has no more sockets.
            self.dropped += 1
            if self.dropped <= _MAX_LOGGED_DROPS:
                logger.warning("relay: a control message to %s was dropped: %s", to, error)

    def _connect(self, to: Address, is_stranger: bool) -> zmq.Socket[bytes]:
        if is_stranger and len(self._strangers) >= MAX_STRANGERS:
            self._close(next(iter(self._strangers)))
        if len(self._sockets) >= MAX_PEERS:
            self._close(next(iter(self._sockets)))
        push = self._context.socket(zmq.PUSH)
        try:
            self._configure(push, to)
            push.connect(f"tcp://{to}")
        except zmq.ZMQError:
            push.close()
            raise
        return push

    def _configure(self, push: zmq.Socket[bytes], to: Address) -> None:
        push.setsockopt(zmq.LINGER, _LINGER_MS)
        push.setsockopt(zmq.SNDHWM, _HIGH_WATER)
        push.setsockopt(zmq.RECONNECT_IVL_MAX, _MAX_RECONNECT_MS)
        if ":" in to.host:
            push.setsockopt(zmq.IPV6, 1)
        if self._curve:
            self._curve.present(push)

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
        self._strangers.pop(address, None)
        self._sockets.pop(address)[0].close()

    def close(self) -> None:
        for push, _ in self._sockets.values():
            push.close()
        self._sockets.clear()


def numeric_address(host: str) -> str:
    """The IP address of a host of this machine: ZMQ binds to an address or an interface, not to a name."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise SettingError(f"{host} is no address of this machine: {error}") from None


def ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(numeric_address(host))


def _sender(frame: zmq.Frame) -> str:
    try:
        return str(frame.get("Peer-Address"))
    except zmq.ZMQError:
        return "unknown"
