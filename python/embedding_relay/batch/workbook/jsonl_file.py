"""JSON lines: one object per line as a row, whole requests of OpenAI's Batch API, and answers as five more keys."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from embedding_relay.batch.errors import NotWhatWasSaved, TooLarge, Unreadable
from embedding_relay.batch.tasks import Result
from embedding_relay.batch.workbook.analysis import Analysis
from embedding_relay.batch.workbook.answers import OURS, Ascending, answer_names, values
from embedding_relay.batch.workbook.cells import SURROGATES, Cell, Row, number_text
from embedding_relay.batch.workbook.limits import Limits

REQUEST_KEYS: Final = frozenset({"custom_id", "method", "url", "body"})
CHAT: Final = "/v1/chat/completions"
PLAIN: Final = "/v1/completions"
ENDPOINTS: Final = (CHAT, PLAIN)
SHOWN: Final = 200
BOM: Final = b"\xef\xbb\xbf"
DECODERS_PLACE: Final = re.compile(r"\(byte (\d+)\)")
_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


class Line(NamedTuple):
    number: int
    text: bytes  # as it stands in the file, with its line end
    fields: dict[str, Any] | None  # None in an empty line


class LinesTable:
    """A .jsonl file as rows. The columns are the keys, in the order in which they appear first."""

    def __init__(self, source: Path, limits: Limits) -> None:
        self._source = source
        self._limits = limits
        self.names: list[str] = []

    def rows(self) -> Iterator[Row]:
        places: dict[str, int] = {name: index for index, name in enumerate(self.names)}
        for line in read_lines(self._source, self._limits):
            cells = {}
            for key, value in (line.fields or {}).items():
                if key not in places:
                    places[key] = len(places)
                    self.names.append(key)
                if len(places) > self._limits.columns:
                    raise TooLarge(f"line {line.number}: more than {self._limits.columns} different keys")
                text = value_text(value)
                if text.strip():
                    cells[places[key]] = Cell(text, isinstance(value, str | list | dict))
            yield Row(line.number, cells)


def value_text(value: Any) -> str:
    match value:
        case None:
            return ""
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case float():
            return number_text(value)
        case int():
            return str(value)
        case list() if all(isinstance(item, str) for item in value):
            return "\n".join(value)
        case {"url": str() as url, **rest} if not rest:
            return url
        case _:
            return _encode(value).decode()


def read_lines(source: Path, limits: Limits) -> Iterator[Line]:
    with source.open("rb") as file:
        if file.read(len(BOM)) != BOM:
            file.seek(0)
        for number, text in enumerate(file, 1):
            if len(text) > limits.cell_chars:
                raise TooLarge(f"line {number} is longer than {limits.cell_chars} bytes")
            yield Line(number, text, _fields(number, text) if text.strip() else None)


def _fields(number: int, text: bytes) -> dict[str, Any]:
    try:
        value = _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Unreadable(f"line {number} is not JSON: {why_not_json(error)}") from None
    if not isinstance(value, dict):
        raise Unreadable(f"line {number} is not a JSON object")
    return value


def why_not_json(error: Exception) -> str:
    """In words of ours, with the place that the decoder names."""
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 at byte {error.start + 1}"
    if isinstance(error, RecursionError):
        return "its lists and objects are nested too deeply"
    place = DECODERS_PLACE.search(str(error))
    return f"there is a mistake at byte {int(place[1]) + 1} of it" if place else "it ends too early"


def is_request(fields: dict[str, Any]) -> bool:
    return fields.keys() >= {"custom_id", "body"} or fields.keys() >= {"method", "url", "body"}


class Request(NamedTuple):
    number: int
    custom_id: str
    body: dict[str, Any]


def read_requests(source: Path, limits: Limits) -> Iterator[Request]:
    """The lines of a file in the format of OpenAI's Batch API; one that is not so is refused with its number."""
    seen: dict[str, int] = {}
    for line in read_lines(source, limits):
        if line.fields is not None:
            request = _request(line.number, line.fields)
            if request.custom_id in seen:
                first = seen[request.custom_id]
                raise Unreadable(
                    f"lines {first} and {line.number} have the same custom_id {request.custom_id[:SHOWN]!r}"
                )
            seen[request.custom_id] = line.number
            yield request


def _request(number: int, fields: dict[str, Any]) -> Request:
    missing = REQUEST_KEYS - fields.keys()
    if missing:
        raise Unreadable(f"line {number} has no {', '.join(sorted(missing))}, unlike the requests before it")
    custom_id, body = fields["custom_id"], fields["body"]
    if not isinstance(custom_id, str) or not custom_id:
        raise Unreadable(f"line {number}: custom_id must be a text that is not empty")
    if fields["method"] != "POST":
        raise Unreadable(f"line {number}: the method must be POST")
    if fields["url"] not in ENDPOINTS:
        raise Unreadable(f"line {number}: the url must be {' or '.join(ENDPOINTS)}")
    key, kinds = ("messages", list) if fields["url"] == CHAT else ("prompt", str | list)
    if not isinstance(body, dict) or not isinstance(body.get(key), kinds) or not body[key]:
        wanted = "a list of messages" if key == "messages" else "a prompt"
        raise Unreadable(f"line {number}: the body must be an object with {wanted}")
    if body.get("stream"):
        raise Unreadable(f"line {number}: a request of a batch cannot be streamed")
    return Request(number, custom_id, body)


# ---- with the answers


def write(source: Path, analysis: Analysis, results: Iterable[Result], out: Path) -> None:
    names = answer_names(analysis)
    pending = Ascending(results)
    with source.open("rb") as file, out.open("wb") as target:
        if file.read(len(BOM)) == BOM:
            target.write(BOM)
        for line in read_lines(source, OURS):
            result = pending.at(line.number) if line.fields is not None else None
            if result is None:
                target.write(line.text)
                continue
            # The line is an object, so its last character is the brace that ends it.
            body = line.text.rstrip()
            added = _encode(fields(names, result))[1:]
            target.write(body[:-1].rstrip() + (b", " if line.fields else b"") + added + line.text[len(body) :])
        pending.expect_none()


def fields(names: tuple[str, ...], result: Result) -> dict[str, Any]:
    given = (SURROGATES.sub("", value) if isinstance(value, str) else value for value in values(result))
    return dict(zip(names, given, strict=True))


def check(out: Path, analysis: Analysis, results: Iterable[Result]) -> None:
    names = answer_names(analysis)
    pending = Ascending(results)
    for line in read_lines(out, OURS):
        result = pending.at(line.number) if line.fields is not None else None
        found = {name: (line.fields or {})[name] for name in names if name in (line.fields or {})}
        if found != ({} if result is None else fields(names, result)):
            raise NotWhatWasSaved(f"line {line.number} of the saved file does not hold its answer")
    pending.expect_none()
