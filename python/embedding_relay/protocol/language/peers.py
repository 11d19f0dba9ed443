"""The encode instances that a language rank knows, by the address of their bootstrap registry: found, pinged, lost."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Iterator
from typing import Final

from embedding_relay.protocol.effects import LanguageEffect, Resolve, Send
from embedding_relay.protocol.messages import Address, Register
from embedding_relay.protocol.timing import Alarms, Timing

# The other halves of the rest run into their deadline.
_MAX_UNTOLD: Final = 10_000


class PeerCheck(enum.Enum):
    """What has to be done when it is time to look after a peer."""

    NOTHING = enum.auto()
    PING = enum.auto()
    LOST = enum.auto()
    """It has left too many pings unanswered."""
    SEARCH = enum.auto()
    """It was lost, and blocks are in quarantine for it: a new instance in its place would be proof that it is dead."""


@dataclasses.dataclass
class Peer:
    """`address` is None until the registry has answered, and again when the instance has fallen silent."""

    name: str
    address: Address | None = None
    instance: str = ""
    takes_offer_ahead: bool = False
    takes_have: bool = False
    registered_with: tuple[Address, str] | None = None
    looking: bool = False
    """A lookup is under way; all requests share it."""
    is_proven: bool = False
    """This instance has delivered rows: what it writes arrives here."""
    trial: int | None = None
    """Before that: the room that tries it."""
    held: int = 0
    """Blocks of its rooms, those in quarantine included."""
    held_by_many: int = 0
    """Those of rooms with many items."""
    quarantined: int = 0
    overdue: int = 0
    """Its rooms whose blocks have been in quarantine for too long."""
    heard: float = 0.0
    unanswered: int = 0
    """Pings since it was last heard."""
    queued: set[int] = dataclasses.field(default_factory=set)
    queued_with_many: set[int] = dataclasses.field(default_factory=set)
    """Those of the queued rooms that have many items."""
    announced: set[int] = dataclasses.field(default_factory=set)
    """Those of the queued rooms that this instance has been told of."""
    under_way: set[int] = dataclasses.field(default_factory=set)
    """Rooms whose init or abort was sent, until no write of them can land any more."""
    untold: set[int] = dataclasses.field(default_factory=set)
    """Rooms that ended while the lookup was under way: their other halves need not wait for them."""

    @property
    def is_idle(self) -> bool:
        return not (self.queued or self.under_way or self.untold)

    @property
    def is_checked(self) -> bool:
        return bool(self.announced or self.under_way)

    def hear(self, now: float) -> None:
        self.heard, self.unanswered = now, 0

    def registration(self, register: Register) -> list[LanguageEffect]:
        """Before anything else is sent to an instance, it is told who sends it: once."""
        if self.address is None or self.registered_with == (self.address, self.instance):
            return []
        self.registered_with = (self.address, self.instance)
        return [Send(self.address, register)]

    def lose(self) -> None:
        """Ask the registry again before anything more is sent there. The instance stays known, to tell a new one."""
        self.address = self.registered_with = None
        self.is_proven = False
        self.announced.clear()


class Peers:
    """The table of them. Lookups are shared; an alarm under a peer's name says when to check on it."""

    def __init__(self, timing: Timing, alarms: Alarms[int | str]) -> None:
        self._timing = timing
        self._alarms = alarms
        self._peers: dict[str, Peer] = {}

    def __len__(self) -> int:
        return len(self._peers)

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers.values())

    def __getitem__(self, name: str) -> Peer:
        return self._peers[name]

    def get(self, name: str) -> Peer | None:
        return self._peers.get(name)

    def known_as(self, instance: str) -> list[Peer]:
        return [peer for peer in self._peers.values() if peer.instance == instance]

    def for_new_room(self, name: str, now: float) -> Peer:
        peer = self._peers.setdefault(name, Peer(name))
        if not peer.is_checked and now - peer.heard > self._timing.silence:
            peer.address = None  # it has not been checked on: it may have been restarted
        return peer

    def look_up(self, peer: Peer) -> list[LanguageEffect]:
        if peer.looking:
            return []
        peer.looking = True
        return [Resolve(peer.name)]

    def resolved(self, peer: Peer, address: Address, instance: str, now: float) -> None:
        peer.looking = False
        if (peer.address, peer.instance) != (address, instance):
            peer.announced.clear()
        if peer.instance != instance:
            peer.is_proven = False
        peer.address, peer.instance = address, instance
        peer.hear(now)
        self._set_check(peer, now)

    def announce(self, peer: Peer, rooms: Iterable[int], now: float) -> None:
        self._begin_checks(peer, now)
        peer.announced.update(rooms)

    def begin(self, peer: Peer, room: int, now: float) -> None:
        self._begin_checks(peer, now)
        self._leave(peer, room)
        peer.under_way.add(room)

    def tell_later(self, peer: Peer, room: int) -> bool:
        """Whether there is somebody to be told of the end of this room, once the lookup has answered."""
        if not peer.looking or len(peer.untold) >= _MAX_UNTOLD:
            return False
        self._leave(peer, room)
        peer.untold.add(room)
        return True

    def end(self, peer: Peer, room: int) -> None:
        self._leave(peer, room)
        self.forget_if_useless(peer)

    def _leave(self, peer: Peer, room: int) -> None:
        for rooms in (peer.queued, peer.queued_with_many, peer.announced, peer.under_way, peer.untold):
            rooms.discard(room)
        if peer.trial == room:
            peer.trial = None

    def forget_if_useless(self, peer: Peer) -> None:
        if peer.is_idle and peer.address is None and not peer.looking:
            self._peers.pop(peer.name, None)
            self._alarms.cancel(peer.name)

    def check(self, peer: Peer, now: float) -> PeerCheck:
        """Time to check on a peer: what to do about it. Sets the time of the next check."""
        if peer.under_way and peer.address is None:
            self._alarms.set(peer.name, now + self._timing.silence)
            return PeerCheck.SEARCH
        if peer.is_checked:
            self._set_check(peer, now)
            if peer.unanswered >= self._timing.heartbeat_max_failures:
                return PeerCheck.LOST
            peer.unanswered += 1
            return PeerCheck.PING
        if peer.queued or now < peer.heard + self._timing.forget_session:
            self._alarms.set(peer.name, max(peer.heard, now) + self._timing.forget_session)
            return PeerCheck.NOTHING
        peer.lose()
        self.forget_if_useless(peer)
        return PeerCheck.NOTHING

    def _begin_checks(self, peer: Peer, now: float) -> None:
        """A message about a room is going there: from here on the peer's silence counts."""
        if not peer.is_checked:
            peer.hear(now)
            self._alarms.set(peer.name, now + self._timing.heartbeat_interval)

    def _set_check(self, peer: Peer, now: float) -> None:
        patience = self._timing.heartbeat_interval if peer.is_checked else self._timing.forget_session
        self._alarms.set(peer.name, now + patience)
