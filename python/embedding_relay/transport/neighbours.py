"""Which ranks of an instance receive rows: the first of each host, for all of that host that can map its memory."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from embedding_relay.memory.shared_segment import NotShared, check_user, is_our_user, sealed_memory, socket_name
from embedding_relay.protocol.errors import LocalError

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT: Final = 2.0
_LONGEST: Final = 16
_PAGE: Final = 4096

Gather = Callable[[Any], Sequence[Any]]
"""Every rank hands in something of its own, and gets what all have handed in, by rank."""


class Offer(NamedTuple):
    """What a rank would lend rows by."""

    host: str
    """Equal where memory can be shared: one kernel, one network namespace, one user."""
    name: str


class Neighbours(NamedTuple):
    receiving: int = 1
    """How many ranks of the instance receive rows, one copy each."""
    borrowers: Mapping[int, socket.socket] = MappingProxyType({})
    """Connections to those that read what this rank receives, by rank."""
    lender: socket.socket | None = None
    """The connection to the rank that receives for this one."""


ALONE: Final = Neighbours()


def meet(rank: int, gather: Gather, *, may_share: bool = True) -> Neighbours:
    """Called by all ranks of an instance at once; each returns what it is to the others.

    A rank that cannot map the memory of the first one of its host receives its rows itself.
    """
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as listener:
        offer, why_alone = _offer(listener) if may_share else (None, "SGLANG_EMBEDDING_DATA_PLANE=mooncake")
        offers = gather(offer)
        lenders = [_lender_of(other, offers) for other in range(len(offers))]
        connection = None
        if lenders[rank] != rank:
            try:
                connection = _connect(offers[lenders[rank]].name, rank)
            except (OSError, NotShared) as error:
                why_alone = str(error)
        receives = gather(connection is None)
        expected = {other for other, lender in enumerate(lenders) if lender == rank and not receives[other]}
        neighbours = Neighbours(sum(receives), _accept(listener, expected), connection)
    _log(rank, lenders[rank], neighbours, len(offers), why_alone)
    return neighbours


def _log(rank: int, lender: int, neighbours: Neighbours, ranks: int, why_alone: str) -> None:
    if neighbours.lender is not None:
        logger.info("relay: rank %d takes its rows from rank %d, which is on the same host", rank, lender)
    elif neighbours.borrowers:
        others = ", ".join(map(str, sorted(neighbours.borrowers)))
        logger.info("relay: rank %d receives rows, for itself and for rank %s of the same host", rank, others)
    elif ranks > 1:
        reason = f": {why_alone}" if why_alone else ""
        logger.info("relay: rank %d receives rows for itself alone%s", rank, reason)


def _offer(listener: socket.socket) -> tuple[Offer | None, str]:
    """Or why there is none."""
    name = secrets.token_hex(16)
    try:
        check_user()
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        network = os.stat("/proc/self/ns/net")
        os.close(sealed_memory(_PAGE))
        listener.bind(socket_name(name))
        listener.listen()
    except (OSError, NotShared) as error:
        return None, f"it cannot share memory with others: {error}"
    return Offer(f"{kernel} {network.st_dev}:{network.st_ino} {os.geteuid()}", name), ""


def _lender_of(rank: int, offers: Sequence[Offer | None]) -> int:
    """The first rank of its host; itself, if it shares nothing."""
    own = offers[rank]
    if own is None:
        return rank
    return next(other for other, offer in enumerate(offers) if offer is not None and offer.host == own.host)


def _connect(name: str, rank: int) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(_ANSWER_TIMEOUT)
    try:
        connection.connect(socket_name(name))
        if not is_our_user(connection):
            raise NotShared("another user has its memory")
        connection.send(str(rank).encode("ascii"))
        connection.setblocking(True)
    except BaseException:
        connection.close()
        raise
    return connection


def _accept(listener: socket.socket, expected: set[int]) -> dict[int, socket.socket]:
    """All of these have connected, and said which rank they are; others may have connected, too."""
    found: dict[int, socket.socket] = {}
    listener.settimeout(_ANSWER_TIMEOUT)
    while expected - found.keys():
        try:
            connection, _ = listener.accept()
            rank = _rank_of(connection)
        except OSError as error:
            raise LocalError(f"ranks {expected - found.keys()} of this host have not connected: {error}") from error
        if rank in expected - found.keys():
            found[rank] = connection
        else:
            connection.close()
    return found


def _rank_of(connection: socket.socket) -> int | None:
    if not is_our_user(connection):
        return None
    try:
        connection.settimeout(_ANSWER_TIMEOUT)
        said = connection.recv(_LONGEST)
        connection.setblocking(True)
        return int(said) if said.isdigit() else None
    except OSError:
        return None
