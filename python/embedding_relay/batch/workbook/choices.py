"""What a person chose, laid over what the analysis found: columns, or a template that names columns in braces."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from embedding_relay.batch.errors import Unreadable
from embedding_relay.batch.workbook.analysis import Analysis, Choices, Column, Role
from embedding_relay.batch.workbook.naming import normalized

PIECES: Final = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


class Chosen(NamedTuple):
    prompt_column: str
    image_columns: tuple[str, ...]
    template: Template | None
    columns: tuple[Column, ...]  # with the roles that they have now


def choose(analysis: Analysis, choices: Choices) -> Chosen:
    names = [column.name for column in analysis.columns]
    if choices.sheet and choices.sheet != analysis.sheet:
        raise Unreadable(f"the analysis is of the sheet {analysis.sheet!r}, not of {choices.sheet!r}")
    prompt = find_column(choices.prompt_column, names) if choices.prompt_column else analysis.prompt_column
    if choices.image_columns is None:
        images = tuple(name for name in analysis.image_columns if name != choices.prompt_column)
    else:
        images = tuple(dict.fromkeys(find_column(name, names) for name in choices.image_columns))
    if prompt in images and not choices.prompt_column:
        prompt = ""
    template = Template(choices.template, names) if choices.template else None
    roles: dict[str, Role] = dict.fromkeys(images, "image")
    if prompt:
        roles[prompt] = "prompt"
    columns = tuple(msgspec.structs.replace(column, role=roles.get(column.name, "")) for column in analysis.columns)
    return Chosen(prompt, images, template, columns)


def require_prompt(analysis: Analysis, chosen: Chosen) -> None:
    if chosen.prompt_column or chosen.template is not None or analysis.requests:
        return
    names = ", ".join(column.name for column in analysis.columns) or "none"
    raise Unreadable(
        "there is nothing to ask: no column is called prompt, question, text or instruction, or the like in another "
        f"language; name the prompt column or give a template. The columns are: {names}"
    )


class Template:
    """A prompt with column names in braces. One that is not among `columns` is refused."""

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


def find_column(name: str, names: Sequence[str]) -> str:
    """The column that a person means by `name`."""
    if name in names:
        return name
    alike = [other for other in names if normalized(other) == normalized(name)]
    if len(alike) != 1:
        raise Unreadable(f"there is no column {name!r}; there are: {', '.join(names) or 'none'}")
    return alike[0]
