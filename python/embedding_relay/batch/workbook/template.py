"""A prompt with column names in braces: "Translate {text} into {language}"."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

from embedding_relay.batch.refusals import Unreadable

PIECES: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Template:
    """Parsed once. `columns` are the names that there are; one that is not among them is refused."""

    def __init__(self, text: str, columns: Sequence[str]) -> None:
        # Fixed texts and, between them, the names of columns.
        self._texts: list[str] = []
        self._names: list[str] = []
        exact = set(columns)
        folded = {name.casefold(): name for name in reversed(columns)}
        fixed, at = "", 0
        for piece in PIECES.finditer(text):
            fixed += text[at : piece.start()]
            at = piece.end()
            match piece.group():
                case "{{" | "}}" as doubled:
                    fixed += doubled[0]
                case "{" | "}" as single:
                    raise Unreadable(f"the template has a single {single}: write {single * 2} for the character itself")
                case _:
                    name = piece.group(1).strip()
                    known = name if name in exact else folded.get(name.casefold())
                    if known is None:
                        there = ", ".join(columns) or "none"
                        raise Unreadable(
                            f"the template names a column {name!r} that does not exist; there are: {there}"
                        )
                    self._texts.append(fixed)
                    self._names.append(known)
                    fixed = ""
        self._end = fixed + text[at:]

    @property
    def names(self) -> tuple[str, ...]:
        """The columns it names, each once, in order."""
        return tuple(dict.fromkeys(self._names))

    def length(self, values: Mapping[str, str]) -> int:
        """Of what `fill` would give; a column may be named a hundred thousand times."""
        fixed = sum(map(len, self._texts)) + len(self._end)
        return fixed + sum(len(values.get(name, "")) for name in self._names)

    def fill(self, values: Mapping[str, str]) -> str:
        """`values` holds a text for each column that has one in this row."""
        filled = (text + values.get(name, "") for text, name in zip(self._texts, self._names, strict=True))
        return "".join(filled) + self._end
