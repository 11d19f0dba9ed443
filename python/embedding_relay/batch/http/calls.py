"""The calls under /api: what the page or a script sends, and what is answered."""

from __future__ import annotations

import asyncio
import urllib.parse
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

import msgspec
from fastapi import APIRouter, Body, File, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from embedding_relay.batch.errors import Refusal
from embedding_relay.batch.service import Service, Verb
from embedding_relay.batch.session.records import Asking, Session
from embedding_relay.batch.store.contract import StoreAway
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
    return list_view(session) | analysis_view(session) | {"asking": msgspec.to_builtins(session.asking)}


# ---- what is asked


def session_id_of(body: Fields) -> str:
    session_id = body.get("session_id")
    if not isinstance(session_id, str):
        raise Refusal(400, "the JSON body must have a session_id")
    return session_id


def _options(body: Fields, known: type[Choices] | type[Asking]) -> Any:
    """The fields beside `session_id`, as what they must be."""
    given = {name: value for name, value in body.items() if name != "session_id"}
    if unknown := given.keys() - set(known.__struct_fields__):
        raise Refusal(
            400, f"unknown option {sorted(unknown)[0]!r}; the options are: {', '.join(known.__struct_fields__)}"
        )
    try:
        options = msgspec.convert(given, known)
    except msgspec.ValidationError as error:
        raise Refusal(400, f"wrong options: {error}") from None
    require_storable(options)
    return options


def require_storable(options: object) -> None:
    """JSON can write numbers and lone surrogates that a record in the store cannot hold."""
    try:
        msgspec.msgpack.encode(options)
    except (OverflowError, UnicodeEncodeError) as error:
        raise Refusal(400, f"wrong options: {error}") from None


def _listed(text: str | None) -> tuple[str, ...] | None:
    """Columns of a form field: `a, b`; nothing said is None, an empty field means none of them."""
    return None if text is None else tuple(name for part in text.split(",") if (name := part.strip()))


def _described(options: type[Choices] | type[Asking] | None = None) -> Fields:
    """What the JSON of a call may have, for /docs."""
    names = msgspec.json.schema(options)["$defs"][options.__name__]["properties"] if options else {}
    return {"properties": {"session_id": {"type": "string"}} | names, "required": ["session_id"]}


Json = Annotated[Fields, Body(json_schema_extra=_described())]
JsonWithChoices = Annotated[Fields, Body(json_schema_extra=_described(Choices))]
JsonWithAsking = Annotated[Fields, Body(json_schema_extra=_described(Asking))]


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
    return analysis_view(service_of(request).analyze_again(session_id, _options(body, Choices)))


@router.post("/tasks/split", summary="Turn the rows into tasks")
def split(request: Request, body: JsonWithChoices) -> Fields:
    session_id = session_id_of(body)
    service = service_of(request)
    service.sessions.get(session_id)
    choices = _options(body, Choices) if body.keys() - {"session_id"} else None
    return split_view(service.split(session_id, choices))


@router.get("/tasks/split/status/{session_id}", summary="How far the split is")
def split_status(request: Request, session_id: str) -> Fields:
    return split_view(service_of(request).sessions.get(session_id))


@router.post("/execute/start", summary="Start to ask")
def start(request: Request, body: JsonWithAsking) -> Fields:
    session_id = session_id_of(body)
    service = service_of(request)
    service.sessions.get(session_id)
    return execution_view(service.start(session_id, _options(body, Asking)))


@router.get("/execute/status/{session_id}", summary="How far the run is")
def execution_status(request: Request, session_id: str) -> Fields:
    return execution_view(service_of(request).monitored(session_id))


@router.get("/execute/stream/{session_id}", summary="The same, live: server-sent events, one per change, until the end")
async def execution_stream(request: Request, session_id: str) -> StreamingResponse:
    service = service_of(request)
    await run_in_threadpool(service.monitored, session_id)

    async def events() -> AsyncIterator[bytes]:
        said = b""
        while not await request.is_disconnected():
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


@router.get("/execute/failures/{session_id}", summary="The rows that failed, with their reasons")
def failed_rows(
    request: Request,
    session_id: str,
    skip: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Fields:
    count, rows = service_of(request).failed_rows(session_id, skip, limit)
    shown = [{"row": row.row, "error": row.error, "http_status": row.http_status} for row in rows]
    return {"session_id": session_id, "failed": count, "rows": shown}


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
