"""What an operator should read once and not a thousand times, however often a stranger makes it happen."""

from __future__ import annotations

from typing import Final

from embedding_relay.protocol.effects import Note

_MAX_NOTES: Final = 1000


class Notes:
    """Says each text once, and falls silent after many of them; what happened is counted elsewhere."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def once(self, text: str) -> list[Note]:
        if text in self._said or len(self._said) >= _MAX_NOTES:
            return []
        self._said.add(text)
        return [Note(text)]
