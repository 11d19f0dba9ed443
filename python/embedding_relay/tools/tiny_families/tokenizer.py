"""The tokenizer of tiny models: bytes and made-up words, the special tokens of a family, a chat template."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
IMAGE
{%- elif part.type == 'video' or 'video' in part -%}
VIDEO
{%- elif part.type == 'audio' or 'audio' in part -%}
AUDIO
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
class Prompt:
    """What stands for media in the prompts of a family."""

    image: str = ""
    video: str = ""
    audio: str = ""
    tokens: tuple[str, ...] = ()
    """Special tokens beside those that all tiny models have."""
    named: dict[str, str] = field(default_factory=dict)
    """Those that the processor asks its tokenizer for, as `tokenizer.image_token` for example."""


@dataclass(frozen=True)
class Words:
    tokenizer: Any
    ids: dict[str, int]
    """Of the special tokens."""
    vocabulary: int
    """Rows of the embedding table."""


def write(out: Path, prompt: Prompt) -> Words:
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    vocab, merges = _vocabulary()
    special = [*SPECIAL_TOKENS, *prompt.tokens]
    tokenizer: Any = Qwen2Tokenizer(vocab=vocab, merges=merges, extra_special_tokens=prompt.named)
    tokens: list[str | AddedToken] = [AddedToken(name, special=True, normalized=False) for name in special]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": special}, replace_extra_special_tokens=False)
    tokenizer.chat_template = (
        CHAT_TEMPLATE.replace("IMAGE", prompt.image).replace("VIDEO", prompt.video).replace("AUDIO", prompt.audio)
    )
    tokenizer.save_pretrained(out)
    ids: dict[str, int] = {name: tokenizer.convert_tokens_to_ids(name) for name in special}
    # Tensor parallel ranks split the vocabulary: a round number divides.
    return Words(tokenizer, ids, -(-len(tokenizer) // 128) * 128)


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-level BPE over made-up words: every byte, then each word's prefixes, letter by letter."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocab = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    dice = random.Random(0)  # not the seed of the weights: all tiny models share one vocabulary
    while len(vocab) < WORDS:
        word = "".join(dice.choice("bdfgklmnprstvz") + dice.choice("aeiou") for _ in range(dice.randint(1, 3)))
        for piece in ("\u0120" + word, word):  # U+0120 is how byte-level BPE writes a leading space
            for end in range(2, len(piece) + 1):
                if piece[:end] not in vocab:
                    vocab[piece[:end]] = len(vocab)
                    merges.append((piece[: end - 1], piece[end - 1]))
    return vocab, merges
