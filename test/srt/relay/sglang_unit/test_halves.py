"""Which half of a model an instance has: the flags that SGLang's classes read, and the tower that is not built."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang.srt.disaggregation.multimodal import halves, modes

FAMILY = "Qwen2_5_VLForConditionalGeneration"


def config_of(*architectures: str) -> Any:
    return SimpleNamespace(hf_config=SimpleNamespace(architectures=list(architectures)))


def tower_class(architecture: str) -> type:
    module, name = halves._TOWERS[architecture]
    return getattr(importlib.import_module(module), name)


@pytest.fixture(autouse=True)
def every_tower_is_put_back() -> Iterator[None]:
    before = {name: tower_class(name) for name in halves._TOWERS}
    yield
    assert {name: tower_class(name) for name in halves._TOWERS} == before


def test_an_encode_instance_leaves_the_language_model_out() -> None:
    config = config_of(FAMILY)
    halves.mark_half(config, modes.ENCODE)
    assert vars(config.hf_config) == {"architectures": [FAMILY], "encoder_only": True}


def test_a_language_instance_leaves_the_tower_out() -> None:
    config = config_of(FAMILY)
    halves.mark_half(config, modes.LANGUAGE)
    assert vars(config.hf_config) == {"architectures": [FAMILY], "language_only": True}


@pytest.mark.parametrize("architecture", halves._TOWERS)
def test_sglang_still_has_the_towers_that_we_know(architecture: str) -> None:
    assert issubclass(tower_class(architecture), torch.nn.Module)
    with halves.no_vision_tower(config_of(architecture)):
        assert tower_class(architecture) is halves.NoTower


def test_a_model_that_fails_to_load_puts_its_tower_back() -> None:
    with pytest.raises(KeyError), halves.no_vision_tower(config_of(FAMILY)):
        raise KeyError("weights")


def test_an_unknown_class_keeps_its_tower_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with halves.no_vision_tower(config_of("SomebodyElsesModel")):
        assert tower_class(FAMILY) is not halves.NoTower
    assert "SomebodyElsesModel" in caplog.text
    assert "keeps its vision tower" in caplog.text


def test_no_tower_takes_whatever_a_tower_takes_and_encodes_nothing() -> None:
    tower = halves.NoTower(SimpleNamespace(hidden_size=8), 1e-6, quant_config=None, prefix="visual")
    assert list(tower.parameters()) == []
    with pytest.raises(RuntimeError, match="has no vision tower"):
        tower(torch.zeros(1))


def test_an_encode_instance_takes_prompts_as_long_as_the_model_does() -> None:
    scheduler = SimpleNamespace(model_config=SimpleNamespace(context_len=1000), max_req_len=15, max_req_input_len=10)
    halves.restore_prompt_limits(scheduler)
    assert (scheduler.max_req_len, scheduler.max_req_input_len) == (999, 994)
