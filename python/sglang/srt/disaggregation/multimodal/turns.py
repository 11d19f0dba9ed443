"""Whose items go through the vision tower in the next turn: requests take turns, and what nobody needs is left out."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Final

from embedding_relay.gathering import Gathering
from embedding_relay.memory.buffers import SourceRows
from embedding_relay.memory.device import Synchronizes
from sglang.srt.disaggregation.mooncake.conn_multimodal import MooncakeEmbeddingSender
from sglang.srt.disaggregation.multimodal import media
from sglang.srt.disaggregation.multimodal.roles import Part
from sglang.srt.disaggregation.multimodal.tower import VisionTower, item_tokens, release_pixels

# Of one request, on a device that works while the scheduler goes on: while it makes one group the next one is queued,
# and no more, or a large request would have the device to itself again.
_MOST_QUEUED: Final = 2


class EncodeRequest:
    """A request and its end of the transfer. By its number all ranks of this instance know it."""

    def __init__(self, req: Any, sender: MooncakeEmbeddingSender, number: int) -> None:
        self.req = req
        self.sender = sender
        self.number = number
        self.bytes = 0
        """Of all its rows, as far as the rows that are made tell: 0 until the tower has begun."""
        self.rows: dict[int, Any] = {}
        """What the tower has made: by the item's index, one tensor."""
        self.absent: tuple[int, ...] = ()
        """Items whose rows everybody who needs them has already."""
        self.left = sorted(range(len(self.items)), key=lambda index: _first_row(self.items[index]))
        """Items that are not made yet, in the order of the prompt."""
        self.size = self.tokens(self.left)
        """Tokens of all its items."""
        self.share = 0.0
        """How far it is in the turns: see `Turns`."""
        self.source: SourceRows | None = None
        """What the transfer was given last."""
        self.has_failed = False
        self._queued: deque[Synchronizes] = deque()

    @property
    def items(self) -> list[Any]:
        return list(self.req.multimodal_inputs.mm_items)

    @property
    def has_begun(self) -> bool:
        return self.source is not None

    def tokens(self, indexes: Iterable[int]) -> int:
        items = self.items
        return sum(item_tokens(items[index]) for index in indexes)

    def leave_out(self, indexes: Collection[int]) -> None:
        self.absent += tuple(indexes)
        self.left = [index for index in self.left if index not in indexes]

    def take(self, indexes: Sequence[int], rows: Sequence[Any]) -> None:
        """What the tower has made of these items. Their pixels, often larger, are let go."""
        items = self.items
        self.rows.update(zip(indexes, rows, strict=True))
        self.left = [index for index in self.left if index not in indexes]
        release_pixels([items[index] for index in indexes])
        made = sum(one.nbytes for one in self.rows.values())
        if tokens := self.tokens(self.rows):
            self.bytes = made * self.tokens([*self.rows, *self.left]) // tokens

    def hand_over(self) -> None:
        """Everything that is made so far."""
        if self.has_failed:
            return
        begun, self.source = self.has_begun, media.source_rows(self.req, self.rows, self.absent)
        if self.source.ready is not None:
            self._queued.append(self.source.ready)
        if begun:
            self.sender.more_rows(self.source)
        else:
            self.sender.send_embedding(self.source)

    def wait_for_device(self) -> None:
        """Until there is little of this request left for the device to do."""
        while len(self._queued) >= _MOST_QUEUED:
            self._queued.popleft().synchronize()

    def fail(self, indexes: Collection[int], *, asks_for_more: bool) -> None:
        """These items could not be made. The rank that decides makes no others of this request then.

        If another rank failed alone, it goes on with the others (`asks_for_more`): they compute in common.
        """
        self.has_failed = True
        self.left = [index for index in self.left if index not in indexes] if asks_for_more else []
        self.rows, self.source = {}, None


def _first_row(item: Any) -> int:
    return int(min(start for start, _ in item.offsets))


class Turns:
    """The requests that wait for the tower, and which of their items are next.

    In each turn the tower takes a group of items of the request that has had the least so far, and groups of others if
    they fit into the same pass. So a request with many pictures takes many turns, and a small one that comes in the
    middle is not behind all of them. What a request has had is counted in tokens, from a point that moves on with what
    all have had on average: one that comes now has had as much as they, and so nobody starves, neither the large
    request among small ones that keep coming nor these among large ones.
    """

    def __init__(self, tower: VisionTower) -> None:
        self.tower = tower
        self.queue: list[EncodeRequest] = []
        self.gathering = Gathering()
        self._clock = 0.0
        self._had = {True: 0.0, False: 0.0}
        """Tokens of small requests, and of large ones. Who does not wait saves nothing up."""

    def _is_small(self, request: EncodeRequest) -> bool:
        return request.size <= self.tower.batch_tokens

    def add(self, requests: Iterable[EncodeRequest]) -> None:
        for request in requests:
            request.share = self._clock
            self.queue.append(request)

    def next_batch(
        self, others: Sequence[EncodeRequest] = (), over: Collection[int] = (), *, may_begin: bool = True
    ) -> tuple[Part, ...]:
        """Decided by the first rank alone, which hears what is promised. `others` are about to be added.

        `over` are the numbers of those that are about to leave.

        A request of which everything is promised is in it whatever else is: it needs no tower. Unless `may_begin`, no
        other one is begun; one that has rows here already goes on, because its room cannot end without the rest.
        """
        free: list[Part] = []
        wanting: list[tuple[EncodeRequest, tuple[int, ...], list[int]]] = []
        waiting = [(one.share, one) for one in self.queue] + [(self._clock, one) for one in others]
        first = self._had[True] <= self._had[False]
        for _, request in sorted(waiting, key=lambda one: (self._is_small(one[1]) is not first, one[0])):
            if request.number in over:
                continue
            held = request.sender.held
            left_out = tuple(index for index in request.left if index in held)
            if len(left_out) == len(request.left):
                free.append(Part(request.number, (), left_out))
            elif may_begin or request.has_begun:
                wanting.append((request, left_out, [index for index in request.left if index not in held]))
        parts: list[Part] = []

        def groups() -> Iterator[list[Any]]:
            for request, left_out, wanted in wanting:
                items = request.items
                count = self.tower.group([items[index] for index in wanted])
                parts.append(Part(request.number, tuple(wanted[:count]), left_out))
                yield [items[index] for index in parts[-1].items]

        together = len(self.tower.next_batch(groups()))
        if not together:
            self.gathering.nothing_waits()
        elif together == len(wanting) and self._waits_for_more([request for request, _, _ in wanting]):
            return tuple(free)
        return (*free, *parts[:together])

    def _waits_for_more(self, requests: Sequence[EncodeRequest]) -> bool:
        """A pass of these has room for one more like them, and others are on their way."""
        are_small = all(self._is_small(request) and not request.has_begun for request in requests)
        has_room = are_small and self.tower.has_room([request.items for request in requests])
        return has_room and self.gathering.seconds_left() > 0

    def came(self, request: EncodeRequest, behind: int) -> None:
        """One that is not ready for its turn yet, and so many like it are being prepared behind it."""
        if self._is_small(request):
            self.gathering.came(behind)

    def passed(self, requests: Sequence[EncodeRequest], took: float, computed: float) -> None:
        if all(map(self._is_small, requests)):
            self.gathering.passed(took, computed)

    def take(self, parts: Sequence[Part]) -> list[tuple[EncodeRequest, tuple[int, ...]]]:
        """Each request of a batch with its items, but for those that are over since it was decided."""
        by_number = {request.number: request for request in self.queue}
        taken = [(by_number[part.number], part) for part in parts if part.number in by_number]
        if any(part.items for part in parts):
            self.gathering.nothing_waits()
        # Decided before the weights changed: what was to be left out is made in a later turn.
        taken = [
            (request, Part(part.number, part.items) if request.sender.has_forgotten else part)
            for request, part in taken
            if part.items or not request.sender.has_forgotten
        ]
        for request, part in taken:
            request.leave_out(part.left_out)
            self.tower.totals["media_items"] += len(part.left_out)
            self.tower.totals["left_out_items"] += len(part.left_out)
            tokens = request.tokens(part.items)
            request.share += tokens
            self._clock += tokens / len(self.queue)
            self._had[self._is_small(request)] += tokens
        if len({self._is_small(request) for request in self.queue}) == 1:
            self._had = dict.fromkeys(self._had, max(self._had.values()))
        return [(request, part.items) for request, part in taken]

    def pop_finished(self) -> list[EncodeRequest]:
        """Requests of which nothing is left to make."""
        finished = [request for request in self.queue if not request.left]
        self.queue = [request for request in self.queue if request.left]
        return finished
