"""The calls under /v1: OpenAI's Files and Batches API, for OpenAI's unmodified clients."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from fastapi import APIRouter, Body, File, Form, Query, Request, UploadFile
from fastapi.responses import FileResponse

from embedding_relay.batch.errors import OpenAIRefusal
from embedding_relay.batch.openai.batches import Batches, batch_view, order_of
from embedding_relay.batch.openai.files import Files, StoredFile

router = APIRouter(prefix="/v1")

HOUR: Final = 3600
BATCH: Final = {"input_file_id": "file-…", "endpoint": "/v1/chat/completions", "completion_window": "24h"}
Fields = dict[str, Any]
BATCH_FIELDS: Final[Fields] = {
    "properties": {name: {"type": "string"} for name in BATCH} | {"metadata": {"type": "object"}},
    "required": list(BATCH),
}
After = Annotated[str | None, Query(description="the id of the last one seen: the list goes on behind it")]


def _files(request: Request) -> Files:
    files: Files = request.app.state.files
    return files


def _batches(request: Request) -> Batches:
    return Batches(request.app.state.service, _files(request))


# ---- files


@router.post("/files", summary="Upload the input of a batch: a request per line of JSON")
def create_file(
    request: Request,
    file: Annotated[UploadFile, File()],
    purpose: Annotated[str, Form(description="batch")],
    anchor: Annotated[str, Form(alias="expires_after[anchor]")] = "created_at",
    seconds: Annotated[int | None, Form(alias="expires_after[seconds]", ge=HOUR, le=720 * HOUR)] = None,
) -> Fields:
    if purpose != "batch":
        raise OpenAIRefusal(400, "this service takes files with the purpose 'batch' only", "purpose", "invalid_value")
    if anchor != "created_at":
        raise OpenAIRefusal(400, "the anchor of expires_after must be 'created_at'", "expires_after", "invalid_value")
    return file_view(_files(request).add(file.file, file.filename or "", seconds))


@router.get("/files", summary="All files, the latest first; the output and errors of batches are among them")
def list_files(
    request: Request,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> Fields:
    found = [stored for stored in _files(request).all() if purpose in (None, stored.purpose)]
    return paged([file_view(stored) for stored in (found if order == "desc" else reversed(found))], after, limit)


@router.get("/files/{file_id}", summary="About one file")
def retrieve_file(request: Request, file_id: str) -> Fields:
    return file_view(_files(request).get(file_id)[0])


@router.get("/files/{file_id}/content", summary="What is in one file")
def file_content(request: Request, file_id: str) -> FileResponse:
    _, path = _files(request).get(file_id)
    return FileResponse(path, media_type="application/octet-stream", headers={"X-Content-Type-Options": "nosniff"})


@router.delete("/files/{file_id}", summary="Delete one file; batches made from it go on")
def delete_file(request: Request, file_id: str) -> Fields:
    _files(request).delete(file_id)
    return {"id": file_id, "object": "file", "deleted": True}


def file_view(stored: StoredFile) -> Fields:
    return {
        "id": stored.file_id,
        "object": "file",
        "bytes": stored.size,
        "created_at": int(stored.created_at),
        "expires_at": stored.expires_at,
        "filename": stored.name,
        "purpose": stored.purpose,
        "status": "processed",
        "status_details": None,
    }


# ---- batches


@router.post("/batches", summary="Ask all requests of an uploaded file")
def create_batch(
    request: Request, body: Annotated[Fields, Body(examples=[BATCH], json_schema_extra=BATCH_FIELDS)]
) -> Fields:
    return batch_view(_batches(request).create(order_of(body)))


@router.get("/batches", summary="All batches, the latest first")
def list_batches(request: Request, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 20) -> Fields:
    return paged([batch_view(session) for session in _batches(request).all()], after, limit)


@router.get("/batches/{batch_id}", summary="How far a batch is")
def retrieve_batch(request: Request, batch_id: str) -> Fields:
    return batch_view(_batches(request).get(batch_id))


@router.post("/batches/{batch_id}/cancel", summary="Ask nothing more, and save what was answered")
def cancel_batch(request: Request, batch_id: str) -> Fields:
    return batch_view(_batches(request).cancel(batch_id))


# ---- lists


def paged(items: list[Fields], after: str | None, limit: int) -> Fields:
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise OpenAIRefusal(400, f"there is no {after!r} in this list, to go on behind it", "after", "invalid_value")
    begin = 0 if after is None else ids.index(after) + 1
    page = items[begin : begin + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": begin + limit < len(items),
    }
