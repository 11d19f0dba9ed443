"""Tiny models whose towers see pictures as squares of one size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from embedding_relay.tools.tiny_families import common
from embedding_relay.tools.tiny_families.common import Checkpoint, Family, Ids, Size
from embedding_relay.tools.tiny_families.tokenizer import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A square, and how many tokens it becomes after two by two patches are merged.
TILE, TILE_TOKENS = 112, 16


INTERN = Prompt(
    image="<IMG_CONTEXT>",
    tokens=("<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<image>"),
    named={
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
)


INTERN_CHAT = Prompt(image="<image>", video="<video>", tokens=(*INTERN.tokens,))


def _internvl(ids: Ids, vocabulary: int, size: Size, tile: int = TILE) -> PreTrainedModel:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        text_config={"model_type": "qwen2"} | common.text(ids, vocabulary, size),
        vision_config=common.vit(size, image_size=[tile, tile], patch_size=[tile // 8, tile // 8]),
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
        image_processor=transformers.GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=12, **common.CLIP),
        video_processor=transformers.InternVLVideoProcessor(size=size),
        tokenizer=tokenizer,
        image_seq_length=TILE_TOKENS,
        chat_template=tokenizer.chat_template,
    )


def _internvl_chat(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    """SGLang's processor for it makes tiles of this size, whatever the configuration says."""
    return _internvl(ids, vocabulary, size, tile=448)


def _internvl_chat_checkpoint(model: Any) -> Checkpoint:
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
        "vision_config": vision.to_dict() | {"model_type": "intern_vit_6b", "image_size": 448, "patch_size": 56},
        "downsample_ratio": 0.5,
        "force_image_size": 448,
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


LLAVA = Prompt(image="<image>", tokens=("<image>", "<video>"))


def _llava_onevision(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2"} | common.text(ids, vocabulary, size),
        vision_config={"model_type": "siglip_vision_model"} | common.vit(size, image_size=TILE),
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

    language = common.text(ids, vocabulary, size, query_pre_attn_scalar=common.HEAD_SIZE, sliding_window=512)
    language["layer_types"] = ["sliding_attention"] * (size.layers - 1) + ["full_attention"]
    language["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    config = Gemma3Config(
        text_config=language | {"tie_word_embeddings": True},
        vision_config={"model_type": "siglip_vision_model"} | common.vit(size, image_size=TILE, vision_use_head=False),
        mm_tokens_per_image=TILE_TOKENS,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image_soft_token>"],
        dtype="bfloat16",
    )
    model = Gemma3ForConditionalGeneration(config)
    # Which `transformers` leaves at zero.
    model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(std=common.RANGE)
    return model


def _gemma3_processor(tokenizer: Any) -> Any:
    import transformers

    return transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(size={"height": TILE, "width": TILE}),
        tokenizer=tokenizer,
        image_seq_length=TILE_TOKENS,
        chat_template=tokenizer.chat_template,
    )


AYA = Prompt(
    image="<image>",
    tokens=(
        *("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL"),
        *(f"TILE_{number}" for number in range(1, 13)),
    ),
)


def _aya_vision(ids: Ids, vocabulary: int, size: Size) -> PreTrainedModel:
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration

    language = common.text(ids, vocabulary, size, sliding_window=512, layer_types=["full_attention"] * size.layers)
    config = AyaVisionConfig(
        text_config={"model_type": "cohere2"} | language | {"logit_scale": 1.0},
        vision_config={"model_type": "siglip_vision_model"} | common.vit(size, image_size=TILE),
        downsample_factor=2,
        image_token_index=ids["<|IMG_PATCH|>"],
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    return AyaVisionForConditionalGeneration(config)


def _aya_vision_processor(tokenizer: Any) -> Any:
    import transformers

    size = {"height": TILE, "width": TILE}
    return transformers.AyaVisionProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=12, **common.CLIP),
        tokenizer=tokenizer,
        patch_size=14,
        img_size=TILE,
        downsample_factor=2,
        chat_template=tokenizer.chat_template,
    )


FAMILIES = {
    "internvl": Family(_internvl, _internvl_processor, INTERN),
    "internvl_chat": Family(
        _internvl_chat, lambda tokenizer: tokenizer, INTERN_CHAT, checkpoint=_internvl_chat_checkpoint
    ),
    "llava_onevision": Family(_llava_onevision, _llava_onevision_processor, LLAVA),
    "gemma3": Family(
        _gemma3,
        _gemma3_processor,
        GEMMA,
        arguments=("--enable-multimodal",),
        checkpoint=common.renamed(
            ("model.language_model.", "language_model.model."),
            ("model.vision_tower.", "vision_tower.vision_model."),
            ("model.", ""),
        ),
    ),
    "aya_vision": Family(_aya_vision, _aya_vision_processor, AYA),
}
