"""What may happen to the simulated world, one move at a time: chosen by Hypothesis, or by a seed."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

from embedding_relay.protocol import codec
from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.language.reserve import has_many
from embedding_relay.protocol.messages import Queued, StatusReport, TransferEmbeddingInfo
from embedding_relay.protocol.status import Status
from embedding_relay.protocol.timing import Timing
from embedding_relay.testing.nodes import LanguageNode, items_of
from embedding_relay.testing.plane import Fault
from embedding_relay.testing.watch import Picture, Violation
from embedding_relay.testing.world import InFlight, World

TIMING = Timing(
    bootstrap=20.0,
    first_word=8.0,
    waiting=20.0,
    heartbeat_interval=2.0,
    heartbeat_max_failures=2,
    repeat_interval=0.5,
    longest_repeat_interval=4.0,
    trial=6.0,
    quarantine=5.0,
    remember_ended=300.0,
    forget_session=400.0,
)

# Long enough for every deadline of a room, one after the other.
PATIENCE = TIMING.bootstrap + 2 * TIMING.waiting

# Long enough to find out that the other side is gone: nothing is heard of a room at all, or nothing more.
NOTICED = max(TIMING.unasked, TIMING.silence + TIMING.heartbeat_interval)

# A peer whose blocks do not come back is given up, and its rooms with it.
GIVEN_UP = TIMING.quarantine + TIMING.longest_repeat_interval

# Whatever was lost has been said again by then, and whoever could not be found has been missed. With the defaults 46 s.
RECOVERED = NOTICED + TIMING.longest_repeat_interval

# How many ranks of the language instance share a room, and how many encode instances there are, or data-parallel ranks
# of one: to the protocol that is the same. (Of tensor-parallel encode ranks one alone takes part.) Four cost most.
RANKS = (1, 1, 1, 1, 1, 2, 2, 2, 4)
ENCODES = (1, 1, 1, 1, 2, 2, 2, 4)

# Half of the encode instances send rows when all of a room are made, the others as they are made.
STEPS_OF_TOWERS = (1, 1, 3, 5)

LANDS_LATE = list(Fault).index(Fault.LANDS_LATE)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A small world: small pools meet their limits soon."""

    block_size: int
    encode_blocks: int
    language_blocks: tuple[int, ...]
    defaults: tuple[int | None, ...]
    encodes: int
    takes_offer_ahead: bool = True
    keeps_rows: bool = False
    steps_of_tower: int = 1

    def build(self, timing: Timing = TIMING, **sides: Any) -> World:
        return World(
            block_size=self.block_size,
            encode_blocks=self.encode_blocks,
            language_blocks=self.language_blocks,
            default_tokens=self.defaults,
            encodes=self.encodes,
            takes_offer_ahead=self.takes_offer_ahead,
            smallest_half=1,
            keeps_rows=self.keeps_rows,
            steps_of_tower=self.steps_of_tower,
            timing=timing,
            **sides,
        )

    @classmethod
    def wide(cls, rng: random.Random) -> "Shape":
        """Two peers, and pools of which an eighth is at least a block."""
        ranks = rng.choice(RANKS)
        return cls(
            block_size=rng.randint(1, 4),
            encode_blocks=rng.randint(1, 6),
            language_blocks=tuple(rng.randint(8, 20) for _ in range(ranks)),
            defaults=tuple(rng.choice((None, 1, 3, 8, 20)) for _ in range(ranks)),
            encodes=2,
            takes_offer_ahead=rng.random() < 0.8,
            keeps_rows=rng.random() < 0.6,
            steps_of_tower=rng.choice(STEPS_OF_TOWERS),
        )

    @classmethod
    def random(cls, rng: random.Random) -> "Shape":
        ranks = rng.choice(RANKS)
        return cls(
            block_size=rng.randint(1, 4),
            encode_blocks=rng.randint(1, 6),
            language_blocks=tuple(rng.randint(1, 5) for _ in range(ranks)),
            defaults=tuple(rng.choice((None, 1, 3, 8, 20)) for _ in range(ranks)),
            encodes=rng.choice(ENCODES),
            takes_offer_ahead=rng.random() < 0.8,
            keeps_rows=rng.random() < 0.6,
            steps_of_tower=rng.choice(STEPS_OF_TOWERS),
        )


def pictures_of(room: int, start: int, stop: int) -> list[Picture]:
    """Of a few that come again and again, for two tenants. Some lie in two runs here and in one elsewhere, and what is
    left over cannot be kept.
    """
    pictures, number = [], room
    while start < stop:
        number = (number + 1 + room % 5) % 7
        rows, split = 1 + number % 5, 0
        if rows > 1 and (number + room) % 3 == 0:
            split = 1 + number % (rows - 1)
        end = start + rows + bool(split)
        if end > stop:
            pictures.append(Picture(100 + room % 1000, 0, ((start, stop),), is_kept=False))
            break
        runs = ((start, start + split), (start + split + 1, end)) if split else ((start, end),)
        pictures.append(Picture(number, int(room % 5 == 0), runs))
        start = end
    return pictures


def hints_for(room: int, pictures: Sequence[Picture]) -> Callable[[LanguageNode], list[str]]:
    """What a language rank expects in the prompt: nothing, what is there, some of it, or anything that it has."""

    def hints(language: LanguageNode) -> list[str]:
        right = [picture.key for picture in pictures if picture.is_kept]
        return [[], right, right[::2], language.kept.keys()][room % 4]

    return hints


class Schedule:
    """Moves take plain numbers, and any number chooses something, so that any sequence of numbers is a schedule."""

    def __init__(self, world: World, first_room: int = 1) -> None:
        self.world = world
        self.rooms = first_room - 1
        self.peers: dict[int, int] = {}
        """Which encode instance each room was sent to, as a number."""

    # ---- what happens when nothing fails

    def start(self, total: int, text_rows: int, peer: int, halves: Sequence[str] = ("encode", "language")) -> None:
        self.rooms += 1
        names = list(self.world.encodes)
        self.peers[self.rooms] = peer % len(names)
        runs = [(text_rows, total)] if text_rows < total else []
        pictures = pictures_of(self.rooms, text_rows, total) if self.world.keeps_rows else []
        if pictures:
            runs = [run for picture in pictures for run in picture.runs]
        hints = hints_for(self.rooms, pictures)
        self.world.start(self.rooms, total, runs, names[peer % len(names)], halves, pictures, hints)

    def warm_up(self) -> None:
        """Every peer has delivered rows before, so that it may have many rooms at a time, and some are kept."""
        for peer in range(len(self.world.encodes)):
            self.start(15 if self.world.keeps_rows else 1, 0, peer)
        self.world.settle()

    def deliver_in_order(self, which: int, again: bool = False) -> None:
        if ready := self.world.deliverable():
            index = ready[which % len(ready)]
            if again:
                self.world.in_flight.append(self.world.in_flight[index])
            self.world.deliver(index)

    def work(self, which: int) -> None:
        """A tower, a write, a copy or a lookup finishes. Now and then kept rows are evicted."""
        if which % 7 == 0:
            self.world.languages[which // 7 % len(self.world.languages)].kept.evict(which)
        moves = self._work()
        if moves:
            moves[which % len(moves)]()

    def _work(self) -> list[Callable[[], None]]:
        moves: list[Callable[[], None]] = []
        for encode in self.world.encodes.values():
            moves += [lambda e=encode, i=i: e.run_tower(i) for i in range(len(encode.towers))]  # type: ignore[misc]
            moves += [lambda e=encode, i=i: e.make_more(i) for i in range(len(encode.growing))]  # type: ignore[misc]
            moves += [lambda e=encode, i=i: e.write(i) for i in range(len(encode.jobs))]  # type: ignore[misc]
            moves += [lambda e=encode, i=i: e.write_half(i) for i in range(len(encode.jobs))]  # type: ignore[misc]
            moves += [lambda e=encode, i=i: e.prove(i) for i in range(len(encode.proofs))]  # type: ignore[misc]
        for rank in self.world.languages:
            moves += [lambda r=rank, i=i: r.answer_look_up(i) for i in range(len(rank.look_ups))]  # type: ignore[misc]
            moves += [lambda r=rank, i=i: r.copy(i) for i in range(len(rank.copies))]  # type: ignore[misc]
            moves += [lambda r=rank, i=i: r.look_up(i) for i in range(len(rank.lookups))]  # type: ignore[misc]
        return moves

    def look_up_all(self) -> None:
        for rank in self.world.languages:
            while rank.lookups:
                rank.look_up()

    # ---- what else may happen

    def deliver_any(self, which: int, again: bool = False) -> None:
        if self.world.in_flight:
            self.world.deliver(which % len(self.world.in_flight), keep=again)

    def lose(self, which: int) -> None:
        if self.world.in_flight:
            self.world.in_flight.pop(which % len(self.world.in_flight))

    def spoil_write(self, rank: int, fault: int) -> None:
        language = self.world.languages[rank % len(self.world.languages)]
        faults = list(Fault)
        self.world.fabric.fail_next(language.plane.session_id, faults[fault % len(faults)])

    def toggle_data_plane(self, peer: int) -> None:
        encode = list(self.world.encodes.values())[peer % len(self.world.encodes)]
        encode.is_cut_off = not encode.is_cut_off

    def land_late(self) -> None:
        self.world.fabric.land_late()

    def look_for_quiet(self) -> None:
        for encode in self.world.encodes.values():
            encode.look_for_quiet()

    def cancel(self, rank: int, which: int) -> None:
        language = self.world.languages[rank % len(self.world.languages)]
        if rooms := language.journal.open_rooms:
            language.cancel(rooms[which % len(rooms)])

    def refuse(self, peer: int, which: int) -> None:
        encode = list(self.world.encodes.values())[peer % len(self.world.encodes)]
        if rooms := encode.journal.open_rooms:
            encode.refuse(rooms[which % len(rooms)], Failure(400, "the image cannot be decoded"))

    def pass_time(self, seconds: float) -> None:
        self.world.advance(seconds)

    def toggle_registry(self, peer: int) -> None:
        self.world.unreachable ^= {list(self.world.encodes)[peer % len(self.world.encodes)]}

    def restart_encode(self, peer: int, same_address: bool) -> None:
        self.world.restart_encode(list(self.world.encodes)[peer % len(self.world.encodes)], same_address)

    def restart_language(self, rank: int, same_address: bool) -> None:
        self.world.restart_language(rank % len(self.world.languages), 3, same_address)

    def replace_language(self, rank: int) -> None:
        """Its Mooncake port, which is its session, is given to the new process again."""
        self.world.restart_language(rank % len(self.world.languages), 3, same_session=True)

    def lose_offers_and_reports(self, rng: random.Random) -> None:
        """Everything arrives that is on its way, but for some of the messages that make rows move."""
        while self.world.in_flight:
            message = self.world.in_flight[0]
            if rng.random() < 0.3 and self._makes_rows_move(message):
                self.world.in_flight.pop(0)
            else:
                self.world.deliver(0)

    def _makes_rows_move(self, message: InFlight) -> bool:
        """Offers, that a room is queued, and every kind of report."""
        to_encode = any(encode.address == message.to for encode in self.world.encodes.values())
        decoded = (codec.decode_to_encode if to_encode else codec.decode_to_language)(message.frames)
        return isinstance(decoded, TransferEmbeddingInfo | Queued | StatusReport)

    # ---- the end

    def recover(self) -> None:
        """L3: messages were lost, nothing else went wrong, and nothing is lost from here on."""
        self._settle_everything()
        self.world.advance(RECOVERED, between=self._settle_everything)
        for node in (*self.world.languages, *self.world.encodes.values()):
            if open_rooms := node.journal.open_rooms:
                raise Violation(f"L3: {node.journal.name} has rooms {open_rooms} {RECOVERED:g} s after the last loss")

    def check_share(self, peer: int, may_try_only: bool) -> None:
        """What one peer holds of each pool: never all, and before it has delivered anything only what a room has."""
        for language in self.world.languages:
            owners = [language.pool.owner_of(block) for block in range(language.pool.count)]
            rooms = [room for room in owners if isinstance(room, int) and self.peers[room] == peer]
            if len(rooms) > language.pool.count - language.pool.count // 8:
                raise Violation(f"share: {len(rooms)} of {language.pool.count} blocks are held by one peer")
            if may_try_only and len(set(rooms)) > 1:
                raise Violation(f"share: rooms {set(rooms)} have blocks for a peer that has never delivered a row")

    def serve_the_healthy(self, dead: int) -> None:
        """One peer of two is cut off. The other's rooms succeed, and need no clock; its own rooms end soon."""
        self.world.settle()
        for node in (*self.world.languages, *self.world.encodes.values()):
            for room in node.journal.open_rooms:
                if self.peers[room] != dead:
                    raise Violation(f"L1: {node.journal.name} has not served room {room} of a healthy peer")
            for room, failure in node.journal.failures.items():
                if failure is not None and self.peers[room] != dead:
                    raise Violation(f"L1: {node.journal.name}: room {room} of a healthy peer has failed: {failure}")
        self.world.advance(GIVEN_UP, between=self.world.settle)
        for node in (*self.world.languages, *self.world.encodes.values()):
            if open_rooms := node.journal.open_rooms:
                raise Violation(f"L3: {node.journal.name} has rooms {open_rooms} of a peer that delivers nothing")

    def kill_one_side(self, dead: str) -> None:
        """L3: every instance of one side dies; the other side waits less long for it than for one that is only slow."""
        world = self.world
        if dead == "language":
            for rank in range(len(world.languages)):
                self.restart_language(rank, same_address=False)
        else:
            for peer in range(len(world.encodes)):
                self.restart_encode(peer, same_address=False)
            world.unreachable.update(world.encodes)
        self._settle_everything()
        world.advance(NOTICED, between=self._settle_everything)
        for node in world.encodes.values() if dead == "language" else world.languages:
            if open_rooms := node.journal.open_rooms:
                raise Violation(
                    f"L3: {node.journal.name} still waits in rooms {open_rooms} for instances that are dead"
                )

    def finish_without_clock(self) -> None:
        """L1: nothing was lost and nothing failed, so everything succeeds, and no deadline is needed for it."""
        self.world.settle()
        for node in (*self.world.languages, *self.world.encodes.values()):
            for room, status in node.journal.statuses.items():
                if status is not Status.SUCCESS:
                    raise Violation(
                        f"L1: {node.journal.name}, room {room}: {status.name} {node.journal.failures.get(room)}"
                    )
        self._check_order()
        self.check_empty()

    def _check_order(self) -> None:
        """L2: first blocks go to rooms in the order of their requests, where no lookup makes one late.

        Those with few items and those with many are two orders.
        """
        for language in self.world.languages:
            firsts = list(dict.fromkeys(offer.room for offer in language.offers))
            for many in (False, True):
                ours = [room for room in firsts if has_many(items_of(room)) is many]
                if len(self.world.encodes) == 1 and ours != sorted(ours):
                    raise Violation(f"L2: {language.journal.name} served rooms in the order {firsts}")

    def finish(self) -> None:
        """From here on nothing fails any more: everyone gets an answer in time, and nothing is left behind."""
        world = self.world
        world.unreachable.clear()
        world.fabric.faults.clear()
        for encode in world.encodes.values():
            encode.is_cut_off = False
        self._settle_everything()
        world.advance(PATIENCE, between=self._settle_everything)
        for node in (*world.languages, *world.encodes.values()):
            if open_rooms := node.journal.open_rooms:
                raise Violation(f"L3: {node.journal.name}: no answer for rooms {open_rooms}")
        self.check_empty()

    def _settle_everything(self) -> None:
        self.world.settle()
        self.world.fabric.land_late()
        self.look_for_quiet()
        self.world.settle()

    def check_empty(self) -> None:
        """S5, once what was remembered of ended rooms and idle sessions has expired too."""
        timing = self.world.timing
        self.world.advance(
            timing.remember_ended + 2 * timing.forget_session + timing.silence, between=self._settle_everything
        )
        self._settle_everything()
        for node in (*self.world.languages, *self.world.encodes.values()):
            left = {name: size for name, size in node.core.sizes().items() if size}
            if left != {"blocks_free": node.pool.count}:
                raise Violation(f"S5: {node.journal.name} is left with {left}")
            if node.core.next_wakeup() is not None:
                raise Violation(f"S5: {node.journal.name} wants to be called at {node.core.next_wakeup()}")
        for language in self.world.languages:
            if language.kept.pinned:
                raise Violation(f"S5: {language.journal.name} keeps {language.kept.pinned} for rooms that are over")


def run_orderly(
    seed: int,
    steps: int = 60,
    shape: Callable[[random.Random], Shape] = Shape.random,
    warm: float = 0.7,
    **sides: Any,
) -> World:
    """Nothing is lost, nobody fails, messages of one sender keep their order; all of them may be late or repeated."""
    rng = random.Random(seed)
    world = shape(rng).build(**sides)
    schedule = Schedule(world)
    if rng.random() < warm:
        schedule.warm_up()
    for _ in range(steps):
        if rng.random() < 0.15:
            schedule.start(rng.randint(1, 40), rng.randint(0, 6), rng.randrange(2))
        elif rng.random() < 0.5:
            schedule.deliver_in_order(rng.randrange(1000), again=rng.random() < 0.25)
        else:
            schedule.work(rng.randrange(1000))
    schedule.finish_without_clock()
    return world


def run_slow(seed: int, steps: int = 80, busy: float = 0.1, shape: Shape | None = None, **sides: Any) -> World:
    """As orderly, but time passes too: less than any deadline, and enough for a live peer to be taken for dead."""
    rng = random.Random(seed)
    world = (shape or Shape.random(rng)).build(**sides)
    schedule = Schedule(world)
    if rng.random() < 0.7:
        schedule.warm_up()
    seconds_left = TIMING.bootstrap - 1.0
    for _ in range(steps):
        luck = rng.random()
        if luck < busy:
            schedule.start(rng.randint(1, 60), rng.randint(0, 6), rng.randrange(2))
        elif luck < 0.4:
            schedule.deliver_in_order(rng.randrange(1000))
        elif luck < 0.7:
            schedule.work(rng.randrange(1000))
        elif seconds_left > 0:
            seconds_left -= 1.0
            schedule.pass_time(1.0)
            if seconds_left % 4 == 0:
                schedule.look_up_all()  # a lookup has a deadline of its own, before that of the first message
            while world.in_flight:
                schedule.deliver_in_order(rng.randrange(1000))
    schedule.finish_without_clock()
    return world


def run_one_data_plane_dies(seed: int, steps: int = 80, **sides: Any) -> World:
    """Nothing that one of two peers writes arrives, from the beginning or from some time on."""
    rng = random.Random(seed)
    world = Shape.wide(rng).build(**sides)
    schedule = Schedule(world)
    dead, since = rng.randrange(2), rng.choice((0, 0, rng.randrange(steps)))
    for step in range(steps):
        if step == since:
            list(world.encodes.values())[dead].is_cut_off = True
        luck = rng.random()
        if luck < 0.2:
            schedule.start(rng.randint(1, 60), rng.randint(0, 6), rng.choice((dead, rng.randrange(2))))
        elif luck < 0.6:
            schedule.deliver_in_order(rng.randrange(1000), again=rng.random() < 0.1)
        else:
            schedule.work(rng.randrange(1000))
        schedule.check_share(dead, may_try_only=since == 0)
    schedule.serve_the_healthy(dead)
    schedule.finish()
    return world


def run_lossy(seed: int, steps: int = 80, **sides: Any) -> World:
    """Messages of any kind are lost, and clients leave. Rooms may fail of it, but nobody waits long."""
    rng = random.Random(seed)
    world = Shape.random(rng).build(**sides)
    schedule = Schedule(world)
    if rng.random() < 0.7:
        schedule.warm_up()
    for _ in range(steps):
        luck = rng.random()
        if luck < 0.12:
            schedule.start(rng.randint(1, 40), rng.randint(0, 6), rng.randrange(2))
        elif luck < 0.5:
            schedule.deliver_in_order(rng.randrange(1000))
        elif luck < 0.78:
            schedule.work(rng.randrange(1000))
        elif luck < 0.81:
            schedule.cancel(rng.randrange(1000), rng.randrange(1000))
        elif luck < 0.95:
            schedule.lose(rng.randrange(1000))
        else:
            schedule.pass_time(rng.choice((0.3, 1.0)))
    schedule.recover()
    schedule.finish()
    return world


def run_offers_and_reports_lost(
    seed: int, steps: int = 80, shape: Callable[[random.Random], Shape] = Shape.random, **sides: Any
) -> World:
    """Offers and reports are lost, and every room succeeds nevertheless, soon after the last loss."""
    rng = random.Random(seed)
    world = shape(rng).build(**sides)
    schedule = Schedule(world)
    if rng.random() < 0.7:
        schedule.warm_up()
    seconds_left = TIMING.waiting - 2 * TIMING.longest_repeat_interval
    for _ in range(steps):
        luck = rng.random()
        if luck < 0.1:
            schedule.start(rng.randint(1, 40), rng.randint(0, 6), rng.randrange(2))
        elif luck < 0.6:
            schedule.work(rng.randrange(1000))
        elif luck < 0.9:
            schedule.lose_offers_and_reports(rng)
        elif seconds_left > 0:
            seconds_left -= 0.5
            schedule.pass_time(0.5)
            schedule.lose_offers_and_reports(rng)
            schedule.look_up_all()
    world.settle()
    world.advance(TIMING.longest_repeat_interval, between=world.settle)
    schedule.finish_without_clock()
    return world


def run_one_side_dies(seed: int, steps: int = 50, **sides: Any) -> World:
    """As slow, with requests that only one side got; then every instance of one side dies."""
    rng = random.Random(seed)
    world = Shape.random(rng).build(**sides)
    schedule = Schedule(world)
    if rng.random() < 0.7:
        schedule.warm_up()
    dead, alive = rng.sample(("encode", "language"), 2)
    for _ in range(steps):
        luck = rng.random()
        if luck < 0.25:
            halves = (dead, alive) if rng.random() < 0.8 else (alive,)
            schedule.start(rng.randint(1, 40), rng.randint(0, 6), rng.randrange(2), halves)
        elif luck < 0.65:
            schedule.deliver_in_order(rng.randrange(1000), again=rng.random() < 0.1)
        elif luck < 0.95:
            schedule.work(rng.randrange(1000))
        else:
            schedule.pass_time(1.0)
    schedule.kill_one_side(dead)
    schedule.finish()
    return world


def run_chaos(
    seed: int,
    steps: int = 80,
    focus: tuple[str, ...] = (),
    shape: Callable[[random.Random], Shape] = Shape.random,
    **sides: Any,
) -> World:
    """Everything goes wrong that can; with a focus, only that, and more of it."""
    rng = random.Random(seed)
    world = shape(rng).build(**sides)
    schedule = Schedule(world)
    if rng.random() < 0.7:
        schedule.warm_up()
    mishaps = _mishaps(schedule, rng)
    # Only a few kinds of faults in each schedule: with all of them at once, no room gets far.
    chosen = [mishaps[name] for name in focus or rng.sample(sorted(mishaps), rng.randint(1, 4))]
    for _ in range(steps):
        luck = rng.random()
        if luck < 0.12:
            schedule.start(rng.randint(1, 30), rng.randint(0, 4), rng.randrange(2))
        elif luck < 0.5:
            schedule.deliver_in_order(rng.randrange(1000))
        elif luck < 0.88:
            schedule.work(rng.randrange(1000))
        else:
            rng.choice(chosen)()
    schedule.finish()
    return world


def _mishaps(schedule: Schedule, rng: random.Random) -> dict[str, Callable[[], None]]:
    def pick() -> int:
        return rng.randrange(1000)

    return {
        "reorder": lambda: schedule.deliver_any(pick()),
        "repeat at once": lambda: schedule.deliver_any(pick(), again=True),
        "repeat later": lambda: schedule.deliver_in_order(pick(), again=True),
        "lose": lambda: schedule.lose(pick()),
        "spoil write": lambda: schedule.spoil_write(pick(), pick()),
        "write late": lambda: schedule.spoil_write(pick(), LANDS_LATE),
        "cut off": lambda: schedule.toggle_data_plane(pick()),
        "land late": schedule.land_late,
        "look for quiet": schedule.look_for_quiet,
        "cancel": lambda: schedule.cancel(pick(), pick()),
        "refuse": lambda: schedule.refuse(pick(), pick()),
        "pass time": lambda: schedule.pass_time(rng.choice((0.1, 1.0, 3.0, 8.0, 25.0))),
        "toggle registry": lambda: schedule.toggle_registry(pick()),
        "refuse connection": lambda: schedule.start(pick() % 30 + 1, 0, pick(), [("encode", "language")[pick() % 2]]),
        "restart encode": lambda: schedule.restart_encode(pick(), rng.random() < 0.5),
        "replace encode": lambda: schedule.restart_encode(pick(), True),
        "restart language": lambda: schedule.restart_language(pick(), rng.random() < 0.5),
        "replace language": lambda: schedule.replace_language(pick()),
    }


# All of them, each with the share of the seeds that is worth its time.
KINDS_OF_SCHEDULES = {
    run_orderly: 1 / 2,
    run_slow: 1 / 2,
    run_one_data_plane_dies: 1 / 2,
    run_lossy: 1 / 2,
    run_offers_and_reports_lost: 1 / 4,
    run_one_side_dies: 1,
    run_chaos: 1,
}
