"""What both halves have in common: when the scheduler may sleep, what is turned away, and who is told that we live."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from embedding_relay import __version__
from embedding_relay.config import RelayConfig
from embedding_relay.keys import Keys
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.protocol.errors import BAD_GATEWAY, BAD_REQUEST, CLIENT_GONE, UNAVAILABLE, Failure
from embedding_relay.protocol.status import Status
from embedding_relay.tools.doctor_peer import InstanceFacts
from embedding_relay.transport.language import LanguageManager
from sglang.srt.disaggregation.multimodal import roles
from sglang.srt.disaggregation.multimodal.multimodal_language import LanguageRole
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
from sglang.srt.managers.io_struct import (
    AbortReq,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    PauseGenerationReqInput,
    ReleaseMemoryOccupationReqInput,
)
from support import scheduler as stand_ins
from support.scheduler import SchedulerWithoutModel, TransferWithoutThread

MODE = "language"


class Sleeps:
    """A poller that is asked how long to wait."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def poll(self, longest_ms: int) -> None:
        self.asked.append(longest_ms)


@pytest.fixture(autouse=True)
def role(scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread) -> LanguageRole:
    scheduler.embedding_relay = LanguageRole(scheduler, transfer)
    scheduler.embedding_relay._poller = Sleeps()
    return scheduler.embedding_relay


def request(rid: str, room: int, **options: Any) -> Any:
    return stand_ins.request(rid, room, need_wait_for_mm_inputs=True, **options)


def slept(scheduler: SchedulerWithoutModel) -> bool:
    """What SGLang does when it has no batch: `on_idle` asks whether it is idle, and our hook comes after that."""
    role = scheduler.embedding_relay
    before = len(role._poller.asked)
    scheduler.is_fully_idle()
    role.sleep_until_something_happens()
    return len(role._poller.asked) > before


# ---- sleep


def test_a_scheduler_with_nothing_but_parked_requests_sleeps_until_a_message(
    scheduler: SchedulerWithoutModel, role: LanguageRole
) -> None:
    scheduler.turn(request("a", 7))
    assert slept(scheduler)
    assert role._poller.asked == [1000], "and looks at its deadlines now and then"


def test_an_idle_scheduler_sleeps_or_not_as_sglang_decides(scheduler: SchedulerWithoutModel) -> None:
    assert not slept(scheduler)


def test_work_of_sglangs_own_keeps_it_awake(scheduler: SchedulerWithoutModel) -> None:
    scheduler.turn(request("a", 7))
    scheduler.grammar_manager.grammar_queue.append("a grammar that is being compiled")
    assert not slept(scheduler)


def test_work_of_ours_keeps_it_awake(
    scheduler: SchedulerWithoutModel, role: LanguageRole, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler.turn(request("a", 7))
    monkeypatch.setattr(role, "has_work", lambda: True)
    assert not slept(scheduler)


def test_neither_a_health_request_nor_a_flush_changes_what_is_known_about_idleness(
    scheduler: SchedulerWithoutModel, role: LanguageRole
) -> None:
    scheduler.turn(request("a", 7))
    assert not scheduler.is_fully_idle()
    assert scheduler.is_fully_idle(for_health_check=True)
    with role.parked_requests_hold_nothing():
        assert scheduler.is_fully_idle()
        with role.parked_requests_hold_nothing():
            assert scheduler.is_fully_idle()
        assert scheduler.is_fully_idle()
    assert not scheduler.is_fully_idle()
    assert role.scheduler_idle, "SGLang has nothing of its own to do"


# ---- who is held


def test_nothing_is_held_at_first(role: LanguageRole) -> None:
    assert not role.is_held()


def test_a_release_of_one_kind_of_memory_is_enough_to_hold(
    scheduler: SchedulerWithoutModel, role: LanguageRole
) -> None:
    scheduler.turn(ReleaseMemoryOccupationReqInput(tags=["kv_cache"]))
    assert role.is_held()


def test_what_is_a_new_weight_is_known_by_its_message() -> None:
    names = {kind.__name__ for kind in roles.weight_changes()}
    assert {"UpdateWeightFromDiskReqInput", "EndWeightUpdateReqInput"} < names
    assert len(names) == 5


# ---- who is turned away, and how


@pytest.mark.parametrize("transfer_settings", [{"SGLANG_EMBEDDING_MAX_WAITING_REQUESTS": 2}])
def test_more_requests_than_may_wait_are_turned_away(
    scheduler: SchedulerWithoutModel, transfer_settings: dict[str, int]
) -> None:
    transfer = TransferWithoutThread(**transfer_settings)
    scheduler.embedding_relay = LanguageRole(scheduler, transfer)
    scheduler.turn(request("a", 1), request("b", 2), request("c", 3))
    answer = scheduler.answer_to("c")
    assert answer == transfer.reason(3)
    assert answer is not None
    assert answer.code == UNAVAILABLE
    transfer.stands(1, Status.FAILED, Failure(UNAVAILABLE, "over"))
    scheduler.turn()
    scheduler.turn(request("d", 4))
    assert transfer.rooms("request") == [1, 2, 3, 4]
    assert scheduler.ended() == ["c", "a"]
    transfer.close()


@pytest.mark.parametrize(("code", "answered"), [(CLIENT_GONE, BAD_REQUEST), (BAD_GATEWAY, BAD_GATEWAY)])
def test_a_code_that_http_has_not_is_not_answered(
    scheduler: SchedulerWithoutModel, role: LanguageRole, code: int, answered: int
) -> None:
    role.answer_with_failure(request("a", 7), Failure(code, "why"))
    assert scheduler.answer_to("a") == Failure(answered, "why")


@pytest.mark.parametrize(
    ("abort", "rid", "meant"),
    [
        (AbortReq(rid="batch_1"), "batch_1", True),
        (AbortReq(rid="batch"), "batch_1", True),
        (AbortReq(rid="batch_1"), "batch", False),
        (AbortReq(abort_all=True), "any", True),
    ],
)
def test_an_abort_means_a_prefix(abort: AbortReq, rid: str, meant: bool) -> None:
    assert roles.aborted(abort, rid) is meant


def test_only_the_host_that_nobody_has_is_local() -> None:
    assert roles.is_local(SimpleNamespace(bootstrap_host=FAKE_BOOTSTRAP_HOST))
    assert not roles.is_local(SimpleNamespace(bootstrap_host="127.0.0.1"))
    assert not roles.is_local(SimpleNamespace(bootstrap_host=None))


# ---- who watches


class Watcher:
    def __init__(self) -> None:
        self.seen: list[dict[str, int]] = []

    def parked(self, tables: dict[str, int]) -> None:
        self.seen.append(tables)


def test_who_watches_hears_of_changes_only(scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread) -> None:
    transfer.observer = Watcher()
    scheduler.turn(request("a", 7))
    scheduler.turn()
    transfer.stands(7, Status.FAILED, Failure(UNAVAILABLE, "over"))
    scheduler.turn()
    scheduler.turn()
    assert [tables["parked"] for tables in transfer.observer.seen] == [1, 0]


def test_each_turn_says_that_the_scheduler_lives(scheduler: SchedulerWithoutModel, role: LanguageRole) -> None:
    beats: list[bool] = []
    role.pulse.beat = lambda: beats.append(True)
    scheduler.turn(PauseGenerationReqInput(mode="in_place"))
    scheduler.turn()
    assert len(beats) == 2


def test_start_and_close_take_everything_along(
    scheduler: SchedulerWithoutModel, transfer: TransferWithoutThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    registered: list[Any] = []
    monkeypatch.setattr(transfer, "start", lambda: calls.append("start"), raising=False)
    monkeypatch.setattr(transfer, "close", lambda: calls.append("close"))
    scheduler.idle_sleeper = SimpleNamespace(poller=SimpleNamespace(register=lambda fd, _: registered.append(fd)))
    scheduler.ipc_channels.recv_from_tokenizer = None
    role = LanguageRole(scheduler, transfer)
    role.pulse.start = role.pulse.close = lambda: calls.append("pulse")
    role.start()
    role.close()
    assert calls == ["start", "pulse", "pulse", "close"]
    assert registered == [transfer.wakeup_fd], "SGLang's own sleep ends when a room changes"


# ---- what an operator's tools read


def described(scheduler: SchedulerWithoutModel) -> dict[str, Any]:
    """What /server_info gets from this scheduler; the rest of it is SGLang's own."""
    scheduler.internal_state = SimpleNamespace(
        get_internal_state=lambda request: GetInternalStateReqOutput(internal_state={"page_size": 1})
    )
    answer = scheduler.get_internal_state(GetInternalStateReq())
    assert answer.internal_state.pop("page_size") == 1
    return dict(answer.internal_state)


def test_an_instance_says_what_it_is(scheduler: SchedulerWithoutModel, role: LanguageRole) -> None:
    secret = Keys.of(b"not to be shown" * 3)
    manager = object.__new__(LanguageManager)  # of which only its layout and its settings are looked at
    manager.layout = BufferLayout(64, "bfloat16", 0, 16, 32, model=(("layers", "2"),))
    manager.config = RelayConfig(heartbeat_interval=4.0, keys=secret)
    role.manager = manager
    said = json.loads(json.dumps(described(scheduler)["embedding_relay"]))
    assert "not to be shown" not in str(said)
    facts = msgspec.convert(said, InstanceFacts, strict=False)
    assert facts.handshake == manager.layout.handshake()
    assert (facts.version, facts.mode, facts.data_plane) == (__version__, "language", "auto")
    assert (facts.has_secret, facts.heartbeat) == (True, 12.0)


def test_a_scheduler_that_is_none_of_ours_says_nothing_of_it(scheduler: SchedulerWithoutModel) -> None:
    assert described(scheduler) == {}, "a rank without a transfer"
    scheduler.embedding_relay = None
    assert described(scheduler) == {}, "another mode"
