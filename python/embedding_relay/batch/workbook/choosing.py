"""What a person chose, laid over what the analysis found; a name that does not exist is refused with those that do."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from embedding_relay.batch.refusals import Unreadable
from embedding_relay.batch.workbook.analysis import Analysis, Choices, Column, Role
from embedding_relay.batch.workbook.naming import find_column
from embedding_relay.batch.workbook.template import Template


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
