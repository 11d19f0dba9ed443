"""What the simulated world checks against: the rows that were encoded, and the statuses that each side published."""

from __future__ import annotations

import ctypes
import dataclasses
import struct
from collections.abc import Iterator, Sequence
from typing import Final

from embedding_relay.memory.plane import Region
from embedding_relay.protocol.effects import StatusChanged
from embedding_relay.protocol.errors import Failure, IllegalMove
from embedding_relay.protocol.messages import Item, Run
from embedding_relay.protocol.plan import Column
from embedding_relay.protocol.status import Status, is_final, move

COLUMNS: Final = (
    Column("input_embeddings", 8, media_only=True),
    Column("fill_ids", 4),
    Column("aux_datas", 8, per_block=True),
    Column("media_items", 2),
)
EMBEDDINGS: Final = 0
AUX: Final = 2
MAX_ROWS: Final = 1 << 20


class Violation(AssertionError):
    """Something happened that the protocol promises never happens."""


class Memory:
    """The buffers of one rank."""

    def __init__(self, block_size: int, blocks: int) -> None:
        self.block_size = block_size
        lengths = [c.bytes_per_row * blocks * (1 if c.per_block else block_size) for c in COLUMNS]
        self.columns = [bytearray(length) for length in lengths]
        self.pointers = tuple(ctypes.addressof(ctypes.c_char.from_buffer(column)) for column in self.columns)

    def regions(self) -> list[Region]:
        return [Region(pointer, len(column)) for pointer, column in zip(self.pointers, self.columns, strict=True)]

    def block_at(self, address: int, length: int) -> set[int]:
        """The blocks that these bytes belong to."""
        for column, pointer, memory in zip(COLUMNS, self.pointers, self.columns, strict=True):
            if pointer <= address < pointer + len(memory):
                size = column.bytes_per_row * (1 if column.per_block else self.block_size)
                return set(range((address - pointer) // size, (address - pointer + length - 1) // size + 1))
        raise Violation(f"{address:#x} is in no column")

    def slices(self, column: Column, blocks: Sequence[int], first_row: int, rows: int) -> list[tuple[int, int, int]]:
        """(offset here, offset in the request, bytes), block by block."""
        width, size, parts = column.bytes_per_row, self.block_size, []
        for index in range(-(-rows // size)):
            count = min(size, rows - index * size)
            parts.append((blocks[index] * size * width, (first_row + index * size) * width, count * width))
        return parts


@dataclasses.dataclass(frozen=True)
class Picture:
    """An item of a prompt. Those that agree in number, tenant and length have the same rows, whatever their room."""

    number: int
    tenant: int
    runs: tuple[Run, ...]
    is_kept: bool = True

    @property
    def key(self) -> str:
        rows = sum(stop - start for start, stop in self.runs)
        return f"{self.number:016x}{self.tenant:08x}{rows:08x}" if self.is_kept else ""

    def rows(self) -> Iterator[tuple[int, bytes]]:
        """The embeddings, by row of the prompt."""
        content = 1 << 31 | self.number << 8 | self.tenant
        for index, row in enumerate(row for start, stop in self.runs for row in range(start, stop)):
            yield row, struct.pack("<II", content, index + 1)


@dataclasses.dataclass(frozen=True)
class Truth:
    """What the encoder makes for one room."""

    total: int
    media_runs: tuple[Run, ...]
    columns: tuple[bytes, ...]
    items: tuple[Item, ...] = ()

    @classmethod
    def of(cls, room: int, total: int, media_runs: Sequence[Run], pictures: Sequence[Picture] = ()) -> Truth:
        rows = {row: struct.pack("<II", room & 0xFFFFFFFF, row + 1) for row in range(total)}
        for picture in pictures:
            rows.update(picture.rows())
        embeddings = b"".join(rows.values())
        ids = struct.pack(f"<{total}I", *((room * 7919 + row * 31 + 1) & 0xFFFFFFFF for row in range(total)))
        items = struct.pack(f"<{total}H", *((room * 3 + row // 5 + 1) & 0xFFFF for row in range(total)))
        columns = embeddings, ids, struct.pack("<q", total), items
        return cls(total, tuple(media_runs), columns, tuple(Item(one.key, one.runs) for one in pictures))

    def differs(self, received: Sequence[bytes]) -> str:
        for index, column in enumerate(COLUMNS):
            if column.per_block:
                continue
            for start, stop in self.media_runs if column.media_only else [(0, self.total)]:
                part = slice(max(0, start) * column.bytes_per_row, min(stop, self.total) * column.bytes_per_row)
                if self.columns[index][part] != received[index][part]:
                    return f"column {column.name} differs in rows {start}..{stop}"
        return ""


class Journal:
    """The statuses that one side published; each must be a legal move."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.statuses: dict[int, Status] = {}
        self.failures: dict[int, Failure | None] = {}
        self.history: dict[int, list[Status]] = {}

    def begin(self, room: int) -> None:
        self.statuses[room] = Status.BOOTSTRAPPING
        self.history[room] = []

    def note(self, effect: StatusChanged) -> None:
        before = self.statuses.get(effect.room)
        if before is None:
            raise Violation(
                f"{self.name}: room {effect.room} is {effect.status.name}, and its request has not arrived here"
            )
        try:
            self.statuses[effect.room] = move(before, effect.status)
        except IllegalMove as error:
            raise Violation(f"S4: {self.name}, room {effect.room}: {error}") from error
        self.failures[effect.room] = effect.failure
        self.history[effect.room].append(effect.status)

    @property
    def open_rooms(self) -> list[int]:
        return [room for room, status in self.statuses.items() if not is_final(status)]
