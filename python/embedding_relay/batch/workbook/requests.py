"""What a ready-made request may make the endpoint fetch: the same as a row of a workbook may."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from embedding_relay.batch.workbook.url_rules import UrlRules

MEDIA: Final = ("image_url", "video_url", "audio_url")
SHOWN: Final = 200


def refusal_of_body(body: dict[str, Any], urls: UrlRules) -> str:
    """Why the request cannot be passed on; "" when nothing speaks against it."""
    for reference in _media(body):
        if reference.startswith("data:"):
            continue
        # The endpoint would take a bare path for a file of its own machine.
        if why := urls.refusal(reference):
            return f"{reference[:SHOWN]}: {why}"
    return ""


def _media(body: dict[str, Any]) -> Iterator[str]:
    for message in body.get("messages", ()):  # a request for a plain completion has none
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else ():
            for key in MEDIA:
                value = part.get(key) if isinstance(part, dict) else None
                if isinstance(value, dict):
                    value = value.get("url")
                if isinstance(value, str):
                    yield value
