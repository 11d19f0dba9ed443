"""The lines of OpenAI's batch files: what is wrong with lines of an input, and the lines of output and errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any, Final

import msgspec

from embedding_relay.batch.session.records import LineError
from embedding_relay.batch.tasks import Outcome, Result
from embedding_relay.batch.workbook.jsonl_file import BOM, PLAIN, why_not_json

# They are part of the session's record in the store, so there must be an end to them.
MOST_ERRORS: Final = 100
SHOWN: Final = 200
EMPTY: Final = LineError("empty_file", "the file has no requests")
Fields = dict[str, Any]

_decode = msgspec.json.Decoder().decode


# ---- what comes in


def input_errors(file: IO[bytes], endpoint: str, most_lines: int) -> list[LineError]:
    """The first errors of a batch's input; without any it can be asked."""
    found: list[LineError] = []
    first_use: dict[str, int] = {}
    requests = 0
    for number, text in enumerate(file, 1):
        text = text.removeprefix(BOM) if number == 1 else text
        if not text.strip():
            continue
        requests += 1
        if requests > most_lines:
            return [*found, LineError("too_many_tasks", f"the file has more than {most_lines} requests")]
        found += _line_errors(number, text, endpoint, first_use)
        if len(found) >= MOST_ERRORS:
            return found[:MOST_ERRORS]
    return found if requests else [EMPTY]


def first_bad_line(file: IO[bytes]) -> LineError | None:
    """Why this cannot be the input of any batch, if it is not JSON lines: an object in each line that is not empty."""
    empty = True
    for number, text in enumerate(file, 1):
        text = text.removeprefix(BOM) if number == 1 else text
        if not text.strip():
            continue
        empty = False
        if isinstance(fields := _fields(number, text), LineError):
            return fields
    return EMPTY if empty else None


def _fields(number: int, text: bytes) -> Fields | LineError:
    try:
        fields = _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return LineError("invalid_json_line", f"this line is not JSON: {why_not_json(error)}", number)
    return fields if isinstance(fields, dict) else LineError("invalid_json_line", "this line is no JSON object", number)


def _line_errors(number: int, text: bytes, endpoint: str, first_use: dict[str, int]) -> Iterator[LineError]:
    fields = _fields(number, text)
    if isinstance(fields, LineError):
        yield fields
        return
    for name in ("custom_id", "method", "url", "body"):
        if name not in fields:
            yield LineError("missing_required_parameter", f"this line has no {name!r}", number, name)
        elif wrong := _field_error(name, fields[name], endpoint):
            yield LineError(*wrong, number, name)
    custom_id = fields.get("custom_id")
    if isinstance(custom_id, str) and first_use.setdefault(custom_id, number) != number:
        sentence = f"line {first_use[custom_id]} has the same custom_id {custom_id[:SHOWN]!r}"
        yield LineError("duplicate_custom_id", sentence, number, "custom_id")


def _field_error(name: str, value: Any, endpoint: str) -> tuple[str, str] | None:
    match name, value:
        case "custom_id", str() if value:
            return None
        case "custom_id", _:
            return "invalid_value", "the custom_id must be a text that is not empty"
        case "method", "POST":
            return None
        case "method", _:
            return "invalid_method", "the method must be POST"
        case "url", _:
            return None if value == endpoint else ("url_mismatch", f"the url must be the batch's endpoint, {endpoint}")
        case "body", dict():
            return _body_error(value, endpoint)
    return "invalid_value", "the body must be a JSON object"


def _body_error(body: Fields, endpoint: str) -> tuple[str, str] | None:
    if body.get("stream"):
        return "invalid_value", "a request of a batch cannot be streamed"
    key, kinds = ("prompt", str | list) if endpoint == PLAIN else ("messages", list)
    if not isinstance(body.get(key), kinds) or not body[key]:
        return "missing_required_parameter", f"the body has no {key}"
    return None


# ---- what goes out


def is_output(result: Result) -> bool:
    """Whether a result belongs into the output file of its batch; else it belongs into the error file."""
    return result.outcome is Outcome.DONE


def line_of(result: Result, session_id: str) -> Fields:
    request_id = f"batch_req_{session_id}{result.row:08x}"
    response, error = _response(result, request_id), None
    if response is None:
        code = "batch_cancelled" if result.outcome is Outcome.CANCELLED else "request_failed"
        error = {"code": code, "message": result.error}
    return {"id": request_id, "custom_id": result.custom_id, "response": response, "error": error}


def _response(result: Result, request_id: str) -> Fields | None:
    """The endpoint's answer or its refusal, if that is the result."""
    refused = result.outcome is Outcome.FAILED and 400 <= result.http_status < 500
    if result.outcome is not Outcome.DONE and not refused:
        return None
    body = result.response if result.response is not None else {"error": {"message": result.error}}
    return {"status_code": result.http_status or 200, "request_id": request_id, "body": body}
