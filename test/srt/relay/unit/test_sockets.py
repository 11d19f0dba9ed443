"""The control sockets: which are kept, which are closed for others, and what is made of messages that cannot be sent.

The sockets here are stand-ins that write down what is done to them: no message leaves. Real ones: the loopback lane.
"""

from __future__ import annotations

from typing import Any

import pytest
import zmq

from embedding_relay.protocol.errors import SettingError
from embedding_relay.protocol.messages import Address
from embedding_relay.transport import sockets
from embedding_relay.transport.sockets import IDLE_SECONDS, Listener, PeerSockets, ip_address, numeric_address

ONE, OTHER, THIRD = (Address("127.0.0.1", port) for port in (1, 2, 3))


class Socket:
    def __init__(self, context: Context, kind: int) -> None:
        self.context, self.kind = context, kind
        self.options: dict[int, int] = {}
        self.sent: list[list[bytes]] = []
        self.inbox: list[Any] = []
        self.endpoint = ""
        self.closed = False

    def setsockopt(self, option: int, value: int) -> None:
        self.options[option] = value

    def getsockopt(self, option: int) -> bytes | int:
        if option == zmq.EVENTS:
            return zmq.POLLIN if self.inbox else 0
        assert option == zmq.LAST_ENDPOINT
        return self.endpoint.replace(":0", ":4321").encode() + b"\0"

    def connect(self, endpoint: str) -> None:
        self.endpoint = endpoint
        if self.context.refuses:
            raise zmq.ZMQError(22)

    bind = connect

    def send_multipart(self, frames: list[bytes], flags: int) -> None:
        assert flags == zmq.NOBLOCK, "the control thread waits for nobody"
        if self.context.full:
            raise zmq.Again
        self.sent.append(frames)

    def recv(self, flags: int, copy: bool) -> Any:
        assert (flags, copy) == (zmq.NOBLOCK, False)
        first, *self.rest = self.inbox.pop(0)
        first.more = bool(self.rest)
        return first

    def recv_multipart(self, flags: int) -> list[bytes]:
        """The rest of the message that has begun."""
        assert flags == zmq.NOBLOCK
        return [frame.bytes for frame in self.rest]

    def close(self) -> None:
        self.closed = True


class Context:
    def __init__(self) -> None:
        self.sockets: list[Socket] = []
        self.refuses = self.full = False

    def socket(self, kind: int) -> Socket:
        self.sockets.append(Socket(self, kind))
        return self.sockets[-1]

    def open_to(self) -> list[str]:
        return [socket.endpoint for socket in self.sockets if not socket.closed]


@pytest.fixture
def context() -> Any:
    return Context()


@pytest.fixture
def peers(context: Any) -> PeerSockets:
    return PeerSockets(context)


def to(*addresses: Address) -> list[str]:
    return [f"tcp://{address}" for address in addresses]


# ---- those to send through


def test_one_socket_for_each_address(peers: PeerSockets, context: Context) -> None:
    for frames in ([b"1"], [b"2"]):
        peers.send(ONE, frames, 0.0)
    peers.send(Address("::1", 1), [b"3"], 0.0)
    assert [socket.sent for socket in context.sockets] == [[[b"1"], [b"2"]], [[b"3"]]]
    assert context.open_to() == ["tcp://127.0.0.1:1", "tcp://[::1]:1"]
    assert len(peers) == 2
    options = {zmq.LINGER: 500, zmq.SNDHWM: 10_000, zmq.RECONNECT_IVL_MAX: 5_000}
    assert [socket.options for socket in context.sockets] == [options, {**options, zmq.IPV6: 1}]
    assert {socket.kind for socket in context.sockets} == {zmq.PUSH}
    peers.close()
    assert context.open_to() == []
    assert len(peers) == 0


def test_the_longest_unused_is_closed_when_there_are_too_many(
    peers: PeerSockets, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "MAX_PEERS", 2)
    for address in (ONE, OTHER, ONE, THIRD):
        peers.send(address, [b""], 0.0)
    assert context.open_to() == to(ONE, THIRD)


def test_an_unused_one_is_closed_in_time(peers: PeerSockets, context: Context) -> None:
    assert peers.next_wakeup() is None
    for address, now in ((ONE, 1.0), (OTHER, 2.0), (ONE, 3.0)):
        peers.send(address, [b""], now)
    assert peers.next_wakeup() == 2.0 + IDLE_SECONDS
    peers.close_idle(2.0 + IDLE_SECONDS - 0.1)
    assert context.open_to() == to(ONE, OTHER)
    peers.close_idle(2.0 + IDLE_SECONDS)
    assert context.open_to() == to(ONE)
    peers.close_idle(3.0 + IDLE_SECONDS)
    assert context.open_to() == []


def test_strangers_cost_each_other_their_sockets_and_nobody_else(
    peers: PeerSockets, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "MAX_STRANGERS", 2)
    peers.send(ONE, [b""], 0.0)
    for port in range(10, 15):
        peers.send(Address("127.0.0.1", port), [b""], 0.0, to_stranger=True)
    assert context.open_to() == [*to(ONE), "tcp://127.0.0.1:13", "tcp://127.0.0.1:14"]
    peers.send(Address("127.0.0.1", 13), [b""], 0.0, to_stranger=True)
    peers.send(Address("127.0.0.1", 15), [b""], 0.0, to_stranger=True)
    assert context.open_to() == [*to(ONE), "tcp://127.0.0.1:13", "tcp://127.0.0.1:15"], "the longest unused"


def test_a_stranger_with_whom_we_have_to_do_is_none_and_who_is_none_never_becomes_one(
    peers: PeerSockets, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "MAX_STRANGERS", 1)
    peers.send(ONE, [b""], 0.0, to_stranger=True)
    peers.send(ONE, [b""], 0.0)
    peers.send(OTHER, [b""], 0.0)
    peers.send(OTHER, [b""], 0.0, to_stranger=True)
    for port in (10, 11):
        peers.send(Address("127.0.0.1", port), [b""], 0.0, to_stranger=True)
    assert context.open_to() == [*to(ONE, OTHER), "tcp://127.0.0.1:11"]


def test_a_stranger_whose_socket_is_closed_for_its_age_is_forgotten(
    peers: PeerSockets, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "MAX_STRANGERS", 1)
    peers.send(ONE, [b""], 0.0, to_stranger=True)
    peers.close_idle(IDLE_SECONDS)
    for _ in range(2):
        peers.send(OTHER, [b""], IDLE_SECONDS, to_stranger=True)
    assert context.open_to() == to(OTHER)


def test_a_message_that_cannot_be_sent_is_dropped_and_so_many_are_named(
    peers: PeerSockets, context: Context, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sockets, "_MAX_LOGGED_DROPS", 2)
    context.full = True
    for _ in range(3):
        peers.send(ONE, [b""], 0.0)
    assert peers.dropped == 3
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("relay: a control message to 127.0.0.1:1 was dropped: ")
    assert context.open_to() == to(ONE)


def test_an_address_that_is_none_leaves_no_socket(peers: PeerSockets, context: Context) -> None:
    context.refuses = True
    peers.send(ONE, [b""], 0.0)
    assert peers.dropped == 1
    assert context.open_to() == []
    assert len(peers) == 0


# ---- the one that listens


@pytest.mark.parametrize(("host", "more"), [("127.0.0.1", {}), ("::1", {zmq.IPV6: 1})])
def test_a_listener(context: Any, host: str, more: dict[int, int]) -> None:
    listener = Listener.open(context, host, 1000)
    assert listener.address == Address(host, 4321)
    (bound,) = context.sockets
    assert bound.kind == zmq.PULL
    assert bound.options == {zmq.LINGER: 0, zmq.RCVHWM: 10_000, zmq.MAXMSGSIZE: 1000, **more}
    listener.close()
    assert bound.closed


def test_a_port_that_cannot_be_opened(context: Any) -> None:
    context.refuses = True
    with pytest.raises(SettingError, match=r"no control port can be opened on 127\.0\.0\.1"):
        Listener.open(context, "127.0.0.1", 1000)
    assert context.open_to() == []


class Frame:
    bytes = b"content"

    def __init__(self, peer: str | None) -> None:
        self._peer = peer

    def get(self, name: str) -> str:
        assert name == "Peer-Address"
        if self._peer is None:
            raise zmq.ZMQError(22)
        return self._peer


def test_so_many_messages_at_once(context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_MESSAGES_AT_ONCE", 2)
    listener = Listener.open(context, "127.0.0.1", 1000)
    context.sockets[0].inbox = [[Frame("10.0.0.1"), Frame("10.0.0.1")], [Frame(None)], [Frame("10.0.0.2")]]
    assert list(listener.messages()) == [("10.0.0.1", [b"content", b"content"]), ("unknown", [b"content"])]
    assert list(listener.messages()) == [("10.0.0.2", [b"content"])]


def test_addresses_of_this_machine() -> None:
    assert numeric_address("127.0.0.1") == "127.0.0.1"
    assert numeric_address("::1") == "::1"
    assert ip_address("127.0.0.1").is_loopback
    with pytest.raises(SettingError, match=r"no-such-host\.invalid is no address of this machine"):
        numeric_address("no-such-host.invalid")
