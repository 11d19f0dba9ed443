"""The two modes: their names, how SGLang learns them, and how a process finds out which one it serves.

With `--encoder-urls` SGLang's own prefill mode is the language mode to us, and to SGLang still what it was: the second
of three stages, whose third is an ordinary decode instance.
"""

from __future__ import annotations

import enum
import functools
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from embedding_relay.pairing import AllowedHosts

ENCODE: Final = "encode"
LANGUAGE: Final = "language"
_PREFILL: Final = "prefill"

HELP: Final = (
    ' With sglang-embedding-relay also "encode" (pixels to embeddings) and "language" (embeddings and text to tokens).'
)
ENCODER_URLS_HELP: Final = (
    " With sglang-embedding-relay, in the modes language and prefill: the encode instances that this instance sends"
    " the media of its requests to."
)


def of(server_args: Any) -> str | None:
    """The mode that these arguments ask for, if it is one of ours."""
    return _ours(server_args)


def current() -> str | None:
    """The mode that this process serves, if it is one of ours; None also if it serves nothing at all."""
    settings = _published()
    return None if settings is None else _ours(settings)


def is_prefill(settings: Any = None) -> bool:
    """Whether the tokens come from a decode instance. Then the bootstrap fields of a request name its decode half."""
    settings = settings or _published()
    return settings is not None and settings.disaggregation_mode == _PREFILL


def encode_urls() -> list[str]:
    """The encode instances that this one sends the media of its requests to; none where the router does that."""
    settings = _published()
    return [] if settings is None else [url.rstrip("/") for url in settings.encoder_urls]


def _published() -> Any:
    """SGLang's settings of this process, if it serves anything."""
    from sglang.srt.runtime_context import get_context, get_disagg

    return get_disagg() if get_context().is_config_namespace_published("disagg") else None


def _ours(settings: Any) -> str | None:
    mode = settings.disaggregation_mode
    if mode == _PREFILL and settings.encoder_urls and not settings.language_only:
        return LANGUAGE
    return str(mode) if mode in (ENCODE, LANGUAGE) else None


def extend_enum() -> None:
    """Add our members to SGLang's enum in place: replacing the class would leave old members in defaults."""
    from sglang.srt.disaggregation.utils import DisaggregationMode

    for name in (ENCODE, LANGUAGE):
        if name not in DisaggregationMode._value2member_map_:
            _add_member(DisaggregationMode, name.upper(), name)


def _add_member(cls: type[enum.Enum], name: str, value: str) -> None:
    member = object.__new__(cls)
    member._name_ = name
    member._value_ = value
    member.__objclass__ = cls  # type: ignore[attr-defined]
    member._sort_order_ = len(cls._member_names_)  # type: ignore[attr-defined]
    cls._member_names_.append(name)
    cls._member_map_[name] = member
    cls._value2member_map_[value] = member


def check_pairing(obj: Any) -> None:
    """What a client says about the other half of its request; a ValueError becomes a 400. Both halves check alike.

    Before SGLang makes lists of it: that counts rooms up, and takes lists to be as long as the batch.
    """
    if not hasattr(obj, "bootstrap_room") or is_prefill():
        return  # a request for an embedding model, which SGLang refuses; or one whose pairing is SGLang's business
    from embedding_relay import pairing
    from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

    prompts = obj.text if obj.text is not None else obj.input_ids
    is_batch = isinstance(prompts, list) and bool(prompts) and isinstance(prompts[0], str | list)
    said = pairing.Pairing(obj.bootstrap_host, obj.bootstrap_port, obj.bootstrap_room)
    number = len(prompts) if is_batch else None
    settled = pairing.settle(said, number, _allowed_hosts(), local=FAKE_BOOTSTRAP_HOST)
    hosts = settled.host if isinstance(settled.host, list) else [settled.host]
    if FAKE_BOOTSTRAP_HOST in hosts and obj.contains_mm_input():
        text = f"bootstrap_host {FAKE_BOOTSTRAP_HOST} is no encode instance: nobody would look at the media"
        raise pairing.BadPairing(text)
    obj.bootstrap_host, obj.bootstrap_port, obj.bootstrap_room = settled


@functools.cache
def _allowed_hosts() -> AllowedHosts | None:
    """Those that the operator names; an instance that clients may reach without a router has named some by its URLs."""
    from embedding_relay.config import RelayConfig
    from embedding_relay.pairing import AllowedHosts

    named = RelayConfig.from_environment().allowed_hosts
    if named is None and (urls := encode_urls()):
        return AllowedHosts.parse(",".join(urlsplit(url).hostname or "" for url in urls))
    return named


# What only the language half can serve. An encode instance without the flag for it must not refuse the request.
_GENERATION_FIELDS: Final = {
    "custom_logit_processor": None,
    "lora_path": None,
    "max_thinking_tokens": None,
    "return_hidden_states": False,
    "return_routed_experts": False,
    "return_sampling_mask": False,
    "sampling_logprobs_mode": None,
    "session_params": None,
    "watermark": None,
}
_SAMPLING_FIELDS: Final = ("json_schema", "regex", "ebnf", "structural_tag", "watermark")


def ask_for_rows_only(obj: Any) -> None:
    """The encode half of a request: its prompt and its images, and nothing about what will be generated.

    `n` samples share one embedding: here they are one request.
    """
    if not hasattr(obj, "bootstrap_room"):
        return  # a request for an embedding model, which SGLang refuses
    for field, nothing in _GENERATION_FIELDS.items():
        setattr(obj, field, nothing)
    params = obj.sampling_params
    if isinstance(params, dict) and params.get("n", 1) != 1:
        _make_batch_of_one(obj)
    for one in params if isinstance(params, list) else [params]:
        if isinstance(one, dict):
            one["n"] = 1
            for field in _SAMPLING_FIELDS:
                one.pop(field, None)


def _make_batch_of_one(obj: Any) -> None:
    """Which a prompt with several samples is to SGLang: its media are in lists of a batch, and are refused if not."""
    if isinstance(obj.text, str):
        obj.text = [obj.text]
    elif obj.text is None and obj.input_ids and isinstance(obj.input_ids[0], int):
        obj.input_ids = [obj.input_ids]


class LoadsPlugins:
    """Pickles as its content; being unpickled it loads SGLang's plugins first."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_plugins_then, (self.content,)


def _load_plugins_then(content: Any) -> Any:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    return content
