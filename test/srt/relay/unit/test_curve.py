"""Who is let in: exactly those with our key.

libzmq, which asks, is a list of questions here, and its sockets write down their options. Real connections with right
and wrong keys are in the loopback lane.
"""

from __future__ import annotations

from typing import Any

import pytest
import zmq
from zmq.utils import z85

from embedding_relay.transport import curve
from embedding_relay.transport.curve import Authenticator, Curve

KEY = b"k" * 32
PUBLIC = z85.decode(zmq.curve_public(z85.encode(KEY)))
ANOTHERS = z85.decode(zmq.curve_public(z85.encode(b"x" * 32)))


class Zap:
    """libzmq's end: it asks, and hears."""

    def __init__(self, *questions: list[bytes]) -> None:
        self.questions, self.answers = list(questions), list[list[bytes]]()
        self.options: dict[int, Any] = {}
        self.bound_to, self.closed = "", False

    def recv_multipart(self, flags: int) -> list[bytes]:
        assert flags == zmq.NOBLOCK
        if not self.questions:
            raise zmq.Again
        return self.questions.pop(0)

    def send_multipart(self, answer: list[bytes]) -> None:
        self.answers.append(answer)

    def setsockopt(self, option: int, value: Any) -> None:
        self.options[option] = value

    def bind(self, endpoint: str) -> None:
        self.bound_to = endpoint

    def close(self) -> None:
        self.closed = True


def question(*credentials: bytes, mechanism: bytes = b"CURVE", address: bytes = b"10.0.0.1") -> list[bytes]:
    return [b"1.0", b"7", b"domain", address, b"identity", mechanism, *credentials]


@pytest.mark.parametrize(
    ("asked", "is_let_in"),
    [
        (question(PUBLIC), True),
        (question(ANOTHERS), False),
        (question(PUBLIC, PUBLIC), False),
        (question(), False),
        (question(PUBLIC[:31]), False),
        (question(PUBLIC + b"x"), False),
        (question(b""), False),
        (question(PUBLIC, mechanism=b"NULL"), False),
        (question(PUBLIC, mechanism=b"PLAIN"), False),
    ],
)
def test_only_our_key_proven_by_curve_is_let_in(asked: list[bytes], is_let_in: bool) -> None:
    zap: Any = Zap(asked)
    authenticator = Authenticator(zap, Curve(KEY))
    authenticator.answer()
    [(version, request, status, *_)] = zap.answers
    assert (version, request, status) == (b"1.0", b"7", b"200" if is_let_in else b"400")
    assert len(zap.answers[0]) == 6
    assert authenticator.refused == (0 if is_let_in else 1)
    authenticator.close()
    assert zap.closed


def test_each_address_is_named_once_and_so_many_at_most(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curve, "_MAX_NAMED", 2)
    addresses = (b"10.0.0.1", b"10.0.0.1", b"10.0.0.\xff", b"10.0.0.3", b"10.0.0.4")
    zap: Any = Zap(*(question(ANOTHERS, address=address) for address in addresses))
    authenticator = Authenticator(zap, Curve(KEY))
    authenticator.answer()
    assert authenticator.refused == 5
    assert caplog.messages == [
        "relay control: a client at 10.0.0.1 with another key is refused",
        "relay control: a client at 10.0.0.\ufffd with another key is refused",
    ]


def test_messages_and_timers_get_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve, "_CLIENTS_AT_ONCE", 2)
    zap: Any = Zap(*[question(PUBLIC)] * 3)
    authenticator = Authenticator(zap, Curve(KEY))
    authenticator.answer()
    assert len(zap.answers) == 2
    authenticator.answer()
    assert len(zap.answers) == 3


def test_libzmq_finds_who_answers() -> None:
    zap = Zap()
    context: Any = type("Context", (), {"socket": lambda self, kind: zap if kind == zmq.REP else None})()
    assert Authenticator.open(context, Curve(KEY)).socket is zap  # type: ignore[comparison-overlap]
    assert (zap.bound_to, zap.options) == ("inproc://zeromq.zap.01", {zmq.LINGER: 0})


def test_both_ends_of_a_connection_prove_the_key() -> None:
    secret, public = z85.encode(KEY), z85.encode(PUBLIC)
    listener, client = Zap(), Zap()
    Curve(KEY).require(listener)  # type: ignore[arg-type]
    Curve(KEY).present(client)  # type: ignore[arg-type]
    assert listener.options == {
        zmq.CURVE_SERVER: 1,
        zmq.CURVE_SECRETKEY: secret,
        zmq.ZAP_DOMAIN: b"sglang-embedding-relay",
        zmq.ZAP_ENFORCE_DOMAIN: 1,
    }
    assert client.options == {
        zmq.CURVE_SERVERKEY: public,
        zmq.CURVE_PUBLICKEY: public,
        zmq.CURVE_SECRETKEY: secret,
    }
