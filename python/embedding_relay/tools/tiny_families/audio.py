"""Tiny models that hear."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from embedding_relay.tools.tiny_families import common
from embedding_relay.tools.tiny_families.common import Family, Ids, Size
from embedding_relay.tools.tiny_families.tokenizer import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GLM_ASR = Prompt(
    audio="<|begin_of_audio|><|pad|><|end_of_audio|>", tokens=("<|begin_of_audio|>", "<|pad|>", "<|end_of_audio|>")
)


def _glm_asr(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import GlmAsrConfig, GlmAsrForConditionalGeneration

    hearing = common.vit(size, num_mel_bins=128, max_position_embeddings=common.AUDIO_POSITIONS)
    hearing["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    # Four vectors in a row become one token.
    hearing["intermediate_size"] = 4 * size.vision_hidden
    config = GlmAsrConfig(
        audio_config=hearing,
        text_config={"model_type": "llama"} | common.text(ids, vocabulary, size),
        audio_token_id=ids["<|pad|>"],
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    return GlmAsrForConditionalGeneration(config)


def _glm_asr_processor(tokenizer: Any) -> Any:
    import transformers

    return transformers.GlmAsrProcessor(
        feature_extractor=common.mel(), tokenizer=tokenizer, chat_template=tokenizer.chat_template
    )


QWEN_AUDIO = Prompt(audio="<|audio_bos|><|AUDIO|><|audio_eos|>", tokens=("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"))


def _qwen2_audio(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    config = Qwen2AudioConfig(
        audio_config=common.whisper(size),
        text_config={"model_type": "qwen2"} | common.text(ids, vocabulary, size),
        audio_token_index=ids["<|AUDIO|>"],
        dtype="bfloat16",
    )
    return Qwen2AudioForConditionalGeneration(config)


def _qwen2_audio_processor(tokenizer: Any) -> Any:
    import transformers

    return transformers.Qwen2AudioProcessor(
        feature_extractor=common.mel(), tokenizer=tokenizer, chat_template=tokenizer.chat_template
    )


FAMILIES = {
    "qwen2_audio": Family(
        _qwen2_audio,
        _qwen2_audio_processor,
        QWEN_AUDIO,
        checkpoint=common.renamed(
            ("model.language_model.", "language_model.model."), ("model.", ""), ("lm_head.", "language_model.lm_head.")
        ),
    ),
    "glm_asr": Family(
        _glm_asr,
        _glm_asr_processor,
        GLM_ASR,
        checkpoint=common.renamed(
            ("model.language_model.", "language_model.model."), ("model.", ""), ("lm_head.", "language_model.lm_head.")
        ),
    ),
}
