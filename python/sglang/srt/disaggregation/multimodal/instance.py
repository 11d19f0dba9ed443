"""The transfer manager of this instance, made from what SGLang decided: model, addresses, ranks."""

from __future__ import annotations

import ipaddress
import logging
from typing import Any

from embedding_relay.config import SECRET_FILE, RelayConfig
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.protocol.messages import Address
from embedding_relay.transport.manager import MooncakeEmbeddingManager
from embedding_relay.transport.sockets import numeric_address
from sglang.srt.runtime_context import get_disagg, get_parallel, get_serving
from sglang.srt.utils.network import get_local_ip_auto

logger = logging.getLogger(__name__)


def encode_manager(scheduler: Any) -> MooncakeEmbeddingManager:
    config, host = RelayConfig.from_environment(), reachable_host()
    warn_if_open(config, host)
    return MooncakeEmbeddingManager.encode(
        _layout(scheduler, config),
        config,
        host=host,
        bootstrap=Address(host, get_disagg().disaggregation_bootstrap_port),
        rank=get_parallel().tp_rank,
        ib_device=get_disagg().disaggregation_ib_device or "",
    )


def language_manager(scheduler: Any) -> MooncakeEmbeddingManager:
    config, host = RelayConfig.from_environment(), reachable_host()
    warn_if_open(config, host)
    return MooncakeEmbeddingManager.language(
        _layout(scheduler, config),
        config,
        host=host,
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


def reachable_host() -> str:
    """The operator's address, if others can use it."""
    host = str(get_serving().host)
    return str(get_local_ip_auto()) if _ip(host).is_unspecified else host


def warn_if_open(config: RelayConfig, host: str) -> None:
    if config.keys is None and not _ip(host).is_loopback:
        logger.warning(
            "relay: ANYONE who reaches %s can take part in this deployment, end its requests and read who takes part, "
            "because %s is not set. See docs/security.md; `sglang-relay make-secret FILE` makes a secret.",
            host,
            SECRET_FILE,
        )


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(numeric_address(host))
