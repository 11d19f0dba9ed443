"""One half of a model: an encode instance without the language model, a language instance without the tower."""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator
from typing import Any, Final

import torch

from sglang.srt.disaggregation.multimodal import modes

logger = logging.getLogger(__name__)

# SGLang's model classes skip the weights of the half they are told to leave out, but still build the tower. Only for
# the classes listed here do we know the constructor to stop; any other class keeps its tower, unused.
_TOWERS: Final = {
    "Qwen2VLForConditionalGeneration": ("sglang.srt.models.qwen2_vl", "Qwen2VisionTransformer"),
    "Qwen2_5_VLForConditionalGeneration": ("sglang.srt.models.qwen2_5_vl", "Qwen2_5_VisionTransformer"),
    "Qwen3VLForConditionalGeneration": ("sglang.srt.models.qwen3_vl", "Qwen3VLMoeVisionModel"),
    "Qwen3VLMoeForConditionalGeneration": ("sglang.srt.models.qwen3_vl", "Qwen3VLMoeVisionModel"),
}


class NoTower(torch.nn.Module):  # type: ignore[misc]  # torch is left out of the type check
    """Stands where the vision tower would be; asked to encode, it says so."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("a language instance has no vision tower: pixels belong to the encode instance")


def mark_half(config: Any, mode: str) -> None:
    """The flags that SGLang's own encoder split gives to model classes; they need none of its servers."""
    if mode == modes.ENCODE:
        config.hf_config.encoder_only = True
    else:
        config.hf_config.language_only = True


@contextlib.contextmanager
def no_vision_tower(model_config: Any) -> Iterator[None]:
    """While a model is built, its tower's class is `NoTower`."""
    known = [_TOWERS[name] for name in model_config.hf_config.architectures if name in _TOWERS]
    if not known:
        logger.warning("%s keeps its vision tower, unused", model_config.hf_config.architectures)
    replaced = [(importlib.import_module(module), tower) for module, tower in known]
    towers = [(module, tower, getattr(module, tower)) for module, tower in replaced]
    try:
        for module, tower, _ in towers:
            setattr(module, tower, NoTower)
        yield
    finally:
        for module, tower, original in towers:
            setattr(module, tower, original)


def restore_prompt_limits(scheduler: Any) -> None:
    """The tiny KV pool of an encode instance must not shorten the prompts that it accepts."""
    scheduler.max_req_len = scheduler.model_config.context_len - 1
    scheduler.max_req_input_len = scheduler.max_req_len - 5
