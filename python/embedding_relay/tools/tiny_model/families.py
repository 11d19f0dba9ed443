"""The families of tiny models, and what differs between them. Each is a class of SGLang's, named in its comment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedding_relay.tools.tiny_model import parts
from embedding_relay.tools.tiny_model.parts import Size
from embedding_relay.tools.tiny_model.tokenizer import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = dict[str, int]

# A square that small towers of a fixed size see, and how many tokens it becomes after two by two are merged.
TILE, TILE_TOKENS = 112, 16


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
    checkpoint: Callable[[Any], tuple[dict[str, Any], dict[str, Any]]] | None = None
    """Its configuration and weights, where those of published models are not what `transformers` writes now."""


# ---- Qwen


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
CLIP: dict[str, Any] = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}


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
    return parts.text(ids, vocabulary, size, rope_parameters=parts.mrope()) | more


def _qwen2_vl(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = parts.qwen_vision(size, patch_size=14, embed_dim=size.vision_hidden, hidden_size=size.hidden, mlp_ratio=2)
    vision["in_chans"] = 3  # as in published models, whose configurations SGLang reads
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=_qwen_text(ids, vocabulary, size), vision_config=vision, **_qwen_top(ids))
    )


def _qwen2_5_vl(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = parts.qwen_vision(size, patch_size=14, window_size=112, fullatt_block_indexes=[1, 3])
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=_qwen_text(ids, vocabulary, size), vision_config=vision, **_qwen_top(ids))
    )


def _qwen3_vision(size: Size, deepstack: list[int], **more: Any) -> dict[str, Any]:
    return parts.qwen_vision(
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
    language = _qwen_text(ids, vocabulary, size, **parts.experts(size), num_hidden_layers=3)
    return Qwen3VLMoeForConditionalGeneration(
        Qwen3VLMoeConfig(text_config=language, vision_config=_qwen3_vision(size, [0, 1, 2]), **_qwen_top(ids))
    )


def _qwen3_omni(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import Qwen3OmniMoeThinkerForConditionalGeneration as Thinker
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeThinkerConfig

    language = _qwen_text(ids, vocabulary, size, **parts.experts(size), num_hidden_layers=3)
    language["rope_parameters"] = parts.mrope(12, 10, 10, mrope_interleaved=True)
    hearing = parts.whisper(size, output_dim=size.hidden, downsample_hidden_size=size.vision_hidden // 4)
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


def _omni_checkpoint(thinker: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The thinker alone: it is what SGLang serves."""
    from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeConfig

    config = Qwen3OmniMoeConfig(thinker_config=thinker.config.to_dict(), enable_audio_output=False).to_dict()
    config |= {"architectures": ["Qwen3OmniMoeForConditionalGeneration"], "dtype": "bfloat16"}
    return config, {f"thinker.{name}": weight for name, weight in _experts_turned(thinker).items()}


def _moe_checkpoint(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return _config_of(model), _experts_turned(model)


def _experts_turned(model: Any) -> dict[str, Any]:
    return {
        name: weight.transpose(1, 2) if ".experts." in name else weight for name, weight in model.state_dict().items()
    }


def _config_of(model: Any) -> dict[str, Any]:
    config: dict[str, Any] = model.config.to_dict()
    return config | {"architectures": [type(model).__name__]}


def _renamed(*beginnings: tuple[str, str]) -> Callable[[Any], tuple[dict[str, Any], dict[str, Any]]]:
    """Weights whose names begin otherwise."""

    def checkpoint(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        weights = model.state_dict()
        if model.config.get_text_config().tie_word_embeddings:
            del weights["lm_head.weight"]
        return _config_of(model), {_rename(name, beginnings): weight for name, weight in weights.items()}

    return checkpoint


def _rename(name: str, beginnings: tuple[tuple[str, str], ...]) -> str:
    old, new = next((pair for pair in beginnings if name.startswith(pair[0])), ("", ""))
    return new + name.removeprefix(old)


def _qwen_processor(name: str, patch: int, video: str = "Qwen2VL", **more: Any) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        import transformers

        settings = parts.any_size(patch, **more)
        kinds = {
            "image_processor": transformers.Qwen2VLImageProcessor(**settings),
            "video_processor": getattr(transformers, f"{video}VideoProcessor")(**settings),
        }
        if "Omni" in name:
            kinds["feature_extractor"] = parts.mel()
        return getattr(transformers, name)(tokenizer=tokenizer, chat_template=tokenizer.chat_template, **kinds)

    return make


# ---- towers that see tiles of a fixed size


INTERN = Prompt(
    image="<IMG_CONTEXT>",
    video="<video>",
    tokens=("<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<image>"),
    named={
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
)


INTERN_CHAT = Prompt(image="<image>", video="<video>", tokens=(*INTERN.tokens,))


def _internvl(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        text_config={"model_type": "qwen2"} | parts.text(ids, vocabulary, size),
        vision_config=parts.vit(size, image_size=[TILE, TILE], patch_size=[14, 14]),
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=TILE_TOKENS,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    return InternVLForConditionalGeneration(config)


def _internvl_processor(tokenizer: Any) -> Any:
    import transformers

    size = {"height": TILE, "width": TILE}
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=12, **CLIP),
        video_processor=transformers.InternVLVideoProcessor(size=size),
        tokenizer=tokenizer,
        image_seq_length=TILE_TOKENS,
        chat_template=tokenizer.chat_template,
    )


def _internvl_chat_checkpoint(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same model as its authors publish it, for code of theirs."""
    weights = {_intern_name(name): weight for name, weight in model.state_dict().items()}
    for name in [name for name in weights if ".q_proj" in name and name.startswith("vision_model.")]:
        import torch

        same = [name.replace(".q_proj", f".{one}_proj") for one in "qkv"]
        weights[name.replace(".q_proj", ".qkv")] = torch.cat([weights.pop(one) for one in same])
    language, vision = model.config.text_config, model.config.vision_config
    config = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "llm_config": language.to_dict() | {"architectures": ["Qwen2ForCausalLM"]},
        "vision_config": vision.to_dict() | {"model_type": "intern_vit_6b", "image_size": TILE, "patch_size": 14},
        "downsample_ratio": 0.5,
        "force_image_size": TILE,
        "ps_version": "v2",
        "select_layer": -1,
        "max_dynamic_patch": 12,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    return config, weights


def _intern_name(name: str) -> str:
    for old, new in (
        ("model.vision_tower.", "vision_model."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.multi_modal_projector.layer_norm", "mlp1.0"),
        ("model.multi_modal_projector.linear_1", "mlp1.1"),
        ("model.multi_modal_projector.linear_2", "mlp1.3"),
        ("encoder.layer.", "encoder.layers."),
        ("attention.projection_layer", "attn.proj"),
        (".attention.", ".attn."),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("lambda_", "ls"),
        ("cls_token", "class_embedding"),
        ("patch_embeddings.projection", "patch_embedding"),
        ("position_embeddings", "position_embedding"),
    ):
        name = name.replace(old, new)
    return name


LLAVA = Prompt(image="<image>", video="<video>", tokens=("<image>", "<video>"))


def _llava_onevision(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2"} | parts.text(ids, vocabulary, size),
        vision_config={"model_type": "siglip_vision_model"} | parts.vit(size, image_size=TILE),
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=LLAVA_GRIDS,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    return LlavaOnevisionForConditionalGeneration(config)


LLAVA_GRIDS = [[TILE * wide, TILE * high] for wide in range(1, 5) for high in range(1, 5)]


def _llava_onevision_processor(tokenizer: Any) -> Any:
    import transformers

    size = {"height": TILE, "width": TILE}
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=LLAVA_GRIDS),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        tokenizer=tokenizer,
        num_image_tokens=(TILE // 14) ** 2,
        vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )


GEMMA = Prompt(
    image="<start_of_image>",
    tokens=("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
)


def _gemma3(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    language = parts.text(ids, vocabulary, size, query_pre_attn_scalar=parts.HEAD_SIZE, sliding_window=512)
    language["layer_types"] = ["sliding_attention"] * (size.layers - 1) + ["full_attention"]
    language["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config = Gemma3Config(
        text_config=language | {"tie_word_embeddings": True},
        vision_config={"model_type": "siglip_vision_model"} | parts.vit(size, image_size=TILE, vision_use_head=False),
        mm_tokens_per_image=TILE_TOKENS,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        dtype="bfloat16",
    )
    model = Gemma3ForConditionalGeneration(config)
    # Which `transformers` leaves at zero.
    model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(std=parts.RANGE)
    return model


def _gemma3_processor(tokenizer: Any) -> Any:
    import transformers

    return transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(size={"height": TILE, "width": TILE}),
        tokenizer=tokenizer,
        image_seq_length=TILE_TOKENS,
        chat_template=tokenizer.chat_template,
    )


# ---- GLM


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

    language = parts.text(ids, vocabulary, size, rope_parameters=parts.mrope(4, 6, 6, partial_rotary_factor=0.5))
    vision = parts.qwen_vision(size, patch_size=14, image_size=336)
    return Glm4vForConditionalGeneration(Glm4vConfig(text_config=language, vision_config=vision, **_glm_top(ids)))


def _glm_ocr(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import GlmOcrConfig, GlmOcrForConditionalGeneration

    language = parts.text(ids, vocabulary, size, rope_parameters=parts.mrope(8, 12, 12))
    vision = parts.qwen_vision(size, patch_size=14, image_size=336)
    return GlmOcrForConditionalGeneration(GlmOcrConfig(text_config=language, vision_config=vision, **_glm_top(ids)))


def _glm_processor(name: str) -> Callable[[Any], Any]:
    def make(tokenizer: Any) -> Any:
        import transformers

        settings = parts.any_size(14, **CLIP)
        # A video's limits count its frames too.
        settings["size"] = {"shortest_edge": 8 * 14**2, "longest_edge": 32768 * 28**2}
        return getattr(transformers, f"{name}Processor")(
            image_processor=getattr(transformers, f"{name}ImageProcessor")(**settings),
            video_processor=getattr(transformers, f"{name}VideoProcessor")(**settings),
            tokenizer=tokenizer,
            chat_template=tokenizer.chat_template,
        )

    return make


# ---- Mistral


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
        "text_config": {"model_type": "mistral"} | parts.text(ids, vocabulary, size, sliding_window=None),
        "vision_config": {"model_type": "pixtral", "image_size": 1540}
        | parts.vit(size, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
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


# ---- others that see


PADDLE = Prompt(
    image="<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
    tokens=("<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>"),
    named={"image_token": "<|IMAGE_PLACEHOLDER|>"},
)


def _paddleocr_vl(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import PaddleOCRVLConfig, PaddleOCRVLForConditionalGeneration

    config = PaddleOCRVLConfig(
        text_config=_qwen_text(ids, vocabulary, size),
        vision_config=parts.vit(size, image_size=378, spatial_merge_size=2),
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
        image_processor=transformers.PaddleOCRVLImageProcessor(**parts.any_size(14, temporal_patch_size=1)),
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
        text_config={"model_type": "qwen3"} | parts.text(ids, vocabulary, size),
        vision_config={"model_type": "pixtral", "image_size": 1540} | parts.vit(size, rope_parameters=rope),
        image_token_id=ids["<|image_pad|>"],
        spatial_merge_size=2,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    return LightOnOcrForConditionalGeneration(config)


def _lighton_ocr_checkpoint(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    return _config_of(model) | {"architectures": ["LightOnOCRForConditionalGeneration"]}, model.state_dict()


def _lighton_ocr_processor(tokenizer: Any) -> Any:
    import transformers

    return transformers.LightOnOcrProcessor(
        image_processor=transformers.PixtralImageProcessor(patch_size=28, size={"longest_edge": 1540}),
        tokenizer=tokenizer,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=tokenizer.chat_template,
    )


COHERE = Prompt(
    image="<|IMG_PATCH|>",
    tokens=("<|START_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "<|END_OF_IMG|>"),
    named={
        "boi_token": "<|START_OF_IMG|>",
        "image_token": "<|IMG_PATCH|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
        "eoi_token": "<|END_OF_IMG|>",
    },
)


def _cohere2_vision(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import Cohere2VisionConfig, Cohere2VisionForConditionalGeneration

    language = parts.text(ids, vocabulary, size, sliding_window=512, layer_types=["full_attention"] * size.layers)
    config = Cohere2VisionConfig(
        text_config={"model_type": "cohere2"} | language | {"tie_word_embeddings": True, "logit_scale": 1.0},
        vision_config={"model_type": "siglip_vision_model"} | parts.vit(size, image_size=TILE, vision_use_head=False),
        downsample_factor=2,
        image_token_id=ids["<|IMG_PATCH|>"],
        alignment_intermediate_size=2 * size.hidden,
        dtype="bfloat16",
    )
    return Cohere2VisionForConditionalGeneration(config)


def _cohere2_vision_processor(tokenizer: Any) -> Any:
    import transformers

    # A processor's patch is what a tile has tokens along one side.
    images = transformers.Cohere2VisionImageProcessor(
        size={"height": TILE, "width": TILE}, patch_size=4, downsample_factor=2, **CLIP
    )
    return transformers.Cohere2VisionProcessor(
        image_processor=images, tokenizer=tokenizer, chat_template=tokenizer.chat_template
    )


# ---- others that hear


GLM_ASR = Prompt(
    audio="<|begin_of_audio|><|pad|><|end_of_audio|>", tokens=("<|begin_of_audio|>", "<|pad|>", "<|end_of_audio|>")
)


def _glm_asr(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import GlmAsrConfig, GlmAsrForConditionalGeneration

    hearing = parts.vit(size, num_mel_bins=128, max_position_embeddings=parts.AUDIO_POSITIONS)
    hearing["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    # Four vectors in a row become one token.
    hearing["intermediate_size"] = 4 * size.vision_hidden
    config = GlmAsrConfig(
        audio_config=hearing,
        text_config={"model_type": "llama"} | parts.text(ids, vocabulary, size),
        audio_token_id=ids["<|pad|>"],
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    return GlmAsrForConditionalGeneration(config)


def _glm_asr_processor(tokenizer: Any) -> Any:
    import transformers

    return transformers.GlmAsrProcessor(
        feature_extractor=parts.mel(), tokenizer=tokenizer, chat_template=tokenizer.chat_template
    )


QWEN_AUDIO = Prompt(audio="<|audio_bos|><|AUDIO|><|audio_eos|>", tokens=("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"))


def _qwen2_audio(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    config = Qwen2AudioConfig(
        audio_config=parts.whisper(size),
        text_config={"model_type": "qwen2"} | parts.text(ids, vocabulary, size),
        audio_token_index=ids["<|AUDIO|>"],
        dtype="bfloat16",
    )
    return Qwen2AudioForConditionalGeneration(config)


def _qwen2_audio_processor(tokenizer: Any) -> Any:
    import transformers

    return transformers.Qwen2AudioProcessor(
        feature_extractor=parts.mel(), tokenizer=tokenizer, chat_template=tokenizer.chat_template
    )


FAMILIES = {
    "qwen2_5_vl": Family(_qwen2_5_vl, _qwen_processor("Qwen2_5_VLProcessor", 14, **CLIP), QWEN),
    "qwen2_vl": Family(_qwen2_vl, _qwen_processor("Qwen2VLProcessor", 14, **CLIP), QWEN),
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
    "internvl": Family(_internvl, _internvl_processor, INTERN),
    "internvl_chat": Family(
        _internvl, lambda tokenizer: tokenizer, INTERN_CHAT, checkpoint=_internvl_chat_checkpoint
    ),
    "llava_onevision": Family(_llava_onevision, _llava_onevision_processor, LLAVA),
    "gemma3": Family(
        _gemma3,
        _gemma3_processor,
        GEMMA,
        arguments=("--enable-multimodal",),
        checkpoint=_renamed(
            ("model.language_model.", "language_model.model."),
            ("model.vision_tower.", "vision_tower.vision_model."),
            ("model.", ""),
        ),
    ),
    "glm4v": Family(_glm4v, _glm_processor("Glm4v"), GLM),
    "glm_ocr": Family(_glm_ocr, _glm_processor("Glm46V"), GLM),
    "mistral3": Family(_mistral3, _mistral_processor(2), MISTRAL),
    "pixtral": Family(_pixtral, _mistral_processor(1), MISTRAL, 14),
    "paddleocr_vl": Family(_paddleocr_vl, _paddleocr_vl_processor, PADDLE),
    "lighton_ocr": Family(_lighton_ocr, _lighton_ocr_processor, LIGHTON, checkpoint=_lighton_ocr_checkpoint),
    "cohere2_vision": Family(_cohere2_vision, _cohere2_vision_processor, COHERE),
    "glm_asr": Family(
        _glm_asr,
        _glm_asr_processor,
        GLM_ASR,
        checkpoint=_renamed(
            ("model.language_model.", "language_model.model."), ("model.", ""), ("lm_head.", "language_model.lm_head.")
        ),
    ),
    "qwen2_audio": Family(
        _qwen2_audio,
        _qwen2_audio_processor,
        QWEN_AUDIO,
        checkpoint=_renamed(
            ("model.language_model.", "language_model.model."), ("model.", ""), ("lm_head.", "language_model.lm_head.")
        ),
    ),
}
