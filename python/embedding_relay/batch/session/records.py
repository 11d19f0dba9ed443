"""The light state of a session, which all workers share: its stages, its two long parts, and their legal moves."""

from __future__ import annotations

import enum
import secrets
import time
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeVar

import msgspec

from embedding_relay.batch.errors import Refusal, StaleJob, WorkersDied
from embedding_relay.batch.workbook.analysis import Analysis, Choices
from embedding_relay.protocol.errors import IllegalMove


class Stage(enum.Enum):
    """How far a session has come. Which call may come next is decided by these questions and nowhere else."""

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
    # The moves back to EXECUTING are retries of the rows without an answer.
    Stage.COMPLETED: frozenset({Stage.EXECUTING}),
    Stage.FAILED: frozenset({Stage.EXECUTING}),
}
# A worker that takes a part over from a dead one begins it again, hence the moves back to PROCESSING and RUNNING.
SPLIT_MOVES: Final[Mapping[SplitStatus, frozenset[SplitStatus]]] = {
    SplitStatus.NOT_STARTED: frozenset({SplitStatus.PROCESSING, SplitStatus.FAILED}),
    SplitStatus.PROCESSING: frozenset({SplitStatus.PROCESSING, SplitStatus.SAVING, SplitStatus.FAILED}),
    SplitStatus.SAVING: frozenset({SplitStatus.PROCESSING, SplitStatus.COMPLETED, SplitStatus.FAILED}),
    SplitStatus.COMPLETED: frozenset(),
    SplitStatus.FAILED: frozenset(),
}
EXECUTION_MOVES: Final[Mapping[ExecutionStatus, frozenset[ExecutionStatus]]] = {
    # The only way out is an accepted start: whatever is not IDLE can be asked how far it is. A retry begins it again.
    ExecutionStatus.IDLE: frozenset({ExecutionStatus.INITIALIZING}),
    ExecutionStatus.INITIALIZING: frozenset({ExecutionStatus.RUNNING, ExecutionStatus.FAILED}),
    ExecutionStatus.RUNNING: frozenset({ExecutionStatus.RUNNING, ExecutionStatus.COMPLETED, ExecutionStatus.FAILED}),
    ExecutionStatus.COMPLETED: frozenset({ExecutionStatus.INITIALIZING}),
    ExecutionStatus.FAILED: frozenset({ExecutionStatus.INITIALIZING}),
}

State = TypeVar("State", bound=enum.Enum)


def move(moves: Mapping[State, frozenset[State]], here: State, there: State) -> State:
    if there not in moves[here]:
        raise IllegalMove(f"{type(here).__name__} cannot go from {here.name} to {there.name}")
    return there


# The shares of a split's progress: building the tasks, then saving them, then reading back what was saved.
SAVING_FROM: Final = 90.0
VERIFYING_FROM: Final = 95.0
VERIFIED: Final = 98.0
EVERYTHING: Final = 100.0

# What a part says from the moment it is accepted until a worker begins.
WAITING: Final = "waiting for a worker"
# What a run says that was accepted together with the split before it.
SPLITTING: Final = "the rows are being read first"

# Attempts that have begun and not ended are workers that died, but for the one that is under way.
MOST_DEATHS: Final = 3


def _one_more(unended: int, part: str) -> int:
    if unended >= MOST_DEATHS:
        raise WorkersDied(
            f"{unended} worker processes died, one after the other, while they were at this {part}, so it is not tried "
            "again; the log of the machine may say why (was its memory used up?)"
        )
    return unended + 1


Moment = Literal["in_progress_at", "finalizing_at", "completed_at", "failed_at", "cancelling_at", "cancelled_at"]


class SplitProgress(msgspec.Struct):
    """`ready_for_next_stage` is set by `mark_completed`, after what was saved was read back, and by nothing else."""

    status: SplitStatus = SplitStatus.NOT_STARTED
    progress: float = 0.0
    message: str = ""
    error: str = ""
    ready_for_next_stage: bool = False
    # How often a worker has begun. The number is part of its files' names, so a worker that lost its lease and does not
    # know yet overwrites nothing.
    attempt: int = 0
    unended: int = 0
    tasks: int = 0
    batches: int = 0

    def is_ready(self) -> bool:
        return self.ready_for_next_stage

    def begin(self) -> None:
        self.status = move(SPLIT_MOVES, self.status, SplitStatus.PROCESSING)
        self.message = WAITING

    def take(self) -> int:
        """A worker begins, or begins again what a dead one left. Returns the number of its attempt."""
        if self.status in (SplitStatus.NOT_STARTED, SplitStatus.COMPLETED, SplitStatus.FAILED):
            raise StaleJob
        self.unended = _one_more(self.unended, "split")
        self.status = move(SPLIT_MOVES, self.status, SplitStatus.PROCESSING)
        self.attempt += 1
        self.progress, self.message = 0.0, "reading the rows"
        return self.attempt

    def advance(self, share: float, message: str) -> None:
        """`share` is how much of the building is done, 0 to 1."""
        self._require(SplitStatus.PROCESSING)
        self.progress, self.message = SAVING_FROM * min(share, 1.0), message

    def mark_saving(self, tasks: int, batches: int) -> None:
        self.status = move(SPLIT_MOVES, self.status, SplitStatus.SAVING)
        self.tasks, self.batches = tasks, batches
        self.progress, self.message = SAVING_FROM, f"saving {counted(tasks, 'task')}"

    def mark_verifying(self) -> None:
        self._require(SplitStatus.SAVING)
        self.progress, self.message = VERIFYING_FROM, "reading back what was saved"

    def mark_verified(self) -> None:
        self._require(SplitStatus.SAVING)
        self.progress, self.message = VERIFIED, "what was saved is what was built"

    def mark_completed(self) -> None:
        self.status = move(SPLIT_MOVES, self.status, SplitStatus.COMPLETED)
        self.progress = EVERYTHING
        self.message = f"saved: {counted(self.tasks, 'task')} in {counted(self.batches, 'batch')}"
        self.ready_for_next_stage = True

    def mark_failed(self, error: str) -> None:
        self.status = move(SPLIT_MOVES, self.status, SplitStatus.FAILED)
        self.error, self.message = error, "the split failed"

    def _require(self, status: SplitStatus) -> None:
        """A report that comes late, after the end or after another worker took over, must not take anything back."""
        if self.status is not status:
            raise StaleJob

    def to_dict(self) -> dict[str, Any]:
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return fields


class Counts(msgspec.Struct, frozen=True):
    """How far a run is, as the worker that carries it out counts it."""

    done: int = 0
    failed: int = 0
    running: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    # Rows per second of the last minute, and the time left at that rate; None before the first rows are answered.
    rate: float = 0.0
    seconds_left: float | None = None
    # Why nothing is asked at the moment, if nothing is: the endpoint is away, or overloaded. And the same in two words.
    waiting: str = ""
    trouble: str = ""


class Wish(msgspec.Struct):
    """What a person wants of a run under way. The worker that carries it out reads this a few times a second."""

    paused: bool = False
    cancelled: bool = False


class ExecutionProgress(msgspec.Struct):
    """`ready_for_monitoring` is set by `mark_running`, `ready_for_download` by `mark_completed`, by nothing else."""

    status: ExecutionStatus = ExecutionStatus.IDLE
    progress: float = 0.0
    message: str = ""
    error: str = ""
    ready_for_monitoring: bool = False
    ready_for_download: bool = False
    saving: bool = False
    attempt: int = 0
    unended: int = 0
    total: int = 0
    counts: Counts = Counts()
    wish: Wish = msgspec.field(default_factory=Wish)
    # Since when `counts.waiting` says that nothing is asked; None while rows are asked.
    waiting_since: float | None = None
    # Its start was accepted while the rows are still being split into tasks: nobody may take it before that is done.
    after_split: bool = False
    # The failures that attempts up to this one have written do not count any more: their rows are asked again.
    set_aside: int = 0

    def is_accepted(self) -> bool:
        """Whether a start was accepted. From then on there is a run to look at, and until it is saved one to steer."""
        return self.status is not ExecutionStatus.IDLE

    def begin(self, total: int, message: str = WAITING) -> None:
        self.status = move(EXECUTION_MOVES, self.status, ExecutionStatus.INITIALIZING)
        self.total, self.message = total, message

    def begin_again(self) -> None:
        """For the rows without an answer; those that are answered stay so."""
        self.begin(self.total)
        self.set_aside = self.attempt
        kept = self.counts
        self.counts = Counts(kept.done, 0, 0, kept.retries, kept.prompt_tokens, kept.completion_tokens)
        self.progress = self._progress()
        self.error, self.wish, self.waiting_since, self.unended = "", Wish(), None, 0
        self.saving = self.ready_for_monitoring = self.ready_for_download = False

    def take(self) -> int:
        """A worker takes the run, or takes it over from a dead one. Returns the number of its attempt."""
        if self.after_split or self.status not in (ExecutionStatus.INITIALIZING, ExecutionStatus.RUNNING):
            raise StaleJob
        self.unended = _one_more(self.unended, "run")
        self.attempt += 1
        return self.attempt

    def mark_running(self) -> None:
        if self.after_split:
            raise StaleJob
        self.status = move(EXECUTION_MOVES, self.status, ExecutionStatus.RUNNING)
        self.saving = False
        self.ready_for_monitoring = True
        self.message = self._wished("running")

    def advance(self, counts: Counts) -> None:
        self._require_running()
        self.counts = counts
        self.progress = self._progress()
        self.message = self._wished(counts.waiting or "running")
        if not counts.waiting:
            self.waiting_since = None
        elif self.waiting_since is None:
            self.waiting_since = time.time()

    def _progress(self) -> float:
        """The last hundredth is the saving of the workbook."""
        finished = self.counts.done + self.counts.failed
        return 99.0 * finished / self.total if self.total else 99.0

    def mark_saving(self) -> None:
        self._require_running()
        self.saving, self.message, self.waiting_since = True, "saving the answers", None

    def mark_completed(self, counts: Counts) -> None:
        self.status = move(EXECUTION_MOVES, self.status, ExecutionStatus.COMPLETED)
        self.counts, self.saving, self.progress = counts, False, EVERYTHING
        left = self.total - counts.done - counts.failed
        self.message = f"{counts.done} answered, {counts.failed} failed"
        if self.wish.cancelled:
            self.message = f"cancelled: {self.message}, {left} not asked"
        self.ready_for_download = True

    def mark_failed(self, error: str) -> None:
        self.status = move(EXECUTION_MOVES, self.status, ExecutionStatus.FAILED)
        self.error, self.message, self.saving, self.waiting_since = error, "the run failed", False, None

    def _wished(self, otherwise: str) -> str:
        """The message of a run under way: what people want of it comes first."""
        if self.wish.cancelled:
            return "cancelling"
        return "paused" if self.wish.paused else otherwise

    def _require_running(self) -> None:
        """As for a split: a report that comes late, and be it while the answers are saved, changes nothing."""
        if self.status is not ExecutionStatus.RUNNING or self.saving:
            raise StaleJob

    def to_dict(self) -> dict[str, Any]:
        fields: dict[str, Any] = msgspec.to_builtins(self)
        fields |= fields.pop("counts") | fields.pop("wish")
        return fields


class Asking(msgspec.Struct, frozen=True, kw_only=True):
    """The options of one run: how its rows are asked."""

    model: str = ""  # "" is the first one that the endpoint lists
    system: str = ""
    max_tokens: int | None = None
    temperature: float | None = None
    concurrency: int | None = None  # requests in flight, up to what the operator allows; None is all of that

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError("max_tokens must be at least 1")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise ValueError("temperature must be between 0 and 2")
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError("concurrency must be at least 1")


class LineError(msgspec.Struct, frozen=True):
    """Why a batch was not accepted. `line` counts from 1; None is the file as a whole."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchOrder(msgspec.Struct):
    """What makes a session a batch of OpenAI's API: what its owner sent, and the times that the API reports."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    errors: tuple[LineError, ...] = ()

    def stamp(self, moment: Moment) -> None:
        setattr(self, moment, int(time.time()))


class Session(msgspec.Struct, kw_only=True):
    """Changed only by its methods, within `Sessions.change`; a call that is not possible now raises a Refusal."""

    session_id: str
    name: str  # of the uploaded file: shown to people, offered for the download, never a path
    kind: Literal["xlsx", "csv", "jsonl"]
    created_at: float
    stage: Stage = Stage.CREATED
    analysis: Analysis | None = None
    choices: Choices = Choices()
    split: SplitProgress = msgspec.field(default_factory=SplitProgress)
    asking: Asking = Asking()
    execution: ExecutionProgress = msgspec.field(default_factory=ExecutionProgress)
    order: BatchOrder | None = None

    def _go(self, stage: Stage) -> None:
        self.stage = move(STAGE_MOVES, self.stage, stage)

    def _stamp(self, moment: Moment) -> None:
        if self.order:
            self.order.stamp(moment)

    # ---- analysis

    def mark_analyzed(self, analysis: Analysis) -> None:
        self._go(Stage.ANALYZED)
        self.analysis = analysis

    def analyze_again(self, choices: Choices, analysis: Analysis) -> None:
        if not self.stage.can_split() or self.split.status is not SplitStatus.NOT_STARTED:
            raise Refusal(400, f"this session cannot be analysed again: {self.where()}")
        self.choices, self.analysis = choices, analysis

    # ---- split

    def begin_split(self, choices: Choices) -> None:
        if not self.stage.can_split() or self.split.status is not SplitStatus.NOT_STARTED:
            raise Refusal(400, f"this session cannot be split: {self.where()}")
        self.choices = choices
        self.split.begin()

    def complete_split(self) -> None:
        self.split.mark_completed()
        self._go(Stage.SPLIT_COMPLETE)
        # In the same change, so that no worker can die between the two.
        if self.execution.is_accepted():
            self._go(Stage.EXECUTING)
            self.execution.total, self.execution.after_split = self.split.tasks, False
            if self.execution.message == SPLITTING:
                self.execution.message = WAITING
        elif self.order:
            self.begin_execution(Asking())  # nobody presses Start for a batch

    def fail_split(self, error: str) -> None:
        self.split.mark_failed(error)
        if self.execution.is_accepted():
            self.execution.mark_failed(error)
        self._go(Stage.FAILED)
        self._stamp("failed_at")

    # ---- execution

    def begin_execution(self, asking: Asking) -> None:
        if not self.split.is_ready():
            raise Refusal(400, f"the tasks of this session are not ready: {self.where()}")
        if not self.stage.can_execute():
            raise Refusal(400, f"this session cannot be started: {self.where()}")
        self._go(Stage.EXECUTING)
        self.asking = asking
        self.execution.begin(self.split.tasks)
        self._stamp("in_progress_at")

    def begin_run(self, asking: Asking) -> None:
        """While it is being split: start it by itself when its tasks are ready. The start is accepted from now on."""
        if self.split.is_ready():
            self.begin_execution(asking)
            return
        if self.split.status not in (SplitStatus.PROCESSING, SplitStatus.SAVING) or self.execution.is_accepted():
            raise Refusal(400, f"this session cannot be started: {self.where()}")
        assert self.analysis is not None
        self.asking = asking
        self.execution.begin(self.analysis.rows, SPLITTING)
        self.execution.after_split = True

    def retry(self, asking: Asking) -> None:
        """Ask the rows again that have no answer: those that failed, and after a cancel those that were not asked."""
        if self.order:
            raise Refusal(400, "this session is a batch of OpenAI's API: create another batch of what has failed")
        if not self.stage.is_over() or not self.execution.is_accepted() or not self.split.is_ready():
            raise Refusal(400, f"there is no run that has ended: {self.where()}")
        if self.stage is Stage.COMPLETED and self.execution.counts.done >= self.execution.total:
            raise Refusal(400, "every row of this session has its answer")
        self._go(Stage.EXECUTING)
        self.asking = asking
        self.execution.begin_again()

    def is_under_way(self) -> bool:
        """Whether there is a run to steer: accepted, and neither over nor being saved."""
        return self.execution.is_accepted() and not self.stage.is_over() and not self.execution.saving

    def mark_saving(self) -> None:
        self.execution.mark_saving()
        self._stamp("finalizing_at")

    def complete_execution(self, counts: Counts) -> None:
        self.execution.mark_completed(counts)
        self._go(Stage.COMPLETED)
        self._stamp("cancelled_at" if self.execution.wish.cancelled else "completed_at")

    def fail_execution(self, error: str) -> None:
        self.execution.mark_failed(error)
        self._go(Stage.FAILED)
        self._stamp("failed_at")

    def wish(self, verb: Literal["pause", "resume", "cancel"]) -> None:
        execution = self.execution
        if not self.is_under_way() or execution.wish.cancelled:
            raise Refusal(400, f"there is no run to {verb}: {self.where()}")
        if verb == "cancel":
            execution.wish.cancelled = True
            execution.message = "cancelling"
            self._stamp("cancelling_at")
        else:
            execution.wish.paused = verb == "pause"
            going = "running" if execution.ready_for_monitoring else WAITING if self.split.is_ready() else SPLITTING
            execution.message = "pausing" if verb == "pause" else going

    def cancel_order(self) -> None:
        """A batch may be cancelled before its run has begun: then the run ends before it has asked anything."""
        if self.stage.is_over() or self.execution.saving:
            raise Refusal(400, f"this batch cannot be cancelled: {self.where()}")
        if not self.execution.wish.cancelled:
            self.execution.wish.cancelled = True
            self.execution.message = "cancelling"
            self._stamp("cancelling_at")

    # ---- words

    def where(self) -> str:
        """How far the session is, in words that explain a refusal."""
        match self.stage:
            case Stage.CREATED:
                return "its file is still being analysed"
            case Stage.ANALYZED if self.split.status is SplitStatus.NOT_STARTED:
                return "it has not been split"
            case Stage.ANALYZED:
                return f"it is being split ({self.split.status.value}, {self.split.progress:.0f} %)"
            case Stage.SPLIT_COMPLETE:
                return "it is split and has not been started"
            case Stage.EXECUTING:
                return f"it is running ({self.execution.message})"
            case Stage.COMPLETED:
                return "it is completed"
            case Stage.FAILED:
                return f"it has failed ({self.split.error or self.execution.error})"


def counted(number: int, thing: str) -> str:
    plural = "es" if thing.endswith("ch") else "s"
    return f"{number} {thing}{'' if number == 1 else plural}"


def new_session_id() -> str:
    return secrets.token_hex(8)
