"""Makes a vision-language model of a few megabytes: real architecture and processor, random weights, meaningless text.

Made with `transformers` alone, so it needs no download. The same family and seed give the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD_SIZE, VISION_HEAD_SIZE = 64, 32
# Random prompts of a benchmark are drawn from the vocabulary; a large one keeps them away from the special tokens.
WORDS = 8000

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' or 'video' in part -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


@dataclass(frozen=True)
class Size:
    """How large each half is. Nothing but a comparison of memory needs more than the default."""

    hidden: int = 256
    layers: int = 2
    vision_hidden: int = 128
    vision_layers: int = 4


@dataclass(frozen=True)
class Family:
    """What differs between two model families."""

    build: Callable[[dict[str, int], int, Size], PreTrainedModel]
    patch_size: int
    processor: str
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    @property
    def pixels_per_token(self) -> int:
        """The side, in pixels, of the square that becomes one token (two by two patches are merged)."""
        return 2 * self.patch_size


def _text_config(ids: dict[str, int], vocab_size: int, size: Size) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": size.hidden,
        "intermediate_size": 2 * size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // HEAD_SIZE,
        "num_key_value_heads": size.hidden // HEAD_SIZE // 2,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [8, 12, 12]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        # Wide enough that two images give visibly different log-probabilities.
        "initializer_range": 0.08,
    }


def _top_config(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def _vision_config(size: Size) -> dict[str, Any]:
    return {
        "depth": size.vision_layers,
        "hidden_size": size.vision_hidden,
        "intermediate_size": 2 * size.vision_hidden,
        "num_heads": size.vision_hidden // VISION_HEAD_SIZE,
        "out_hidden_size": size.hidden,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "initializer_range": 0.08,
    }


def _qwen2_5_vl(ids: dict[str, int], vocab_size: int, size: Size) -> PreTrainedModel:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = _vision_config(size) | {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1, 3]}
    config = Qwen2_5_VLConfig(text_config=_text_config(ids, vocab_size, size), vision_config=vision, **_top_config(ids))
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(ids: dict[str, int], vocab_size: int, size: Size) -> PreTrainedModel:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    vision = _vision_config(size) | {
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [1, 2],
    }
    config = Qwen3VLConfig(text_config=_text_config(ids, vocab_size, size), vision_config=vision, **_top_config(ids))
    return Qwen3VLForConditionalGeneration(config)


FAMILIES = {
    "qwen2_5_vl": Family(
        build=_qwen2_5_vl,
        patch_size=14,
        processor="Qwen2_5_VLProcessor",
        image_mean=(0.48145466, 0.4578275, 0.40821073),
        image_std=(0.26862954, 0.26130258, 0.27577711),
    ),
    "qwen3_vl": Family(
        build=_qwen3_vl,
        patch_size=16,
        processor="Qwen3VLProcessor",
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    ),
}


DEFAULT_FAMILY = "qwen2_5_vl"


def make(out: Path, family: str = DEFAULT_FAMILY, seed: int = 0, size: Size = Size()) -> Path:
    """Write the model into `out` and return it."""
    recipe = FAMILIES[family]
    out.mkdir(parents=True, exist_ok=True)
    ids, vocab_size = _write_tokenizer(out)
    _write_weights(out, lambda: recipe.build(ids, vocab_size, size), seed)
    _write_processor(out, recipe)
    return out


def cached(family: str = DEFAULT_FAMILY, seed: int = 0) -> Path:
    """The same, made once per machine and per version of this file."""
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-embedding-relay"
    model = cache / f"{family}-{seed}-{version}"
    if not model.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = make(Path(scratch) / "model", family, seed)
            # Somebody else may have finished first; theirs is the same.
            with contextlib.suppress(OSError):
                made.rename(model)
    return model


def _write_tokenizer(out: Path) -> tuple[dict[str, int], int]:
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    vocab, merges = _vocabulary()
    tokenizer: Any = Qwen2Tokenizer(vocab=vocab, merges=merges)
    tokens: list[str | AddedToken] = [AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.add_special_tokens(
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": list(SPECIAL_TOKENS)}
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    ids: dict[str, int] = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    # Tensor parallel ranks split the vocabulary: a round number divides.
    return ids, -(-len(tokenizer) // 128) * 128


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE over made-up words: every byte, then each word's prefixes, letter by letter."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    dice = random.Random(0)  # not the seed of the weights: all tiny models share one tokenizer
    while len(vocab) < WORDS:
        word = "".join(dice.choice("bdfgklmnprstvz") + dice.choice("aeiou") for _ in range(dice.randint(1, 3)))
        for piece in ("\u0120" + word, word):  # U+0120 is how byte-level BPE writes a leading space
            for end in range(2, len(piece) + 1):
                if piece[:end] not in vocab:
                    vocab[piece[:end]] = len(vocab)
                    merges.append((piece[: end - 1], piece[end - 1]))
    return vocab, merges


def _write_weights(out: Path, build: Callable[[], PreTrainedModel], seed: int) -> None:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build().bfloat16()
    model.save_pretrained(out)
    # safetensors makes it readable by its owner alone, which surprises a server that runs as somebody else.
    (out / "model.safetensors").chmod(0o644)


def _write_processor(out: Path, recipe: Family) -> None:
    settings = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": recipe.processor,
        "patch_size": recipe.patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 4 * recipe.patch_size**2, "longest_edge": 16384 * recipe.pixels_per_token**2},
        "image_mean": recipe.image_mean,
        "image_std": recipe.image_std,
    }
    (out / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    video = settings | {"video_processor_type": "Qwen2VLVideoProcessor"}
    if recipe.processor == "Qwen3VLProcessor":
        video["video_processor_type"] = "Qwen3VLVideoProcessor"
    del video["image_processor_type"]
    (out / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")
