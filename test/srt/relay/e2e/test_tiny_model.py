"""The tiny models: real processors take them, and the same arguments give the same bytes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from embedding_relay.tools import cli, tiny_model
from embedding_relay.tools.chat_client import picture
from support.sglang_ci import register_cpu_ci, run_tests

register_cpu_ci(est_time=60, suite="base-c-test-cpu")


def hashes(model: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in model.iterdir()}


@pytest.fixture(scope="module")
def processor(model: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(model)


def test_the_same_arguments_give_the_same_bytes(model: Path, family: str, tmp_path: Path) -> None:
    assert cli.main(["tiny-model", str(tmp_path / "again"), "--family", family]) == 0
    assert hashes(tmp_path / "again") == hashes(model)


def test_another_seed_changes_the_weights_alone(model: Path, family: str, tmp_path: Path) -> None:
    other, here = hashes(tiny_model.make(tmp_path / "other", family, seed=1)), hashes(model)
    assert {name for name in here if here[name] != other[name]} == {"model.safetensors"}


def test_one_token_for_each_square_of_pixels(processor: Any, family: str) -> None:
    side = tiny_model.FAMILIES[family].pixels_per_token
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what is this<|im_end|>\n<|im_start|>assistant\n"
    )
    (ids,) = processor(text=[text], images=[picture(3 * side, 5 * side)])["input_ids"]
    assert list(ids).count(processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")) == 15


def test_the_tokenizer_can_say_anything(processor: Any) -> None:
    text = "Grüße, 世界! 123\n\ttab"
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text
    # Random prompts of a benchmark are drawn from what is not special.
    assert set(tiny_model.SPECIAL_TOKENS) <= set(processor.tokenizer.all_special_tokens)


def test_deepstack_where_the_family_has_it(model: Path, family: str) -> None:
    vision = json.loads((model / "config.json").read_text())["vision_config"]
    assert vision.get("deepstack_visual_indexes", []) == ([1, 2] if family == "qwen3_vl" else [])


if __name__ == "__main__":
    run_tests(__file__)
