"""A batch of OpenAI's API goes by itself, and can be cancelled at every moment before its end."""

from __future__ import annotations

import pytest

from embedding_relay.batch.errors import Refusal
from embedding_relay.batch.session.records import (
    Asking,
    Counts,
    ExecutionStatus,
    Stage,
)
from embedding_relay.batch.workbook.analysis import Choices
from support.batch_sessions import ANALYSIS, new_batch, run_batch, split_batch


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
