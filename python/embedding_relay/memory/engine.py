"""Mooncake's TransferEngine behind the data-plane interface: one engine that receives, one more per peer written to.

An engine of its own for each peer costs a millisecond and two threads, and buys two things: a stuck peer holds up
nobody else, and after a failed write the engine can be thrown away, which is the only way to stop what it has queued.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from typing import Any, Final

from embedding_relay.memory.plane import Entry, Region, TransferError
from embedding_relay.memory.quiet import HeldConnections, is_gone, own_sockets, shorten_accept
from embedding_relay.protocol.errors import LocalError, SettingError
from embedding_relay.protocol.messages import Address
from embedding_relay.protocol.plan import BATCH_LIMIT

logger = logging.getLogger(__name__)

_WHEELS: Final = "install one of the extras: sglang-embedding-relay[cpu], [cuda12] or [cuda13]"
_INFINIBAND: Final = "/sys/class/infiniband"


class MooncakeDataPlane:
    """What `plane.DataPlane` promises, by Mooncake over RDMA or TCP."""

    def __init__(self, host: str, transport: str | None = None, device: str = "", *, receives: bool = True) -> None:
        """Unless `transport` says which: RDMA if the machine has it. Whoever only sends has no session of its own."""
        self._host = host
        self._transport = transport or ("rdma" if os.path.isdir(_INFINIBAND) and os.listdir(_INFINIBAND) else "tcp")
        self._device = device
        self._receives = receives
        self._regions: tuple[Region, ...] = ()
        self._engine: Any = None
        self._links: list[MooncakeLink] = []
        self.renewals = 0
        self._lock = threading.Lock()

    def start(self, regions: Sequence[Region]) -> None:
        self._set_environment()
        self._regions = tuple(regions)
        _engine_class()  # a missing wheel is the operator's to know now, not at the first request
        if self._receives:
            self._engine = self.make_engine()

    def _set_environment(self) -> None:
        """Mooncake takes some settings only from the environment; what the operator has set stays."""
        if self._transport == "tcp":
            os.environ.setdefault("MC_FORCE_TCP", "1")
            # One connection per peer is as fast for merged entries, and makes one proof of quiet enough.
            os.environ.setdefault("MC_TCP_LANES_PER_PEER", "1")
        if ":" in self._host:
            os.environ.setdefault("MC_USE_IPV6", "1")

    def make_engine(self) -> Any:
        """A new engine, with our memory registered."""
        engine = _engine_class()()
        if engine.initialize(self._host, "P2PHANDSHAKE", self._transport, self._device):
            raise SettingError(f"Mooncake's transfer engine does not start on {self._host} over {self._transport}")
        for region in self._regions:
            code = engine.register_memory(region.pointer, region.length)
            if code:
                raise SettingError(f"Mooncake does not register {region.length} bytes of memory (code {code})")
        return engine

    @property
    def session_id(self) -> str:
        if self._engine is None:
            raise LocalError("this data plane does not receive, or was not started")
        return str(Address(self._host, self._engine.get_rpc_port()))

    @property
    def is_tcp(self) -> bool:
        return self._transport == "tcp"

    def link(self, session_id: str) -> MooncakeLink:
        link = MooncakeLink(self, session_id)
        with self._lock:
            self._links.append(link)
        return link

    def forget(self, link: MooncakeLink) -> None:
        with self._lock:
            if link in self._links:
                self._links.remove(link)

    def note_renewal(self) -> None:
        with self._lock:
            self.renewals += 1

    def close(self) -> None:
        for link in list(self._links):
            link.close()
        _end_quickly(self._engine)
        self._engine = None  # the destructor closes its sockets and joins its threads


class MooncakeLink:
    """The engine that writes to one peer, made when it is first needed. One thread owns it and calls every method."""

    def __init__(self, plane: MooncakeDataPlane, session_id: str) -> None:
        self._plane = plane
        self._session_id = session_id
        self._engine: Any = None
        self._before: frozenset[str] = frozenset()
        """The sockets that this process had before the engine: what was opened since may be the engine's."""
        self._connections = HeldConnections()
        self._holds = False
        self._undrained: list[HeldConnections] = []
        """Connections of earlier engines that the peer has not read to their end yet."""

    def write(self, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        if len(entries) > BATCH_LIMIT:
            raise TransferError(f"{len(entries)} entries are more than the {BATCH_LIMIT} that one call may carry")
        if self._engine is None:
            self._make_engine()
        sources, destinations, lengths = (list(column) for column in zip(*entries, strict=True))
        code = self._engine.batch_transfer_sync_write(self._session_id, sources, destinations, lengths)
        if code:
            raise TransferError(f"Mooncake could not write {sum(lengths)} bytes to {self._session_id} (code {code})")
        if self._plane.is_tcp and not self._holds:
            # Before anything goes wrong: an engine that gives up on a connection closes it.
            self._connections.hold_new(self._before)
            self._holds = True

    def _make_engine(self) -> None:
        self._before, self._holds = frozenset(own_sockets()), False
        try:
            self._engine = self._plane.make_engine()
        except SettingError as error:
            raise TransferError(str(error)) from error

    def renew(self) -> None:
        """The new engine is made by the next write; dropping the old one ends its sending."""
        ended, self._connections = self._connections, HeldConnections()
        if self._plane.is_tcp:
            self._undrained.append(ended)
            ended.hold_new(self._before)
        _end_quickly(self._engine)
        self._engine = None
        self._plane.note_renewal()
        ended.end_those_of_the_engine()
        logger.warning(
            "relay engine for %s renewed; the peer has yet to read %d connections of the old one to their end",
            self._session_id,
            len(ended),
        )
        if is_gone(self._session_id):
            self._forget_undrained()

    def is_quiet(self) -> bool:
        """Over RDMA a destroyed queue pair sends nothing; over TCP the peer has to have read to the end."""
        self._undrained = [ended for ended in self._undrained if not ended.are_drained()]
        return not self._undrained

    def _forget_undrained(self) -> None:
        for connections in self._undrained:
            connections.close()
        self._undrained.clear()

    def close(self) -> None:
        _end_quickly(self._engine)
        self._engine = None
        self._connections.close()
        self._forget_undrained()
        self._plane.forget(self)


def _end_quickly(engine: Any) -> None:
    """Else its destructor waits a second for its listening thread, and no other thread of Python runs meanwhile."""
    if engine is not None:
        shorten_accept(engine.get_rpc_port())


def _engine_class() -> Any:
    try:
        from mooncake.engine import TransferEngine
    except ImportError as error:
        raise SettingError(f"Mooncake's transfer engine cannot be loaded ({error}): {_WHEELS}") from error
    return TransferEngine
