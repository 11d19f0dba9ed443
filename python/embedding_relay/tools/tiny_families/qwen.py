"""Tiny models of Qwen's families that see."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from embedding_relay.tools.tiny_families import common
from embedding_relay.tools.tiny_families.common import Checkpoint, Family, Ids, Size
from embedding_relay.tools.tiny_families.tokenizer import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QWEN = Prompt(
    image="<|vision_start|><|image_pad|><|vision_end|>",
    video="<|vision_start|><|video_pad|><|vision_end|>",
)
QWEN_OMNI = Prompt(
    image=QWEN.image,
    video=QWEN.video,
    audio="<|audio_start|><|audio_pad|><|audio_end|>",
    tokens=("<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"),
    named={
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "audio_token": "<|audio_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
        "audio_bos_token": "<|audio_start|>",
        "audio_eos_token": "<|audio_end|>",
    },
)


def _qwen_top(ids: Ids) -> dict[str, Any]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def _qwen_text(ids: Ids, vocabulary: int, size: Size, **more: Any) -> dict[str, Any]:
    return common.text(ids, vocabulary, size, rope_parameters=common.mrope()) | more


def _qwen2_vl(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = common.qwen_vision(size, patch_size=14, embed_dim=size.vision_hidden, hidden_size=size.hidden, mlp_ratio=2)
    vision["in_chans"] = 3  # as in published models, whose configurations SGLang reads
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=_qwen_text(ids, vocabulary, size), vision_config=vision, **_qwen_top(ids))
    )


def _qwen2_5_vl(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = common.qwen_vision(size, patch_size=14, window_size=112, fullatt_block_indexes=[1, 3])
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=_qwen_text(ids, vocabulary, size), vision_config=vision, **_qwen_top(ids))
    )


def _qwen3_vision(size: Size, deepstack: list[int], **more: Any) -> dict[str, Any]:
    return common.qwen_vision(
        size, patch_size=16, num_position_embeddings=2304, deepstack_visual_indexes=deepstack, **more
    )


def _qwen3_vl(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = _qwen3_vision(size, [1, 2])
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=_qwen_text(ids, vocabulary, size), vision_config=vision, **_qwen_top(ids))
    )


def _qwen3_vl_moe(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    # SGLang's class takes rows of three inner layers, whatever the configuration says.
    language = _qwen_text(ids, vocabulary, size, **common.experts(size), num_hidden_layers=3)
    return Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(text_config=language, vision_config=_qwen3_vision(size, [0, 1, 2]), **_qwen_top(ids))
    )


def _qwen3_omni(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration as Thinker
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

    language = _qwen_text(ids, vocabulary, size, **common.experts(size), num_hidden_layers=3)
    language["rope_parameters"] = common.mrope(12, 10, 10, mrope_interleaved=True)
    hearing = common.whisper(size, output_dim=size.hidden, downsample_hidden_size=size.vision_hidden // 4)
    config = Qwen3OmniMoeThinkerConfig(
        text_config=language,
        vision_config=_qwen3_vision(size, [0, 1, 2]),
        audio_config=hearing,
        audio_token_id=ids["<|audio_pad|>"],
        audio_start_token_id=ids["<|audio_start|>"],
        audio_end_token_id=ids["<|audio_end|>"],
        **_qwen_top(ids),
    )
    return Thinker(config)


def _omni_checkpoint(thinker: Any) -> Checkpoint:
    """The thinker alone: it is what SGLang serves."""
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeConfig

    config = Qwen3OmniMoeConfig(thinker_config=thinker.config.to_dict(), enable_audio_output=False).to_dict()
    config |= {"architectures": ["Qwen3OmniMoeForConditionalGeneration"], "dtype": "bfloat16"}
    return config, {f"thinker.{name}": weight for name, weight in _experts_turned(thinker).items()}


def _moe_checkpoint(model: Any) -> Checkpoint:
    return common.config_of(model), _experts_turned(model)


def _experts_turned(model: Any) -> dict[str, Any]:
    return {
        name: weight.transpose(1, 2) if ".experts." in name else weight for name, weight in model.state_dict().items()
    }


def _qwen_processor(name: str, patch: int, video: str = "Qwen2VL", **more: Any) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        import transformers

        settings = common.any_size(patch, **more)
        kinds = {
            "image_processor": transformers.Qwen2VLImageProcessor(**settings),
            "video_processor": getattr(transformers, f"{video}VideoProcessor")(**settings),
        }
        if "Omni" in name:
            kinds["feature_extractor"] = common.mel()
        return getattr(transformers, name)(tokenizer=tokenizer, chat_template=tokenizer.chat_template, **kinds)

    return make


FAMILIES = {
    "qwen2_5_vl": Family(_qwen2_5_vl, _qwen_processor("Qwen2_5_VLProcessor", 14, **common.CLIP), QWEN),
    "qwen2_vl": Family(_qwen2_vl, _qwen_processor("Qwen2VLProcessor", 14, **common.CLIP), QWEN),
    "qwen3_vl": Family(_qwen3_vl, _qwen_processor("Qwen3VLProcessor", 16, "Qwen3VL"), QWEN, 32),
    "qwen3_vl_moe": Family(
        _qwen3_vl_moe,
        _qwen_processor("Qwen3VLProcessor", 16, "Qwen3VL"),
        QWEN,
        32,
        checkpoint=_moe_checkpoint,
    ),
    "qwen3_omni": Family(
        _qwen3_omni,
        _qwen_processor("Qwen3OmniMoeProcessor", 16),
        QWEN_OMNI,
        32,
        checkpoint=_omni_checkpoint,
    ),
}
