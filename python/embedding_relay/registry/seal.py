"""Seals (HMAC) on requests to the bootstrap registry and on its answers: for this registry, now, and only once."""

from __future__ import annotations

import dataclasses
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from embedding_relay.config import SECRET_FILE
from embedding_relay.protocol.messages import Address

TIME: Final = "Relay-Time"
NONCE: Final = "Relay-Nonce"
TO: Final = "Relay-To"
SEAL: Final = "Relay-Seal"

# How far two clocks may be apart, and so how long a request can be used by whoever overheard it.
WINDOW_NS: Final = 60 * 10**9
# Requests with a good seal only: nobody without the secret can fill this.
_MAX_REMEMBERED: Final = 100_000


@dataclasses.dataclass(frozen=True)
class Request:
    method: str
    path: str
    body: bytes
    to: str = ""
    """Where it was sent, or has arrived. An announcement is for one registry; a question may go to any: then empty."""


def destination(socket_address: Sequence[Any] | None) -> str:
    """The `to` of a request, from an address as sockets give it, with two parts or four."""
    return str(Address(*socket_address[:2])) if socket_address else ""


def seal_request(key: bytes, request: Request, now_ns: int) -> dict[str, str]:
    """The headers that go with it."""
    time, nonce = str(now_ns), secrets.token_hex(16)
    return {TIME: time, NONCE: nonce, TO: request.to, SEAL: _request_seal(key, request, time, nonce)}


def is_sealed_answer(key: bytes, nonce: str, status: int, body: bytes, seal: str) -> bool:
    """Whether somebody with the secret gave this answer to the request with this nonce."""
    return _equal(seal, seal_answer(key, nonce, status, body))


def seal_answer(key: bytes, nonce: str, status: int, body: bytes) -> str:
    return _seal(key, b"answer", nonce.encode(), str(status).encode(), body)


class SealCheck:
    """The registry's side: which requests are answered. It owns no clock."""

    def __init__(self, key: bytes, started_ns: int) -> None:
        self._key = key
        self._started_ns = started_ns
        self._seen: OrderedDict[str, int] = OrderedDict()
        """Nonces, oldest first, and until when a request with them could come again."""

    def refusal(self, request: Request, headers: Mapping[str, str], now_ns: int) -> str | None:
        """Why the request is refused, in one sentence that its sender reads; None lets it in, once."""
        time, nonce, to, seal = (headers.get(name, "") for name in (TIME, NONCE, TO, SEAL))
        if not seal:
            return f"{SECRET_FILE} is set at the registry, and is missing where the request came from"
        if not _equal(seal, _request_seal(self._key, dataclasses.replace(request, to=to), time, nonce)):
            return f"{SECRET_FILE} is another secret at the registry than where the request came from"
        # From here on it was made by somebody with the secret: what it says is true, if it is said now.
        made_ns = int(time)
        if abs(now_ns - made_ns) > WINDOW_NS:
            apart, allowed = abs(now_ns - made_ns) / 1e9, WINDOW_NS // 10**9
            return f"the clocks of the two machines are {apart:.0f} s apart, more than {allowed} s"
        if request.to and request.to != to:
            return f"the request was sent to {to or 'nobody'}, and has arrived at {request.to}"
        if request.to and made_ns < self._started_ns:
            return (
                "the request was made before this registry started"  # a new process has forgotten the nonces of the old
            )
        return self._used_before(nonce, made_ns, now_ns)

    def _used_before(self, nonce: str, made_ns: int, now_ns: int) -> str | None:
        while self._seen and next(iter(self._seen.values())) < now_ns:
            self._seen.popitem(last=False)
        if nonce in self._seen:
            return "the same request was received before"
        if len(self._seen) >= _MAX_REMEMBERED:
            return "too many requests within two minutes"
        # The oldest comes first if all are kept equally long: as long as the latest clock could make use of one.
        self._seen[nonce] = now_ns + 2 * WINDOW_NS
        return None


def _request_seal(key: bytes, request: Request, time: str, nonce: str) -> str:
    said = (request.method, request.path, request.to, time, nonce)
    return _seal(key, b"request", *(text.encode(errors="surrogateescape") for text in said), request.body)


def _seal(key: bytes, *fields: bytes) -> str:
    """Each field with its length: no two messages look the same."""
    message = b"".join(len(field).to_bytes(8) + field for field in fields)
    return hmac.digest(key, message, "sha256").hex()


def _equal(one: str, other: str) -> bool:
    """In the same time wherever they differ. As bytes: a header may hold any character."""
    return hmac.compare_digest(one.encode(errors="surrogateescape"), other.encode())
