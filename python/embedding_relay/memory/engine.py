"""Mooncake's TransferEngine behind the data-plane interface: one engine that receives, one more per peer written to.

An engine of its own for each peer costs a millisecond and two threads, and buys two things: a stuck peer holds up
nobody else, and after a failed write the engine can be thrown away, which is the only way to stop what it has queued.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from embedding_relay.memory.handshake import EngineFacts, address_of, ask, find_data_port
from embedding_relay.memory.plane import (
    WRITE_TIMEOUT,
    Entry,
    Region,
    TransferError,
    Unreachable,
    private_memory,
)
from embedding_relay.memory.quiet import HeldConnections, has_read_everything, is_gone, shorten_accept
from embedding_relay.protocol.errors import LocalError, SettingError
from embedding_relay.protocol.messages import Address
from embedding_relay.protocol.plan import BATCH_LIMIT

logger = logging.getLogger(__name__)

_WHEELS: Final = "install one of the extras: sglang-embedding-relay[cpu], [cuda12] or [cuda13]"
_INFINIBAND: Final = "/sys/class/infiniband"
# Of the rows, what is written first and alone; and how long a peer whose engine has just answered may take over it.
_FIRST_BYTES: Final = 8
_FIRST_WRITE_TIMEOUT: Final = 5.0
_LOOK_EVERY: Final = 0.001
# Mooncake's blocking call spins, on a core that the threads which move the bytes may need: where it has the core, they
# wait until its time slice is over. What takes longer than a few sleeps is waited for asleep, with pieces on their way
# while the one before them is waited for; a few short entries are waited for awake, and whoever needs the core has it.
_AWAKE_BELOW: Final = 256 << 10
_AWAKE_S: Final = 0.002
_SLEEP: Final = 50e-6
_AHEAD: Final = 2
# An engine confirms entry by entry, and does nothing meanwhile. So many are divided between two.
_SCATTERED: Final = 8
# An engine keeps a connection to each peer that it has written to, whether the peer is still there or not.
_MOST_PEERS: Final = 8
# What correctness over TCP needs, so not an operator's to set. A write is done when the peer confirms it. And the proof
# of quiet needs every connection that an engine has had to a peer: with these there is one, and no engine replaces it
# because its peer is slow.
_TCP_SETTINGS: Final = {
    "MC_TCP_PROTO": "2",
    "MC_TCP_LANES_PER_PEER": "1",  # as fast as more, for merged entries
    "MC_TCP_STATUS_TIMEOUT_SEC": "86400",
    "MC_TCP_PROGRESS_TIMEOUT_SEC": "86400",
}


class MooncakeDataPlane:
    """What `plane.DataPlane` promises, by Mooncake over RDMA or TCP."""

    def __init__(
        self,
        host: str,
        transport: str | None = None,
        device: str = "",
        *,
        receives: bool = True,
        patience: float = WRITE_TIMEOUT,
    ) -> None:
        """Unless `transport` says which: RDMA if the machine has it. Whoever only sends has no session of its own.

        `patience`: for how many seconds nothing of a write may be confirmed. Only Mooncake's blocking call has such a
        limit itself.
        """
        self._host = host
        self._transport = transport or ("rdma" if _devices() else "tcp")
        self._device = device
        self._receives = receives
        self.patience = patience
        self._regions: tuple[Region, ...] = ()
        self._engine: Any = None
        self._spare: Sender | None = None
        """Of a link that is not needed any more. The next one need not register the memory anew, which takes long over
        RDMA."""
        self._links: list[MooncakeLink] = []
        self.renewals = 0
        self.on_death: Callable[[str], None] = logger.error
        self._lock = threading.Lock()

    memory_name = ""
    mapped = 0

    def allocate(self, length: int) -> mmap.mmap:
        return private_memory(length)

    def start(self, regions: Sequence[Region]) -> None:
        self._set_environment()
        self._regions = tuple(regions)
        # Even one that only sends: what does not work is the operator's to know now, not at the first request.
        engine = self.make_engine()
        if self._receives:
            self._engine = engine
        else:
            self._spare = Sender(engine)
        logger.info("relay data plane: Mooncake over %s", self._transport)

    def _set_environment(self) -> None:
        """Mooncake takes some settings only from the environment; what the operator has set of the others stays."""
        if self.is_tcp:
            os.environ.setdefault("MC_FORCE_TCP", "1")
        os.environ.update(_TCP_SETTINGS)
        if ":" in self._host:
            os.environ.setdefault("MC_USE_IPV6", "1")

    def make_engine(self) -> Any:
        """A new engine, with our memory registered, that moves bytes over what we were asked for."""
        engine = _engine_class()()
        flaw = self._flaw_of(engine)
        if flaw:
            del engine  # now, and not when nobody refers to the error any more: it has a last word in the log
            raise SettingError(flaw)
        return engine

    def _flaw_of(self, engine: Any) -> str:
        """What an engine is decides how fast it is, and what proves that its writes are over. Empty if all is well."""
        if engine.initialize(self._host, "P2PHANDSHAKE", self._transport, self._device):
            return f"Mooncake's engine does not start on {self._host}{self._hint()}"
        flaw = self._difference(engine)
        for region in self._regions:
            if not flaw and (code := engine.register_memory(region.pointer, region.length)):
                flaw = f"Mooncake does not register {region.length} bytes of memory (code {code})"
        if flaw:
            _end_quickly(engine)
        return flaw

    def _difference(self, engine: Any) -> str:
        """Between what it says of itself and what it was asked to be."""
        try:
            facts = self._facts_of(engine)
        except (OSError, ValueError) as error:
            return f"Mooncake's engine cannot be used: {error}"
        if self._transport in facts.protocols and facts.is_tcp == self.is_tcp:
            return ""
        return f"Mooncake's engine runs over {facts.spoken}{self._hint()}"

    def _facts_of(self, engine: Any) -> EngineFacts:
        return ask(Address("::1" if ":" in self._host else "127.0.0.1", engine.get_rpc_port()))

    def _hint(self) -> str:
        """The end of a line that says what an engine does instead."""
        if self.is_tcp:
            return ", and was asked for tcp"
        devices = ", ".join(sorted(_devices())) or "none"
        return (
            f", and was asked for {self._transport} (device: {self._device or 'any'}; {_INFINIBAND} has {devices})."
            " A device needs /dev/infiniband and its provider's library (package ibverbs-providers)."
            " To run over TCP, set MC_FORCE_TCP=1"
        )

    @property
    def reads_any_memory(self) -> bool:
        """Over TCP the kernel reads what is sent; over RDMA the card does, which must know the memory."""
        return self.is_tcp

    def has_read_everything(self, writer: str) -> bool:
        """Over RDMA nothing waits to be read; over TCP nobody knows which connection is the writer's."""
        return not self.is_tcp or has_read_everything(self._facts_of(self._engine).data_port)

    # ---- engines for links

    def take_sender(self, session_id: str, peer: EngineFacts) -> Sender:
        """Raises SettingError if Mooncake does not make an engine."""
        with self._lock:
            spare, self._spare = self._spare, None
        if spare is not None:
            if spare.peers.get(session_id, peer) == peer:
                return spare
            spare.end()
        return Sender(self.make_engine())

    def give_back(self, sender: Sender) -> None:
        """One that has finished all it had to send."""
        if len(sender.peers) >= _MOST_PEERS:
            sender.end()
            return
        with self._lock:
            surplus, self._spare = self._spare, sender
        if surplus is not None:
            surplus.end()

    @property
    def session_id(self) -> str:
        if self._engine is None:
            raise LocalError("this data plane does not receive, or was not started")
        return str(Address(self._host, self._engine.get_rpc_port()))

    @property
    def is_tcp(self) -> bool:
        return self._transport == "tcp"

    def link(self, session_id: str, memory_name: str = "") -> MooncakeLink:
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
        if self._spare is not None:
            self._spare.end()
        self._spare = None


class Sender:
    """An engine that writes, and what it believes of the peers to which it has written: it asks each but once."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.peers: dict[str, EngineFacts] = {}

    def end(self) -> None:
        _end_quickly(self.engine)
        self.engine = None


class MooncakeLink:
    """The engine that writes to one peer, there when it is first needed. One thread owns it and calls every method."""

    def __init__(self, plane: MooncakeDataPlane, session_id: str) -> None:
        self._plane = plane
        self._session_id = session_id
        self._sender: Sender | None = None
        """From the first bytes that it is given to send."""
        self._is_proven = False
        """The peer has confirmed what this sender has sent."""
        self._peer: EngineFacts | None = None
        self._data_port: frozenset[tuple[str, int]] = frozenset()
        self._connections = HeldConnections()
        self._second: MooncakeLink | None = None
        """Another engine for entries that are many."""

    def write(self, entries: Sequence[Entry]) -> None:
        for _ in self.write_in_turn([entries]):
            pass

    def write_in_turn(self, pieces: Iterable[Sequence[Entry]]) -> Iterator[None]:
        on_the_way: deque[list[_Submitted]] = deque()
        used: set[MooncakeLink] = set()
        for entries in pieces:
            if len(entries) > BATCH_LIMIT:
                raise TransferError(f"{len(entries)} entries are more than the {BATCH_LIMIT} that one call may carry")
            if entries and not self._is_proven and not on_the_way:
                self._prove_the_way(entries[0])
            if not self._plane.is_tcp:
                self._write_by_one_call(entries)
                yield
                continue
            if not on_the_way and len(entries) < _SCATTERED and sum(one.length for one in entries) < _AWAKE_BELOW:
                if entries:
                    self._wait_for(self._submit_to([self], entries), awake_s=_AWAKE_S)
                    self._is_proven = True
                yield
                continue
            on_the_way.append(self._submit(entries))
            used.update(link for link, _ in on_the_way[-1])
            if len(on_the_way) > _AHEAD:
                self._wait_for(on_the_way.popleft())
                yield
        while on_the_way:
            self._wait_for(on_the_way.popleft())
            if not on_the_way:
                for link in used:
                    link._is_proven = True
            yield

    def _write_by_one_call(self, entries: Sequence[Entry]) -> None:
        if not entries:
            return
        sources, destinations, lengths = (list(column) for column in zip(*entries, strict=True))
        self._is_proven = False
        code = self._engine.batch_transfer_sync_write(self._session_id, sources, destinations, lengths)
        if code:
            raise TransferError(f"Mooncake could not write {sum(lengths)} bytes to {self._session_id} (code {code})")
        self._is_proven = True

    def _submit(self, entries: Sequence[Entry]) -> list[_Submitted]:
        links = [self]
        if len(entries) >= _SCATTERED and (second := self._take_second(entries[0])) is not None:
            links.append(second)
        return self._submit_to(links, entries)

    def _submit_to(self, links: Sequence[MooncakeLink], entries: Sequence[Entry]) -> list[_Submitted]:
        submitted: list[_Submitted] = []
        for link in links:
            link._is_proven = False
        for link, entry in zip(itertools.cycle(links), entries, strict=False):
            number = link._engine.transfer_submit_write(self._session_id, *entry)
            if not number:
                raise TransferError(f"Mooncake does not take {entry.length} bytes for {self._session_id}")
            submitted.append((link, number))
        return submitted

    def _take_second(self, entry: Entry) -> MooncakeLink | None:
        """None if another engine cannot reach the peer: this one can."""
        if self._second is None:
            self._second = self._plane.link(self._session_id)
        try:
            if self._second._sender is None:
                self._second._prove_the_way(entry)
        except Unreachable:
            return None
        return self._second

    def _wait_for(self, submitted: Sequence[_Submitted], *, awake_s: float = 0.0) -> None:
        asleep_from = time.monotonic() + awake_s
        for link, number in submitted:
            deadline = time.monotonic() + self._plane.patience
            while not (status := link._engine.transfer_check_status(number)):
                now = time.monotonic()
                if now > deadline:
                    text = f"{self._session_id} has confirmed nothing for {self._plane.patience:g} s"
                    raise TransferError(f"a write was given up: {text}")
                if now < asleep_from:
                    os.sched_yield()
                else:
                    time.sleep(_SLEEP)
            if status != 1:
                raise TransferError(f"Mooncake could not write to {self._session_id} (status {status})")

    @property
    def _engine(self) -> Any:
        assert self._sender is not None
        return self._sender.engine

    # ---- the first write

    def _prove_the_way(self, entry: Entry) -> None:
        """Before many bytes are on a way that nobody has tried, a few of them go alone, and are confirmed.

        Mooncake waits a minute for a peer that does not answer. So we ask first whether it does: until it has, nothing
        is sent, and what was never sent cannot land.
        """
        peer = self._find_peer()
        if self._sender is None:
            try:
                sender = self._plane.take_sender(self._session_id, peer)
            except SettingError as error:
                raise Unreachable(str(error)) from error
            sender.peers[self._session_id] = peer
            self._sender = sender
        what = self._session_id, entry.source, entry.destination, min(entry.length, _FIRST_BYTES)
        if not (self._write_first(*what) if self._plane.is_tcp else self._engine.transfer_sync_write(*what) == 0):
            raise TransferError(f"the first write to {self._session_id} was not confirmed")
        self._is_proven = True

    def _find_peer(self) -> EngineFacts:
        try:
            address = address_of(self._session_id)
            peer = ask(address)
            if peer.is_tcp != self._plane.is_tcp:
                raise ValueError(f"it moves bytes over {peer.spoken}, and this side does not")
            self._data_port = find_data_port(address, peer) if peer.is_tcp else frozenset()
        except (OSError, UnicodeError, ValueError) as error:
            raise Unreachable(f"the engine of {self._session_id} cannot be reached: {error}") from error
        if peer != self._peer:
            self._connections.forget_ended()  # they went to another one, which is gone
            self._peer = peer
        return peer

    def _write_first(self, *what: Any) -> bool:
        """Over TCP. Its connection is held as soon as it is there: an engine that gives up on it closes it."""
        number = self._engine.transfer_submit_write(*what)
        if not number:
            raise Unreachable(f"the engine of {self._session_id} answers us, but not Mooncake")
        deadline, status = time.monotonic() + _FIRST_WRITE_TIMEOUT, 0
        while not status and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY)
            status = self._engine.transfer_check_status(number)
            if not self._connections.has_any:
                self._connections.hold(self._data_port)
        return status == 1 and self._connections.has_any

    # ---- after a failed write

    def renew(self) -> None:
        """The new engine is made by the next write; dropping the old one ends its sending."""
        if self._second is not None:
            self._second.renew()
        if self._sender is None:
            return
        if self._plane.is_tcp:
            self._connections.hold(self._data_port)
        self._drop_sender()
        if self._plane.is_tcp:
            self._connections.end()
        self._plane.note_renewal()
        logger.warning(
            "relay engine for %s renewed; the peer has yet to read %d connections of the old one to their end",
            self._session_id,
            len(self._connections),
        )

    def _drop_sender(self) -> None:
        if self._sender is not None:
            self._sender.end()
        self._sender, self._is_proven = None, False

    def is_quiet(self) -> bool:
        """Over RDMA a destroyed queue pair sends nothing; over TCP the peer has to have read to the end."""
        return (self._second is None or self._second.is_quiet()) and self._connections.is_quiet(self._peer_is_gone)

    def _peer_is_gone(self) -> bool:
        return self._peer is not None and is_gone(address_of(self._session_id), self._peer)

    def close(self) -> None:
        if self._second is not None:
            self._second.close()
        if self._sender is not None and self._is_proven:
            self._plane.give_back(self._sender)
            self._sender = None
        self._drop_sender()
        self._connections.close()
        self._plane.forget(self)


_Submitted = tuple[MooncakeLink, int]
"""An entry that an engine has been given, and the number by which it knows it."""


def _devices() -> list[str]:
    return os.listdir(_INFINIBAND) if os.path.isdir(_INFINIBAND) else []


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
