"""Asks instances what they have noted of requests."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Final

import msgspec

from embedding_relay.tools.trace_story import Told
from embedding_relay.tools.trace_text import printable

PATH: Final = "/relay/trace"
_TIMEOUT: Final = 15.0
_LARGEST_ANSWER: Final = 32 << 20
_LONGEST_DETAIL: Final = 300


class NotTold(Exception):
    """Why an instance has not answered."""


def latest(urls: Sequence[str], number: int, key: str | None, silent: dict[str, str]) -> list[int]:
    """The latest rooms of all instances together, the oldest first. `silent` gets who does not answer, and why."""
    began: dict[int, float] = {}
    for one in _each(urls, f"last={number}", key, silent):
        for request in one.requests:
            at = request.moments[0].at - one.monotonic + one.wall
            began[request.room] = min(at, began.get(request.room, at))
    return sorted(began, key=lambda room: began[room])[-number:]


def ask_all(
    urls: Sequence[str], rooms: Iterable[int], key: str | None = None, silent: dict[str, str] | None = None
) -> list[Told]:
    """What each instance knows of these rooms."""
    silent = {} if silent is None else silent
    return [one for room in rooms for one in _each(urls, f"room={room}", key, silent)]


def _each(urls: Sequence[str], query: str, key: str | None, silent: dict[str, str]) -> list[Told]:
    """All at once; whoever was silent before is not waited for again."""

    def attempt(url: str) -> Told | NotTold:
        try:
            return _told(url, query, key)
        except NotTold as problem:
            return problem

    asked = [url for url in urls if url not in silent]
    with ThreadPoolExecutor(max_workers=16) as pool:
        answers = list(pool.map(attempt, asked))
    silent |= {url: str(one) for url, one in zip(asked, answers, strict=True) if isinstance(one, NotTold)}
    return [one for one in answers if isinstance(one, Told)]


def _told(url: str, query: str, key: str | None) -> Told:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with opener.open(urllib.request.Request(f"{url}{PATH}?{query}", headers=headers), timeout=_TIMEOUT) as reply:
            return msgspec.json.decode(reply.read(_LARGEST_ANSWER), type=Told)
    except urllib.error.HTTPError as refusal:
        with refusal:
            raise NotTold(_why(refusal.code, refusal.read(1 << 16))) from None
    except msgspec.MsgspecError as error:
        raise NotTold(f"what it answers is no trace of this version ({error})") from None
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise NotTold(f"it cannot be reached ({getattr(reason, 'strerror', None) or reason})") from None


def _why(status: int, content: bytes) -> str:
    try:
        detail = json.loads(content).get("detail")
    except (ValueError, AttributeError):
        detail = None
    if status in (401, 403) and detail is None:
        return "the key is missing or wrong: --key-file names a file with that of --admin-api-key, or --api-key"
    if status == 404 and (not isinstance(detail, str) or detail == "Not Found"):
        return f"it has no {PATH}: it is no encode or language instance, or an older one"
    return printable(f"it answers {status}: {str(detail)[:_LONGEST_DETAIL]}")
