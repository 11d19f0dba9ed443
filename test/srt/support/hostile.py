"""Strangers at the control sockets of the simulated world: what they may send, and what must hold nevertheless.

Promised, and checked after every hostile message, whatever the stranger knows: nothing raises but `UndecodableFrames`,
no status moves against the table, no block has two owners, every write stays inside the columns that its own session
has registered, tables are bounded, and everyone gets an answer in the end.

Promised to a room whose ranks have all asked for it: strangers who know its number change nothing for it by asking for
it, aborting it, or registering its sessions anew, in their own name or with its own return address.

Not promised without authentication (`docs/security.md`), because the frames of the owner look the same: somebody who
- names the session of a rank in a message about one of its rooms, or about a room whose request was their own;
- knows the number of a room and sends its language rank a report or word of progress, or is the first to ask for it or
  to abort it;
- registers the session of a rank at an encode instance before that rank does;
- knows the instance of an encode rank, which its registry tells, and sends pongs or has them sent;
- sends more than the control thread can read.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from embedding_relay.protocol import codec
from embedding_relay.protocol.encode.admission import MAX_CONTENDERS
from embedding_relay.protocol.errors import Failure, UndecodableFrames
from embedding_relay.protocol.messages import (
    MAX_ROOM,
    Abort,
    AbortAck,
    Address,
    Handshake,
    Have,
    Item,
    Manifest,
    Ping,
    Pong,
    Progress,
    Queued,
    Register,
    StatusReport,
    ToEncode,
    ToLanguage,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.status import Status
from embedding_relay.protocol.timing import Timing
from embedding_relay.testing.nodes import EncodeNode
from embedding_relay.testing.watch import Violation
from embedding_relay.testing.world import World
from support.schedules import LANDS_LATE, TIMING, Schedule, Shape

T = TypeVar("T")

# Room numbers of honest requests: a stranger does not guess one by chance, so a message names one only on purpose.
HONEST_ROOMS = 1 << 40

NEAR = (
    b"", b"0", b"1", b"-1", b"+1", b" 1", b"007", b"1_0", b"1e3", b"9" * 19, b"9" * 30, b"%d" % (1 << 63),
    b"%d" % (1 << 64), b"None", b"ABORT", b"ABORTED", b"PING", b"PONG", b"\xff\xfe", "\u0663".encode(), b",", b"1,",
    b"1,1", b"0,1,2", b"1048576", b"{}", b"[" * 3000, b"x" * 5000, b"!", b"*", b"a;b", b"x" * 300, b"\0" * 8,
    b"\xff" * 8, b"\1" * 264, b"400 no", b"499 \n gone", b"PROGRESS", b"HAVE", b"MANIFEST", b"[]", b'[""]',
    b'[["",[[0,1]]]]', b'[["",[[1,1]]]]', b'[["%s",[[0,2],[1,3]]]]' % (b"0f" * 16), b'[["%s",[]]]' % (b"0f" * 16),
)  # fmt: skip


class Choices(Protocol):
    """Where a stranger's decisions come from: a seed, or the bytes of a fuzzer."""

    def number(self, low: int, high: int) -> int: ...

    def raw(self, most: int) -> bytes: ...

    def is_used_up(self) -> bool: ...


class Seeded:
    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def number(self, low: int, high: int) -> int:
        return self._rng.randint(low, high)

    def raw(self, most: int) -> bytes:
        return self._rng.randbytes(self._rng.randint(0, most))

    def is_used_up(self) -> bool:
        return False


class Stranger:
    """Makes messages: mostly well-formed ones that say the wrong thing, sometimes damaged ones, sometimes noise."""

    def __init__(self, choices: Choices, world: World) -> None:
        self._choices = choices
        self._world = world

    def pick(self, options: Sequence[T]) -> T:
        return options[self._choices.number(0, len(options) - 1)]

    def chance(self, one_in: int) -> bool:
        return self._choices.number(1, one_in) == 1

    def frames(self, make: Callable[[], ToEncode | ToLanguage]) -> list[bytes]:
        kind = self._choices.number(0, 9)
        if kind == 0:
            return [self._noise() for _ in range(self._choices.number(0, 10))]
        frames = codec.encode(make())
        if kind <= 3:
            for _ in range(self._choices.number(1, 3)):
                self._damage(frames)
        return frames

    def _noise(self) -> bytes:
        return self._choices.raw(40) if self.chance(3) else self.pick(NEAR)

    def _damage(self, frames: list[bytes]) -> None:
        if not frames:
            return
        at = self._choices.number(0, len(frames) - 1)
        kind = self._choices.number(0, 4)
        if kind == 0:
            del frames[at]
        elif kind == 1:
            frames.insert(at, frames[at])
        elif kind == 2:
            frames[at] = self._noise()
        elif kind == 3:
            frames[at] = frames[at][: self._choices.number(0, len(frames[at]))]
        elif frames[at]:
            where = self._choices.number(0, len(frames[at]) - 1)
            frames[at] = frames[at][:where] + bytes([self._choices.number(0, 255)]) + frames[at][where + 1 :]

    # ---- what well-formed messages are made of

    def _room(self) -> int:
        kind = self._choices.number(0, 9)
        if kind == 0:
            return self.pick([0, -1, MAX_ROOM, MAX_ROOM + 1, 1 << 64])
        if kind <= 4 or not self._world.truths:
            return self._choices.number(1000, 100_000)
        return self.pick(list(self._world.truths)[-4:])

    def _session(self) -> str:
        honest = [language.plane.session_id for language in self._world.languages]
        return self.pick([*honest, *(f"stranger-{number}:1" for number in range(4))])

    def _address(self) -> Address:
        nodes = [*self._world.languages, *self._world.encodes.values()]
        return self.pick([*(node.address for node in nodes), Address("stranger", self._choices.number(1, 4))])

    def _number(self) -> int:
        if self._choices.number(0, 7):
            return self._choices.number(1, 40)
        return self.pick([0, -1, codec.MAX_ROWS, codec.MAX_ROWS + 1, 1 << 63, 1 << 64])

    def _failure(self) -> Failure | None:
        return self.pick([None, Failure(421, "not registered"), Failure(409, "used"), Failure(500, "x" * 5000)])

    def _handshake(self) -> Handshake:
        handshake = self._world.handshake(self._choices.number(3, 9))
        wrong: list[dict[str, Any]] = [
            {"version": 0}, {"block_size": 1 << 40}, {"block_size": 0}, {"dtype": "ü\n"}, {"blocks": 1 << 20},
            {"blocks": 0}, {"item_lens": handshake.item_lens[1:]}, {"item_lens": (1 << 48,) * 4}, {"deepstack_rows": 9},
        ]  # fmt: skip
        return msgspec.structs.replace(handshake, **self.pick(wrong)) if self.chance(4) else handshake

    def _register(self) -> Register:
        honest = self.pick(self._world.languages)
        pointers = self.pick([honest.memory.pointers, (1 << 20,) * 4, (0,) * 4, ((1 << 64) - 1,) * 4, (1,) * 40])
        return Register(self._address(), self._session(), tuple(pointers), self._handshake())

    def _offer(self) -> TransferEmbeddingInfo:
        honest = [offer for language in self._world.languages for offer in language.offers[-3:]]
        if honest and self.chance(4):
            return self._next_after(self.pick(honest))
        first, count = self._choices.number(0, 4), self._choices.number(1, 4)
        blocks = (first,) * count if self.chance(12) else tuple(range(first, first + count))
        fits = self._choices.number(1, count * self._world.block_size)
        where = self._address()
        return TransferEmbeddingInfo(
            room=self._room(),
            endpoint=where.host,
            dst_port=where.port,
            mooncake_session_id=self._session(),
            dst_embedding_indices=blocks,
            required_dst_info_num=self.pick([self._world.ranks, self._world.ranks, 1, 2, 3]),
            sent_tokens=self._number() if self.chance(3) else 0,
            allocated_tokens=self._number() if self.chance(4) else fits,
        )

    def _next_after(self, offer: TransferEmbeddingInfo) -> TransferEmbeddingInfo:
        """What its rank may offer next, in blocks of the stranger's choice."""
        first, count = self._choices.number(0, 4), self._choices.number(1, 2)
        return msgspec.structs.replace(
            offer,
            dst_embedding_indices=tuple(range(first, first + count)),
            sent_tokens=offer.sent_tokens + offer.allocated_tokens,
            allocated_tokens=self._choices.number(1, count * self._world.block_size),
        )

    def to_encode(self) -> ToEncode:
        kind = self._choices.number(0, 9)
        if kind <= 1:
            return self._register()
        if kind <= 5:
            return self._offer()
        if kind == 6 and self.chance(2):
            return Have(self._room(), self._address(), self._session(), self._keys())
        if kind == 6:
            return Queued(self._room(), self._address(), self._session())
        if kind <= 8:
            return Abort(self._room(), self._address(), self._session(), self._failure())
        return Ping(self._address(), self._session(), self._instance())

    def _keys(self) -> tuple[str, ...]:
        """Of honest pictures, and invented ones."""
        items = [item for truth in list(self._world.truths.values())[-4:] for item in truth.items if item.key]
        honest = [item.key for item in items] or ["0f" * 16]
        return tuple(self.pick([*honest, f"{index:032x}"]) for index in range(self._choices.number(1, 6)))

    def _items(self) -> tuple[Item, ...]:
        items, row = [], 0
        for key in self._keys():
            start = row + self._choices.number(0, 2)
            row = start + self._choices.number(0 if self.chance(9) else 1, 9)
            items.append(Item("" if self.chance(9) else key, ((start, row),)))
        return tuple(items)

    def to_language(self) -> ToLanguage:
        kind = self._choices.number(0, 9)
        if kind == 6 and self.chance(2):
            return Manifest(self._room(), self._items())
        if kind == 6:
            return Progress(self._room(), self._number())
        if kind <= 5:
            rows = self._number() if self.chance(2) else None
            status = self.pick(list(Status))
            failure = self._failure() if status is Status.FAILED else None
            held = self._items() if rows is not None and self.chance(4) else ()
            return StatusReport(self._room(), status, rows, failure, held)
        if kind <= 7:
            return AbortAck(self._room())
        return Pong(self._instance(), self._instance())

    def _instance(self) -> str:
        return self.pick(["nobody", *(node.instance for node in self._world.encodes.values())])


class AttackedWorld:
    """An honest world at work, and a stranger whose messages arrive in between."""

    def __init__(self, choices: Choices, shape: Shape, knows_all: bool = False, timing: Timing = TIMING) -> None:
        self.choices = choices
        self.world = shape.build(timing=timing)
        self.schedule = Schedule(self.world, first_room=HONEST_ROOMS)
        self.knows_all = knows_all
        self.own_rooms: list[int] = []
        self.stranger = Stranger(choices, self.world)
        self.messages = self.undecodable = 0
        if knows_all:
            self._stop_checking_rows()

    def _stop_checking_rows(self) -> None:
        """If anything may be forged, rows may go to any block; what is left to check is that nothing breaks."""
        self.world.fabric.on_landing = None
        for language in self.world.languages:
            language.trusts_rows = False

    # ---- moves

    def start(self) -> None:
        self.schedule.start(self.choices.number(1, 40), self.choices.number(0, 6), self.choices.number(0, 1))

    def start_own(self) -> None:
        """The stranger is a client too: the request reaches an encode rank, and no language rank asks for its rows."""
        room = 100 + len(self.own_rooms)
        self.own_rooms.append(room)
        encode = self.stranger.pick(list(self.world.encodes.values()))
        self.world.add_truth(room, self.choices.number(1, 40))
        encode.expect(room)

    def go_on(self) -> None:
        number = self.choices.number(0, 999)
        if number % 2:
            self.schedule.deliver_in_order(number)
        else:
            self.schedule.work(number)

    def mishap(self) -> None:
        which, rank = self.choices.number(0, 9), self.choices.number(0, 1)
        moves: list[Callable[[], None]] = [
            self.schedule.land_late,
            self.schedule.look_for_quiet,
            lambda: self.schedule.cancel(rank, self.choices.number(0, 9)),
            lambda: self.schedule.refuse(rank, self.choices.number(0, 9)),
            lambda: self.schedule.pass_time(3.0),
            lambda: self.schedule.spoil_write(rank, self.choices.number(0, 2)),
        ]
        moves[which]() if which < len(moves) else self.schedule.spoil_write(rank, LANDS_LATE)

    def attack(self) -> None:
        for _ in range(self.choices.number(1, 12)):
            self._attack_once()

    def _attack_once(self) -> None:
        if self.choices.number(0, 3):
            self.attack_encode(self.stranger.frames(self.stranger.to_encode))
        else:
            self.attack_language(self.stranger.frames(self.stranger.to_language))

    def attack_encode(self, frames: Sequence[bytes]) -> None:
        self.messages += 1
        try:
            message = codec.decode_to_encode(frames)
        except UndecodableFrames:
            self.undecodable += 1
            return
        for encode in self.world.encodes.values():
            if self.knows_all or not self._is_forged(encode, message):
                encode.run(encode.core.receive(message, self.world.clock.now))
        self.check()

    def attack_language(self, frames: Sequence[bytes]) -> None:
        self.messages += 1
        try:
            message = codec.decode_to_language(frames)
        except UndecodableFrames:
            self.undecodable += 1
            return
        for language in self.world.languages:
            if self.knows_all or not self._is_forged_report(message):
                language.run(language.core.receive(message, self.world.clock.now))
        self.check()

    # ---- what is not promised

    def _is_forged(self, encode: EncodeNode, message: ToEncode) -> bool:
        honest = {language.plane.session_id for language in self.world.languages}
        if isinstance(message, Ping):
            return self._names_an_instance(message.instance) and message.address.host != "stranger"
        if isinstance(message, Register):
            return message.session_id in honest and encode.core.session(message.session_id) is None
        is_offer = isinstance(message, TransferEmbeddingInfo)
        in_whose_name = message.mooncake_session_id if is_offer else message.session_id
        if message.room >= HONEST_ROOMS and message.room in self.world.truths:
            return in_whose_name in honest or not encode.core.is_settled(message.room)
        return in_whose_name in honest and message.room in self.own_rooms

    def _is_forged_report(self, message: ToLanguage) -> bool:
        if isinstance(message, Pong):
            return self._names_an_instance(message.asked)
        return message.room in self.world.truths

    def _names_an_instance(self, instance: str) -> bool:
        return any(instance == encode.instance for encode in self.world.encodes.values())

    # ---- what must hold

    def check(self) -> None:
        timing = self.world.timing
        for encode in self.world.encodes.values():
            sizes = encode.core.sizes()
            for table, most in (
                ("sessions", timing.max_sessions),
                ("contenders", MAX_CONTENDERS),
                ("unexpected", timing.max_unexpected_rooms),
                ("remembered", timing.max_remembered),
            ):
                if sizes[table] > most:
                    raise Violation(f"bounds: {table} are {sizes[table]}, and {most} at most")
            if sizes["rooms"] > sizes["unexpected"] + len(encode.journal.history) + len(encode.jobs):
                raise Violation(f"bounds: {sizes['rooms']} rooms, of which strangers opened too many")
        for node in (*self.world.encodes.values(), *self.world.languages):
            sizes = node.core.sizes()
            if sizes["blocks_free"] + sizes["blocks_leased"] + sizes["blocks_quarantined"] != node.pool.count:
                raise Violation(f"S2: {node.journal.name} has lost blocks: {sizes}")

    def finish_honestly(self) -> None:
        """Every honest room ends as if nobody had attacked: with all of its rows, and without a deadline."""
        self.world.settle()
        for node in (*self.world.languages, *self.world.encodes.values()):
            for room, status in node.journal.statuses.items():
                if room not in self.own_rooms and status is not Status.SUCCESS:
                    how = node.journal.failures.get(room)
                    raise Violation(f"attack: {node.journal.name}, honest room {room}: {status.name} {how}")
        self.schedule.finish()

    def finish(self) -> None:
        self.schedule.finish()


def run_attack(choices: Choices, steps: int = 80, keeps_rows: bool = False) -> AttackedWorld:
    """Nothing goes wrong but the stranger, so every honest room succeeds."""
    attacked = AttackedWorld(choices, _shape(choices, keeps_rows))
    _attack_at_random(attacked, choices, steps, attacked.go_on)
    attacked.finish_honestly()
    return attacked


def run_attack_with_faults(
    choices: Choices, steps: int = 80, knows_all: bool = False, keeps_rows: bool = False
) -> AttackedWorld:
    """Writes fail and land late too, and requests are cancelled. Tables are small, so that their bounds are met."""
    timing = msgspec.structs.replace(
        TIMING, max_sessions=3, max_unexpected_rooms=2, max_unexpected_blocks=6, max_remembered=50
    )
    attacked = AttackedWorld(choices, _shape(choices, keeps_rows), knows_all, timing)
    _attack_at_random(attacked, choices, steps, attacked.mishap)
    attacked.finish()
    return attacked


def _attack_at_random(attacked: AttackedWorld, choices: Choices, steps: int, now_and_then: Callable[[], None]) -> None:
    if choices.number(0, 3):
        attacked.schedule.warm_up()
    attacked.start()
    for _ in range(steps):
        if choices.is_used_up():
            break
        move = choices.number(0, 9)
        if move == 0:
            attacked.start()
        elif move == 1:
            attacked.start_own()
        elif move == 2:
            now_and_then()
        elif move <= 5:
            attacked.go_on()
        else:
            attacked.attack()


def run_insider_attack(choices: Choices, steps: int = 80, keeps_rows: bool = False) -> AttackedWorld:
    """The stranger knows everything and may forge any message: nothing breaks, and everyone gets an answer."""
    return run_attack_with_faults(choices, steps, knows_all=True, keeps_rows=keeps_rows)


def _shape(choices: Choices, keeps_rows: bool) -> Shape:
    ranks = choices.number(1, 2)
    return Shape(
        block_size=choices.number(1, 4),
        encode_blocks=choices.number(1, 6),
        language_blocks=tuple(choices.number(1, 5) for _ in range(ranks)),
        defaults=tuple((None, 1, 3, 8, 20)[choices.number(0, 4)] for _ in range(ranks)),
        encodes=choices.number(1, 2),
        keeps_rows=keeps_rows,
        steps_of_tower=3 if keeps_rows else 1,
    )
