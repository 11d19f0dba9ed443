"""The calls under /api: what the page or a script sends, and what is answered."""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Body, File, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from embedding_relay.batch import preview
from embedding_relay.batch.errors import Refusal, wrong_field
from embedding_relay.batch.service import Service, Verb
from embedding_relay.batch.session.records import Asking, Session
from embedding_relay.batch.store.contract import StoreAway
from embedding_relay.batch.tasks import Outcome, Result, Task
from embedding_relay.batch.workbook.analysis import Choices

router = APIRouter(prefix="/api")

STREAM_EVERY: Final = 0.25
MEDIA_TYPES: Final = {
    "xlsx": "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
    "csv": "text/csv",
    "jsonl": "application/jsonl",
}
Fields = dict[str, Any]


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


# ---- what is answered


def head(session: Session) -> Fields:
    return {"session_id": session.session_id, "stage": session.stage.value}


def split_view(session: Session) -> Fields:
    return head(session) | session.split.to_dict()


def execution_view(session: Session) -> Fields:
    return head(session) | session.execution.to_dict()


def file_view(session: Session) -> Fields:
    return head(session) | {"name": session.name, "kind": session.kind, "created_at": session.created_at}


def analysis_view(session: Session) -> Fields:
    found: Fields = msgspec.to_builtins({"analysis": session.analysis, "choices": session.choices})
    return file_view(session) | found


def list_view(session: Session) -> Fields:
    parts = {"split": session.split.to_dict(), "execution": session.execution.to_dict()}
    return file_view(session) | parts


def session_view(session: Session) -> Fields:
    more = {"asking": msgspec.to_builtins(session.asking), "batch": session.order is not None}
    return list_view(session) | analysis_view(session) | more


def result_view(result: Result) -> Fields:
    """Without the row; an answer may be very long, and the workbook has all of it."""
    return {
        "status": result.outcome.value,
        "answer": preview.shortened(result.answer),
        "error": result.error,
        "http_status": result.http_status,
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
    }


WAITS: Final = result_view(Result(0, Outcome.CANCELLED)) | {"status": "waiting"}


# ---- what is asked


def session_id_of(body: Fields) -> str:
    session_id = body.get("session_id")
    if not isinstance(session_id, str):
        raise Refusal(400, "the JSON body must have a session_id")
    return session_id


class Rows(msgspec.Struct, frozen=True):
    """How many of the first rows are looked at."""

    rows: Annotated[int, msgspec.Meta(ge=1, le=preview.MOST_ROWS)] = preview.FIRST_ROWS


Options = type[Choices] | type[Asking] | type[Rows]


def _options(body: Fields, *kinds: Options) -> list[Any]:
    """The fields beside `session_id`, as what they must be: one of each of `kinds`, whose fields differ."""
    given = {name: value for name, value in body.items() if name != "session_id"}
    known = [name for kind in kinds for name in kind.__struct_fields__]
    if unknown := given.keys() - set(known):
        raise Refusal(400, f"unknown option {sorted(unknown)[0]!r}; the options are: {', '.join(known)}")
    options = [_converted({n: v for n, v in given.items() if n in kind.__struct_fields__}, kind) for kind in kinds]
    require_storable(options)
    return options


def _converted(given: Fields, kind: Options) -> Any:
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise Refusal(400, f"wrong options: {wrong_field(error)}") from None


def _choices(body: Fields, choices: Choices) -> Choices | None:
    """None where none of them was given: then those of the session hold."""
    return choices if body.keys() & set(Choices.__struct_fields__) else None


def require_storable(options: object) -> None:
    """JSON can write numbers and lone surrogates that a record in the store cannot hold."""
    try:
        msgspec.msgpack.encode(options)
    except OverflowError:
        raise Refusal(400, "wrong options: a number in them is too large") from None
    except UnicodeEncodeError:
        raise Refusal(400, "wrong options: a text in them is not Unicode") from None


def _listed(text: str | None) -> tuple[str, ...] | None:
    """Columns of a form field: `a, b`; nothing said is None, an empty field means none of them."""
    return None if text is None else tuple(name for part in text.split(",") if (name := part.strip()))


def _described(*kinds: Options) -> Fields:
    """What the JSON of a call may have, for /docs."""
    properties: Fields = {"session_id": {"type": "string"}}
    for kind in kinds:
        properties |= msgspec.json.schema(kind)["$defs"][kind.__name__]["properties"]
    return {"properties": properties, "required": ["session_id"]}


Json = Annotated[Fields, Body(json_schema_extra=_described())]
JsonWithChoices = Annotated[Fields, Body(json_schema_extra=_described(Choices))]
JsonWithAsking = Annotated[Fields, Body(json_schema_extra=_described(Asking))]
JsonToRun = Annotated[Fields, Body(json_schema_extra=_described(Choices, Asking))]
JsonToPreview = Annotated[Fields, Body(json_schema_extra=_described(Rows, Choices))]
JsonToTry = Annotated[Fields, Body(json_schema_extra=_described(Rows, Choices, Asking))]


@router.post("/analyze/upload", summary="Upload a workbook and have it analysed")
def upload(
    request: Request,
    file: Annotated[UploadFile, File(description=".xlsx, .csv, .jsonl, or a .zip of one of them with its pictures")],
    template: Annotated[str, Form(description="column names in braces: Translate {text} into {language}")] = "",
    prompt_column: Annotated[str, Form()] = "",
    image_columns: Annotated[str | None, Form(description="separated by commas; empty: none")] = None,
    sheet: Annotated[str, Form()] = "",
) -> Fields:
    choices = Choices(sheet=sheet, prompt_column=prompt_column, image_columns=_listed(image_columns), template=template)
    require_storable([choices, file.filename])
    return analysis_view(service_of(request).take_upload(file.file, file.filename or "", choices))


@router.post("/analyze/again", summary="Analyse the workbook once more, with other choices, before it is split")
def analyze_again(request: Request, body: JsonWithChoices) -> Fields:
    session_id = session_id_of(body)
    (choices,) = _options(body, Choices)
    return analysis_view(service_of(request).analyze_again(session_id, choices))


@router.post("/analyze/preview", summary="What the first rows will be asked, and why this sheet and these columns")
def look_ahead(request: Request, body: JsonToPreview) -> Fields:
    session_id = session_id_of(body)
    rows, given = _options(body, Rows, Choices)
    service = service_of(request)
    session, choices, analysis, tasks = service.first_tasks(session_id, _choices(body, given), rows.rows)
    folder = service.sessions.folder(session_id).path
    return head(session) | {
        "total": session.split.tasks if session.split.is_ready() else analysis.rows,
        "why": msgspec.to_builtins(preview.whys(analysis, choices)),
        "rows": [msgspec.to_builtins(preview.question_of(task, folder)) for task in tasks],
    }


@router.post("/analyze/try", summary="Ask the first rows once, now; their answers are shown and not kept")
async def try_rows(request: Request, body: JsonToTry) -> Fields:
    session_id = session_id_of(body)
    rows, given, asking = _options(body, Rows, Choices, Asking)
    service, choices = service_of(request), _choices(body, given)
    session, _, analysis, tasks = await run_in_threadpool(service.first_tasks, session_id, choices, rows.rows)
    folder = service.sessions.folder(session_id).path
    trial = await preview.try_tasks(service.settings, session, tasks, asking, folder)
    most = service.settings.concurrency
    total = session.split.tasks if session.split.is_ready() else analysis.rows
    return head(session) | {
        "model": trial.model,
        "rows": [
            {"row": tried.result.row, "seconds": round(tried.seconds, 3)} | result_view(tried.result)
            for tried in trial.rows
        ],
        "estimate": msgspec.to_builtins(preview.estimate(trial, total, min(asking.concurrency or most, most))),
    }


@router.get("/endpoint", summary="The endpoint that is asked, its model, and whether it can be reached")
async def endpoint(request: Request) -> Fields:
    view: Fields = msgspec.to_builtins(await preview.look_at_endpoint(service_of(request).settings))
    return view


@router.post("/tasks/split", summary="Turn the rows into tasks")
def split(request: Request, body: JsonWithChoices) -> Fields:
    session_id = session_id_of(body)
    service = service_of(request)
    service.sessions.get(session_id)
    (choices,) = _options(body, Choices)
    return split_view(service.split(session_id, _choices(body, choices)))


@router.get("/tasks/split/status/{session_id}", summary="How far the split is")
def split_status(request: Request, session_id: str) -> Fields:
    return split_view(service_of(request).sessions.get(session_id))


@router.post("/execute/start", summary="Start to ask")
def start(request: Request, body: JsonWithAsking) -> Fields:
    session_id = session_id_of(body)
    service = service_of(request)
    service.sessions.get(session_id)
    (asking,) = _options(body, Asking)
    return execution_view(service.start(session_id, asking))


@router.post("/run", summary="Split the rows if that is not done, and start to ask as soon as their tasks are saved")
def run(request: Request, body: JsonToRun) -> Fields:
    session_id = session_id_of(body)
    service = service_of(request)
    service.sessions.get(session_id)
    choices, asking = _options(body, Choices, Asking)
    return execution_view(service.run(session_id, _choices(body, choices), asking))


@router.get("/execute/status/{session_id}", summary="How far the run is")
def execution_status(request: Request, session_id: str) -> Fields:
    return execution_view(service_of(request).monitored(session_id))


@router.get("/execute/stream/{session_id}", summary="The same, live: server-sent events, one per change, until the end")
async def execution_stream(request: Request, session_id: str) -> StreamingResponse:
    service = service_of(request)
    await run_in_threadpool(service.monitored, session_id)

    async def events() -> AsyncIterator[bytes]:
        said = b""
        while not (request.app.state.closing.is_set() or await request.is_disconnected()):
            try:
                session = await run_in_threadpool(service.monitored, session_id)
            except StoreAway:
                pass  # it may be back in a moment, and what was said last stays true until then
            except Refusal as refusal:
                yield b"event: gone\ndata: " + msgspec.json.encode({"detail": refusal.detail}) + b"\n\n"
                return
            else:
                now = msgspec.json.encode(execution_view(session))
                if now != said:
                    said = now
                    yield b"data: " + now + b"\n\n"
                if session.stage.is_over():
                    return
            await asyncio.sleep(STREAM_EVERY)

    return StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})


def _wish(request: Request, body: Fields, verb: Verb) -> Fields:
    return execution_view(service_of(request).wish(session_id_of(body), verb))


@router.post("/execute/pause", summary="Ask no more rows for now; those under way are let finish")
def pause(request: Request, body: Json) -> Fields:
    return _wish(request, body, "pause")


@router.post("/execute/resume", summary="Go on after a pause")
def resume(request: Request, body: Json) -> Fields:
    return _wish(request, body, "resume")


@router.post("/execute/cancel", summary="End the run and save what was answered")
def cancel(request: Request, body: Json) -> Fields:
    return _wish(request, body, "cancel")


@router.post("/execute/retry", summary="After a run: ask the rows again that have no answer; options given replace its")
def retry(request: Request, body: JsonWithAsking) -> Fields:
    session_id = session_id_of(body)
    _options(body, Asking)
    given = {name: value for name, value in body.items() if name != "session_id"}
    return execution_view(
        service_of(request).retry(session_id, lambda asking: _converted(msgspec.to_builtins(asking) | given, Asking))
    )


@router.get("/execute/answers/{session_id}", summary="What was answered so far, in the order of the rows")
def answers(
    request: Request,
    session_id: str,
    skip: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=50)] = 20,
) -> Fields:
    service = service_of(request)
    folder = service.sessions.folder(session_id).path
    session = service.monitored(session_id)
    found = service.answers(session_id, skip, limit)
    rows = [answer_view(task, result, folder) for task, result in found]
    return {"session_id": session_id, "total": session.execution.total, "rows": rows}


def answer_view(task: Task, result: Result | None, folder: Path) -> Fields:
    asked: Fields = msgspec.to_builtins(preview.question_of(task, folder))
    return asked | (WAITS if result is None else result_view(result))


@router.get("/execute/failures/{session_id}", summary="The rows that failed: counted by reason, and one by one")
def failed_rows(
    request: Request,
    session_id: str,
    skip: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Fields:
    found = service_of(request).failed_rows(session_id, skip, limit)
    shown = [{"row": row.row, "error": row.error, "http_status": row.http_status} for row in found.page]
    reasons = msgspec.to_builtins(found.reasons)
    return {"session_id": session_id, "failed": found.count, "reasons": reasons, "rows": shown}


@router.get("/download/{session_id}", summary="The workbook with its answers")
def download(request: Request, session_id: str) -> FileResponse:
    path, name = service_of(request).download(session_id)
    quoted = urllib.parse.quote(name)
    return FileResponse(
        path,
        media_type=MEDIA_TYPES[path.suffix[1:]],
        headers={"Content-Disposition": f"attachment; filename*=UTF-8''{quoted}", "X-Content-Type-Options": "nosniff"},
    )


@router.get("/sessions", summary="All sessions, the latest first")
def sessions(request: Request) -> Fields:
    return {"sessions": [list_view(session) for session in service_of(request).sessions.all()]}


@router.get("/sessions/{session_id}", summary="All about one session")
def one_session(request: Request, session_id: str) -> Fields:
    return session_view(service_of(request).sessions.get(session_id))


@router.delete("/sessions/{session_id}", summary="Forget a session and all its files; a run is ended")
def delete(request: Request, session_id: str) -> Fields:
    service_of(request).delete(session_id)
    return {"session_id": session_id, "deleted": True}
