"""Data-parallel ranks: which of this instance's takes a request, and which of the encode instance's makes its rows.

Both halves of a request must find the same rank of the encode instance, and all samples of a prompt the same rank of
the language instance: so whatever has a room goes by its number. Decided in the HTTP process, ahead of SGLang's data
parallel controller, which knows rooms only by a method that ends the controller where a request has none.
"""

from __future__ import annotations

import asyncio
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from embedding_relay.config import RelayConfig
from embedding_relay.protocol.messages import Address, rank_of_room
from embedding_relay.registry.client import InstanceSizes
from sglang.srt.disaggregation.multimodal import modes, request_notes
from sglang.srt.runtime_context import get_disagg, get_parallel

# Clients choose registries. Those that do not answer must keep no thread that others need.
_THREADS: Final = ThreadPoolExecutor(16, thread_name_prefix="relay-sizes")
_asking: Final[dict[Address, asyncio.Future[int]]] = {}


async def route(tokenized: Any) -> Any:
    """Fill in SGLang's own fields for both ranks; what a client has written into the second one is not believed.

    A client may choose the language rank, as at any server. At the encode instance it would be the other half's rank.
    """
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    size = get_parallel().num_dp_ranks
    if modes.is_prefill() or tokenized.bootstrap_host == FAKE_BOOTSTRAP_HOST:
        return tokenized  # health and warm-up requests name the rank that they mean, or are for each in turn
    chosen_here = request_notes.read(tokenized).encode_half if tokenized.need_wait_for_mm_inputs else None
    room = tokenized.bootstrap_room if chosen_here is None else chosen_here.room
    if room is None:
        return tokenized
    if size > 1 and (tokenized.routed_dp_rank is None or modes.current() == modes.ENCODE):
        tokenized.routed_dp_rank = rank_of_room(room, size)
    tokenized.disagg_prefill_dp_rank = 0
    if chosen_here is None and tokenized.need_wait_for_mm_inputs and tokenized.bootstrap_host is not None:
        host, port = tokenized.bootstrap_host, tokenized.bootstrap_port
        tokenized.disagg_prefill_dp_rank = await of_encode_instance(host, port, room)
    return tokenized


async def of_encode_instance(host: str, port: int | None, room: int) -> int:
    registry = Address(host, get_disagg().disaggregation_bootstrap_port if port is None else port)
    size = _sizes().known(registry, time.monotonic())
    return rank_of_room(room, await _ask(registry) if size is None else size)


async def _ask(registry: Address) -> int:
    """Once for all requests that wait for it."""
    asked = _asking.get(registry)
    if asked is None:
        asked = _asking[registry] = asyncio.get_running_loop().run_in_executor(_THREADS, _sizes().ask, registry)
        asked.add_done_callback(lambda _: _asking.pop(registry, None))
    return await asyncio.shield(asked)  # one of them may leave


@functools.cache
def _sizes() -> InstanceSizes:
    keys = RelayConfig.from_environment().keys
    return InstanceSizes(keys.registry if keys else None)
