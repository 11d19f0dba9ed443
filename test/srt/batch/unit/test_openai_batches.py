"""A batch of OpenAI's API goes by itself, and can be cancelled at every moment before its end."""

from __future__ import annotations

import time

import pytest

from embedding_relay.batch.errors import Refusal
from embedding_relay.batch.session.records import (
    Asking,
    BatchOrder,
    Counts,
    ExecutionStatus,
    Session,
    Stage,
    new_session_id,
)
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


def test_the_end_of_the_split_is_the_start_of_the_run() -> None:
    session = split_batch()
    assert session.stage is Stage.EXECUTING
    assert session.execution.status is ExecutionStatus.INITIALIZING
    assert session.order is not None
    assert session.order.in_progress_at is not None


def test_a_session_without_an_order_waits_for_its_owner() -> None:
    session = new_batch()
    session.order = None
    session.mark_analyzed(ANALYSIS)
    session.begin_split(Choices())
    session.split.take()
    session.split.mark_saving(3, 1)
    session.complete_split()
    assert session.stage is Stage.SPLIT_COMPLETE
    session.begin_execution(Asking())


def test_a_batch_that_is_cancelled_while_it_is_split_stays_cancelled() -> None:
    session = new_batch()
    session.mark_analyzed(ANALYSIS)
    session.begin_split(Choices())
    session.cancel_order()
    session.split.take()
    session.split.mark_saving(3, 1)
    session.complete_split()
    session.execution.take()
    session.execution.mark_running()
    assert session.execution.wish.cancelled


def test_a_second_cancel_changes_nothing_and_one_after_the_end_is_refused() -> None:
    session = split_batch()
    session.cancel_order()
    assert session.order is not None
    session.order.cancelling_at = 1
    session.cancel_order()
    assert session.order.cancelling_at == 1
    over = run_batch(Counts(done=3), cancelled=True)
    assert over.order is not None
    assert over.order.completed_at is None
    assert over.order.cancelled_at is not None
    with pytest.raises(Refusal, match="cannot be cancelled"):
        over.cancel_order()
