"""Tiny models whose towers see pictures in their own proportions, as rows of patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from embedding_relay.tools.tiny_families import common
from embedding_relay.tools.tiny_families.common import Checkpoint, Family, Ids, Size
from embedding_relay.tools.tiny_families.tokenizer import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GLM = Prompt(
    image="<|begin_of_image|><|image|><|end_of_image|>",
    video="<|begin_of_video|><|video|><|end_of_video|>",
    tokens=(
        *("<|begin_of_image|>", "<|image|>", "<|end_of_image|>"),
        *("<|begin_of_video|>", "<|video|>", "<|end_of_video|>"),
    ),
)


def _glm_top(ids: Ids) -> dict[str, Any]:
    return {
        "image_token_id": ids["<|image|>"],
        "video_token_id": ids["<|video|>"],
        "image_start_token_id": ids["<|begin_of_image|>"],
        "image_end_token_id": ids["<|end_of_image|>"],
        "video_start_token_id": ids["<|begin_of_video|>"],
        "video_end_token_id": ids["<|end_of_video|>"],
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def _glm4v(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    language = common.text(ids, vocabulary, size, rope_parameters=common.mrope(4, 6, 6, partial_rotary_factor=0.5))
    vision = common.qwen_vision(size, patch_size=14, image_size=336)
    return Glm4vForConditionalGeneration(Glm4vConfig(text_config=language, vision_config=vision, **_glm_top(ids)))


def _glm_ocr(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import GlmOcrConfig, GlmOcrForConditionalGeneration

    language = common.text(ids, vocabulary, size, rope_parameters=common.mrope(8, 12, 12))
    vision = common.qwen_vision(size, patch_size=14, image_size=336)
    return GlmOcrForConditionalGeneration(GlmOcrConfig(text_config=language, vision_config=vision, **_glm_top(ids)))


def _glm_processor(name: str) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        import transformers

        settings = common.any_size(14, **common.CLIP)
        # A video's limits count its frames too.
        settings["size"] = {"shortest_edge": 8 * 14**2, "longest_edge": 32768 * 28**2}
        return getattr(transformers, f"{name}Processor")(
            image_processor=getattr(transformers, f"{name}ImageProcessor")(**settings),
            video_processor=getattr(transformers, f"{name}VideoProcessor")(**settings),
            tokenizer=tokenizer,
            chat_template=tokenizer.chat_template,
        )

    return make


MISTRAL = Prompt(image="[IMG]", tokens=("[IMG]", "[IMG_BREAK]", "[IMG_END]"))


def _mistral3(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(spatial_merge_size=2, **_mistral_parts(ids, vocabulary, size))
    return Mistral3ForConditionalGeneration(config)


def _pixtral(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    strategy = {"vision_feature_select_strategy": "full", "image_seq_length": 1}
    return LlavaForConditionalGeneration(LlavaConfig(**strategy, **_mistral_parts(ids, vocabulary, size)))


def _mistral_parts(ids: Ids, vocabulary: int, size: Size) -> dict[str, Any]:
    return {
        "text_config": {"model_type": "mistral"} | common.text(ids, vocabulary, size, sliding_window=None),
        "vision_config": {"model_type": "pixtral", "image_size": 1540}
        | common.vit(size, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
        "image_token_index": ids["[IMG]"],
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def _mistral_processor(merge: int) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        import transformers

        side = 14 * merge
        return transformers.PixtralProcessor(
            image_processor=transformers.PixtralImageProcessor(patch_size=side, size={"longest_edge": 1540}),
            tokenizer=tokenizer,
            patch_size=14,
            spatial_merge_size=merge,
            chat_template=tokenizer.chat_template,
        )

    return make


PADDLE = Prompt(
    image="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
    tokens=("<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>"),
    named={"image_token": "<|IMAGE_PLACEHOLDER|>"},
)


def _paddleocr_vl(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

    config = PaddleOCRVLConfig(
        text_config=common.text(ids, vocabulary, size, rope_parameters=common.mrope()),
        vision_config=common.vit(size, image_size=378, spatial_merge_size=2, tokens_per_second=2),
        image_token_id=ids["<|IMAGE_PLACEHOLDER|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|IMAGE_START|>"],
        vision_end_token_id=ids["<|IMAGE_END|>"],
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    return PaddleOCRVLForConditionalGeneration(config)


def _paddleocr_vl_processor(tokenizer: Any) -> Any:
    import transformers

    return transformers.PaddleOCRVLProcessor(
        image_processor=transformers.PaddleOCRVLImageProcessor(**common.any_size(14, temporal_patch_size=1)),
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
    )


LIGHTON = Prompt(
    image="<|image_pad|>",
    named={
        "image_token": "<|image_pad|>",
        "image_break_token": "<|vision_pad|>",
        "image_end_token": "<|vision_end|>",
    },
)


def _lighton_ocr(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import LightOnOcrConfig, LightOnOcrForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = LightOnOcrConfig(
        text_config={"model_type": "qwen3"} | common.text(ids, vocabulary, size),
        vision_config={"model_type": "pixtral", "image_size": 1540} | common.vit(size, rope_parameters=rope),
        image_token_id=ids["<|image_pad|>"],
        spatial_merge_size=2,
        multimodal_projector_bias=False,  # SGLang takes its absence for a bias
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    return LightOnOcrForConditionalGeneration(config)


def _lighton_ocr_checkpoint(model: Any) -> Checkpoint:
    return common.config_of(model) | {"architectures": ["LightOnOCRForConditionalGeneration"]}, model.state_dict()


def _lighton_ocr_processor(tokenizer: Any) -> Any:
    import transformers

    return transformers.LightOnOcrProcessor(
        image_processor=transformers.PixtralImageProcessor(patch_size=28, size={"longest_edge": 1540}),
        tokenizer=tokenizer,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=tokenizer.chat_template,
    )


FAMILIES = {
    "glm4v": Family(_glm4v, _glm_processor("Glm4v"), GLM),
    "glm_ocr": Family(_glm_ocr, _glm_processor("Glm46V"), GLM),
    "mistral3": Family(_mistral3, _mistral_processor(2), MISTRAL),
    "pixtral": Family(_pixtral, _mistral_processor(1), MISTRAL, 14),
    "paddleocr_vl": Family(_paddleocr_vl, _paddleocr_vl_processor, PADDLE),
    "lighton_ocr": Family(
        _lighton_ocr,
        _lighton_ocr_processor,
        LIGHTON,
        several_images=False,
        checkpoint=_lighton_ocr_checkpoint,
    ),
}
