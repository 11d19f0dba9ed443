"""One rank of either side: a core, its memory, and the work that waits until the test lets it happen."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import msgspec

from embedding_relay.memory.plane import Entry, TransferError
from embedding_relay.protocol.blocks import BlockPool
from embedding_relay.protocol.effects import (
    ChunkDestination,
    ClearAux,
    CopyAhead,
    CopyOut,
    Deliver,
    DropRows,
    EncodeEffect,
    HeldByAll,
    LanguageEffect,
    LookUp,
    ProveGone,
    Resolve,
    Send,
    StatusChanged,
    TransferEmbeddingChunk,
)
from embedding_relay.protocol.encode.side import EncodeSide
from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.language.side import LanguageSide
from embedding_relay.protocol.messages import (
    Address,
    Handshake,
    Item,
    Register,
    StatusReport,
    TransferEmbeddingInfo,
)
from embedding_relay.protocol.plan import batches, plan_chunk
from embedding_relay.protocol.status import Status, is_final
from embedding_relay.protocol.timing import Timing
from embedding_relay.testing.kept import KeptRows, MadeRows, WrittenRows
from embedding_relay.testing.plane import Clock, MemoryDataPlane, MemoryFabric
from embedding_relay.testing.watch import AUX, COLUMNS, EMBEDDINGS, MAX_ROWS, Journal, Memory, Truth, Violation


def items_of(room: int) -> int:
    """What a language rank is told of its request. Every third has many; nothing else depends on it here."""
    return 28 if room % 3 == 0 else 1


class WorldOfNode(Protocol):
    """What a node uses of the world that it is part of."""

    block_size: int
    ranks: int
    takes_offer_ahead: bool
    smallest_half: int
    keeps_rows: bool
    steps_of_tower: int
    timing: Timing
    clock: Clock
    fabric: MemoryFabric
    truths: dict[int, Truth]
    unreachable: set[str]
    encodes: dict[str, EncodeNode]

    def handshake(self, blocks: int) -> Handshake: ...

    def post(self, sender: str, send: Send) -> None: ...

    def is_refused(self, address: Address) -> bool: ...

    def make_encode_side(self, **arguments: Any) -> EncodeSide: ...

    def make_language_side(self, **arguments: Any) -> LanguageSide: ...


class Job(NamedTuple):
    chunk: TransferEmbeddingChunk
    registers: dict[str, Register | None]
    errors: dict[str, str]


class EncodeNode:
    """An encode instance: its core, its memory, and the work that waits for a test to let it happen."""

    def __init__(self, world: WorldOfNode, name: str, address: Address, instance: str, blocks: int) -> None:
        self.world = world
        self.name = name
        self.address = address
        self.instance = instance
        self.pool = BlockPool(blocks)
        self.memory = Memory(world.block_size, blocks)
        self.plane = MemoryDataPlane(world.fabric, f"{instance}:1")
        self.plane.start(self.memory.regions())
        self.core = world.make_encode_side(
            handshake=world.handshake(blocks), instance=instance, pool=self.pool, timing=world.timing
        )
        self.journal = Journal(instance)
        self.towers: list[int] = []
        self.jobs: list[Job] = []
        self.sources: dict[int, MadeRows] = {}
        self.growing: list[int] = []
        """Rooms of which more rows will be made."""
        self.held: dict[int, tuple[int, ...]] = {}
        """Items of each room that need not be made."""
        self.written: dict[tuple[int, Address], WrittenRows] = {}
        self.failed_sessions: set[str] = set()
        self.proofs: list[ProveGone] = []
        self.is_cut_off = False
        """Its data plane reaches nobody, so that it can prove nothing about it either; its control plane lives."""

    def run(self, effects: Sequence[EncodeEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                if isinstance(effect.message, StatusReport):
                    self._check_report(effect.to, effect.message)
                self.world.post(self.instance, effect)
            elif isinstance(effect, StatusChanged):
                self.journal.note(effect)
                if effect.status is Status.WAITING_FOR_INPUT:
                    self.towers.append(effect.room)
            elif isinstance(effect, HeldByAll):
                self.held[effect.room] = effect.items
            elif isinstance(effect, TransferEmbeddingChunk):
                self._take_job(effect)
            elif isinstance(effect, ProveGone):
                self.proofs.append(effect)
            elif isinstance(effect, DropRows):
                self.sources.pop(effect.room, None)
                self.held.pop(effect.room, None)
                if any(chunk.room == effect.room for chunk, _, _ in self.jobs):
                    raise Violation(f"rows: those of room {effect.room} are dropped while they are being written")

    def _take_job(self, chunk: TransferEmbeddingChunk) -> None:
        registers = {d.session_id: self.core.session(d.session_id) for d in chunk.destinations}
        for other, known, _ in self.jobs:
            for ours, theirs in itertools.product(chunk.destinations, other.destinations):
                is_same = ours.session_id == theirs.session_id and known[ours.session_id] == registers[ours.session_id]
                if is_same and not set(ours.blocks).isdisjoint(theirs.blocks):
                    raise Violation(f"S2: rooms {chunk.room} and {other.room} write to one block of {ours.session_id}")
        self.jobs.append(Job(chunk, registers, {}))

    def _check_report(self, to: Address, report: StatusReport) -> None:
        if (written := self.written.get((report.room, to))) is not None:
            written.check(report)

    def expect(self, room: int) -> None:
        self.journal.begin(room)
        self.run(self.core.expect(room, self.world.clock.now, self.world.truths[room].items))

    def refuse(self, room: int, failure: Failure) -> None:
        self.run(self.core.refuse(room, failure, self.world.clock.now))

    def run_tower(self, index: int = 0) -> None:
        room = self.towers.pop(index)
        truth, steps = self.world.truths[room], self.world.steps_of_tower
        source = self.sources.setdefault(room, MadeRows(truth))
        ready = truth.total if steps == 1 else truth.total * (room % steps) // steps
        source.make(ready, self.held.get(room, ()))
        if ready < truth.total:
            self.growing.append(room)
        self.run(self.core.submit(room, truth.total, self.world.clock.now, source.absent, ready))

    def make_more(self, index: int = 0) -> None:
        room = self.growing[index]
        if (source := self.sources.get(room)) is None:
            self.growing.pop(index)
            return
        total = source.truth.total
        source.make(min(total, source.ready + max(1, total // self.world.steps_of_tower)), self.held.get(room, ()))
        if source.ready == total:
            self.growing.pop(index)
        self.run(self.core.more_rows(room, source.ready, self.world.clock.now, source.absent))

    def write_half(self, index: int = 0) -> None:
        """Do the first half of one chunk, and say so. `write` then does all of it, but where this has failed."""
        chunk, registers, errors = self.jobs[self._first_of_its_room(index)]
        if self.is_cut_off:
            return
        if chunk.window.stage:
            self._stage(chunk)
        for destination in chunk.destinations:
            register, middle = registers[destination.session_id], (destination.start_row + destination.stop_row) // 2
            if register is None or middle == destination.start_row or self.world.is_refused(register.address):
                continue
            try:
                self._write(chunk, msgspec.structs.replace(destination, stop_row=middle), register)
            except TransferError as error:
                errors[destination.session_id] = str(error)
                continue
            session = destination.session_id, middle
            self.run(self.core.progressed(chunk.room, chunk.transfer_id, *session))

    def write(self, index: int = 0) -> None:
        """Do one chunk, to all of its destinations, and report."""
        chunk, registers, errors = self.jobs.pop(self._first_of_its_room(index))
        if chunk.window.stage:
            self._stage(chunk)
        for destination in chunk.destinations:
            if destination.session_id in errors:
                continue
            register = registers[destination.session_id]
            try:
                if register is None:
                    raise TransferError("the session is gone")
                if self.is_cut_off:
                    raise TransferError("no answer")
                if self.world.is_refused(register.address):
                    raise TransferError("another process has the session, and its engine knows other memory")
                self._write(chunk, destination, register)
            except TransferError as error:
                errors[destination.session_id] = str(error)
        self.run(self.core.transferred(chunk.room, chunk.transfer_id, errors, self.world.clock.now))
        self.failed_sessions.update(errors)

    def _first_of_its_room(self, index: int) -> int:
        """One worker has all of a session's, and does them in their order."""
        room = self.jobs[index].chunk.room
        return next(at for at, job in enumerate(self.jobs) if job.chunk.room == room)

    def _stage(self, chunk: TransferEmbeddingChunk) -> None:
        window, source = chunk.window, self.sources[chunk.room]
        if any(self.pool.owner_of(block) != chunk.room for block in window.blocks):
            raise Violation(f"S2: room {chunk.room} stages rows in blocks that are not its own")
        for index, column in enumerate(COLUMNS):
            memory, content = self.memory.columns[index], source.columns[index]
            if column.per_block:
                at = window.blocks[0] * column.bytes_per_row
                memory[at : at + column.bytes_per_row] = content
                continue
            for here, there, length in self.memory.slices(column, window.blocks, window.first_row, window.rows):
                memory[here : here + length] = content[there : there + length]

    def _write(self, chunk: TransferEmbeddingChunk, destination: ChunkDestination, register: Register) -> None:
        truth = self.sources[chunk.room].truth
        ranges = plan_chunk(COLUMNS, self.world.block_size, chunk.window, destination, truth.media_runs)
        written = self.written.setdefault((chunk.room, register.address), WrittenRows(truth))
        written.note(ranges, destination, self.world.block_size)
        link = self.plane.link(destination.session_id)
        self.world.fabric.label = chunk.room
        for r in ranges:
            limit = register.handshake.item_lens[r.column] * register.handshake.blocks
            if not (r.destination >= 0 and r.length > 0 and r.destination + r.length <= limit):
                raise Violation(f"bounds: {r} of room {chunk.room} is outside of what {register.session_id} registered")
        here, there = self.memory.pointers, register.buffer_pointers
        for batch in batches(ranges):
            link.write([Entry(here[r.column] + r.source, there[r.column] + r.destination, r.length) for r in batch])

    def prove(self, index: int = 0) -> None:
        """Is the process that had a session gone? Not if it only cannot be reached."""
        asked = self.proofs.pop(index)
        is_gone = self.world.is_refused(asked.address)
        known = self.core.session(asked.session_id)
        self.run(self.core.proven(asked.session_id, asked.address, is_gone, self.world.clock.now))
        if known and not self.world.is_refused(known.address) and self.core.session(asked.session_id) != known:
            raise Violation(f"session: {asked.session_id} is taken away from {known.address}, which is alive")

    def look_for_quiet(self) -> None:
        """What the workers do after a failed write: tell the core once nothing of it can land any more."""
        for session_id in sorted(self.failed_sessions):
            if not self.is_cut_off and self.plane.link(session_id).is_quiet():
                self.failed_sessions.discard(session_id)
                self.run(self.core.session_quiet(session_id, self.world.clock.now))


class LanguageNode:
    """One language rank."""

    def __init__(self, world: WorldOfNode, address: Address, session_id: str, blocks: int, default: int | None) -> None:
        self.world = world
        self.address = address
        self.pool = BlockPool(blocks)
        self.memory = Memory(world.block_size, blocks)
        self.plane = MemoryDataPlane(world.fabric, session_id)
        self.plane.start(self.memory.regions())
        handshake = msgspec.structs.replace(
            world.handshake(blocks), takes_progress=True, takes_manifest=world.keeps_rows
        )
        register = Register(address, session_id, self.memory.pointers, handshake)
        self.core = world.make_language_side(
            register=register,
            pool=self.pool,
            default_tokens=default,
            max_rows=MAX_ROWS,
            ranks=world.ranks,
            timing=world.timing,
            smallest_half=world.smallest_half,
        )
        self.journal = Journal(session_id)
        self.copies: list[CopyOut] = []
        self.look_ups: list[LookUp] = []
        """Manifests for which nobody has looked yet."""
        self.items: dict[int, tuple[Item, ...]] = {}
        self.kept = KeptRows()
        self.lookups: list[str] = []
        self.targets: dict[int, list[bytearray]] = {}
        self.copied: dict[int, int] = {}
        """Rows of the targets that are there."""
        self.delivered: dict[int, Deliver] = {}
        self.trusts_rows = True
        """Off: somebody forges the messages of its peers, so that what it delivers may be anything."""
        self.offers: list[TransferEmbeddingInfo] = []
        """Every init and resume that it sent, in order."""
        self.held: dict[int, int] = {}
        """How many blocks each room had when it offered some of them last."""

    def run(self, effects: Sequence[LanguageEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Send):
                if isinstance(effect.message, TransferEmbeddingInfo):
                    self._check_offer(effect.message)
                self.world.post(self.plane.session_id, effect)
            elif isinstance(effect, StatusChanged):
                self.journal.note(effect)
                if is_final(effect.status):
                    self._end(effect.room)
            elif isinstance(effect, ClearAux):
                self._clear_aux(effect.block)
            elif isinstance(effect, LookUp):
                self.items[effect.room] = effect.items
                self.look_ups.append(effect)
            elif isinstance(effect, CopyAhead):
                self._copy(effect.room, effect.blocks, effect.first_row, effect.stop_row, effect.max_rows)
            elif isinstance(effect, CopyOut):
                self.copies.append(effect)
            elif isinstance(effect, Resolve):
                self.lookups.append(effect.peer)
            elif isinstance(effect, Deliver):
                self._check_delivery(effect)

    def _end(self, room: int) -> None:
        self.kept.unpin(room)
        self.items.pop(room, None)

    def _clear_aux(self, block: int) -> None:
        size = COLUMNS[AUX].bytes_per_row
        self.memory.columns[AUX][block * size : (block + 1) * size] = bytes(size)

    def _check_offer(self, info: TransferEmbeddingInfo) -> None:
        self.offers.append(info)
        held = sum(self.pool.owner_of(block) == info.room for block in range(self.pool.count))
        before, self.held[info.room] = self.held.get(info.room, held), held
        if held > before:
            sizes = self.core.sizes()
            if sizes["waiting_for_blocks"] > sizes["held_back"] or not sizes["blocks_free"]:
                raise Violation(f"L2: room {info.room} takes blocks that others wait for: {sizes}")
        if any(self.pool.owner_of(block) != info.room for block in info.dst_embedding_indices):
            raise Violation(f"S2: room {info.room} offers blocks that are not its own")

    def _check_delivery(self, effect: Deliver) -> None:
        if effect.room in self.delivered:
            raise Violation(f"S1: room {effect.room} is delivered twice")
        self.delivered[effect.room] = effect
        if not self.trusts_rows:
            return
        truth, received = self.world.truths[effect.room], self.targets.pop(effect.room)
        problem = truth.differs([bytes(column) for column in received])
        if problem or effect.rows != truth.total:
            raise Violation(f"S1: room {effect.room} ({effect.rows} of {truth.total} rows): {problem}")
        self.kept.put(self.items.get(effect.room, ()), received[EMBEDDINGS])

    def request(self, room: int, peer: str, hint_rows: int | None = None, hints: Sequence[str] = ()) -> None:
        self.journal.begin(room)
        self.targets.pop(room, None)
        self.copied.pop(room, None)
        held = self.kept.pin(room, hints)
        now = self.world.clock.now
        self.run(self.core.request(room, peer, now, hint_rows=hint_rows, held=held, items=items_of(room)))

    def answer_look_up(self, index: int = 0) -> None:
        room, items = msgspec.structs.astuple(self.look_ups.pop(index))
        if room in self.items:  # it is not over
            self.run(self.core.holds(room, self.kept.pin(room, [item.key for item in items]), self.world.clock.now))

    def cancel(self, room: int) -> None:
        self.run(self.core.cancel(room, self.world.clock.now))

    def copy(self, index: int = 0) -> None:
        effect = self.copies.pop(index)
        stop = effect.first_row + effect.capacity
        copied = self.copied.get(effect.room, 0)
        total = self._copy(effect.room, effect.blocks, effect.first_row, stop, effect.max_rows)
        if flaw := self._fill(effect, copied, min(stop, total)):
            self.run(self.core.refuse_rows(effect.room, flaw, self.world.clock.now))
            return
        rows = min(effect.capacity, total - effect.first_row) if effect.room in self.targets else 0
        self.run(self.core.copied(effect.room, rows, total, self.world.clock.now))

    def _fill(self, effect: CopyOut, copied: int, stop: int) -> str:
        """What is held is not in the blocks; what has been copied ahead is there already."""
        if not effect.held or effect.room not in self.targets or effect.room not in self.journal.open_rooms:
            return ""
        start = max(copied, effect.first_row)
        return self.kept.fill(self.targets[effect.room][EMBEDDINGS], effect.held, start, stop)

    def _copy(self, room: int, blocks: Sequence[int], first_row: int, stop_row: int, max_rows: int) -> int:
        """Rows that were copied before are not copied again. Return what is said to be the true length."""
        if any(self.pool.owner_of(block) != room for block in blocks):
            raise Violation(f"S2: room {room} reads blocks that are not its own")
        aux = COLUMNS[AUX].bytes_per_row
        if room not in self.targets:
            at = blocks[0] * aux
            (total,) = struct.unpack("<q", self.memory.columns[AUX][at : at + aux])
            if not 1 <= total <= max_rows:
                return int(total)
            self.targets[room] = [bytearray(total * column.bytes_per_row) for column in COLUMNS]
        total = len(self.targets[room][AUX]) // aux
        stop, copied = min(stop_row, total), self.copied.get(room, 0)
        for index, column in enumerate(COLUMNS):
            if column.per_block:
                continue
            for here, there, length in self.memory.slices(column, blocks, first_row, stop - first_row):
                skipped = min(length, max(0, copied * column.bytes_per_row - there))
                part = self.memory.columns[index][here + skipped : here + length]
                self.targets[room][index][there + skipped : there + length] = part
        self.copied[room] = max(stop, copied)
        return total

    def look_up(self, index: int = 0) -> None:
        peer = self.lookups.pop(index)
        node = self.world.encodes.get(peer)
        now = self.world.clock.now
        if node is None or peer in self.world.unreachable:
            self.run(self.core.peer_unreachable(peer, "connection refused", now))
        else:
            self.run(
                self.core.peer_resolved(
                    peer,
                    node.address,
                    node.instance,
                    now,
                    takes_offer_ahead=self.world.takes_offer_ahead,
                    takes_have=self.world.keeps_rows,
                )
            )
