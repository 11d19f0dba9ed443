"""Prefill of the rows of a prompt that are here, while the others are on their way: requests of our own to SGLang.

What such a request has computed stays in SGLang's radix cache, and the whole prompt finds it there, as it finds what
any other request has left. SGLang itself fills its cache in this way before it draws several samples of one prompt.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from embedding_relay import recorder
from embedding_relay.memory.buffers import ReceivedRows
from embedding_relay.memory.checks import NO_ITEM, ModelLimits, SmallColumns
from embedding_relay.observer import Observer
from embedding_relay.recorder import Recorder
from sglang.srt.disaggregation.mooncake.conn_multimodal import MooncakeEmbeddingReceiver
from sglang.srt.disaggregation.multimodal import media, modes

logger = logging.getLogger(__name__)

# A forward pass takes about as long for one row as for a few hundred: an accelerator loads all weights for it. With
# fewer new rows than this a pass of their own would cost more than it saves.
LEAST_NEW_ROWS: Final = 256


class Room(Protocol):
    """What is looked at of a `MultimodalLanguageRequest`; of its receiver, rows that the control thread copies."""

    receiver: MooncakeEmbeddingReceiver
    waiting: list[Any]
    is_decided: bool
    prefix: Prefix | None
    prefilled: int


class Prefix:
    """One request of ours. SGLang's `Req` refers to it, by which everybody knows that its answer is for nobody."""

    def __init__(self, room: int, rows: int) -> None:
        self.room = room
        self.rows = rows
        self.rid = f"relay-prefix-{uuid.uuid4().hex}"
        self.req: Any = None
        self.is_over = False
        self.on_end: Callable[[], None] | None = None

    def end(self) -> None:
        """SGLang is done with it, in whatever way."""
        if not self.is_over:
            self.is_over = True
            if self.on_end is not None:
                self.on_end()


def of(req: Any) -> Prefix | None:
    """The prefix that a `Req` of SGLang is for."""
    found: Prefix | None = getattr(req, "relay_prefix", None)
    return found


def answers(req: Any) -> bool:
    """Whether what SGLang shows of this `Req` is for nobody, because it is one of ours. It may have ended with it."""
    if (prefix := of(req)) is None:
        return False
    if req.finished():
        prefix.end()
    return True


def why_not(scheduler: Any, ranks: int) -> str | None:
    """Why this instance begins with no prompt before all its rows are here; None if it may."""
    cache = scheduler.tree_cache
    if modes.is_prefill():
        return "its tokens come from a decode instance"
    if ranks > 1:
        return "it has several ranks, which would have to begin at the same rows"
    if not scheduler.is_generation:
        return "its model generates no tokens"
    if not scheduler.spec_algorithm.is_none():
        return "it decodes speculatively"
    if not cache.supports_prefix_sharing() or cache.supports_swa() or cache.supports_mamba():
        return "its radix cache is off, or keeps more than one kind of state"
    if scheduler.chunked_prefill_size is None:
        return "chunked prefill is off: its model may need a prompt as a whole"
    return None


class PrefixPrefill:
    """The prefixes of all rooms of one language rank. Every method runs in the scheduler's thread."""

    def __init__(self, scheduler: Any, limits: ModelLimits, held: Recorder, observer: Observer) -> None:
        self._scheduler = scheduler
        self._limits = limits
        self._recorder = held
        self._observer = observer
        self._making: Prefix | None = None
        self.totals: Final = {"prefixes": 0, "prefix_rows": 0}

    def advance(self, rooms: Iterable[Room]) -> None:
        """Give SGLang the first prefix that is worth it, if nothing else waits: a prompt that is whole goes first."""
        if self._scheduler.waiting_queue or self._scheduler.chunked_req is not None:
            return
        for room in rooms:
            if room.prefix is not None and not room.prefix.is_over:
                continue
            if room.is_decided or not room.waiting or room.receiver.copied - room.prefilled < LEAST_NEW_ROWS:
                continue
            if (rows := self._rows_for(room)) is not None:
                self._begin(room, rows)
                return

    def _rows_for(self, room: Room) -> ReceivedRows | None:
        copied, target = room.receiver.copied, room.receiver.target
        if target is None or target.flaw is not None or target.total > self._scheduler.max_req_input_len:
            return None
        if not _can_be_divided(room.waiting[0]):
            return None
        rows = first_rows(target, copied)
        if rows is None or rows.total - room.prefilled < LEAST_NEW_ROWS or rows.total >= target.total:
            return None
        columns = SmallColumns(rows.aux, rows.fill_ids.numpy(), rows.mrope.numpy(), rows.items.numpy())
        return rows if columns.flaw(self._limits) is None else None

    def _begin(self, room: Room, rows: ReceivedRows) -> None:
        new, prefix = rows.total - room.prefilled, Prefix(room.receiver.room, rows.total)
        room.prefix, room.prefilled = prefix, rows.total
        self._recorder.note(prefix.room, recorder.PREFIX_BEGAN, first_row=rows.total - new, rows=new)
        prefix.on_end = lambda: self._recorder.note(prefix.room, recorder.PREFIX_ENDED, rows=new)
        self._making = prefix
        try:
            self._scheduler.handle_generate_request(_request(prefix, room.waiting[0], rows, self._limits))
        except Exception:  # the request itself will be told what is wrong with it, when it is whole
            logger.exception("relay room=%d: its first %d rows could not be given to SGLang", prefix.room, rows.total)
        finally:
            self._making = None
        if prefix.req is None:
            prefix.end()
        self.totals["prefixes"] += 1
        self.totals["prefix_rows"] += new
        self._observer.prefilled(self.totals)

    def note_created(self, req: Any) -> bool:
        """SGLang makes its `Req` of a request; whether it is one of ours."""
        if self._making is None:
            return False
        self._making.req, req.relay_prefix = req, self._making
        return True

    def holds_up(self, room: Room) -> bool:
        """All rows are here now. What SGLang has begun to compute with the first of them the whole prompt waits for;
        what it has not begun with is taken back.
        """
        if room.prefix is not None and not room.prefix.is_over:
            self._take_back(room.prefix)
        return room.prefix is not None and not room.prefix.is_over

    def give_up(self, room: Room) -> None:
        """Nobody wants the prompt any more. What SGLang has begun with ends soon, and its answer is for nobody."""
        if room.prefix is not None and not room.prefix.is_over:
            self._take_back(room.prefix)
            if not room.prefix.is_over:
                from sglang.srt.managers.io_struct import AbortReq

                self._scheduler.abort_request(AbortReq(rid=room.prefix.rid))

    def take_back_all(self, rooms: Iterable[Room]) -> None:
        """Those that wait in SGLang's queue, so that it is as idle as if there were none."""
        for room in rooms:
            if room.prefix is not None and not room.prefix.is_over:
                self._take_back(room.prefix)

    def _take_back(self, prefix: Prefix) -> None:
        queue = self._scheduler.waiting_queue
        for place, req in enumerate(queue):
            if req is prefix.req:
                del queue[place]
                self._scheduler._release_aborted_request(req)
                prefix.end()
                return


def _can_be_divided(recv_req: Any) -> bool:
    """Whether SGLang answers this request alike if the beginning of its prompt comes from the radix cache, and may."""
    wants_more = (
        *(recv_req.lora_id, recv_req.input_embeds, recv_req.session_id, recv_req.session_params),
        *(recv_req.token_type_ids, recv_req.positional_embed_overrides, recv_req.multi_item_delimiter_indices),
        *(recv_req.return_hidden_states, recv_req.return_routed_experts, recv_req.return_indexer_topk),
    )
    of_prompt = recv_req.return_logprob and recv_req.logprob_start_len >= 0
    return not of_prompt and not any(one is not None and one is not False for one in wants_more)


def first_rows(target: ReceivedRows, copied: int) -> ReceivedRows | None:
    """As many of the first `copied` rows as end with whole items, as a prompt of its own; None without an item.

    The items are numbered anew, in the order of their old numbers.
    """
    end = _end_of_items(target.items.numpy()[:copied, 0])
    items = target.items.numpy()[:end].copy()
    is_media = items[:, 0] != NO_ITEM
    numbers, renumbered = np.unique(items[is_media, 0], return_inverse=True)
    if not len(numbers) or numbers[0] < 0 or numbers[-1] >= target.media_items:
        return None
    items[is_media, 0] = renumbered
    mrope = target.mrope[:end]
    return dataclasses.replace(
        target,
        total=end,
        fill_ids=target.fill_ids[:end],
        mrope=mrope,
        items=torch.from_numpy(items),
        embeddings=target.embeddings[:end],
        mrope_delta=int(mrope.max()) + 1 - end if target.has_mrope else 0,
        media_items=len(numbers),
    )


def _end_of_items(index: NDArray[np.int32]) -> int:
    """Of rows that say which item they belong to, how many there are before a last item of which more may follow."""
    if not len(index) or index[-1] == NO_ITEM:
        return len(index)
    others = np.flatnonzero(index != index[-1])
    return int(others[-1]) + 1 if len(others) else 0


def _request(prefix: Prefix, recv_req: Any, rows: ReceivedRows, limits: ModelLimits) -> Any:
    """Like the whole request, but for what comes out of it."""
    from sglang.srt.sampling.sampling_params import SamplingParams

    own = copy.copy(recv_req)
    own.rid = prefix.rid
    own.input_ids, own.mm_inputs = media.request_inputs(rows, limits)
    own.sampling_params = SamplingParams(max_new_tokens=0, temperature=0.0)
    own.sampling_params.normalize(None)
    own.stream = own.return_logprob = own.return_sampling_mask = own.require_reasoning = False
    own.logprob_start_len, own.top_logprobs_num, own.token_ids_logprob = -1, 0, None
    own.need_wait_for_mm_inputs = own.encoder_urls = own.custom_logit_processor = own.time_stats = None
    own.bootstrap_host = own.bootstrap_room = None
    return own
