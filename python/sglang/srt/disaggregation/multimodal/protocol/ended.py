"""Rooms that are over: remembered for a while, because messages about them may still be on their way."""

from __future__ import annotations

import msgspec

from sglang.srt.disaggregation.multimodal.protocol.errors import Failure
from sglang.srt.disaggregation.multimodal.protocol.status import Status
from sglang.srt.disaggregation.multimodal.protocol.timing import Timing


class Ending(msgspec.Struct, frozen=True):
    status: Status
    failure: Failure | None
    forget_at: float


class EndedRooms:
    """Bounded in time and in number; every entry lives equally long, so the oldest is always the first."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._endings: dict[int, Ending] = {}

    def __len__(self) -> int:
        return len(self._endings)

    def add(self, room: int, status: Status, failure: Failure | None, now: float) -> None:
        self._endings.pop(room, None)
        self._endings[room] = Ending(status, failure, now + self._timing.remember_ended)
        if len(self._endings) > self._timing.max_remembered:
            del self._endings[next(iter(self._endings))]

    def get(self, room: int) -> Ending | None:
        return self._endings.get(room)

    def next(self) -> float | None:
        return next((ending.forget_at for ending in self._endings.values()), None)

    def forget_due(self, now: float) -> None:
        for room, ending in list(self._endings.items()):
            if ending.forget_at > now:
                return
            del self._endings[room]
