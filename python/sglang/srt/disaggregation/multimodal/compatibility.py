"""The versions of SGLang that this package is tested with, and everything that differs between them."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable
from typing import Any, Final

from embedding_relay.config import UNTESTED_SGLANG, untested_sglang_allowed
from embedding_relay.protocol.errors import BAD_REQUEST, INTERNAL, UNAVAILABLE, SettingError

logger = logging.getLogger(__name__)

TESTED_SGLANG: Final = ("0.5.22", "0.5.23")


def may_serve() -> bool:
    return _installed() in TESTED_SGLANG or untested_sglang_allowed()


def check() -> None:
    """Hooks that apply to a version that nobody has tested may still mean something else there: so it is refused."""
    if _installed() in TESTED_SGLANG:
        return
    known = " and ".join(TESTED_SGLANG)
    if not may_serve():
        raise SettingError(
            f"this version is tested with SGLang {known}, found {_installed()};"
            f" {UNTESTED_SGLANG}=1 tries that one all the same"
        )
    logger.warning("relay: nobody has tested this with SGLang %s, only with %s", _installed(), known)


def _installed() -> str:
    return importlib.metadata.version("sglang")


# ---- what differs


def send_abort(scheduler: Any, abort: Any, recv_req: Any) -> None:
    """Answer a request outside of the stream of outputs."""
    if hasattr(scheduler, "send_abort_output"):
        scheduler.send_abort_output(abort, recv_req)
    else:  # 0.5.22
        scheduler.ipc_channels.send_to_tokenizer.send_output(abort, recv_req)


async def tell_of_abort(original: Callable[..., Any], out: Any, state: Any, is_stream: bool) -> Any:
    """In the HTTP process, where SGLang makes an error of an answer that is an abort.

    0.5.22 does so for three statuses. An abort with any other, as our 502, it would answer with 200 and an empty text:
    so it is shown one that it knows, and the client is told the right one.
    """
    reason = out["meta_info"]["finish_reason"]
    code = reason.get("status_code") or 0
    if reason.get("type") != "abort" or not 400 <= code < 600 or code in (BAD_REQUEST, INTERNAL, UNAVAILABLE):
        return await original(out, state, is_stream)
    from fastapi import HTTPException

    known = {**out, "meta_info": {**out["meta_info"], "finish_reason": {**reason, "status_code": UNAVAILABLE}}}
    try:
        told = await original(known, state, is_stream)
    except HTTPException as error:
        raise HTTPException(code, error.detail) from None
    return None if told is None else out
