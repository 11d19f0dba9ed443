"""What a family of tiny models is, and what several have in common: numbers of their halves, parts of processors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedding_relay.tools.tiny_families.tokenizer import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = dict[str, int]
Checkpoint = tuple[dict[str, Any], dict[str, Any]]
"""A configuration, and weights by name."""

HEAD_SIZE, VISION_HEAD_SIZE = 64, 32
# Wide enough that two pictures give visibly different log-probabilities.
RANGE = 0.08
AUDIO_POSITIONS = 1500


@dataclass(frozen=True)
class Size:
    """How large each half is. Nothing but a comparison of memory needs more than the default."""

    hidden: int = 256
    layers: int = 2
    vision_hidden: int = 128
    vision_layers: int = 4


@dataclass(frozen=True)
class Family:
    build: Callable[[Ids, int, Size], PreTrainedModel]
    processor: Callable[[Any], Any]
    """From its tokenizer."""
    prompt: Prompt
    pixels_per_token: int = 28
    """The side, in pixels, of the square that becomes one token: where pictures keep their size."""
    arguments: tuple[str, ...] = ()
    """Flags that its servers need."""
    several_images: bool = True
    """SGLang takes more than one in a prompt."""
    checkpoint: Callable[[Any], Checkpoint] | None = None
    """Its configuration and weights, where those of published models are not what `transformers` writes now."""


CLIP: dict[str, Any] = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}


def text(ids: Ids, vocabulary: int, size: Size, **more: Any) -> dict[str, Any]:
    """Of a language model."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": 2 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // HEAD_SIZE,
        "num_key_value_heads": size.hidden // HEAD_SIZE // 2,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "initializer_range": RANGE,
        "tie_word_embeddings": False,
    } | more


def mrope(*section: int, **more: Any) -> dict[str, Any]:
    """Positions in three dimensions."""
    return {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": list(section or (8, 12, 12))} | more


def experts(size: Size) -> dict[str, Any]:
    return {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": size.hidden,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
    }


def qwen_vision(size: Size, **more: Any) -> dict[str, Any]:
    """A tower that takes pictures of any size as rows of patches, two by two of which become one token."""
    return {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden,
        "intermediate_size": 2 * size.vision_hidden,
        "num_heads": size.vision_hidden // VISION_HEAD_SIZE,
        "out_hidden_size": size.hidden,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": RANGE,
    } | more


def vit(size: Size, **more: Any) -> dict[str, Any]:
    """A tower that names its numbers as most of them do."""
    return {
        "hidden_size": size.vision_hidden,
        "intermediate_size": 2 * size.vision_hidden,
        "num_hidden_layers": size.vision_layers,
        "num_attention_heads": size.vision_hidden // VISION_HEAD_SIZE,
        "patch_size": 14,
        "initializer_range": RANGE,
    } | more


def whisper(size: Size, **more: Any) -> dict[str, Any]:
    """A tower for audio."""
    return {
        "num_mel_bins": 128,
        "d_model": size.vision_hidden,
        "encoder_layers": size.vision_layers,
        "encoder_attention_heads": size.vision_hidden // VISION_HEAD_SIZE,
        "encoder_ffn_dim": 2 * size.vision_hidden,
        "max_source_positions": AUDIO_POSITIONS,
        "initializer_range": RANGE,
    } | more


def any_size(patch: int, **more: Any) -> dict[str, Any]:
    """Of an image processor that keeps the proportions of a picture."""
    side = 2 * patch
    return {
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 4 * patch**2, "longest_edge": 16384 * side**2},
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
    } | more


def mel() -> Any:
    """The feature extractor of most towers for audio."""
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=128)


def config_of(model: Any) -> dict[str, Any]:
    config: dict[str, Any] = model.config.to_dict()
    return config | {"architectures": [type(model).__name__]}


def renamed(*beginnings: tuple[str, str]) -> Callable[[Any], Checkpoint]:
    """Weights whose names begin otherwise."""

    def checkpoint(model: Any) -> Checkpoint:
        weights = model.state_dict()
        if model.config.get_text_config().tie_word_embeddings:
            del weights["lm_head.weight"]
        return config_of(model), {_rename(name, beginnings): weight for name, weight in weights.items()}

    return checkpoint


def _rename(name: str, beginnings: tuple[tuple[str, str], ...]) -> str:
    old, new = next((pair for pair in beginnings if name.startswith(pair[0])), ("", ""))
    return new + name.removeprefix(old)
