"""The transfer manager of this instance, made from what SGLang decided: model, addresses, ranks."""

from __future__ import annotations

from typing import Any

from sglang.srt.disaggregation.mooncake.conn_multimodal import MooncakeEmbeddingManager
from sglang.srt.disaggregation.multimodal.config import RelayConfig
from sglang.srt.disaggregation.multimodal.layout import BufferLayout
from sglang.srt.disaggregation.multimodal.protocol.messages import Address
from sglang.srt.runtime_context import get_disagg, get_parallel, get_serving
from sglang.srt.utils.network import get_local_ip_auto

_WILDCARDS = ("0.0.0.0", "::", "")


def encode_manager(scheduler: Any) -> MooncakeEmbeddingManager:
    config = RelayConfig.from_environment()
    return MooncakeEmbeddingManager.encode(
        _layout(scheduler, config),
        config,
        host=_reachable_host(),
        bootstrap=Address(_reachable_host(), get_disagg().disaggregation_bootstrap_port),
        rank=get_parallel().tp_rank,
        ib_device=get_disagg().disaggregation_ib_device or "",
    )


def language_manager(scheduler: Any) -> MooncakeEmbeddingManager:
    config = RelayConfig.from_environment()
    return MooncakeEmbeddingManager.language(
        _layout(scheduler, config),
        config,
        host=_reachable_host(),
        ranks=get_parallel().tp_size,
        max_rows=scheduler.max_req_input_len,
        ib_device=get_disagg().disaggregation_ib_device or "",
    )


def _layout(scheduler: Any, config: RelayConfig) -> BufferLayout:
    model = scheduler.tp_worker.model_runner.model
    return BufferLayout(
        hidden_size=scheduler.model_config.hidden_size,
        dtype=str(scheduler.model_config.dtype).removeprefix("torch."),
        deepstack_rows=getattr(model, "num_deepstack_embeddings", 0),
        block_size=config.block_size,
        blocks=config.cache_blocks,
    )


def _reachable_host() -> str:
    """The operator's address, if others can use it."""
    host = str(get_serving().host)
    return str(get_local_ip_auto()) if host in _WILDCARDS else host
