"""The keys of multimodal items: equal ones have the same rows, whichever encode instance makes them."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import torch
from torch.nn.parameter import is_lazy

from embedding_relay import __version__
from sglang.srt.disaggregation.multimodal import parts

logger = logging.getLogger(__name__)

_KEY_BYTES: Final = 16
# So many values of a parameter, and about so many bytes of what a processor has put beside an item's pixels.
_SAMPLES: Final = 1024
_MOST_BYTES: Final = 1 << 22
# Not of the item: how its pixels came to this process.
_TRANSPORTS: Final = "_sglang_"


class _Unknown(Exception):
    """A value that cannot be compared with another by its bytes."""


class ItemKeys:
    """Of one model with its weights, in one scheduler."""

    def __init__(self, facts: object, weights: Callable[[], bytes]) -> None:
        """`facts`: what else than its weights makes rows differ; `weights`: a fingerprint of them as they are now."""
        self._facts = msgspec.json.encode(facts, order="sorted")
        self._weights_now = weights
        self._weights: bytes | None = None
        self._unseen = b""

    @classmethod
    def of(cls, scheduler: Any, model: Sequence[tuple[str, str]]) -> ItemKeys:
        """`model`: what the handshake says of it."""
        from sglang.srt.runtime_context import get_mm

        part = parts.media_part(scheduler.tp_worker.model_runner.model)
        facts = {
            "version": __version__,
            "model": model,
            "class": type(part).__name__,
            "dtype": str(scheduler.model_config.dtype),
            "device": str(scheduler.device).partition(":")[0],
            "ranks": scheduler.tp_size,
            "processor": repr(getattr(get_mm(), "mm_process_config", None)),
        }
        return cls(facts, lambda: fingerprint(part))  # when the first key is wanted: nobody has waited for it before

    def renew(self) -> None:
        """The weights may be others. Of those that look the same in a sample nobody can say that they are."""
        if self._weights is None:
            return
        before, self._weights = self._weights, self._weights_now()
        if self._weights == before:
            self._unseen = secrets.token_bytes(_KEY_BYTES)

    def key(self, item: Any, req: Any) -> str:
        """Empty for an item whose rows cannot be kept: nobody knows what they are made of."""
        if item.hash is None or item.is_precomputed_embedding() or item.precomputed_embeddings is not None:
            return ""
        if self._weights is None:
            self._weights = self._weights_now()
        digest = hashlib.blake2b(digest_size=_KEY_BYTES)
        try:
            for part in (self._facts, self._weights, self._unseen, *_of_item(item), *_of_tenant(req)):
                digest.update(len(part).to_bytes(8, "big") + part)
        except _Unknown as what:
            logger.debug("relay: the rows of an item are not kept: %s", what)
            return ""
        return digest.hexdigest()


def _of_item(item: Any) -> Iterator[bytes]:
    rows = sum(end - start + 1 for start, end in item.offsets)
    yield msgspec.json.encode([item.hash, item.modality.name, rows])
    yield getattr(item, "identity", None) or b""
    left = _MOST_BYTES
    for name, value in sorted(item.model_specific_data.items()):
        if name.startswith(_TRANSPORTS):
            continue
        yield name.encode()
        for part in _plain(value):
            left -= len(part)
            if left < 0:
                raise _Unknown(f"{name} is large")
            yield part


def _of_tenant(req: Any) -> Iterator[bytes]:
    """Equal pictures of different tenants are different, as in SGLang's prefix cache: how soon an answer comes shall
    tell nobody what others have sent.
    """
    yield msgspec.json.encode([getattr(req, name, None) for name in ("extra_key", "cache_salt", "lora_id")])


def _plain(value: Any) -> Iterator[bytes]:
    """The bytes of a value, and of what kind it is."""
    match value:
        case None | bool() | int() | float() | str():
            yield repr(value).encode()
        case bytes():
            yield value
        case torch.Tensor():
            yield f"{value.dtype} {tuple(value.shape)}".encode()
            yield _bytes_of(value)
        case np.ndarray() if value.dtype.kind in "biuf":
            yield f"{value.dtype} {value.shape}".encode()
            yield value.tobytes()
        case list() | tuple():
            yield f"list {len(value)}".encode()
            for one in value:
                yield from _plain(one)
        case dict():
            yield f"dict {len(value)}".encode()
            for name, one in sorted(value.items(), key=repr):
                yield repr(name).encode()
                yield from _plain(one)
        case _:
            raise _Unknown(f"a {type(value).__name__} has no bytes to be compared by")


def _bytes_of(tensor: torch.Tensor) -> bytes:
    if tensor.nbytes > _MOST_BYTES:
        raise _Unknown("a tensor is large")
    return bytes(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def fingerprint(model: Any) -> bytes:
    """Of the weights of a module: of each parameter that is here a sample from everywhere in it."""
    digest = hashlib.blake2b(digest_size=_KEY_BYTES)
    for name, values in model.named_parameters():
        if is_lazy(values) or values.is_meta or not values.numel():
            continue
        digest.update(f"{name} {values.dtype} {tuple(values.shape)};".encode())
        flat = values.detach().reshape(-1)
        digest.update(_bytes_of(flat[:: max(1, flat.numel() // _SAMPLES)]))
    return digest.digest()
