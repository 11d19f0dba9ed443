"""The hooks: each is where SGLang looks, a missing one is noticed, and in no mode but ours do they change anything."""

from __future__ import annotations

import functools
import inspect
import pkgutil
import re
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from embedding_relay.protocol.errors import SettingError
from embedding_relay.tools import doctor_machine
from sglang.srt.disaggregation.multimodal import hooks, modes
from sglang.srt.managers.io_struct import AbortReq, FlushCacheReqInput, ReleaseMemoryOccupationReqInput
from sglang.srt.plugins import hook_registry
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from support.scheduler import SchedulerWithoutModel, request

MODE = "encode"

pytestmark = pytest.mark.usefixtures("mode")


# ---- that they are there


def test_every_hook_took() -> None:
    hooks.verify()


@pytest.mark.parametrize("hook", hooks.HOOKS, ids=lambda hook: hook.target.rpartition(".")[2])
def test_a_hook_that_did_not_take_is_named(hook: hooks.Hook, monkeypatch: pytest.MonkeyPatch) -> None:
    place, _, name = hook.target.rpartition(".")
    monkeypatch.setattr(pkgutil.resolve_name(place), name, bare(hook.target))
    with pytest.raises(SettingError, match="did not apply") as error:
        hooks.verify()
    assert hook.target in str(error.value)


def test_the_doctor_applies_them_and_names_one_that_did_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it runs in a process of its own, here in one that has SGLang already."""
    exec(doctor_machine.APPLY_HOOKS, {})
    place, _, name = hooks.HOOKS[0].target.rpartition(".")
    monkeypatch.setattr(pkgutil.resolve_name(place), name, bare(hooks.HOOKS[0].target))
    with pytest.raises(SystemExit, match=f"doctor: the hook on {re.escape(hooks.HOOKS[0].target)} did not apply"):
        exec(doctor_machine.APPLY_HOOKS, {})


@functools.cache
def held_by_modules() -> dict[int, str]:
    return {id(value): f"{module}.{name}" for module in list(sys.modules) for name, value in held(sys.modules[module])}


def held(module: Any) -> list[tuple[str, Any]]:
    return list(vars(module).items()) if isinstance(module, ModuleType) else []


def bare(target: str) -> Any:
    function = pkgutil.resolve_name(target)
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


@pytest.mark.parametrize("hook", hooks.hooks_here(), ids=lambda hook: hook.target.rpartition(".")[2])
def test_no_module_has_kept_what_a_hook_replaced(hook: hooks.Hook) -> None:
    assert id(bare(hook.target)) not in held_by_modules(), held_by_modules()[id(bare(hook.target))]


def test_modules_are_not_searched_for_a_method_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's search takes a second for all of them. For what others replace it is as it was."""
    place, _, name = hooks.HOOKS[0].target.rpartition(".")
    holder, ours = pkgutil.resolve_name(place), pkgutil.resolve_name(hooks.HOOKS[0].target)

    def theirs() -> None: ...

    for wrapper, found in ((ours, 0), (theirs, 1)):
        importer = imported(monkeypatch, bare(f"{place}.{name}"))
        assert hook_registry._propagate_patch(importer.first, wrapper, holder) == found


def test_modules_are_searched_once_for_all_functions_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """When SGLang has applied the last hook."""
    targets = [hook.target for hook in hooks.HOOKS if not isinstance(place_of(hook.target), type)]
    assert len(targets) > 2
    importer = imported(monkeypatch, *map(bare, targets))
    for target in targets:
        hook_registry._propagate_patch(bare(target), pkgutil.resolve_name(target), place_of(target))
    assert importer.first is bare(targets[0]), "a search of its own"
    HookRegistry.apply_hooks()
    assert importer.all == [pkgutil.resolve_name(target) for target in targets]


class Importer(ModuleType):
    """A module that has imported functions by their names."""

    first: Any

    @property
    def all(self) -> list[Any]:
        return [value for name, value in vars(self).items() if not name.startswith("__")]


def imported(monkeypatch: pytest.MonkeyPatch, *functions: Any) -> Importer:
    importer = Importer("importer")
    for number, function in enumerate(functions):
        setattr(importer, f"other_{number}" if number else "first", function)
    monkeypatch.setitem(sys.modules, "importer", importer)
    return importer


def place_of(target: str) -> Any:
    return pkgutil.resolve_name(target.rpartition(".")[0])


def test_memory_is_asked_to_be_pinned_where_there_is_no_accelerator() -> None:
    """As SGLang does for videos and LoRA adapters."""
    assert torch.tensor([1.0, 2.0], pin_memory=True).pin_memory().tolist() == [1, 2]
    assert torch.zeros(2, pin_memory=True).tolist() == [0, 0]
    assert torch.empty((2, 3), pin_memory=True).shape == (2, 3)


def _scripted(like: torch.Tensor) -> torch.Tensor:
    return like + torch.zeros([1]) + torch.tensor(1.0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_torch_still_compiles_scripts_that_call_what_is_wrapped() -> None:
    """As modules of transformers do when they are imported: SGLang's Mistral 3 and Pixtral import all of them."""
    assert torch.jit.script(_scripted)(torch.ones(1)).tolist() == [2]


def test_a_target_has_one_hook_and_the_argument_that_its_function_names() -> None:
    """SGLang passes on what it was given: a hook that takes a scheduler must be on a method of one."""
    targets = [hook.target for hook in hooks.HOOKS]
    assert len(targets) == len(set(targets))
    for hook in hooks.HOOKS:
        names = list(inspect.signature(hook.function).parameters)
        first = names[0] if hook.kind is HookType.BEFORE else names[1] if len(names) > 1 else ""
        assert (first == "scheduler") == (".Scheduler." in hook.target), hook.target


def test_an_operators_mistake_is_one_line() -> None:
    with pytest.raises(SystemExit, match="sglang-embedding-relay: this cannot work"), hooks.one_line_for_the_operator():
        raise SettingError("this cannot work")


# ---- a server in another mode


@pytest.fixture(params=["as SGLang makes it", "in parts"])
def undivided(
    scheduler: SchedulerWithoutModel, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> SchedulerWithoutModel:
    """Our hooks are there, a role is not. Some make a scheduler of which we never hear: SGLang's own tests do."""
    monkeypatch.setattr(modes, "current", lambda: None)
    hooks.take_role(None, scheduler)
    assert scheduler.embedding_relay is None
    if request.param == "in parts":
        del scheduler.embedding_relay
    return scheduler


def test_without_a_role_requests_go_sglangs_way(undivided: SchedulerWithoutModel) -> None:
    undivided.turn(request("a", None), request("b", 7, pictures=1), request("c", None, priority=3))
    assert [req.rid for req in undivided.waiting_queue] == ["a", "b"]
    answer = undivided.answer_to("c")
    assert answer is not None
    assert "priority" in answer.text
    undivided.turn(AbortReq(abort_all=True))
    assert undivided.waiting_queue == []
    assert undivided.is_fully_idle()


def test_without_a_role_commands_go_sglangs_way(undivided: SchedulerWithoutModel) -> None:
    undivided.turn(FlushCacheReqInput())
    assert undivided.answers[-1].success
    undivided.turn(request("a", None), FlushCacheReqInput())
    assert not undivided.answers[-1].success
    with pytest.raises(AssertionError, match="only when server is idle"):
        undivided.turn(ReleaseMemoryOccupationReqInput())


def test_what_runs_once_a_turn_needs_a_role(undivided: SchedulerWithoutModel) -> None:
    for hook in (hooks.sleep_while_only_we_wait, hooks.close_role):
        hook(None, undivided)
    assert undivided.answers == []


def test_a_model_in_another_mode_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "current", lambda: None)
    assert hooks.build_one_half(lambda config, extra: (config, extra), "config", "kept") == ("config", "kept")
    assert hooks.load_one_half(lambda runner: runner, "runner") == "runner"
    limits = SimpleNamespace(max_req_len=3)
    hooks.restore_prompt_limits(None, limits)
    assert limits.max_req_len == 3


# ---- a server in one of ours


def test_to_sglang_a_server_of_ours_is_a_plain_one(
    scheduler: SchedulerWithoutModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own prefill and decode branches must not see a mode that they do not know."""
    from sglang.srt.disaggregation.multimodal import instance
    from sglang.srt.disaggregation.utils import DisaggregationMode

    monkeypatch.setattr(instance, "start_role", lambda scheduler, mode: f"the role of {mode}")
    scheduler.disaggregation_mode = DisaggregationMode(modes.ENCODE)
    hooks.take_role(None, scheduler)
    assert scheduler.embedding_relay == "the role of encode"
    assert scheduler.disaggregation_mode is DisaggregationMode.NULL
    scheduler.embedding_relay = None


def test_a_draft_model_stays_whole() -> None:
    config = SimpleNamespace(is_draft_model=True)
    assert hooks.build_one_half(lambda config, extra: (config, extra), config, "kept") == (config, "kept")
    runner = SimpleNamespace(is_draft_worker=True)
    assert hooks.load_one_half(lambda runner: runner, runner) is runner


def test_a_model_that_cannot_be_divided_ends_the_process_with_one_line() -> None:
    def refuse(runner: Any) -> None:
        raise SettingError("TextOnly cannot be divided")

    with pytest.raises(SystemExit, match="sglang-embedding-relay: TextOnly cannot be divided"):
        hooks.load_one_half(refuse, SimpleNamespace(is_draft_worker=False))


def test_the_device_of_an_instance_is_meant_where_sglang_names_none() -> None:
    """Its torch may be built for an accelerator that this machine has not."""
    before = torch.get_device_module
    with hooks.torch_on("cpu"):
        assert torch.get_device_module() is torch.cpu
        assert torch.get_device_module("cuda") is torch.cuda
    assert torch.get_device_module is before


def test_tokenizer_workers_load_plugins_before_anything_else_of_theirs() -> None:
    def loads(wrapped: Any) -> bool:
        return wrapped.__reduce__()[0].__name__ == "_load_plugins_then"

    arguments, options = hooks.bring_plugins_along("ports", "settings", scheduler_info=1) or ((), {})
    assert loads(arguments[0])
    assert (arguments[1:], options) == (("settings",), {"scheduler_info": 1})
