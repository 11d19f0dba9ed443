"""The light state of a session: every order of calls against the tables, and what may be said at each moment."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embedding_relay.batch.errors import Refusal, StaleJob, WorkersDied
from embedding_relay.batch.session.records import (
    EXECUTION_MOVES,
    SPLIT_MOVES,
    STAGE_MOVES,
    Asking,
    Counts,
    ExecutionStatus,
    Session,
    SplitStatus,
    Stage,
    move,
)
from embedding_relay.batch.workbook.analysis import Analysis, Choices, Sheet
from embedding_relay.protocol.errors import IllegalMove
from support.batch_sessions import run_batch
from support.effort import effort, unhurried

ANALYSIS = Analysis(
    sheets=(Sheet("one", 2),), sheet="one", columns=(), prompt_column="a", image_columns=(), rows=2, pictures=0
)


def new_session() -> Session:
    session = Session(session_id="0" * 16, name="a.csv", kind="csv", created_at=0.0)
    session.mark_analyzed(ANALYSIS)
    return session


STEPS = {
    "begin split": lambda session: session.begin_split(Choices()),
    "take split": lambda session: session.split.take(),
    "building": lambda session: session.split.advance(0.5, "building the tasks"),
    "saving": lambda session: session.split.mark_saving(2, 1),
    "verifying": lambda session: session.split.mark_verifying(),
    "verified": lambda session: session.split.mark_verified(),
    "complete split": lambda session: session.complete_split(),
    "fail split": lambda session: session.fail_split("why"),
    "begin execution": lambda session: session.begin_execution(Asking()),
    "begin run": lambda session: session.begin_run(Asking()),
    "retry": lambda session: session.retry(Asking()),
    "take execution": lambda session: session.execution.take(),
    "running": lambda session: session.execution.mark_running(),
    "advance": lambda session: session.execution.advance(Counts(done=1)),
    "saving answers": lambda session: session.mark_saving(),
    "complete execution": lambda session: session.complete_execution(Counts(done=2)),
    "fail execution": lambda session: session.fail_execution("why"),
    "pause": lambda session: session.wish("pause"),
    "resume": lambda session: session.wish("resume"),
    "cancel": lambda session: session.wish("cancel"),
}


IN_ORDER = [
    *("begin split", "take split", "building", "saving", "verifying", "verified", "complete split"),
    *("begin execution", "take execution", "running", "advance", "saving answers", "complete execution"),
]


RUN_STEPS = {"begin execution", "begin run", *IN_ORDER[8:], "fail execution"}

# What the worker of a part reports, how that part fails, and the steps after which such a report is in time.
REPORTS = {
    "building": ("fail split", {"begin split", "take split", "building"}),
    "verifying": ("fail split", {"saving", "verifying", "verified"}),
    "verified": ("fail split", {"saving", "verifying", "verified"}),
    "advance": ("fail execution", {"running", "advance"}),
    "saving answers": ("fail execution", {"running", "advance"}),
}


@unhurried
@effort()
@given(st.lists(st.sampled_from([*STEPS, *IN_ORDER, *IN_ORDER]), max_size=40))
@example(["begin split", "saving", "complete split", "verifying"])
@example([*IN_ORDER, "saving answers"])
@example(["begin split", "begin run", *IN_ORDER[1:7], *IN_ORDER[8:], "retry", *IN_ORDER[8:]])
@example(["begin split", "begin run", "fail split", "retry"])
@example(["begin split", "begin run", "take execution", "running"])
@example([*IN_ORDER[:-1], "fail execution", "retry", *IN_ORDER[8:]])
def test_no_order_of_calls_says_ready_too_early(names: list[str]) -> None:
    session, done, starts = new_session(), list[str](), 0
    for name in names:
        try:
            STEPS[name](session)
        except (Refusal, StaleJob, IllegalMove, WorkersDied):
            continue
        done.append(name)
        starts += name in ("begin execution", "begin run", "retry")
        if name == "retry":
            # Of the run there is nothing any more but what it answered.
            done = [step for step in done if step not in RUN_STEPS]
        split, execution = session.split, session.execution
        assert split.ready_for_next_stage == (split.status is SplitStatus.COMPLETED) == ("complete split" in done)
        assert execution.is_accepted() == (starts > 0)
        assert execution.ready_for_monitoring == ("running" in done)
        assert execution.ready_for_download == (execution.status is ExecutionStatus.COMPLETED)
        assert (split.progress == 100) == split.ready_for_next_stage
        assert (execution.progress == 100) == execution.ready_for_download
        assert not execution.saving or execution.status is ExecutionStatus.RUNNING
        if "begin execution" in done:
            assert done.index("complete split") < done.index("begin execution")
        if "running" in done:
            assert split.ready_for_next_stage, "a run began before its tasks were ready"
        assert session.stage.can_download() == execution.ready_for_download
        if session.stage.can_split():
            assert not split.ready_for_next_stage


def test_the_whole_way() -> None:
    session = new_session()
    stages, progress = [], []
    for name in IN_ORDER:
        STEPS[name](session)
        stages.append(session.stage)
        progress.append(session.split.progress)
    assert progress[2:7] == [45, 90, 95, 98, 100]
    assert sorted(set(stages), key=stages.index) == [
        *(Stage.ANALYZED, Stage.SPLIT_COMPLETE, Stage.EXECUTING, Stage.COMPLETED)
    ]


@pytest.mark.parametrize(
    ("kind", "moves"), [(Stage, STAGE_MOVES), (SplitStatus, SPLIT_MOVES), (ExecutionStatus, EXECUTION_MOVES)]
)
def test_every_pair_is_in_the_table_or_refused(kind, moves) -> None:  # type: ignore[no-untyped-def]
    assert set(moves) == set(kind)
    for here in kind:
        for there in kind:
            if there in moves[here]:
                assert move(moves, here, there) is there
            else:
                with pytest.raises(IllegalMove, match=f"{here.name} to {there.name}"):
                    move(moves, here, there)


def test_who_takes_over_has_a_number_of_their_own() -> None:
    session = new_session()
    session.begin_split(Choices())
    assert [session.split.take(), session.split.take()] == [1, 2]
    session.split.mark_saving(2, 1)
    assert session.split.take() == 3
    assert (session.split.status, session.split.progress) == (SplitStatus.PROCESSING, 0)


# ---- a start together with the split


def test_a_start_is_accepted_with_the_split_and_comes_true_with_its_end() -> None:
    session = new_session()
    session.begin_split(Choices())
    session.begin_run(Asking(model="m"))
    assert session.execution.is_accepted()
    assert (session.execution.status, session.execution.message) == (
        ExecutionStatus.INITIALIZING,
        "the rows are being read first",
    )
    session.split.take()
    session.split.mark_saving(2, 1)
    assert session.stage is Stage.ANALYZED
    session.complete_split()
    assert (session.stage, session.asking.model, session.execution.total) == (Stage.EXECUTING, "m", 2)
    assert session.execution.message == "waiting for a worker"


def test_a_start_that_was_accepted_fails_with_its_split() -> None:
    session = new_session()
    session.begin_split(Choices())
    session.begin_run(Asking())
    session.split.take()
    session.fail_split("its workbook is damaged")
    assert (session.stage, session.execution.error) == (Stage.FAILED, "its workbook is damaged")
    with pytest.raises(Refusal, match="no run that has ended"):
        session.retry(Asking())


def test_a_start_that_was_accepted_can_be_cancelled_while_the_rows_are_read() -> None:
    session = new_session()
    session.begin_split(Choices())
    session.begin_run(Asking())
    session.wish("pause")
    session.wish("resume")
    assert session.execution.message == "the rows are being read first"
    session.wish("cancel")
    session.split.take()
    session.split.mark_saving(2, 1)
    session.complete_split()
    assert (session.stage, session.execution.message) == (Stage.EXECUTING, "cancelling")


def test_nothing_is_started_twice() -> None:
    session = new_session()
    with pytest.raises(Refusal, match="it has not been split"):
        session.begin_run(Asking())
    session.begin_split(Choices())
    session.begin_run(Asking())
    for again in (lambda: session.begin_run(Asking()), lambda: session.begin_execution(Asking())):
        with pytest.raises(Refusal):
            again()


# ---- a retry


def ended_session(counts: Counts) -> Session:
    session = accepted_session()
    session.execution.take()
    session.execution.mark_running()
    session.mark_saving()
    session.complete_execution(counts)
    return session


def test_a_retry_begins_again_with_what_is_answered() -> None:
    session = ended_session(Counts(done=1, failed=1, retries=3))
    session.retry(Asking(max_tokens=9))
    execution = session.execution
    assert (session.stage, execution.status, session.asking.max_tokens) == (
        Stage.EXECUTING,
        ExecutionStatus.INITIALIZING,
        9,
    )
    assert (execution.counts.done, execution.counts.failed, execution.progress) == (1, 0, 49.5)
    assert not execution.ready_for_download
    assert (execution.set_aside, execution.take()) == (1, 2)


def test_a_retry_needs_a_row_without_an_answer() -> None:
    with pytest.raises(Refusal, match="every row of this session has its answer"):
        ended_session(Counts(done=2)).retry(Asking())
    with pytest.raises(Refusal, match="there is no run that has ended: it is running"):
        accepted_session().retry(Asking())


def test_a_run_that_failed_goes_on_with_a_retry() -> None:
    session = accepted_session()
    session.execution.take()
    session.fail_execution("the disk is gone")
    session.retry(Asking())
    assert (session.stage, session.execution.error) == (Stage.EXECUTING, "")


def test_a_batch_is_not_retried() -> None:
    with pytest.raises(Refusal, match="create another batch"):
        run_batch(Counts(done=1, failed=2)).retry(Asking())


def test_since_when_nothing_is_asked() -> None:
    session = accepted_session()
    session.execution.take()
    session.execution.mark_running()
    session.execution.advance(Counts(waiting="cannot reach it"))
    since = session.execution.waiting_since
    assert since is not None
    session.execution.advance(Counts(waiting="cannot reach it; asking again every 4 s"))
    assert session.execution.waiting_since == since
    session.execution.advance(Counts())
    assert session.execution.waiting_since is None


def test_nobody_takes_what_is_over() -> None:
    session = new_session()
    with pytest.raises(StaleJob):
        session.split.take()
    session.begin_split(Choices())
    session.split.take()
    session.fail_split("why")
    with pytest.raises(StaleJob):
        session.split.take()


@pytest.mark.parametrize("report", REPORTS)
@pytest.mark.parametrize("failed", [False, True])
def test_a_report_out_of_its_time_is_refused_and_changes_nothing(report: str, failed: bool) -> None:
    """A worker that is too slow may report on what has ended meanwhile, or on what another one has begun again."""
    fail, in_time = REPORTS[report]
    for length in range(len(IN_ORDER) + 1):
        session = new_session()
        for name in IN_ORDER[:length]:
            STEPS[name](session)
        last = IN_ORDER[length - 1] if length else ""
        if failed:
            if last not in in_time:
                continue
            STEPS[fail](session)
        elif last in in_time:
            continue
        before = msgspec.json.encode(session)
        with pytest.raises(StaleJob):
            STEPS[report](session)
        assert msgspec.json.encode(session) == before, last


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"temperature": 2.5}, {"temperature": -1}, {"concurrency": 0}])
def test_wrong_options_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Asking(**wrong)  # type: ignore[arg-type]


def accepted_session() -> Session:
    session = new_session()
    for name in IN_ORDER[: IN_ORDER.index("begin execution") + 1]:
        STEPS[name](session)
    return session


def test_an_accepted_run_can_be_steered_before_a_worker_has_taken_it() -> None:
    session = accepted_session()
    assert session.execution.message == "waiting for a worker"
    session.wish("pause")
    assert (session.execution.wish.paused, session.execution.message) == (True, "pausing")
    session.wish("resume")
    assert (session.execution.wish.paused, session.execution.message) == (False, "waiting for a worker")
    session.wish("cancel")
    for verb in ("pause", "resume", "cancel"):
        with pytest.raises(Refusal, match=f"there is no run to {verb}"):
            session.wish(verb)


@pytest.mark.parametrize(("verb", "message"), [("pause", "paused"), ("cancel", "cancelling")])
def test_a_wish_is_not_unsaid_when_a_worker_takes_the_run(verb: str, message: str) -> None:
    session = accepted_session()
    session.wish(verb)  # type: ignore[arg-type]
    session.execution.take()
    session.execution.mark_running()
    assert session.execution.message == message
    session.execution.advance(Counts(waiting="the endpoint is away"))
    assert session.execution.message == message


def test_a_cancelled_run_tells_what_was_not_asked() -> None:
    session = new_session()
    for name in IN_ORDER[: IN_ORDER.index("running") + 1]:
        STEPS[name](session)
    session.wish("cancel")
    with pytest.raises(Refusal):
        session.wish("pause")
    session.mark_saving()
    session.complete_execution(Counts(done=1))
    assert session.execution.message == "cancelled: 1 answered, 0 failed, 1 not asked"
    assert session.execution.ready_for_download
