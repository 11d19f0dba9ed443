"""Batches of OpenAI's API: a batch is a session with a `BatchOrder`, and nothing about it is stored elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from embedding_relay.batch.errors import OpenAIRefusal, Refusal
from embedding_relay.batch.openai.files import Files, output_id
from embedding_relay.batch.openai.lines import input_errors
from embedding_relay.batch.service import Service
from embedding_relay.batch.session.records import BatchOrder, LineError, Session, Stage, new_session_id
from embedding_relay.batch.workbook.analysis import Choices
from embedding_relay.batch.workbook.cells import SURROGATES
from embedding_relay.batch.workbook.jsonl_file import ENDPOINTS

PREFIX: Final = "batch_"
WINDOW: Final = "24h"
OPTIONS: Final = ("input_file_id", "endpoint", "completion_window", "metadata")
MOST_METADATA, LONGEST_KEY, LONGEST_VALUE = 16, 64, 512
MOMENTS: Final = (
    *("in_progress_at", "finalizing_at", "completed_at", "failed_at"),
    *("cancelling_at", "cancelled_at"),
)
Fields = dict[str, Any]


# ---- what a client sends


def order_of(body: Mapping[str, Any]) -> BatchOrder:
    if unknown := body.keys() - set(OPTIONS):
        raise OpenAIRefusal(400, f"unknown parameter {sorted(unknown)[0]!r}; known are: {', '.join(OPTIONS)}")
    for name in OPTIONS[:3]:
        if not isinstance(body.get(name), str):
            raise OpenAIRefusal(400, f"{name!r} must be given, as a text", name, "missing_required_parameter")
    if body["endpoint"] not in ENDPOINTS:
        raise OpenAIRefusal(400, f"the endpoint must be one of: {', '.join(ENDPOINTS)}", "endpoint", "invalid_value")
    if body["completion_window"] != WINDOW:
        raise OpenAIRefusal(400, f"the completion_window must be {WINDOW!r}", "completion_window", "invalid_value")
    return BatchOrder(
        input_file_id=body["input_file_id"],
        endpoint=body["endpoint"],
        completion_window=WINDOW,
        metadata=_metadata_of(body.get("metadata")),
    )


def _metadata_of(given: object) -> dict[str, str] | None:
    if given is None:
        return None
    rule = f"at most {MOST_METADATA} pairs of text, of {LONGEST_KEY} and {LONGEST_VALUE} characters"
    refusal = OpenAIRefusal(400, f"metadata may be {rule}", "metadata", "invalid_value")
    if not isinstance(given, dict) or len(given) > MOST_METADATA:
        raise refusal
    for key, value in given.items():
        if not isinstance(value, str) or len(key) > LONGEST_KEY or len(value) > LONGEST_VALUE:
            raise refusal
        if SURROGATES.search(key + value):
            raise refusal  # lone surrogates: JSON can write them, a record in the store cannot hold them
    return given


# ---- what is done


class Batches:
    def __init__(self, service: Service, files: Files) -> None:
        self._service = service
        self._files = files

    def create(self, order: BatchOrder) -> Session:
        """A file that cannot be used makes a batch that has failed, as it does at OpenAI; not an error of this call."""
        stored, path = self._files.get(order.input_file_id, "input_file_id")
        if stored.purpose != "batch":
            raise OpenAIRefusal(400, "the input file was not uploaded with the purpose 'batch'", "input_file_id")
        with path.open("rb") as file:
            errors = input_errors(file, order.endpoint, self._service.settings.rows)
            if not errors:
                file.seek(0)
                try:
                    return self._service.take_upload(file, "batch.jsonl", Choices(), order)
                except Refusal as refusal:
                    errors = [LineError("invalid_file", refusal.detail)]
        return self._failed(order, errors)

    def _failed(self, order: BatchOrder, errors: list[LineError]) -> Session:
        session = Session(
            session_id=new_session_id(), name="batch.jsonl", kind="jsonl", created_at=time.time(), order=order
        )
        order.errors = tuple(errors)
        where = "" if errors[0].line is None else f"line {errors[0].line}: "
        session.fail_split(f"{where}{errors[0].message}")
        self._service.sessions.add(session)
        return session

    def get(self, batch_id: str) -> Session:
        session = self._service.sessions.find(batch_id.removeprefix(PREFIX)) if batch_id.startswith(PREFIX) else None
        if session is None or session.order is None:
            why = "it was deleted, it expired, or it never existed"
            raise OpenAIRefusal(404, f"there is no batch {batch_id!r}: {why}", "batch_id")
        return session

    def all(self) -> list[Session]:
        return [session for session in self._service.sessions.all() if session.order]

    def cancel(self, batch_id: str) -> Session:
        session_id = self.get(batch_id).session_id
        return self._service.sessions.change(session_id, lambda session: session.cancel_order())


# ---- what a client sees


def status_of(session: Session) -> str:
    execution = session.execution
    if session.stage is Stage.FAILED:
        return "failed"
    if execution.wish.cancelled:
        return "cancelled" if session.stage is Stage.COMPLETED else "cancelling"
    if session.stage is Stage.COMPLETED:
        return "completed"
    if session.stage is Stage.EXECUTING:
        return "finalizing" if execution.saving else "in_progress"
    return "validating"


def batch_view(session: Session) -> Fields:
    order, counts = session.order, session.execution.counts
    assert order is not None
    return {
        "id": PREFIX + session.session_id,
        "object": "batch",
        "endpoint": order.endpoint,
        "errors": _errors_view(session, order),
        "input_file_id": order.input_file_id,
        "completion_window": order.completion_window,
        "status": status_of(session),
        "output_file_id": output_id(session, "out"),
        "error_file_id": output_id(session, "err"),
        "created_at": int(session.created_at),
        **{moment: getattr(order, moment) for moment in MOMENTS},
        # A batch of this service goes on until it is done.
        "expires_at": None,
        "expired_at": None,
        "request_counts": {"total": session.split.tasks, "completed": counts.done, "failed": counts.failed},
        "metadata": order.metadata,
    }


def _errors_view(session: Session, order: BatchOrder) -> Fields | None:
    if session.stage is not Stage.FAILED:
        return None
    errors = order.errors or (LineError("batch_failed", session.split.error or session.execution.error),)
    return {"object": "list", "data": [msgspec.to_builtins(error) for error in errors]}
