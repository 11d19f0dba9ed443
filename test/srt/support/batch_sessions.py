"""Sessions that are batches of OpenAI's API, at some moments of their way."""

from __future__ import annotations

import time

from embedding_relay.batch.session.records import BatchOrder, Counts, Session, new_session_id
from embedding_relay.batch.workbook.analysis import Analysis, Choices

ANALYSIS = Analysis((), "", (), "", (), 3, 0, requests=True)


def new_batch() -> Session:
    order = BatchOrder(input_file_id="file-x", endpoint="/v1/chat/completions", completion_window="24h")
    return Session(session_id=new_session_id(), name="batch.jsonl", kind="jsonl", created_at=time.time(), order=order)


def split_batch() -> Session:
    """As it is in the moment in which its split has ended."""
    session = new_batch()
    session.mark_analyzed(ANALYSIS)
    session.begin_split(Choices())
    session.split.take()
    session.split.mark_saving(3, 1)
    session.complete_split()
    return session


def run_batch(counts: Counts, cancelled: bool = False) -> Session:
    session = split_batch()
    session.execution.take()
    session.execution.mark_running()
    if cancelled:
        session.cancel_order()
    session.mark_saving()
    session.complete_execution(counts)
    return session
