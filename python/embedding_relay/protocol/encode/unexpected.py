"""Rooms that language ranks have asked for before their request has come here. Anybody can invent such: bounded."""

from __future__ import annotations

from collections import OrderedDict

from embedding_relay.protocol.timing import Timing


class UnexpectedRooms:
    """Bounded in number and in blocks on offer: the oldest gives way, because a real request arrives soon."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._blocks: OrderedDict[int, int] = OrderedDict()
        self._total = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, room: int, blocks: int) -> None:
        self._blocks[room] = self._blocks.get(room, 0) + blocks
        self._total += blocks

    def discard(self, room: int) -> None:
        self._total -= self._blocks.pop(room, 0)

    def one_too_many(self) -> int | None:
        timing = self._timing
        if len(self._blocks) <= timing.max_unexpected_rooms and self._total <= timing.max_unexpected_blocks:
            return None
        return next(iter(self._blocks))
