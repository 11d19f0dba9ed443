"""On a CPU a first token is sent before the next pass: SGLang's own event loop, with passes that note when they run.

What the scheduler would run next is written down beforehand, and a pass computes nothing. The order in which results
are processed is SGLang's, with our hook on its decision.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest

from sglang.srt.disaggregation.multimodal import hooks, modes, prefix
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from support.scheduler import SchedulerWithoutModel

MODE = "language"

pytestmark = pytest.mark.usefixtures("mode")

PREFILL, DECODE = ForwardMode.EXTEND, ForwardMode.DECODE


class Batch(SimpleNamespace):
    """Of requests, which are their names."""

    def copy(self) -> Batch:
        return copy.copy(self)


def batch(scheduler: SchedulerWithoutModel, mode: ForwardMode, *names: str) -> Batch:
    requests = [SimpleNamespace(rid=name) for name in names]
    for req in requests:
        if req.rid.startswith("prefix"):
            req.relay_prefix = object()
    return Batch(forward_mode=mode, reqs=requests, spec_algorithm=scheduler.spec_algorithm)


def order(scheduler: SchedulerWithoutModel, *passes: tuple[ForwardMode, str]) -> list[str]:
    """What happens in an event loop whose next passes are these, each of a batch with its requests."""
    happened: list[str] = []
    steps = iter(passes)
    running: dict[str, Batch] = {}

    def next_batch(*, running_batch: Any, last_batch: Any) -> Any:
        made = None
        if (step := next(steps, None)) is not None:
            mode, name = step
            # A batch that was prefilled is decoded as the same object, of which only a mode has changed.
            made = running.setdefault(name, batch(scheduler, mode, *name.split()))
            made.forward_mode = mode
        scheduler.gracefully_exit = made is None and last_batch is None
        return SimpleNamespace(running_batch=running_batch, batch_to_run=made)

    def note(what: str, noted: Batch) -> None:
        happened.append(f"{what} {noted.forward_mode.name.lower()} of {' '.join(req.rid for req in noted.reqs)}")

    nothing = lambda *_, **__: None  # noqa: E731
    scheduler.gracefully_exit = scheduler.require_mlp_sync = scheduler.enable_unified_memory = False
    scheduler.running_batch = scheduler.last_batch = scheduler.cur_batch_for_debug = None
    scheduler.ingest_requests = scheduler.on_idle = scheduler._apply_war_barrier = nothing
    scheduler.launch_batch_sample_if_needed = nothing
    scheduler.get_next_batch_to_run = next_batch
    scheduler.run_batch = lambda ran: note("run", ran)
    scheduler.process_batch_result = lambda ran, _: note("process", ran)
    scheduler.event_loop_overlap()
    return happened


ONE_REQUEST = ((PREFILL, "a"), (DECODE, "a"), (DECODE, "a"))


def test_a_first_token_does_not_wait_for_the_next_pass(scheduler: SchedulerWithoutModel) -> None:
    assert order(scheduler, *ONE_REQUEST) == [
        "run extend of a",
        "process extend of a",
        "run decode of a",
        "run decode of a",
        "process decode of a",
        "process decode of a",
    ]


def test_nor_for_the_prefill_of_another(scheduler: SchedulerWithoutModel) -> None:
    assert order(scheduler, (PREFILL, "a"), (PREFILL, "b c"))[:3] == [
        "run extend of a",
        "process extend of a",
        "run extend of b c",
    ]


def test_what_nobody_waits_for_overlaps(scheduler: SchedulerWithoutModel) -> None:
    """The beginning of a prompt whose rows are not all here has no answer. One of several that has is enough."""
    assert prefix.of(SimpleNamespace(relay_prefix=1)) == 1
    together = order(scheduler, (PREFILL, "prefix"), (PREFILL, "prefix b"), (DECODE, "b"))
    assert together[:4] == [
        "run extend of prefix",
        "run extend of prefix b",
        "process extend of prefix",
        "process extend of prefix b",
    ]


@pytest.mark.parametrize("mode_of_others", [None, modes.ENCODE])
def test_in_other_modes_sglang_overlaps(
    scheduler: SchedulerWithoutModel, mode_of_others: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modes, "current", lambda: mode_of_others)
    assert order(scheduler, *ONE_REQUEST) == [
        "run extend of a",
        "run decode of a",
        "process extend of a",
        "run decode of a",
        "process decode of a",
        "process decode of a",
    ]


def test_what_sglang_does_not_overlap_stays_so(scheduler: SchedulerWithoutModel) -> None:
    scheduler.result_queue = []
    assert hooks.answer_first(True, scheduler, None, last_batch=None)
    assert not hooks.answer_first(False, scheduler, None, last_batch=None)


def test_an_accelerator_computes_beside_the_scheduler() -> None:
    """There the order is SGLang's: the hook is one for a CPU."""
    assert hooks.answer_first not in [hook.function for hook in hooks.HOOKS]
    assert hooks.answer_first in [hook.function for hook in hooks.CPU_HOOKS]
