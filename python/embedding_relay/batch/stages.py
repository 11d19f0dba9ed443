"""The stages of a session and the states of its two long parts, each with ONE table of legal moves."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final, TypeVar

from embedding_relay.protocol.errors import IllegalMove


class Stage(enum.Enum):
    """How far a session has come. The questions that decide about a call are asked here and nowhere else."""

    CREATED = "created"
    ANALYZED = "analyzed"
    SPLIT_COMPLETE = "split_complete"
    EXECUTING = "executing"
    COMPLETED = "completed"
    FAILED = "failed"

    def can_split(self) -> bool:
        return self is Stage.ANALYZED

    def can_execute(self) -> bool:
        return self is Stage.SPLIT_COMPLETE

    def can_download(self) -> bool:
        return self is Stage.COMPLETED

    def is_over(self) -> bool:
        return self in (Stage.COMPLETED, Stage.FAILED)


class SplitStatus(enum.Enum):
    """`COMPLETED` means saved, and read back from where it was saved."""

    NOT_STARTED = "not_started"
    PROCESSING = "processing"
    SAVING = "saving"
    COMPLETED = "completed"
    FAILED = "failed"


class ExecutionStatus(enum.Enum):
    IDLE = "idle"
    INITIALIZING = "initializing"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


STAGE_MOVES: Final[Mapping[Stage, frozenset[Stage]]] = {
    Stage.CREATED: frozenset({Stage.ANALYZED, Stage.FAILED}),
    Stage.ANALYZED: frozenset({Stage.SPLIT_COMPLETE, Stage.FAILED}),
    Stage.SPLIT_COMPLETE: frozenset({Stage.EXECUTING, Stage.FAILED}),
    Stage.EXECUTING: frozenset({Stage.COMPLETED, Stage.FAILED}),
    Stage.COMPLETED: frozenset(),
    Stage.FAILED: frozenset(),
}
# A part starts anew in its first working state when a worker takes it over from one that is gone.
SPLIT_MOVES: Final[Mapping[SplitStatus, frozenset[SplitStatus]]] = {
    SplitStatus.NOT_STARTED: frozenset({SplitStatus.PROCESSING, SplitStatus.FAILED}),
    SplitStatus.PROCESSING: frozenset({SplitStatus.PROCESSING, SplitStatus.SAVING, SplitStatus.FAILED}),
    SplitStatus.SAVING: frozenset({SplitStatus.PROCESSING, SplitStatus.COMPLETED, SplitStatus.FAILED}),
    SplitStatus.COMPLETED: frozenset(),
    SplitStatus.FAILED: frozenset(),
}
EXECUTION_MOVES: Final[Mapping[ExecutionStatus, frozenset[ExecutionStatus]]] = {
    ExecutionStatus.IDLE: frozenset({ExecutionStatus.INITIALIZING, ExecutionStatus.FAILED}),
    ExecutionStatus.INITIALIZING: frozenset({ExecutionStatus.RUNNING, ExecutionStatus.FAILED}),
    ExecutionStatus.RUNNING: frozenset({ExecutionStatus.RUNNING, ExecutionStatus.COMPLETED, ExecutionStatus.FAILED}),
    ExecutionStatus.COMPLETED: frozenset(),
    ExecutionStatus.FAILED: frozenset(),
}

State = TypeVar("State", bound=enum.Enum)


def move(moves: Mapping[State, frozenset[State]], here: State, there: State) -> State:
    if there not in moves[here]:
        raise IllegalMove(f"{type(here).__name__} cannot go from {here.name} to {there.name}")
    return there
