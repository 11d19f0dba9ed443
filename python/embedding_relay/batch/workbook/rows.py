"""The tasks of a workbook: for each row its prompt and its pictures, or why it cannot be asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from embedding_relay.batch.errors import Unreadable
from embedding_relay.batch.tasks import Task
from embedding_relay.batch.workbook.analysis import Analysis, Choices, Kind
from embedding_relay.batch.workbook.cells import Cell, Row, column_index
from embedding_relay.batch.workbook.choices import Chosen, choose, require_prompt
from embedding_relay.batch.workbook.formats import open_analyzed
from embedding_relay.batch.workbook.images import ImageFinder, NoImage
from embedding_relay.batch.workbook.jsonl_file import read_requests
from embedding_relay.batch.workbook.limits import Limits
from embedding_relay.batch.workbook.url_rules import UrlRules

MEDIA: Final = ("image_url", "video_url", "audio_url")
SHOWN: Final = 200
PROGRESS_EVERY: Final = 200
EMPTY: Final = Cell("")


def read_tasks(
    source: Path,
    kind: Kind,
    analysis: Analysis,
    choices: Choices,
    folder: Path,
    limits: Limits,
    urls: UrlRules,
    progress: Callable[[float], None],
) -> Iterator[Task]:
    """Ascending by row. Rows that are empty, or that hold neither a prompt nor a picture, are left out."""
    tasks = (
        _request_tasks(source, limits, urls)
        if analysis.requests
        else _row_tasks(source, kind, analysis, choices, folder, limits, urls)
    )
    done = 0
    for done, task in enumerate(tasks, 1):
        yield task
        if done % PROGRESS_EVERY == 0:
            progress(min(1.0, done / max(1, analysis.rows)))
    if not done:
        raise Unreadable("there is nothing to ask: no row holds a prompt or a picture")
    progress(1.0)


def _request_tasks(source: Path, limits: Limits, urls: UrlRules) -> Iterator[Task]:
    for request in read_requests(source, limits):
        error = refusal_of_body(request.body, urls)
        yield Task(request.number, custom_id=request.custom_id, body=request.body, error=error)


def _row_tasks(
    source: Path, kind: Kind, analysis: Analysis, choices: Choices, folder: Path, limits: Limits, urls: UrlRules
) -> Iterator[Task]:
    chosen = choose(analysis, choices)
    require_prompt(analysis, chosen)
    places = {
        column.name: index if kind == "jsonl" else column_index(column.letter)
        for index, column in enumerate(analysis.columns)
    }
    with open_analyzed(source, kind, analysis, limits) as (table, container):
        finder = ImageFinder(folder, container, limits, urls)
        asker = _Asker(chosen, places, finder, limits.cell_chars)
        header_end = None
        for row in table.rows():
            if row.number == analysis.header_row and kind == "csv":
                header_end = max(row.cells, default=-1)
            if row.number <= analysis.header_row or row.is_empty():
                continue
            task = asker.task(row)
            if task is None:
                continue
            if header_end is not None and max(row.cells) > header_end:
                # Most likely the rest of a prompt, which would be asked without its end.
                error = "the row has more cells than the header: a text that holds the delimiter needs quotation marks"
                task = Task(row.number, error=error)
            yield task


class _Asker:
    """Makes a task of a row."""

    def __init__(self, chosen: Chosen, places: dict[str, int], finder: ImageFinder, longest: int) -> None:
        self._chosen = chosen
        self._finder = finder
        self._longest = longest
        self._template = chosen.template
        texts = chosen.template.names if chosen.template is not None else (chosen.prompt_column,)
        self._texts = {name: places[name] for name in texts}
        self._images = {name: places[name] for name in chosen.image_columns}

    def task(self, row: Row) -> Task | None:
        texts = {name: row.cells.get(index, EMPTY) for name, index in self._texts.items()}
        pictures = {name: row.cells.get(index, EMPTY) for name, index in self._images.items()}
        # The value of a merged cell alone does not make a row worth asking.
        if all(cell.spread or cell == EMPTY for cell in (*texts.values(), *pictures.values())):
            return None
        for name, cell in (texts | pictures).items():
            if cell.problem:
                return Task(row.number, error=f"column {name!r} {cell.problem}")
        if self._template is not None:
            values = {name: cell.text for name, cell in texts.items()}
            if (length := self._template.length(values)) > self._longest:
                return Task(
                    row.number, error=f"the prompt would have {length} characters; {self._longest} are accepted"
                )
            prompt = self._template.fill(values)
        else:
            prompt = texts[self._chosen.prompt_column].text
        if not prompt.strip():
            return Task(
                row.number, error=f"the prompt is empty: there is nothing in column {self._chosen.prompt_column!r}"
            )
        images = list[str]()
        for name, cell in pictures.items():
            try:
                images += self._finder.find(cell)
            except NoImage as error:
                return Task(row.number, prompt, error=f"column {name!r}: {error}")
        return Task(row.number, prompt, tuple(images))


# ---- what a ready-made request may make the endpoint fetch: no more than a row may


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
