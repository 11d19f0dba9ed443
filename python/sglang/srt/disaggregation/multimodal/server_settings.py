"""What a server in one of our modes needs from SGLang's arguments, decided before anything starts."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import closing
from typing import Any, Final
from urllib.parse import urlsplit

import torch

from embedding_relay import cores
from embedding_relay.config import SHARED_MEMORY, RelayConfig
from embedding_relay.memory.engine import MooncakeDataPlane
from embedding_relay.protocol.errors import SettingError
from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
from sglang.srt.disaggregation.multimodal import modes
from sglang.srt.environ import envs

logger = logging.getLogger(__name__)

_SOURCE: Final = "embedding_relay"

# An encode instance keeps no KV cache, but SGLang cannot run with a pool of nothing.
_ENCODE_KV_TOKENS: Final = 16

# Seconds after which an idle connection is closed. If a server closes it in the moment in which a router sends the half
# of a request on it, that half is lost, and the other waits. So the one in front shall be the first to close: idle
# connections of `sglang-router` and of what else is built on common libraries live for 90 seconds at most.
_KEEP_ALIVE_S: Final = 120

_UNSUPPORTED: Final = {
    "attn_cp_size": (1, "--attn-cp-size"),
    "encoder_only": (False, "--encoder-only"),
    "language_only": (False, "--language-only"),
    "language_model_only": (False, "--language-model-only"),
    "enable_pdmux": (False, "--enable-pdmux"),
    "enable_pd_role_switch": (False, "--enable-pd-role-switch"),
    "is_embedding": (False, "--is-embedding"),
    "skip_tokenizer_init": (False, "--skip-tokenizer-init"),
}


def settle(server_args: Any) -> None:
    """Refuse what cannot work, with the flag's name; then decide what follows from the mode."""
    cfg = resolving_view(server_args)
    mode = modes.of(server_args)
    for field, (needed, flag) in _UNSUPPORTED.items():
        if getattr(cfg, field, needed) != needed:
            raise SettingError(f"--disaggregation-mode {mode} does not work with {flag} yet; leave it at {needed}")
    if mode == modes.ENCODE and cfg.pp_size > 1:
        raise SettingError("--pp-size: the vision tower is in the first pipeline stage, and there is no second one")
    if cfg.enable_dp_attention or getattr(cfg, "attn_dp_size", 1) > 1:
        reason = "nobody has tried it with these modes, since SGLang's own DP attention does not run on a CPU"
        raise SettingError(f"--enable-dp-attention, --attn-dp-size: {reason}")
    _check_encoder_urls(mode, cfg)
    if cfg.disaggregation_transfer_backend != "mooncake" and not modes.is_prefill(cfg):
        backend = cfg.disaggregation_transfer_backend
        raise SettingError(f"--disaggregation-transfer-backend {backend}: embeddings travel over mooncake only")
    if envs.SGLANG_RUST_SERVER.get():
        raise SettingError("SGLANG_RUST_SERVER: that server asks none of the rules of these modes about a request")
    if not cfg.host:
        raise SettingError("--host must name an address; 0.0.0.0 or :: is for all of them")
    RelayConfig.from_environment()
    if not envs.SGLANG_TIMEOUT_KEEP_ALIVE.is_set():
        envs.SGLANG_TIMEOUT_KEEP_ALIVE.set(_KEEP_ALIVE_S)
    if mode == modes.ENCODE:
        declare_resolution(
            server_args,
            _SOURCE,
            max_total_tokens=_ENCODE_KV_TOKENS,
            max_running_requests=cfg.max_running_requests or 1,
            disable_overlap_schedule=True,
            disable_radix_cache=True,
            disable_prefill_cuda_graph=True,
            disable_decode_cuda_graph=True,
            sleep_on_idle=True,
        )


def _check_encoder_urls(mode: str | None, cfg: Any) -> None:
    if mode == modes.ENCODE and cfg.encoder_urls:
        raise SettingError("--encoder-urls is for instances that generate, and this one encodes")
    for url in cfg.encoder_urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            raise SettingError(f"--encoder-urls {url}: the address of an encode instance is like http://host:30000")
    if modes.is_prefill(cfg):
        for field, flag in {"dp_size": "--dp-size", "pp_size": "--pp-size"}.items():
            if getattr(cfg, field) > 1:
                text = f"{flag} {getattr(cfg, field)}: a prefill instance with --encoder-urls has one rank of these"
                raise SettingError(f"{text}; start more instances instead")


def settle_decode(server_args: Any) -> None:
    """Of an instance that cannot pin memory."""
    if resolving_view(server_args).disaggregation_decode_retraction_backup is None:
        declare_resolution(server_args, _SOURCE, disaggregation_decode_retraction_backup="none")


def settle_load_balancing(server_args: Any) -> None:
    method = resolving_view(server_args).load_balance_method
    if method == "follow_bootstrap_room":
        text = "a request without a room would end the instance, and those with one go by it with any other method too"
        raise SettingError(f"--load-balance-method {method}: {text}")
    if method == "auto":
        declare_resolution(server_args, _SOURCE, load_balance_method="round_robin")


def check_ports(server_args: Any) -> None:
    """Say which port is taken, while there is nothing to clean up yet."""
    cfg = resolving_view(server_args)
    wanted = {"--port": cfg.port}
    if modes.of(server_args) == modes.ENCODE:
        wanted["--disaggregation-bootstrap-port"] = cfg.disaggregation_bootstrap_port
    for flag, port in wanted.items():
        _refuse_if_taken(cfg.host, port, flag)


def check_transport(server_args: Any) -> None:
    """RDMA that does not come up is one line now, and a traceback of a scheduler later. TCP always does."""
    config, device = RelayConfig.from_environment(), resolving_view(server_args).disaggregation_ib_device
    plane = MooncakeDataPlane("127.0.0.1", config.transport, device or "")
    if config.data_plane != SHARED_MEMORY and not plane.is_tcp:
        with closing(plane):
            plane.start([])


def _refuse_if_taken(host: str, port: int, flag: str) -> None:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with closing(socket.socket(family, kind, protocol)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise SettingError(f"{flag} {port} cannot be used on {host}: {error.strerror}") from None


def share_cores() -> None:
    """Where instances compute on cores: what this one's processes must know of them before they exist."""
    from sglang.srt.disaggregation.multimodal import cpu_platform

    if not cpu_platform.serves():
        return
    sharing = cores.share(os.environ, len(os.sched_getaffinity(0)), cores.usable_cores())
    os.environ.update(sharing.environ)
    if sharing.own_threads is not None:
        torch.set_num_threads(sharing.own_threads)
    logger.info("relay cores: %s", sharing.why)


def start_registry() -> Any:
    from sglang.srt.disaggregation.mooncake.conn_multimodal import MooncakeEmbeddingBootstrapServer
    from sglang.srt.runtime_context import get_disagg, get_serving

    keys = RelayConfig.from_environment().keys
    server = MooncakeEmbeddingBootstrapServer(
        get_serving().host, get_disagg().disaggregation_bootstrap_port, keys.registry if keys else None
    )
    server.start()
    return server
