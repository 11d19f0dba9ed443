"""The one place where SGLang is changed, and the check that every change took.

SGLang's plugin loader logs a hook that failed and goes on. A server that half has our modes would be worse than one
without them, so `verify()` looks at each target again before a server in one of our modes may start. In every other
mode the hooks fall through to the original at their first line, and nothing else of this package is imported.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

from embedding_relay.protocol.errors import SettingError
from sglang.srt.disaggregation.multimodal import compatibility, modes
from sglang.srt.plugins import hook_registry
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

Original = Callable[..., Any]


# ---- start-up


@contextlib.contextmanager
def one_line_for_the_operator() -> Iterator[None]:
    """A setting that cannot work ends the process with its sentence, not with a traceback."""
    try:
        yield
    except SettingError as error:
        raise SystemExit(f"sglang-embedding-relay: {error}") from None


def offer_our_modes(_result: Any, parser: Any, *_: Any, **__: Any) -> None:
    for action in parser._actions:
        if action.dest == "disaggregation_mode" and modes.ENCODE not in action.choices:
            action.choices = [*action.choices, modes.ENCODE, modes.LANGUAGE]
            action.help = (action.help or "") + modes.HELP
        elif action.dest == "encoder_urls" and modes.ENCODER_URLS_HELP not in (action.help or ""):
            action.help = (action.help or "") + modes.ENCODER_URLS_HELP


def settle_settings(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Resolution step `handle_pd_disaggregation`: the first one that runs with our mode known."""
    previous(server_args)
    if server_args.disaggregation_mode == "decode":
        settle_decode_on_cpu(server_args)
    if modes.of(server_args) is None:
        return
    from sglang.srt.disaggregation.multimodal import server_settings

    with one_line_for_the_operator():
        verify()
        server_settings.settle(server_args)


def settle_decode_on_cpu(server_args: Any) -> None:
    """SGLang's own decode mode, on the CPU platform that comes with this package."""
    from sglang.srt.disaggregation.multimodal import cpu_platform, server_settings

    if cpu_platform.serves():
        server_settings.settle_decode(server_args)


def settle_load_balancing(server_args: Any, previous: Callable[[Any], None]) -> None:
    """SGLang's own step refuses modes that it does not know."""
    if modes.of(server_args) is None or modes.is_prefill(server_args):
        previous(server_args)
    else:
        from sglang.srt.disaggregation.multimodal import server_settings

        server_settings.settle_load_balancing(server_args)


def start_registry(original: Original) -> Any:
    if modes.current() != modes.ENCODE:
        return original()
    from sglang.srt.disaggregation.multimodal import server_settings

    with one_line_for_the_operator():
        return server_settings.start_registry()


def check_machine_first(_engine_class: Any, server_args: Any, *_: Any, **__: Any) -> None:
    """Before any child process exists: what it would fail for must not leave a half-alive server behind."""
    if modes.of(server_args) is not None:
        from sglang.srt.disaggregation.multimodal import halves, server_settings

        with one_line_for_the_operator():
            server_settings.check_ports(server_args)
            server_settings.check_transport(server_args)
            halves.check_class(server_args)


def share_cores(_result: Any, server_args: Any) -> None:
    """Where SGLang sets what its processes find in their environment: none of them exists yet."""
    if modes.of(server_args) is not None:
        from sglang.srt.disaggregation.multimodal import faults, server_settings

        server_settings.share_cores()
        if modes.of(server_args) == modes.ENCODE:
            faults.warn_without_ffmpeg()


def bring_plugins_along(port_args: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Tokenizer workers never load plugins themselves: let the first thing that they unpickle do it."""
    if modes.current() is None:
        return None
    return (modes.LoadsPlugins(port_args), *args), kwargs


# ---- model


def build_one_half(original: Original, model_config: Any, *args: Any, **kwargs: Any) -> Any:
    mode = modes.current()
    if mode is None or model_config.is_draft_model:
        return original(model_config, *args, **kwargs)
    from sglang.srt.disaggregation.multimodal import halves

    return halves.build(functools.partial(original, model_config, *args, **kwargs), mode)


def load_one_half(original: Original, runner: Any) -> Any:
    mode = modes.current()
    if mode is None or runner.is_draft_worker:
        return original(runner)
    from sglang.srt.disaggregation.multimodal import halves

    with one_line_for_the_operator():
        return halves.load(functools.partial(original, runner), mode)


def restore_prompt_limits(_result: Any, scheduler: Any) -> None:
    if modes.current() == modes.ENCODE:
        from sglang.srt.disaggregation.multimodal import halves

        halves.restore_prompt_limits(scheduler)


# ---- tokenizer manager


def begin_http_process(_result: Any, manager: Any, *_: Any, **__: Any) -> None:
    if modes.current() is not None:
        from sglang.srt.disaggregation.multimodal import admitting, tracing

        tracing.start(manager)
        admitting.start(manager)


def generate(original: Original, manager: Any, obj: Any, request: Any = None) -> Any:
    mode = modes.current()
    if mode is None:
        return original(manager, obj, request)
    from sglang.srt.disaggregation.multimodal import front, tracing

    modes.check_pairing(obj)
    tracing.join_trace(manager, obj, request)
    if mode == modes.ENCODE:
        modes.ask_for_rows_only(obj)
    return front.generate(original, manager, obj, request)


def note_dispatched(_result: Any, manager: Any, rid: str) -> None:
    if modes.current() is not None and (state := manager.rid_to_state.get(rid)) is not None:
        from sglang.srt.disaggregation.multimodal import front, tracing

        front.note_dispatched(state.obj)
        tracing.note_dispatched(manager, state)


def hear_of_abort(original: Original, manager: Any, recv_obj: Any) -> Any:
    if modes.current() is not None:
        from sglang.srt.disaggregation.multimodal import admitting, front

        if front.take_prompt_ids(manager, recv_obj) or admitting.take_encoded(recv_obj):
            return None
    return original(manager, recv_obj)


async def tell_of_abort(original: Original, manager: Any, out: Any, state: Any, is_stream: bool) -> Any:
    if modes.current() is None:
        return await original(manager, out, state, is_stream)
    return await compatibility.tell_of_abort(functools.partial(original, manager), out, state, is_stream)


async def tokenize(original: Original, manager: Any, obj: Any) -> Any:
    match modes.current():
        case modes.ENCODE:
            from sglang.srt.disaggregation.multimodal import dp_ranks, preparation

            return await dp_ranks.route(await preparation.tokenize(original, manager, obj))
        case modes.LANGUAGE:
            from sglang.srt.disaggregation.multimodal import dp_ranks, preparation

            return await dp_ranks.route(await preparation.tokenize_text_only(original, manager, obj))
        case _:
            return await original(manager, obj)


async def process_in_turn(original: Original, executor: Any, function: Original, *args: Any, **kwargs: Any) -> Any:
    if modes.current() is None:
        return await original(executor, function, *args, **kwargs)
    from sglang.srt.disaggregation.multimodal import preparation

    return await preparation.process_in_turn(original, executor, function, *args, **kwargs)


def guard_media_session(session: Any) -> Any:
    if modes.current() != modes.ENCODE:
        return session
    from sglang.srt.disaggregation.multimodal import preparation

    return preparation.guard_session(session)


# ---- scheduler


def take_role(_result: Any, scheduler: Any) -> None:
    """SGLang's own prefill and decode branches must not see a mode that they do not know: to them we are plain."""
    if modes.is_prefill():
        prefill_on_cpu(scheduler)
    scheduler.embedding_relay = None
    mode = modes.current()
    if mode is not None:
        from sglang.srt.disaggregation.multimodal import instance

        scheduler.embedding_relay = instance.start_role(scheduler, mode)
        if not modes.is_prefill():
            scheduler.disaggregation_mode = type(scheduler.disaggregation_mode).NULL


def prefill_on_cpu(scheduler: Any) -> None:
    """SGLang's own prefill mode, with encode instances or without, on the CPU platform of this package."""
    from sglang.srt.disaggregation.multimodal import cpu_platform, prefill_stage

    if cpu_platform.serves():
        prefill_stage.do_without_cuda(scheduler)


def _role_of(scheduler: Any) -> Any:
    """None also where `take_role` never ran, as in the schedulers that SGLang's own tests make in parts."""
    return getattr(scheduler, "embedding_relay", None)


def receive_request(original: Original, scheduler: Any, recv_req: Any, **kwargs: Any) -> Any:
    role = _role_of(scheduler)
    if role is None:
        return original(scheduler, recv_req, **kwargs)
    if not role.take_over(recv_req):
        with _passing_on(role):
            role.pass_on(recv_req, functools.partial(original, scheduler, recv_req, **kwargs))
    return None


_passes_on: Any = None
"""The role whose scheduler is making a `Req` of a message. That belongs to one thread; a `Req` names no scheduler."""


@contextlib.contextmanager
def _passing_on(role: Any) -> Iterator[None]:
    global _passes_on
    outer, _passes_on = _passes_on, role
    try:
        yield
    finally:
        _passes_on = outer


def note_created(_result: Any, req: Any, *_: Any, **__: Any) -> None:
    if _passes_on is not None:
        _passes_on.note_created(req)


def queue_request(original: Original, scheduler: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    role = _role_of(scheduler)
    if role is not None and role.take_from_queue(req):
        return None
    return original(scheduler, req, *args, **kwargs)


def decide_before_messages(messages: Any, scheduler: Any) -> Any:
    """SGLang's own aborts come the same way: one rank finds them, and all ranks get them in the same turn."""
    role = _role_of(scheduler)
    return messages if role is None else [*messages, *role.decide()]


def work_after_messages(messages: Any, scheduler: Any, *_: Any, **__: Any) -> None:
    if (role := _role_of(scheduler)) is not None:
        role.after_messages(messages)


def sleep_while_only_we_wait(_result: Any, scheduler: Any) -> None:
    if (role := _role_of(scheduler)) is not None:
        role.sleep_until_something_happens()


def count_our_requests(idle: bool, scheduler: Any, for_health_check: bool = False, *_: Any, **__: Any) -> bool:
    role = _role_of(scheduler)
    if role is None or for_health_check or not role.counts_parked:
        return idle
    role.scheduler_idle = idle
    return bool(idle and role.is_idle())


def flush_beside_parked(original: Original, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    role = _role_of(scheduler)
    if role is None:
        return original(scheduler, *args, **kwargs)
    with role.parked_requests_hold_nothing():
        flushed = original(scheduler, *args, **kwargs)
    if flushed:
        role.forget_computed()
    return flushed


def release_memory_beside_parked(original: Original, updater: Any, recv_req: Any) -> Any:
    role = _role_of(updater.scheduler)
    if role is None:
        return original(updater, recv_req)
    with role.parked_requests_hold_nothing(), torch_on(updater.scheduler.device):
        role.finish_computing()
        return original(updater, recv_req)


@contextlib.contextmanager
def torch_on(device: str) -> Iterator[None]:
    """While SGLang waits for torch's device without naming it: that is the one torch was built for, there or not."""
    import torch

    named = torch.get_device_module
    torch.get_device_module = lambda other=None: named(device if other is None else other)
    try:
        yield
    finally:
        torch.get_device_module = named


def keep_prefixes_to_ourselves(original: Original, streamer: Any, reqs: Any, *args: Any, **kwargs: Any) -> Any:
    """What answers requests of our own is for no client. SGLang may show one again that has ended already."""
    if modes.current() != modes.LANGUAGE:
        return original(streamer, reqs, *args, **kwargs)
    from sglang.srt.disaggregation.multimodal import prefix

    others = [req for req in reqs if not prefix.answers(req)]
    if reqs and not others:
        return None
    return original(streamer, others, *args, **kwargs)


def end_aborted_prefix(_result: Any, scheduler: Any, req: Any) -> None:
    if _role_of(scheduler) is not None and modes.current() == modes.LANGUAGE:
        from sglang.srt.disaggregation.multimodal import prefix

        if (aborted := prefix.of(req)) is not None:
            aborted.end()


def abort_ours(_result: Any, scheduler: Any, recv_req: Any) -> None:
    if (role := _role_of(scheduler)) is not None:
        role.hear_abort(recv_req)


def describe_ourselves(result: Any, scheduler: Any, *_: Any) -> None:
    """At /server_info: `sglang-relay doctor` compares both halves of a pair by it."""
    if (role := _role_of(scheduler)) is not None and (facts := role.facts()) is not None:
        result.internal_state["embedding_relay"] = facts


def close_role(_result: Any, scheduler: Any) -> None:
    if (role := _role_of(scheduler)) is not None:
        role.close()


# ---- a machine without an accelerator


def leave_unpinned(_original: Original, tensor: Any, *_: Any, **__: Any) -> Any:
    return tensor


def make_unpinned(original: Original, *args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


def find_what_is_wrapped(original: Original, function: Any) -> Any:
    """torch knows its functions by identity where it compiles scripts, as some modules of `transformers` are."""
    return original(inspect.unwrap(function))


def answer_first(overlap_is_off: bool, scheduler: Any, *_: Any, **__: Any) -> bool:
    """On a CPU nothing runs beside a pass. SGLang's overlap schedule would make a first token wait for the next one."""
    if overlap_is_off or modes.current() != modes.LANGUAGE or not scheduler.result_queue:
        return overlap_is_off
    from sglang.srt.disaggregation.multimodal import prefix

    # The last batch itself may have become the next one: what it was says the copy beside its result.
    last_batch, _result = scheduler.result_queue[0]
    # Of the beginnings of prompts that are ours alone nobody waits for an answer.
    return last_batch.forward_mode.is_extend() and any(prefix.of(req) is None for req in last_batch.reqs)


class Hook(NamedTuple):
    target: str
    function: Callable[..., Any]
    kind: HookType


_SCHEDULER: Final = "sglang.srt.managers.scheduler.Scheduler"
_WEIGHT_UPDATER: Final = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_STREAMER: Final = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
_TOKENIZER_MANAGER: Final = "sglang.srt.managers.tokenizer_manager.TokenizerManager"

HOOKS: Final = (
    Hook("sglang.srt.server_args.ServerArgs.add_cli_args", offer_our_modes, HookType.AFTER),
    Hook("sglang.srt.managers.disagg_service.start_disagg_service", start_registry, HookType.AROUND),
    Hook("sglang.srt.entrypoints.engine.Engine._launch_subprocesses", check_machine_first, HookType.BEFORE),
    Hook("sglang.srt.entrypoints.engine._set_envs_and_config", share_cores, HookType.AFTER),
    Hook(
        "sglang.srt.managers.multi_tokenizer_mixin.write_data_for_multi_tokenizer",
        bring_plugins_along,
        HookType.BEFORE,
    ),
    Hook("sglang.srt.model_executor.model_runner.ModelRunner.load_model", load_one_half, HookType.AROUND),
    Hook("sglang.srt.model_loader.loader._initialize_model", build_one_half, HookType.AROUND),
    Hook(f"{_TOKENIZER_MANAGER}.__init__", begin_http_process, HookType.AFTER),
    Hook(f"{_TOKENIZER_MANAGER}.generate_request", generate, HookType.AROUND),
    Hook(f"{_TOKENIZER_MANAGER}._mark_state_dispatched", note_dispatched, HookType.AFTER),
    Hook(f"{_TOKENIZER_MANAGER}._handle_abort_req", hear_of_abort, HookType.AROUND),
    Hook(f"{_TOKENIZER_MANAGER}._handle_abort_finish_reason", tell_of_abort, HookType.AROUND),
    Hook(f"{_TOKENIZER_MANAGER}._tokenize_one_request", tokenize, HookType.AROUND),
    Hook(
        "sglang.srt.multimodal.processors.executor.MultimodalProcessorExecutor.run",
        process_in_turn,
        HookType.AROUND,
    ),
    Hook("sglang.srt.utils.common.get_mm_http_session", guard_media_session, HookType.AFTER),
    Hook(f"{_SCHEDULER}.init_model_worker", restore_prompt_limits, HookType.AFTER),
    Hook(f"{_SCHEDULER}.init_disaggregation", take_role, HookType.AFTER),
    Hook(f"{_SCHEDULER}.handle_generate_request", receive_request, HookType.AROUND),
    Hook("sglang.srt.managers.schedule_batch.Req.__init__", note_created, HookType.AFTER),
    Hook(f"{_SCHEDULER}._add_request_to_queue", queue_request, HookType.AROUND),
    Hook(f"{_SCHEDULER}._poll_timeout_aborts", decide_before_messages, HookType.AFTER),
    Hook(f"{_SCHEDULER}.ingest_requests", work_after_messages, HookType.AFTER),
    Hook(f"{_SCHEDULER}.on_idle", sleep_while_only_we_wait, HookType.AFTER),
    Hook(f"{_SCHEDULER}.is_fully_idle", count_our_requests, HookType.AFTER),
    Hook(f"{_SCHEDULER}.flush_cache", flush_beside_parked, HookType.AROUND),
    Hook(f"{_WEIGHT_UPDATER}.release_memory_occupation", release_memory_beside_parked, HookType.AROUND),
    Hook(f"{_SCHEDULER}.abort_request", abort_ours, HookType.AFTER),
    Hook(f"{_STREAMER}.stream_output", keep_prefixes_to_ourselves, HookType.AROUND),
    Hook(f"{_SCHEDULER}._release_aborted_request", end_aborted_prefix, HookType.AFTER),
    Hook(f"{_SCHEDULER}.get_internal_state", describe_ourselves, HookType.AFTER),
    Hook(f"{_SCHEDULER}.release_host_resources", close_role, HookType.AFTER),
)

# For the CPU platform that comes with this package. SGLang pins the frames of a video and the tables of LoRA adapters
# without asking the platform whether memory can be pinned; without an accelerator torch raises.
CPU_HOOKS: Final = (
    Hook(f"{_SCHEDULER}.is_disable_overlap_for_batch", answer_first, HookType.AFTER),
    Hook("torch.Tensor.pin_memory", leave_unpinned, HookType.AROUND),
    *(Hook(f"torch.{name}", make_unpinned, HookType.AROUND) for name in ("empty", "tensor", "zeros")),
    Hook("torch.jit._builtins._find_builtin", find_what_is_wrapped, HookType.AROUND),
)

RESOLUTION_STEPS: Final = {
    "handle_pd_disaggregation": settle_settings,
    "handle_load_balance_method": settle_load_balancing,
}


def activate() -> None:
    """Called by the plugin's entry point (`embedding_relay.doors`); SGLang applies the hooks after it returns.

    An SGLang that we do not know gets only the hooks that let it name our modes and refuse them.
    """
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    for name, function in RESOLUTION_STEPS.items():
        register_resolution_hook(name)(function)
    modes.extend_enum()
    search_modules_once()
    for hook in hooks_here() if compatibility.may_serve() else HOOKS[:1]:
        HookRegistry.register(hook.target, hook.function, hook.kind)


def search_modules_once() -> None:
    """SGLang looks through all that all modules hold for each function that a hook replaces, and replaces it there too.

    That is more than a second for our hooks, in each process of a server. Nobody but its class holds a method, and
    functions of modules are looked for together, when SGLang has applied the last hook.
    """
    search = getattr(hook_registry, "_propagate_patch", None)
    if search is None:
        return  # another SGLang, which may find them in another way
    ours = [hook.function for hook in hooks_here()]
    apply_hooks, replaced = HookRegistry.apply_hooks, {}

    def note_ours(original: Any, wrapper: Any, holder: Any) -> Any:
        if not any(function in ours for function in _functions_behind(wrapper)):
            return search(original, wrapper, holder)
        if not isinstance(holder, type):
            replaced[id(original)] = (original, wrapper)
        return 0

    def apply_and_search() -> None:
        apply_hooks()
        for module in list(sys.modules.values()):
            held = list(vars(module).items()) if isinstance(module, types.ModuleType) else []
            for name, value in held:
                if id(value) in replaced:
                    setattr(module, name, replaced[id(value)][1])
        replaced.clear()

    hook_registry._propagate_patch = note_ours
    HookRegistry.apply_hooks = apply_and_search


def hooks_here() -> tuple[Hook, ...]:
    """Those for the platform that serves."""
    from sglang.srt.disaggregation.multimodal import cpu_platform

    return HOOKS + CPU_HOOKS if cpu_platform.serves() else HOOKS


def verify() -> None:
    """Raise with the first thing that is not as we left it."""
    compatibility.check()
    for hook in hooks_here():
        if hook.function not in _functions_behind(pkgutil.resolve_name(hook.target)):
            raise SettingError(f"the hook on {hook.target} did not apply; the modes encode and language are off")


def _functions_behind(wrapper: Any) -> Iterator[Any]:
    """The hook functions that a chain of HookRegistry wrappers closes over."""
    while wrapper is not None:
        for cell in getattr(wrapper, "__closure__", None) or ():
            yield cell.cell_contents
        wrapper = getattr(wrapper, "__wrapped__", None)
