"""The language ranks that an encode rank knows: their buffers, when they were last heard, and the blocks they offer."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

from embedding_relay.protocol.errors import BAD_GATEWAY, INTERNAL, Failure
from embedding_relay.protocol.messages import Address, Handshake, Register, TransferEmbeddingInfo

_MUST_AGREE: Final = ("version", "block_size", "item_lens", "dtype", "deepstack_rows")
# Two models may differ in everything, and who reads it needs only a reason.
_MOST_NAMED: Final = 5


def disagreement(encode: Handshake, language: Handshake) -> str:
    """Both values of what differs; empty if the two sides fit together."""
    facts = ours, theirs = _facts(encode), _facts(language)
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    said = []
    for name in differing[:_MOST_NAMED]:
        here, there = (known.get(name, "unknown") for known in facts)
        said.append(f"{name} is {here} at the encode side and {there} at the language side")
    if len(differing) > _MOST_NAMED:
        said.append(f"and {len(differing) - _MOST_NAMED} more")
    return "; ".join(said)


def _facts(handshake: Handshake) -> dict[str, object]:
    return {
        **{name: getattr(handshake, name) for name in _MUST_AGREE},
        **{f"model {name}": value for name, value in handshake.model},
    }


@dataclasses.dataclass
class Session:
    register: Register
    refusal: Failure | None
    heard: float
    rooms: set[int] = dataclasses.field(default_factory=set)
    served: set[int] = dataclasses.field(default_factory=set)
    """Those of them whose request is here."""
    _offered: dict[int, int] = dataclasses.field(default_factory=dict)
    """Block of the peer -> the room that may write to it."""

    @classmethod
    def of(cls, register: Register, ours: Handshake, now: float) -> Session:
        problem = disagreement(ours, register.handshake)
        return cls(register, Failure(INTERNAL, f"handshake refused: {problem}") if problem else None, now)

    def flaw(self, info: TransferEmbeddingInfo) -> Failure | None:
        """Why nothing may ever be written where this message says; None if all is well."""
        theirs, blocks = self.register.handshake, info.dst_embedding_indices
        where = f"session {info.mooncake_session_id} offers room {info.room}"
        if max(blocks) >= theirs.blocks:
            return Failure(BAD_GATEWAY, f"{where} block {max(blocks)}, but has only {theirs.blocks} blocks")
        if info.allocated_tokens > len(blocks) * theirs.block_size:
            capacity = f"{len(blocks)} blocks of {theirs.block_size}"
            return Failure(BAD_GATEWAY, f"{where} space for {info.allocated_tokens} rows in {capacity}")
        return None

    def claim(self, room: int, blocks: tuple[int, ...]) -> Failure | None:
        """From here on only this room may write there; or another one already does.

        Only for rooms whose request is here: an offer alone may come from anybody, in anybody's name.
        """
        where = f"session {self.register.session_id} offers room {room}"
        for block in blocks:
            if self._offered.get(block, room) != room:
                return Failure(BAD_GATEWAY, f"{where} block {block}, which room {self._offered[block]} has")
        self._offered.update(dict.fromkeys(blocks, room))
        self.served.add(room)
        return None

    def leave(self, room: int) -> None:
        self.rooms.discard(room)
        self.served.discard(room)

    def end_offer(self, room: int, blocks: Iterable[int]) -> None:
        for block in blocks:
            if self._offered.get(block) == room:
                del self._offered[block]


@dataclasses.dataclass
class UnquietWrite:
    """A write that failed, and may still land."""

    address: Address
    was_asked_about: bool = False
    """An acknowledgement is owed to that address."""


@dataclasses.dataclass
class Contender:
    """Another registration of a session that is known. It counts when the known one's process is proven gone."""

    register: Register
    kept_waiting: dict[int, Address] = dataclasses.field(default_factory=dict)
    """Rooms that it asked for, and where the answer goes."""


class Sessions:
    """The table of them, and the acknowledgements that must wait for proof."""

    def __init__(self, handshake: Handshake) -> None:
        self._handshake = handshake
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        """Whoever was heard last is at the end."""
        self.contenders: dict[str, Contender] = {}
        self._unquiet: dict[str, dict[int, UnquietWrite]] = {}
        """By session, then by room."""

    def __len__(self) -> int:
        return len(self._sessions)

    def names(self) -> frozenset[str]:
        return frozenset(self._sessions)

    def get(self, session_id: str) -> Session | None:
        return self._sessions.get(session_id)

    def hear(self, session_id: str, address: Address, now: float) -> Session | None:
        """The session that says this, unless another process says it in its name."""
        session = self._sessions.get(session_id)
        if session is None or session.register.address != address:
            return None
        session.heard = now
        self._sessions.move_to_end(session_id)
        return session

    def longest_idle(self) -> str | None:
        """Who can be forgotten first, and would only have to register again."""
        return next((session_id for session_id, session in self._sessions.items() if not session.rooms), None)

    def add(self, register: Register, now: float) -> Session:
        session = self._sessions[register.session_id] = Session.of(register, self._handshake, now)
        return session

    def forget(self, session_id: str) -> None:
        """No proof that it is gone: what must be kept quiet for it stays on record."""
        del self._sessions[session_id]

    # ---- writes that failed

    @property
    def unquiet(self) -> int:
        return sum(map(len, self._unquiet.values()))

    def note_failed_write(self, session_id: str, room: int, address: Address) -> None:
        """Of a room that has one on record already, whoever has asked about that is still told."""
        rooms = self._unquiet.setdefault(session_id, {})
        if (known := rooms.get(room)) is None or known.address != address:
            rooms[room] = UnquietWrite(address)

    def must_wait(self, session_id: str, room: int, address: Address) -> bool:
        """Whether an abort cannot be acknowledged there yet, in whosever name it came."""
        if own := self._unquiet.get(session_id, {}).get(room):
            own.was_asked_about = True
            return True
        writes = (rooms.get(room) for rooms in self._unquiet.values())
        return any(write is not None and write.address == address for write in writes)

    def quiet(self, session_id: str) -> list[tuple[Address, int]]:
        """No failed write can land there any more: who is to be told about which room."""
        rooms = self._unquiet.pop(session_id, {})
        return [(write.address, room) for room, write in rooms.items() if write.was_asked_about]
