"""CURVE on the control sockets: one key pair for all who have the secret, and the check that lets in no other key."""

from __future__ import annotations

import hmac
import logging
from typing import Final

import zmq
from zmq.utils import z85

logger = logging.getLogger(__name__)

_ZAP: Final = "inproc://zeromq.zap.01"
_DOMAIN: Final = b"sglang-embedding-relay"
_MAX_NAMED: Final = 1000
_CLIENTS_AT_ONCE: Final = 256

# What a CURVE message is longer than its content by, generously: a name, a nonce, flags, an authenticator.
OVERHEAD: Final = 64


class Curve:
    """The key pair. Whoever can make it has the secret, so each rank uses it as its server's key and its client's."""

    def __init__(self, key: bytes) -> None:
        self._secret = z85.encode(key)
        self._public = zmq.curve_public(self._secret)

    def require(self, listener: zmq.Socket[bytes]) -> None:
        """Before `bind`: only clients that the authenticator accepts, and none at all while there is none."""
        listener.setsockopt(zmq.CURVE_SERVER, 1)
        listener.setsockopt(zmq.CURVE_SECRETKEY, self._secret)
        listener.setsockopt(zmq.ZAP_DOMAIN, _DOMAIN)
        listener.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    def present(self, client: zmq.Socket[bytes]) -> None:
        """Before `connect`: prove that we have this key, and accept no server without it."""
        client.setsockopt(zmq.CURVE_SERVERKEY, self._public)
        client.setsockopt(zmq.CURVE_PUBLICKEY, self._public)
        client.setsockopt(zmq.CURVE_SECRETKEY, self._secret)

    def is_ours(self, public: bytes) -> bool:
        return hmac.compare_digest(z85.encode(public) if len(public) == 32 else b"", self._public)


class Authenticator:
    """Answers libzmq (its authentication protocol ZAP, RFC 27) about each client that has proven which key it holds.

    To know the server's key is not enough. It is made from the secret and never sent, but a public key is treated by
    everyone, libzmq's logs and captures included, as something that may be seen.
    It runs in the control thread, between messages: no thread of its own that could die.
    """

    def __init__(self, zap: zmq.Socket[bytes], curve: Curve) -> None:
        self.socket = zap
        self._curve = curve
        self._named: set[bytes] = set()
        self.refused = 0

    @classmethod
    def open(cls, context: zmq.Context[zmq.Socket[bytes]], curve: Curve) -> Authenticator:
        """Before any listener of the same context: libzmq looks for it when a client arrives."""
        zap = context.socket(zmq.REP)
        zap.setsockopt(zmq.LINGER, 0)
        zap.bind(_ZAP)
        return cls(zap, curve)

    def answer(self) -> None:
        """Answer the questions that have come in. Bounded, so that messages and timers get their turn."""
        for _ in range(_CLIENTS_AT_ONCE):
            try:
                asked = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            version, request, _domain, address, _identity, mechanism, *credentials = asked
            if mechanism == b"CURVE" and len(credentials) == 1 and self._curve.is_ours(credentials[0]):
                self.socket.send_multipart([version, request, b"200", b"OK", b"relay", b""])
            else:
                self._note_refused(address)
                self.socket.send_multipart([version, request, b"400", b"a key that is not ours", b"", b""])

    def _note_refused(self, address: bytes) -> None:
        """Counted each time, named in the log once per address."""
        self.refused += 1
        if address not in self._named and len(self._named) < _MAX_NAMED:
            self._named.add(address)
            logger.warning(
                "relay control: a client at %s with another key is refused", address.decode(errors="replace")
            )

    def close(self) -> None:
        self.socket.close()
