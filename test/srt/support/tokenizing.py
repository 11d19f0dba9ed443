"""SGLang's own `TokenizerManager` without a scheduler: for tests of what our modes do in the HTTP process.

Real are the manager's methods with our hooks around them, the tokenizer and the processor of a tiny model, and whatever
loads pictures. There is no HTTP server, no scheduler and no detokenizer: what would be sent to the scheduler is kept in
`sent`, and a test hands in what would come back.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from embedding_relay.tools import tiny_model
from embedding_relay.tools.chat_client import data_uri, picture
from embedding_relay.tools.local_process import free_ports
from sglang.srt import runtime_context
from sglang.srt.disaggregation.multimodal import front
from sglang.srt.managers.io_struct import AbortReq, GenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import PortArgs, ServerArgs
from support import sglang_context
from support.patience import wait_until

T = TypeVar("T")

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
GOOD = data_uri(picture(56, 56, seed=1))
MAX_PROMPT = 1000


class Watch:
    """Finds what a test says; the real one is tested in test/srt/relay/unit/test_pulse.py."""

    def __init__(self) -> None:
        self.trouble: str | None = None
        self.waiting = 0

    async def trouble_before_a_request(self) -> str | None:
        return self.trouble

    @contextmanager
    def a_request_waits(self) -> Iterator[None]:
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1


class TokenizerManagerWithoutScheduler(TokenizerManager):  # type: ignore[misc]  # SGLang is left out of the type check
    def __init__(self, server_args: ServerArgs) -> None:
        self.sent: list[Any] = []
        super().__init__(server_args, PortArgs.init_new(server_args))
        self.max_req_input_len = MAX_PROMPT

        self._context = sglang_context.kept()

    def make_current(self) -> None:
        """SGLang has one context in a process: with two managers it is the one of the last that was made."""
        sglang_context.put_back(self._context)

    def watch_nobody(self) -> Watch:
        """In place of the watch over the scheduler's process, which is not there."""
        watch = Watch()
        self.embedding_relay_watches = [watch]
        return watch

    def _dispatch_to_scheduler(self, obj: Any) -> None:
        self.sent.append(obj)

    def auto_create_handle_loop(self) -> None:
        """There is nobody to read from."""

    def prepare(self, **request: Any) -> Any:
        """What the scheduler would be sent for this request; whatever is raised comes out."""
        return run(self.tokenized(**request))

    async def tokenized(self, **request: Any) -> Any:
        obj = GenerateReqInput(**{"sampling_params": {"max_new_tokens": 4}, **request})
        obj.normalize_batch_and_arguments()
        self._init_req_state(obj)
        return await self._tokenize_one_request(obj if obj.is_single else obj[0])


async def answers(manager: TokenizerManagerWithoutScheduler, obj: Any, *events: Callable[[str], Any]) -> list[Any]:
    """All that comes of a request of one prompt while the scheduler says `events`, each made from its rid."""
    found = []

    async def read() -> None:
        async for answer in manager.generate_request(obj, None):
            found.append(answer)

    reading = asyncio.create_task(read())
    for event in events:
        while not (sent := [one for one in manager.sent if isinstance(one, TokenizedGenerateReqInput)]):
            if reading.done():
                break
            await asyncio.sleep(0)
        for one in sent:
            manager._result_dispatcher(event(one.rid))
    await reading
    return found


def run(work: Coroutine[Any, Any, T]) -> T:
    """Processors keep threads for their loop, so all tests of a process share one."""
    return _loop.run_until_complete(work)


_loop = asyncio.new_event_loop()


@contextmanager
def serving(mode: str, **more: Any) -> Iterator[TokenizerManagerWithoutScheduler]:
    """The manager of a server in that mode, with `more` of SGLang's arguments."""
    before = sglang_context.kept()
    load_plugins()
    port, bootstrap_port = free_ports(2)
    arguments = ServerArgs(
        model_path=str(tiny_model.cached()),
        device="cpu",
        attention_backend="torch_native",
        host="127.0.0.1",
        port=port,
        disaggregation_mode=mode,
        disaggregation_transfer_backend="mooncake",
        disaggregation_bootstrap_port=bootstrap_port,
        **more,
    )
    runtime_context.publish(arguments, role="tokenizer")
    manager = TokenizerManagerWithoutScheduler(arguments)
    if mode == "prefill":  # SGLang's own registry starts in a thread, and cannot be closed before it listens
        wait_until(lambda: _listens(bootstrap_port))
    try:
        yield manager
    finally:
        manager.embedding_relay_teller.close()
        manager.mm_processor.shutdown()
        if manager.bootstrap_server is not None:
            manager.bootstrap_server.close()
        manager.send_to_scheduler.context.destroy(linger=0)
        sglang_context.put_back(before)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def asked(**request: Any) -> GenerateReqInput:
    """A request with a picture, of a pair."""
    where = {"bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 7}
    defaults = {"text": f"{IMAGE}a", "image_data": [GOOD], "sampling_params": {"max_new_tokens": 4}}
    return GenerateReqInput(**{**defaults, **where, **request})


def refusals(manager: TokenizerManagerWithoutScheduler) -> list[Any]:
    """What the scheduler is told for the other half, as it reads it."""
    return [told for one in manager.sent if isinstance(one, AbortReq) and (told := front.refusal_in(one)) is not None]
