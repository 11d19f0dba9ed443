"""The language ranks that an encode rank knows: their buffers, their last word, and the blocks they have on offer."""

from __future__ import annotations

import dataclasses

from sglang.srt.disaggregation.multimodal.protocol.errors import BAD_GATEWAY, INTERNAL, Failure
from sglang.srt.disaggregation.multimodal.protocol.messages import Address, Handshake, Register, TransferEmbeddingInfo

_MUST_AGREE = ("version", "block_size", "item_lens", "dtype", "deepstack_rows")


def disagreement(encode: Handshake, language: Handshake) -> str:
    """Both values of everything that differs; empty if the two sides fit together."""
    return "; ".join(
        f"{name} is {getattr(encode, name)} at the encode side and {getattr(language, name)} at the language side"
        for name in _MUST_AGREE
        if getattr(encode, name) != getattr(language, name)
    )


@dataclasses.dataclass
class Session:
    register: Register
    refusal: Failure | None
    heard: float
    rooms: set[int] = dataclasses.field(default_factory=set)
    _offered: dict[int, int] = dataclasses.field(default_factory=dict)
    """Block of the peer -> the room that may write to it."""

    @classmethod
    def of(cls, register: Register, ours: Handshake, now: float) -> Session:
        problem = disagreement(ours, register.handshake)
        return cls(register, Failure(INTERNAL, f"handshake refused: {problem}") if problem else None, now)

    def flaw(self, info: TransferEmbeddingInfo) -> Failure | None:
        """Why nothing may be written where this message says; None if all is well."""
        theirs, blocks = self.register.handshake, info.dst_embedding_indices
        where = f"session {info.mooncake_session_id} offers room {info.room}"
        if max(blocks) >= theirs.blocks:
            return Failure(BAD_GATEWAY, f"{where} block {max(blocks)}, but has only {theirs.blocks} blocks")
        if info.allocated_tokens > len(blocks) * theirs.block_size:
            capacity = f"{len(blocks)} blocks of {theirs.block_size}"
            return Failure(BAD_GATEWAY, f"{where} space for {info.allocated_tokens} rows in {capacity}")
        for block in blocks:
            if self._offered.get(block, info.room) != info.room:
                return Failure(BAD_GATEWAY, f"{where} block {block}, which room {self._offered[block]} has")
        return None

    def note_offer(self, info: TransferEmbeddingInfo) -> None:
        self._offered.update(dict.fromkeys(info.dst_embedding_indices, info.room))

    def end_offer(self, room: int, blocks: tuple[int, ...]) -> None:
        for block in blocks:
            if self._offered.get(block) == room:
                del self._offered[block]


class Sessions:
    """The table of them, and the acknowledgements that must wait for proof."""

    def __init__(self, handshake: Handshake) -> None:
        self._handshake = handshake
        self._sessions: dict[str, Session] = {}
        self._unquiet: dict[str, dict[int, Address | None]] = {}
        """Session -> rooms of which a failed write may still land there, and who waits to be told that none can."""

    def __len__(self) -> int:
        return len(self._sessions)

    def names(self) -> frozenset[str]:
        return frozenset(self._sessions)

    def get(self, session_id: str) -> Session | None:
        return self._sessions.get(session_id)

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

    def note_failed_write(self, session_id: str, room: int) -> None:
        self._unquiet.setdefault(session_id, {})[room] = None

    def must_wait(self, session_id: str, room: int, address: Address) -> bool:
        """Whether an abort cannot be acknowledged yet; `quiet` will name its address."""
        rooms = self._unquiet.get(session_id, {})
        if room not in rooms:
            return False
        rooms[room] = address
        return True

    def quiet(self, session_id: str) -> list[tuple[Address, int]]:
        """No failed write can land there any more: who is to be told about which room."""
        rooms = self._unquiet.pop(session_id, {})
        return [(address, room) for room, address in rooms.items() if address is not None]
