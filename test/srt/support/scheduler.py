"""SGLang's own `Scheduler` without a model, processes and sockets: for tests of what our modes do inside it.

Real are the methods that take messages, validate requests, queue, pause, flush, update weights and release memory, with
our hooks around them. `SchedulerWithoutModel` leaves out the model and its memory (all pools are stand-ins that count
how often they were cleared), every socket (messages are handed in, answers are kept in lists), the event loop (a test
takes its turns) and the forward pass: a request that SGLang has queued stays in `waiting_queue`.

`TransferWithoutThread` stands in for a manager of the transfer. The status board and the two ends of a room are real.
There is no protocol and no peer: a test says where a room stands, and what the scheduler asks for is kept in a list. It
fails a room at once when it is refused or cancelled; the real control thread does so a moment later.
"""

from __future__ import annotations

import select
from array import array
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final

import torch

from embedding_relay.config import RelayConfig
from embedding_relay.memory.buffers import ReceivedRows
from embedding_relay.memory.checks import NO_ITEM, ModelLimits
from embedding_relay.observer import NOBODY
from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.status import Status
from embedding_relay.recorder import Recorder
from embedding_relay.tools import tiny_model
from embedding_relay.transport.manager import RoomEnd, StatusBoard
from sglang.srt import runtime_context
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.plugins import load_plugins
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm
from support import sglang_context

VOCABULARY: Final = 4096
MAX_PROMPT: Final = 64


@contextmanager
def serving(mode: str) -> Iterator[None]:
    """This process as a server's in that mode: SGLang has resolved its arguments, and our hooks are in place."""
    before = sglang_context.kept()
    load_plugins()
    arguments = ServerArgs(
        model_path=str(tiny_model.cached()),
        device="cpu",
        attention_backend="torch_native",
        host="127.0.0.1",
        disaggregation_mode=mode,
        disaggregation_transfer_backend="mooncake",
    )
    runtime_context.publish(arguments, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=0))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    alone = SimpleNamespace(cpu_group=torch.distributed.group.WORLD)
    try:
        with runtime_context.get_parallel().override(tp_group=alone):
            yield
    finally:
        torch.distributed.destroy_process_group()
        sglang_context.put_back(before)


# ---- requests


def request(rid: str, room: int | None, *, pictures: int = 0, seed: int = 0, **options: Any) -> Any:
    """As it comes from SGLang's tokenizer manager; a picture is two tokens wide and shows `seed`."""
    sampling = SamplingParams(max_new_tokens=4, **options.pop("sampling", {}))
    ids, items = [1], []
    for number in range(pictures):
        first = len(ids)
        ids += [9, 9]
        item = MultimodalDataItem(modality=Modality.IMAGE, offsets=[(first, first + 1)], feature=torch.zeros(1, 1))
        item.set_hash(1 + 1000 * number + seed)
        items.append(item)
    inputs = MultimodalProcessorOutput(mm_items=items, input_ids=ids, padded_input_ids=ids) if items else None
    fields = {
        "input_text": None,
        "input_ids": array("q", [*ids, 2]),
        "input_embeds": None,
        "mm_inputs": inputs,
        "token_type_ids": None,
        "sampling_params": sampling,
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "token_ids_logprob": None,
        "stream": False,
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": 8998,
        "bootstrap_room": room,
    }
    return TokenizedGenerateReqInput(rid=rid, **{**fields, **options})


# ---- the scheduler


class Cleared:
    """A pool or a cache: how often it was emptied."""

    def __init__(self, **attributes: Any) -> None:
        self.times = 0
        vars(self).update(attributes)

    def clear(self) -> None:
        self.times += 1

    reset = clear


class SchedulerWithoutModel(Scheduler):  # type: ignore[misc]  # SGLang is left out of the type check
    """`answers` has what went to the tokenizer manager: requests that ended, and answers to commands."""

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.inbox: list[Any] = []
        self.embedding_relay = None
        self.scheduler_stage_metrics = None
        self.server_args = runtime_context.get_server_args()
        self.device = "cpu"
        self.disaggregation_mode = DisaggregationMode.NULL
        self._stand_in_for_the_model()
        self._stand_in_for_sockets()
        self.rust_server = self.draft_worker = self.hisparse_coordinator = self.mm_receiver = None
        self.decode_offload_manager = self.external_corpus_manager = self.chunked_req = self.dllm_config = None
        self._pending_chunked_abort_req = self.disagg_decode_prealloc_queue = None
        self.enable_overlap = self.enable_overlap_mlx = self.enable_lmcache = False
        self.enable_hicache_storage = self.enable_hisparse = self.enable_hierarchical_cache = False
        self.enable_priority_scheduling = self.schedule_low_priority_values_first = False
        self.abort_on_priority_when_disabled = True
        self.enable_session_radix_cache = False
        self.max_queued_requests = None
        self.processed_tokens_counter = 0
        self._pause_started_at, self._pause_intervals = None, deque(maxlen=4)
        self.init_running_status()
        self.init_weight_updater()
        self.init_beam_coordinator()
        self.profiler_manager = None
        self.init_request_dispatcher()

    def _stand_in_for_the_model(self) -> None:
        self.model_config = SimpleNamespace(
            hf_eos_token_id=None,
            vocab_size=VOCABULARY,
            is_encoder_decoder=False,
            requires_mm_token_modalities=False,
            is_multimodal=True,
        )
        self.weights = Weights()
        self.tp_worker = SimpleNamespace(
            weight_update_runners=lambda: [("target", SimpleNamespace(weight_updater=self.weights))],
            model_runner=SimpleNamespace(model=torch.nn.Linear(1, 1)),
        )
        self.memory_saver_adapter = SimpleNamespace(pause=lambda tag: None, resume=lambda tag: None)
        self.tokenizer = self._mm_processor = self.pad_input_ids_func = None
        self.spec_algorithm, self.is_generation = SpeculativeAlgorithm.NONE, True
        self.max_req_len, self.max_req_input_len, self.max_new_tokens_limit = MAX_PROMPT + 4, MAX_PROMPT, None
        self.max_total_num_tokens, self.kv_shard_widening, self.page_size = 1024, 1, 1
        self.sliding_window_size = self.chunked_prefill_size = self.future_map = None
        self.tree_cache = Cleared(
            cache_controller=None,
            finish=lambda *_: None,
            supports_swa=lambda: False,
            supports_mamba=lambda: False,
            supports_prefix_sharing=lambda: True,
        )
        self.req_to_token_pool = Cleared(size=1, device="cpu", reset_aux_cache_allocator=lambda: None)
        self.token_to_kv_pool_allocator = Cleared(max_new_tokens_for_memory=lambda length, wanted, **_: wanted)
        self.grammar_manager = Cleared(
            grammar_queue=[], abort_requests=lambda _: None, process_req_with_grammar=lambda req: False
        )
        self.dllm_manager = SimpleNamespace(any_staging_reqs=lambda: False)

    def _stand_in_for_sockets(self) -> None:
        nothing = lambda *_, **__: None  # noqa: E731
        self.metrics_collector = None
        self.metrics_reporter = SimpleNamespace(
            enable_metrics=False,
            reset_metrics=nothing,
            is_stats_logging_rank=False,
            last_gen_throughput=0.0,
            current_scheduler_metrics_enabled=False,
            record_scheduler_active=nothing,
        )
        self.kv_events_publisher = SimpleNamespace(publish_kv_events=nothing, enable_kv_cache_events=False)
        self.request_receiver = SimpleNamespace(recv_requests=self._take_inbox)
        self.output_streamer = SimpleNamespace(stream_output=lambda reqs, *_: self.answers.extend(reqs))
        to_tokenizer = SimpleNamespace(send_output=lambda output, _: self.answers.append(output))
        self.ipc_channels = SimpleNamespace(send_to_tokenizer=to_tokenizer, recv_from_rpc=None)

    def _take_inbox(self, local_reqs: Any = None) -> list[Any]:
        taken, self.inbox = self.inbox, []
        return [*taken, *(local_reqs or [])]

    def turn(self, *messages: Any) -> None:
        """One turn of the event loop, up to where it would look for a batch to run; and another, as the loop would take
        at once, if a room has changed in it.
        """
        self.inbox += messages
        self.ingest_requests()
        role = getattr(self, "embedding_relay", None)
        if role is not None and has_news(role.manager):
            self.ingest_requests()

    def answer_to(self, rid: str) -> Failure | None:
        """How the request ended; None if it ended well. Raises if it has not ended, or more than once."""
        (answer,) = [one for one in self.answers if getattr(one, "rid", None) == rid]
        reason = answer.finished_reason
        if isinstance(reason, dict):
            return Failure(int(reason["status_code"]), reason["message"])
        return Failure(int(reason.status_code), reason.message) if hasattr(reason, "status_code") else None

    def ended(self) -> list[str]:
        """What says that a tower has run ends no request."""
        ends = [one.rid for one in self.answers if getattr(one, "finished_reason", None) is not None]
        return [rid for rid in ends if not rid.startswith("relay-encoded-")]

    def encoded(self) -> list[str]:
        """What the HTTP process was told about rooms whose tower has run."""
        return [rid for one in self.answers if (rid := str(getattr(one, "rid", ""))).startswith("relay-encoded-")]


def has_news(transfer: Any) -> bool:
    return bool(select.select([transfer.wakeup_fd], [], [], 0)[0])


class Weights:
    """What a weight update of a model runner does, as far as its caller sees: the model has another version."""

    def __init__(self) -> None:
        self.version = 1

    def update_weights_from_disk(self, *_: Any, **__: Any) -> tuple[bool, str]:
        self.version += 1
        return True, "done"

    def begin_weight_update(self) -> None: ...

    def end_weight_update(self, *, run_post_load: bool) -> None:
        self.version += 1


# ---- the transfer


class TransferWithoutThread:
    """`asked` has what the scheduler asked for, in order, each with its room and what came with it."""

    def __init__(self, **settings: Any) -> None:
        self.config = RelayConfig.from_environment({name: str(value) for name, value in settings.items()})
        self.limits = ModelLimits(VOCABULARY, frozenset(modality.value for modality in Modality))
        self.observer = NOBODY
        self.recorder = Recorder(self.config.trace_events)
        self.unhealthy_reason: str | None = None
        self.is_reachable = True
        self.asked: list[tuple[str, int, Any]] = []
        self.forgotten = 0
        """How often kept rows were."""
        self._board = StatusBoard()
        self._board.wakeup.open()

    def close(self) -> None:
        self._board.wakeup.close()

    def healthy(self) -> bool:
        return self.unhealthy_reason is None

    def reachable(self) -> bool:
        return self.is_reachable

    @property
    def wakeup_fd(self) -> int:
        return self._board.wakeup.fileno()

    def drain_events(self) -> list[int]:
        return self._board.drain()

    def follow(self, end: RoomEnd) -> bool:
        return self._board.follow(end)

    def stands(self, room: int, status: Status, failure: Failure | None = None) -> None:
        """What the control thread would have found out."""
        self._board.change(room, status, failure)

    def rooms(self, what: str) -> list[int]:
        return [room for asked, room, _ in self.asked if asked == what]

    def reason(self, room: int) -> Failure:
        """What the other half is told."""
        (found,) = [more for asked, other, more in self.asked if other == room and asked in ("refuse", "cancel")]
        assert isinstance(found, Failure)
        return found

    # ---- of the encode side

    def expect(self, sender: Any) -> None:
        self.asked.append(("expect", sender.room, sender))

    def send_embedding(self, room: int, source: Any) -> None:
        self.asked.append(("send", room, source))

    def more_rows(self, room: int, source: Any) -> None:
        self.asked.append(("more", room, source))

    def sources(self, room: int) -> list[Any]:
        """What was handed over of a room, each time everything that was made so far."""
        return [more for asked, other, more in self.asked if other == room and asked in ("send", "more")]

    def forget_items(self, room: int) -> None:
        self.asked.append(("forget", room, None))

    def promise(self, room: int, *items: int) -> None:
        """Every language rank has the rows of these items, by their numbers."""
        (sender,) = [more for asked, other, more in self.asked if (asked, other) == ("expect", room)]
        sender.held = tuple(sorted({*sender.held, *items}))

    def refuse(self, room: int, failure: Failure) -> None:
        self.asked.append(("refuse", room, failure))
        self.stands(room, Status.FAILED, failure)

    # ---- of the language side

    def request(self, receiver: Any, hint_rows: int | None) -> None:
        self.asked.append(("request", receiver.room, receiver))

    def forget_rows(self) -> None:
        self.forgotten += 1

    def rows_arrive(self, room: int, seed: int = 0) -> None:
        """All rows of a prompt with one picture, of `request(…, pictures=1, seed=seed)` at the encode half."""
        (receiver,) = [more for what, other, more in self.asked if (what, other) == ("request", room)]
        items = torch.zeros(4, 4, dtype=torch.int32)
        items[:, 0] = torch.tensor([NO_ITEM, 0, 0, NO_ITEM])
        items[1:3, 1:3] = torch.tensor([Modality.IMAGE.value, 1 + seed])
        receiver.target = ReceivedRows(
            total=4,
            fill_ids=torch.tensor([1, 9, 9, 2], dtype=torch.int32),
            mrope=torch.zeros(4, 3, dtype=torch.int32),
            items=items,
            embeddings=torch.full((4, 2), float(seed)),
            media_items=1,
        )
        self.stands(room, Status.SUCCESS)

    def cancel(self, room: int, failure: Failure | None) -> None:
        self.asked.append(("cancel", room, failure))
        self.stands(room, Status.FAILED, failure)
