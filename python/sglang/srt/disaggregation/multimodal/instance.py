"""The role of this instance in its scheduler, made from what SGLang decided: model, addresses, ranks."""

from __future__ import annotations

import logging
from typing import Any, Final

import torch

from embedding_relay.config import MOONCAKE, RelayConfig
from embedding_relay.memory.checks import ModelLimits
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.memory.shared_rows import Borrower
from embedding_relay.observer import NOBODY, Observer
from embedding_relay.protocol.messages import Address
from embedding_relay.transport.encode import NoTransfer
from embedding_relay.transport.neighbours import ALONE, Neighbours, meet
from embedding_relay.transport.ranks import Reporter, Reports
from embedding_relay.transport.sockets import ip_address
from sglang.srt.disaggregation.mooncake.conn_multimodal import BorrowingManager, EncodeManager, LanguageManager
from sglang.srt.disaggregation.multimodal import halves, modes, parts
from sglang.srt.disaggregation.multimodal.item_keys import ItemKeys
from sglang.srt.disaggregation.multimodal.multimodal_embedding import EncodeRole
from sglang.srt.disaggregation.multimodal.multimodal_language import AnyLanguageManager, LanguageRole
from sglang.srt.disaggregation.multimodal.prefill_stage import PrefillRole
from sglang.srt.disaggregation.multimodal.roles import Role
from sglang.srt.disaggregation.multimodal.tower import VisionTower
from sglang.srt.runtime_context import get_disagg, get_parallel, get_serving
from sglang.srt.utils.network import get_local_ip_auto

logger = logging.getLogger(__name__)

_MEDIA_TOKENS: Final = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "audio_token_id",
    "audio_token_index",
    "vision_start_token_id",
)
_ENCODERS: Final = {
    "vision_config": (
        "model_type",
        "hidden_size",
        "embed_dim",
        "depth",
        "num_hidden_layers",
        "image_size",
        "patch_size",
        "temporal_patch_size",
        "spatial_merge_size",
        "out_hidden_size",
        "deepstack_visual_indexes",
    ),
    "audio_config": ("model_type", "d_model", "encoder_layers", "num_mel_bins", "output_dim"),
}


def start_role(scheduler: Any, mode: str) -> Role[Any]:
    role = _encode_role(scheduler) if mode == modes.ENCODE else _language_role(scheduler)
    role.start()
    held = halves.parameters_held(parts.media_part(scheduler.tp_worker.model_runner.model))
    logger.info("relay mode=%s parameters=%d threads=%d", mode, held, torch.get_num_threads())
    return role


def _encode_role(scheduler: Any) -> EncodeRole:
    """Tensor-parallel ranks make the same rows: the first sends them to all language ranks."""
    is_first = get_parallel().world_group.rank_in_group == 0
    manager = open_encode_manager(scheduler) if is_first else NoTransfer(RelayConfig.from_environment())
    tower = VisionTower.of(scheduler, progressive=manager.config.progressive)
    keys = ItemKeys.of(scheduler, manager.layout.model) if isinstance(manager, EncodeManager) else None
    role = EncodeRole(scheduler, manager, tower, keys)
    if isinstance(manager, EncodeManager):
        role.pulse.is_offered = manager.is_offered  # of requests that the HTTP process keeps back (admitting.py)
    return role


def _language_role(scheduler: Any) -> LanguageRole:
    """Every tensor-parallel rank of each pipeline stage has the rows, and those of one host share them.

    The first rank decides for all.
    """
    group = get_parallel().world_group  # the ranks that get the same requests, and nobody else
    manager = open_language_manager(scheduler, group)
    keys = manager.config.keys
    key = keys.control if keys else None
    reports = Reports.open(reachable_host(), key) if group.world_size > 1 and group.rank_in_group == 0 else None
    meeting = group.broadcast_object(reports and reports.meeting)
    reporter = Reporter(meeting, group.rank_in_group, key) if group.rank_in_group > 0 else None
    role = PrefillRole if modes.is_prefill() else LanguageRole
    return role(scheduler, manager, ranks=group.world_size, reports=reports, reporter=reporter)


def open_encode_manager(scheduler: Any) -> EncodeManager:
    config, host = RelayConfig.from_environment(), reachable_host()
    return EncodeManager.open(
        _layout(scheduler, config),
        config,
        host=host,
        bootstrap=Address(host, get_disagg().disaggregation_bootstrap_port),
        rank=get_parallel().dp_rank or 0,
        ranks=get_parallel().num_dp_ranks,
        ib_device=get_disagg().disaggregation_ib_device or "",
        device=str(scheduler.device),
        observer=_observer(scheduler, modes.ENCODE),
    )


def open_language_manager(scheduler: Any, group: Any) -> AnyLanguageManager:
    """`group`: the ranks of this instance, as SGLang has them."""
    config, host = RelayConfig.from_environment(), reachable_host()
    neighbours = _neighbours(group, config)
    layout, limits, device = _layout(scheduler, config), model_limits(scheduler), str(scheduler.device)
    observer = _observer(scheduler, modes.LANGUAGE)
    if neighbours.lender is not None:
        borrower = Borrower(neighbours.lender, layout, torch.device(device))
        return BorrowingManager(borrower, config, limits, observer)
    return LanguageManager.open(
        layout,
        config,
        host=host,
        ranks=neighbours.receiving,
        max_rows=scheduler.max_req_input_len,
        limits=limits,
        ib_device=get_disagg().disaggregation_ib_device or "",
        device=device,
        observer=observer,
        borrowers=neighbours.borrowers,
    )


def _neighbours(group: Any, config: RelayConfig) -> Neighbours:
    if group.world_size == 1:
        return ALONE
    return meet(group.rank_in_group, group.all_gather_object, may_share=config.data_plane != MOONCAKE)


def _observer(scheduler: Any, mode: str) -> Observer:
    if not scheduler.metrics_collector_context.current_scheduler_metrics_enabled:
        return NOBODY
    from embedding_relay.metrics import RelayMetrics

    return RelayMetrics(mode, scheduler.metrics_collector.labels)


def _layout(scheduler: Any, config: RelayConfig) -> BufferLayout:
    model = parts.media_part(scheduler.tp_worker.model_runner.model)
    return BufferLayout(
        hidden_size=scheduler.model_config.hidden_size,
        dtype=str(scheduler.model_config.dtype).removeprefix("torch."),
        deepstack_rows=parts.deepstack_rows(model),
        block_size=config.block_size,
        blocks=config.cache_blocks,
        model=fingerprint(scheduler.model_config),
    )


def fingerprint(model_config: Any) -> tuple[tuple[str, str], ...]:
    """What both halves of one model have in common, and two models mostly have not.

    From the configuration only: a half has none of the other's weights, its copy may lie anywhere under any name, and
    it may be quantized. So none of these counts, nor what SGLang changes for a half or a rank (heads, for example).
    """
    config = model_config.hf_config
    inner = _part(config, "thinker_config") or config
    facts = {
        "architecture": config.architectures[0],
        "vocabulary": model_config.vocab_size,
        "hidden_size": model_config.hidden_size,
        "layers": model_config.num_hidden_layers,
        **{name: _part(inner, name) for name in _MEDIA_TOKENS},
    }
    for part, names in _ENCODERS.items():
        encoder = _part(inner, part)
        facts |= {f"{part}.{name}": _part(encoder, name) for name in names}
    return tuple((name, _word(value)) for name, value in facts.items() if value is not None)


def _part(config: Any, name: str) -> Any:
    """Some configurations of models that bring their own code are dictionaries."""
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _word(value: object) -> str:
    """As the handshake takes it: printable ASCII, at most 64 characters."""
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return "".join(character if "!" <= character <= "~" else "_" for character in text)[:64] or "_"


def model_limits(scheduler: Any) -> ModelLimits:
    """What may be handed to this model. What is beyond it would raise in the scheduler, or in the middle of a batch."""
    from sglang.srt.managers.schedule_batch import Modality

    model, config = parts.media_part(scheduler.tp_worker.model_runner.model), scheduler.model_config
    return ModelLimits(
        vocabulary=config.vocab_size,
        modalities=frozenset(m.value for m in Modality if hasattr(model, f"get_{m.name.lower()}_feature")),
        # SGLang makes its tables of rotary positions at least as long as the context.
        positions=config.context_len if config.model_is_mrope else None,
        narrow={modality.value: config.hidden_size for modality in parts.without_deepstack(model)},
    )


def reachable_host() -> str:
    """The operator's address, if others can use it."""
    host = str(get_serving().host)
    return str(get_local_ip_auto()) if ip_address(host).is_unspecified else host
