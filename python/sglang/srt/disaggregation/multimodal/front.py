"""Both modes in SGLang's tokenizer manager: the other half hears of failures, and a dead scheduler is answered for."""

from __future__ import annotations

import contextlib
import functools
import http
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final, NamedTuple

from embedding_relay.config import RelayConfig
from embedding_relay.protocol.errors import BAD_REQUEST, INTERNAL, UNAVAILABLE, Failure
from embedding_relay.pulse import SchedulerWatch, socket_name
from sglang.srt.disaggregation.multimodal import admitting, dp_ranks, modes, tracing

logger = logging.getLogger(__name__)


async def generate(
    original: Callable[..., AsyncGenerator[Any, None]], manager: Any, obj: Any, request: Any
) -> AsyncGenerator[Any, None]:
    """Around a whole request."""
    watched = functools.partial(_generate_watched, original)
    async with contextlib.aclosing(_generate_or_tell(watched, manager, obj, request)) as answers:
        async for answer in answers:
            _name_status(answer)
            yield answer


async def _generate_watched(
    original: Callable[..., AsyncGenerator[Any, None]], manager: Any, obj: Any, request: Any
) -> AsyncGenerator[Any, None]:
    watches = _watches_of(manager)
    for watch in watches:
        if trouble := await watch.trouble_before_a_request():
            from fastapi import HTTPException

            raise HTTPException(UNAVAILABLE, trouble)
    with contextlib.ExitStack() as waiting:
        for watch in watches:
            waiting.enter_context(watch.a_request_waits())
        async with (
            admitting.admitted(manager, obj, request, _rooms(obj)),
            contextlib.aclosing(original(manager, obj, request)) as answers,
        ):
            async for answer in answers:
                yield answer


def _name_status(answer: Any) -> None:
    """SGLang's streams tell of a failure only if its code is an HTTPStatus; between processes it becomes an int."""
    reason = answer["meta_info"].get("finish_reason") if isinstance(answer, dict) and "meta_info" in answer else None
    if isinstance(reason, dict) and isinstance(code := reason.get("status_code"), int):
        with contextlib.suppress(ValueError):
            reason["status_code"] = http.HTTPStatus(code)


# ---- what one half alone finds wrong with a request


class Refusal(NamedTuple):
    """A room that will never be asked for here, because its request failed before the scheduler saw it.

    Of a prefill instance: the room that it shares with a decode instance.
    """

    room: int
    host: str | None
    port: int | None
    failure: Failure
    encode_rank: int = 0


_with_scheduler: Final[set[int]] = set()
"""Rooms that the scheduler has been given, while their request is under way: how they end is its business."""


def note_dispatched(obj: Any) -> None:
    if (room := getattr(obj, "bootstrap_room", None)) is not None:
        _with_scheduler.add(room)


async def _generate_or_tell(
    original: Callable[..., AsyncGenerator[Any, None]], manager: Any, obj: Any, request: Any
) -> AsyncGenerator[Any, None]:
    """Whatever one half alone finds wrong with a request, the other half must not wait in vain."""
    try:
        async with contextlib.aclosing(original(manager, obj, request)) as answers:
            async for answer in answers:
                yield answer
    except Exception as error:
        error = _unforeseen(error) if obj.contains_mm_input() else error
        for refusal in [await _with_encode_rank(one) for one in _refusals(obj, error)]:
            logger.info("relay room=%d refused: %s", refusal.room, refusal.failure)
            tracing.note_refused(manager, refusal.room, refusal.failure, getattr(obj, "received_time", None))
            manager._dispatch_to_scheduler(_as_message(refusal))
        raise error
    finally:
        _with_scheduler.difference_update(_rooms(obj))


def _unforeseen(error: Exception) -> Exception:
    """To a client nothing of what Python says about a mistake of ours or SGLang's; the log has it."""
    if isinstance(error, ValueError) or hasattr(error, "status_code"):
        return error
    from fastapi import HTTPException

    logger.error("relay: a request failed before the scheduler had it", exc_info=error)
    return HTTPException(INTERNAL, f"this {modes.current()} instance failed on the request: its log says why")


def _refusals(obj: Any, error: Exception) -> list[Refusal]:
    rooms = [room for room in _rooms(obj) if room not in _with_scheduler]
    if not rooms or not obj.contains_mm_input():
        return []  # no other half, or one that waits for nothing
    failure = Failure(getattr(error, "status_code", BAD_REQUEST), str(getattr(error, "detail", error)))
    return [Refusal(room, _first(obj.bootstrap_host), _first(obj.bootstrap_port), failure) for room in rooms]


async def _with_encode_rank(refusal: Refusal) -> Refusal:
    if refusal.host is None or modes.current() == modes.ENCODE or modes.is_prefill():
        return refusal
    return refusal._replace(encode_rank=await dp_ranks.of_encode_instance(refusal.host, refusal.port, refusal.room))


def _rooms(obj: Any) -> list[int]:
    """One for each prompt; SGLang numbers samples too, but they share the room of their prompt."""
    rooms = getattr(obj, "bootstrap_room", None)
    if isinstance(rooms, list):
        return [room for room in rooms[: getattr(obj, "batch_size", len(rooms))] if room is not None]
    return [] if rooms is None else [rooms]


def _first(value: Any) -> Any:
    """The router pairs a whole batch with one encode instance."""
    return value[0] if isinstance(value, list) else value


def _as_message(refusal: Refusal) -> Any:
    """An abort of no request: of all that SGLang's two processes can tell each other, the one that carries a reason."""
    room, host, port, failure, rank = refusal
    where = {"relay_host": host, "relay_port": port, "relay_rank": rank}
    return abort_message(f"relay-refused-{room}", failure, relay_room=room, **where)


def refusal_in(recv_req: Any) -> Refusal | None:
    """In the scheduler: what `_as_message` said."""
    reason = recv_req.finished_reason
    if not reason or "relay_room" not in reason:
        return None
    failure = Failure(reason["status_code"], reason["message"])
    return Refusal(reason["relay_room"], reason["relay_host"], reason["relay_port"], failure, reason["relay_rank"])


def lost_rows_message(room: int, failure: Failure) -> Any:
    """From the HTTP process that has asked for the rows of this room itself, and knows that they will not come."""
    return abort_message(f"relay-lost-{room}", failure, relay_lost_room=room)


def lost_rows_in(recv_req: Any) -> tuple[int, Failure] | None:
    """In the scheduler: what `lost_rows_message` said."""
    reason = recv_req.finished_reason
    if not reason or "relay_lost_room" not in reason:
        return None
    return reason["relay_lost_room"], Failure(reason["status_code"], reason["message"])


def reason_of(recv_req: Any) -> Failure | None:
    """In the scheduler: why a request was aborted, if we did it; a client's abort has no reason."""
    reason = recv_req.finished_reason
    return Failure(reason["status_code"], reason["message"]) if reason and "status_code" in reason else None


def abort_message(rid: str, failure: Failure, **more: Any) -> Any:
    """SGLang's message for a request that ends with this failure, in either direction between its two processes."""
    from sglang.srt.managers.io_struct import AbortReq

    reason = {"type": "abort", "status_code": failure.code, "message": failure.text}
    return AbortReq(rid=rid, finished_reason={**reason, **more})


# ---- the ids of an expanded prompt, which only the language half's scheduler has


_PROMPT_IDS: Final = "relay_prompt_token_ids"


def prompt_ids_message(rid: str, ids: list[int]) -> Any:
    """To the HTTP process, ahead of the first token; like a refusal it is an abort of nothing."""
    from sglang.srt.managers.io_struct import AbortReq

    return AbortReq(rid=rid, finished_reason={_PROMPT_IDS: ids})


def take_prompt_ids(manager: Any, recv_obj: Any) -> bool:
    """In the HTTP process, for each abort that comes from the scheduler; True if it was none."""
    ids = (recv_obj.finished_reason or {}).get(_PROMPT_IDS)
    if ids is not None and (state := manager.rid_to_state.get(recv_obj.rid)) is not None:
        state.prompt_token_ids = ids
    return ids is not None


# ---- a scheduler that does not answer


def _watches_of(manager: Any) -> list[SchedulerWatch]:
    """Those of this process, one for each data-parallel rank: made at its first request, because they belong to the
    running event loop. One rank in trouble is the instance's: nobody here knows which requests it has.
    """
    watches: list[SchedulerWatch] | None = getattr(manager, "embedding_relay_watches", None)
    if watches is None:
        from sglang.srt.runtime_context import get_parallel, get_serving

        serving = get_serving()
        watches = [
            SchedulerWatch(
                socket_name(serving.host, serving.port, dp_rank),
                RelayConfig.from_environment(),
                on_trouble=functools.partial(_answer_all, manager),
                on_unhealthy=functools.partial(_report_unhealthy, manager),
            )
            for dp_rank in range(get_parallel().num_dp_ranks)
        ]
        for watch in watches:
            watch.start()
        manager.embedding_relay_watches = watches
    return watches


def _answer_all(manager: Any, trouble: str) -> None:
    """In the scheduler's place, as it would have aborted them itself; and it hears of it, should it go on."""
    rids = list(manager.rid_to_state)
    logger.error("relay: %d requests are answered 503: %s", len(rids), trouble)
    for rid in rids:
        abort = abort_message(rid, Failure(UNAVAILABLE, trouble))
        manager._dispatch_to_scheduler(abort)  # with its reason: the other half must not take it for the client's wish
        manager._handle_abort_req(abort)


def _report_unhealthy(manager: Any, reason: str) -> None:
    """For good. SGLang's health endpoints all answer 503 at once for a server that has not started."""
    from sglang.srt.managers.tokenizer_manager import ServerStatus

    logger.error("relay: this instance is unhealthy, and its health endpoints say so from now on: %s", reason)
    manager.server_status = ServerStatus.Starting
