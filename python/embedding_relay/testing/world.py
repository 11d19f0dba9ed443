"""Encode and language sides of the protocol in one process, over a simulated network that the test controls.

Every message goes through the codec, every row through memory. Nothing happens by itself: messages, writes, copies,
lookups and runs of the vision tower wait in lists, until the test lets one of them happen or `settle` all.
The world checks what must never happen (`Violation`): rows that differ from what the encoder wrote, bytes that land in
another room's block or are read from one, a status that moves against the table.

What it does not reproduce: threads, sockets, and everything that `plane.py` says of its data plane.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from embedding_relay.memory.plane import Entry
from embedding_relay.protocol import codec
from embedding_relay.protocol.effects import Send
from embedding_relay.protocol.encode.side import EncodeSide
from embedding_relay.protocol.errors import UndecodableFrames
from embedding_relay.protocol.language.room import SMALLEST_HALF
from embedding_relay.protocol.language.side import LanguageSide
from embedding_relay.protocol.messages import PROTOCOL_VERSION, Address, Handshake, Run
from embedding_relay.protocol.timing import Timing
from embedding_relay.testing.nodes import EncodeNode, LanguageNode
from embedding_relay.testing.plane import Clock, MemoryFabric
from embedding_relay.testing.watch import COLUMNS, Picture, Truth, Violation


@dataclasses.dataclass(frozen=True)
class InFlight:
    """A message on its way."""

    sender: str
    to: Address
    frames: tuple[bytes, ...]


class World:
    def __init__(
        self,
        *,
        block_size: int = 128,
        encode_blocks: int = 64,
        language_blocks: Sequence[int] = (64,),
        default_tokens: int | Sequence[int | None] | None = 1024,
        encodes: int = 1,
        takes_offer_ahead: bool = True,
        smallest_half: int = SMALLEST_HALF,
        keeps_rows: bool = False,
        steps_of_tower: int = 1,
        timing: Timing | None = None,
        make_encode_side: Callable[..., EncodeSide] = EncodeSide,
        make_language_side: Callable[..., LanguageSide] = LanguageSide,
    ) -> None:
        """One language rank for each entry of `language_blocks`, with its own default if several are given.

        `keeps_rows`: language ranks keep the rows of pictures. `steps_of_tower`: in how many steps those of a room are
        made.
        """
        self.block_size = block_size
        self.ranks = len(language_blocks)
        self.takes_offer_ahead = takes_offer_ahead
        self.smallest_half = smallest_half
        self.keeps_rows = keeps_rows
        self.steps_of_tower = steps_of_tower
        self.timing = timing or Timing(forget_session=700.0)
        self._encode_side = make_encode_side
        self._language_side = make_language_side
        self.clock = Clock()
        self.fabric = MemoryFabric()
        self.fabric.on_landing = self._watch_landing
        self.in_flight: list[InFlight] = []
        self.truths: dict[int, Truth] = {}
        self.unreachable: set[str] = set()
        self.encodes: dict[str, EncodeNode] = {}
        self.languages: list[LanguageNode] = []
        self._numbers = itertools.count(1)
        self._encode_blocks = encode_blocks
        for index in range(encodes):
            self.add_encode(f"registry{index}:80")
        defaults = default_tokens if isinstance(default_tokens, Sequence) else [default_tokens] * self.ranks
        for blocks, default in zip(language_blocks, defaults, strict=True):
            self.languages.append(self._new_language(blocks, default, self._new_address("language")))

    # ---- instances

    def make_encode_side(self, **arguments: Any) -> EncodeSide:
        return self._encode_side(**arguments)

    def make_language_side(self, **arguments: Any) -> LanguageSide:
        return self._language_side(**arguments)

    def handshake(self, blocks: int) -> Handshake:
        lens = tuple(c.bytes_per_row * (1 if c.per_block else self.block_size) for c in COLUMNS)
        return Handshake(PROTOCOL_VERSION, self.block_size, lens, "bytes", 0, blocks)

    def _new_address(self, kind: str) -> Address:
        return Address(kind, 1000 + next(self._numbers))

    def add_encode(self, peer: str, address: Address | None = None) -> None:
        """Start an encode instance, or a new process in place of the one that is there."""
        if peer in self.encodes:
            self.fabric.kill(self.encodes[peer].plane.session_id)
        where = address or self._new_address("encode")
        self.encodes[peer] = EncodeNode(self, peer, where, f"encode-{next(self._numbers)}", self._encode_blocks)

    def restart_encode(self, peer: str, same_address: bool) -> None:
        self.add_encode(peer, self.encodes[peer].address if same_address else None)

    def _new_language(
        self, blocks: int, default: int | None, address: Address, session_id: str | None = None
    ) -> LanguageNode:
        return LanguageNode(self, address, session_id or f"language-{next(self._numbers)}:1", blocks, default)

    def restart_language(
        self, rank: int, default: int | None, same_address: bool = False, same_session: bool = False
    ) -> None:
        """A new process gets other ports; by chance it may be given one of the old ones again."""
        old = self.languages[rank]
        self.fabric.kill(old.plane.session_id)
        address = old.address if same_address else self._new_address("language")
        session_id = old.plane.session_id if same_session else None
        self.languages[rank] = self._new_language(old.pool.count, default, address, session_id)

    def is_refused(self, address: Address) -> bool:
        """Nobody listens there."""
        return address not in [node.address for node in self.languages]

    # ---- what happens

    def start(
        self,
        room: int,
        total: int,
        media_runs: Sequence[Run] | None = None,
        peer: str | None = None,
        halves: Sequence[str] = ("encode", "language"),
        pictures: Sequence[Picture] = (),
        hints: Callable[[LanguageNode], Sequence[str]] = lambda language: (),
    ) -> None:
        """The router sends the request to both sides; a side that is not in `halves` has refused the connection.

        `hints`: keys that a language rank expects in the prompt, rightly or not.
        """
        name = peer or next(iter(self.encodes))
        self.add_truth(room, total, media_runs, pictures)
        if "encode" in halves:
            self.encodes[name].expect(room)
        if "language" in halves:
            for language in self.languages:
                language.request(room, name, hints=hints(language))

    def add_truth(
        self, room: int, total: int, media_runs: Sequence[Run] | None = None, pictures: Sequence[Picture] = ()
    ) -> None:
        """What the encoder will make of this request."""
        self.truths[room] = Truth.of(room, total, [(0, total)] if media_runs is None else media_runs, pictures)

    def post(self, sender: str, send: Send) -> None:
        self.in_flight.append(InFlight(sender, send.to, tuple(codec.encode(send.message))))

    def deliverable(self) -> list[int]:
        """The messages that may arrive next if messages of one sender to one address keep their order, as with ZMQ."""
        firsts: dict[tuple[str, Address], int] = {}
        for index, message in enumerate(self.in_flight):
            firsts.setdefault((message.sender, message.to), index)
        return list(firsts.values())

    def deliver(self, index: int = 0, keep: bool = False) -> None:
        """One message arrives; with `keep` it will arrive once more."""
        message = self.in_flight[index] if keep else self.in_flight.pop(index)
        # Frames that are no message for this side are dropped, as by the control loop.
        with contextlib.suppress(UndecodableFrames):
            for encode in self.encodes.values():
                if encode.address == message.to:
                    encode.run(encode.core.receive(codec.decode_to_encode(message.frames), self.clock.now))
            for language in self.languages:
                if language.address == message.to:
                    language.run(language.core.receive(codec.decode_to_language(message.frames), self.clock.now))

    def settle(self, limit: int = 1_000_000) -> int:
        """Let everything happen that can happen without the clock; return how many steps that took."""
        for step in range(limit):
            if not self._step():
                return step
        raise Violation("the world does not come to rest")

    def _step(self) -> bool:
        if self.in_flight:
            self.deliver()
            return True
        for encode in self.encodes.values():
            if encode.towers:
                encode.run_tower()
                return True
            if encode.jobs:
                encode.write()
                return True
            if encode.growing:
                encode.make_more()
                return True
            if encode.proofs:
                encode.prove()
                return True
        for language in self.languages:
            if language.look_ups:
                language.answer_look_up()
                return True
            if language.copies:
                language.copy()
                return True
            if language.lookups:
                language.look_up()
                return True
        return False

    def advance(self, seconds: float, between: Callable[[], object] | None = None) -> None:
        """Advance the clock, stopping wherever a side wants to be called; `between` runs after each stop."""
        end = self.clock.now + seconds
        while (at := self._next_wakeup()) is not None and at <= end:
            self.clock.advance_to(at)
            self.tick()
            if (again := self._next_wakeup()) is not None and again <= self.clock.now:
                raise Violation("a side wants to be called again at once: its control thread would spin")
            if between:
                between()
        self.clock.advance_to(end)
        self.tick()

    def tick(self) -> None:
        for encode in list(self.encodes.values()):
            encode.run(encode.core.tick(self.clock.now))
        for language in self.languages:
            language.run(language.core.tick(self.clock.now))

    def _next_wakeup(self) -> float | None:
        wakeups = [node.core.next_wakeup() for node in self.encodes.values()]
        wakeups += [node.core.next_wakeup() for node in self.languages]
        return min((at for at in wakeups if at is not None), default=None)

    # ---- what must hold

    def _watch_landing(self, label: object, destination: str, entry: Entry) -> None:
        """S3: what is written for a room may land only in blocks that this room has, or has in quarantine."""
        for language in self.languages:
            if language.plane.session_id == destination:
                owners = {language.pool.owner_of(b) for b in language.memory.block_at(entry.destination, entry.length)}
                if owners != {label}:
                    raise Violation(f"S3: bytes of room {label} land in blocks of {owners}")
