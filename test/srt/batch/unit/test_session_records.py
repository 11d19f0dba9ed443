"""The light state of a session: every order of calls against the tables, and what may be said at each moment."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embedding_relay.batch.errors import Refusal, StaleJob
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
def test_no_order_of_calls_says_ready_too_early(names: list[str]) -> None:
    session, done = new_session(), list[str]()
    for name in names:
        try:
            STEPS[name](session)
        except (Refusal, StaleJob, IllegalMove):
            continue
        done.append(name)
        split, execution = session.split, session.execution
        assert split.ready_for_next_stage == (split.status is SplitStatus.COMPLETED) == ("complete split" in done)
        assert execution.is_accepted() == ("begin execution" in done)
        assert execution.ready_for_monitoring == ("running" in done)
        assert execution.ready_for_download == (execution.status is ExecutionStatus.COMPLETED)
        assert (split.progress == 100) == split.ready_for_next_stage
        assert (execution.progress == 100) == execution.ready_for_download
        assert not execution.saving or execution.status is ExecutionStatus.RUNNING
        if "begin execution" in done:
            assert done.index("complete split") < done.index("begin execution")
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
