"""The HTTP sessions in which an encode instance fetches media: they connect to public addresses only."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any, Final

from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from embedding_relay.public_addresses import is_public


class NotPublic(ValueError):
    """A URL, or what it redirects to, at a place that only machines near this one can reach."""

    def __init__(self) -> None:
        super().__init__("the URL, or one that it redirects to, has an address that is not public")


def public_only(session: Any) -> Any:
    """The same session of `requests`. Through a proxy of the environment it is the proxy that chooses addresses."""
    if not isinstance(session.get_adapter("http://"), _PublicAdapter):
        session.mount("http://", _PublicAdapter())
        session.mount("https://", _PublicAdapter())
    return session


class _PublicConnection:
    """Looks twice: before it connects, and at the address that it is connected to, before it sends anything.

    The first look keeps strangers from finding out what is open on a private address; the second is for names that
    mean something else a moment later.
    """

    host: str
    port: int

    def _new_conn(self) -> socket.socket:
        try:
            answers = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            answers = []  # the connection will say so
        _refuse_private(*(str(answer[4][0]) for answer in answers))
        connected: socket.socket = super()._new_conn()  # type: ignore[misc]  # of urllib3's class beside this one
        try:
            _refuse_private(connected.getpeername()[0])
        except BaseException:
            connected.close()
            raise
        return connected


def _refuse_private(*addresses: str) -> None:
    if not all(is_public(ipaddress.ip_address(address)) for address in addresses):
        raise NotPublic


class _HTTPConnection(_PublicConnection, HTTPConnection):
    pass


class _HTTPSConnection(_PublicConnection, HTTPSConnection):
    pass


class _HTTPPool(HTTPConnectionPool):
    ConnectionCls = _HTTPConnection


class _HTTPSPool(HTTPSConnectionPool):
    ConnectionCls = _HTTPSConnection


_POOLS: Final = {"http": _HTTPPool, "https": _HTTPSPool}


class _PublicAdapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = _POOLS
