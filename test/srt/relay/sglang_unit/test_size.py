"""`sglang-relay size` beside what it stands for: the processors of the models, and SGLang's defaults."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy
import pytest
import transformers
from transformers.models.pixtral.image_processing_pixtral import get_resize_output_image_size

from embedding_relay import config
from embedding_relay.tools import cli, size, tiny_model
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.environ import envs
from support import pages
from support.repo import REPO

# A few pixels, panoramas, scans; and beyond the limits for the area on either side.
SIDES = [(28, 28), (56, 84), (100, 100), (333, 777), (640, 480), (1024, 1024), (1920, 1080), (4000, 300), (9000, 7000)]
GRIDS = ["qwen2_5_vl", "qwen3_vl", "glm4v", "glm_ocr", "paddleocr_vl"]


@pytest.mark.parametrize("family", GRIDS)
def test_rows_are_those_of_the_models_own_processor(family: str) -> None:
    folder = tiny_model.cached(family)
    settings = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    processor = getattr(transformers, settings["image_processor_type"]).from_dict(settings)
    model, merged = size.read_model(str(folder)), settings["merge_size"] ** 2
    ours = [model.rows_of_picture(width, height) for width, height in SIDES]
    theirs = [processor.get_number_of_image_patches(height, width, {}) // merged for width, height in SIDES]
    assert ours == theirs


@pytest.mark.parametrize("family", ["pixtral", "mistral3", "lighton_ocr"])
def test_rows_in_lines_are_those_of_the_models_own_processor(family: str) -> None:
    folder = tiny_model.cached(family)
    settings = json.loads((folder / "processor_config.json").read_text())
    unit, most = settings["patch_size"] * settings["spatial_merge_size"], settings["image_processor"]["size"]
    model = size.read_model(str(folder))
    for width, height in SIDES:
        nothing = numpy.broadcast_to(numpy.uint8(0), (height, width, 3))
        high, wide = get_resize_output_image_size(nothing, (most["longest_edge"],) * 2, (unit, unit))
        assert model.rows_of_picture(width, height) == (high // unit) * (wide // unit)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_omni", "gemma3", "internvl"])
def test_widths_and_types_are_those_that_sglang_finds(family: str) -> None:
    folder = tiny_model.cached(family)
    model, found = size.read_model(str(folder)), ModelConfig(str(folder))
    assert (model.hidden_size, f"torch.{model.dtype}") == (found.hidden_size, str(found.dtype))


def test_the_row_cache_is_as_large_as_sglang_makes_it() -> None:
    assert envs.SGLANG_VLM_CACHE_SIZE_MB.get() == size.ROW_CACHE_MB


def test_the_page_shows_what_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of tuning.md, about the model of tutorial.md; after the first is what it prints."""
    for name in (config.CACHE_BLOCKS, config.BLOCK_SIZE, config.DEFAULT_ALLOCATE):
        monkeypatch.delenv(name, raising=False)
    ours = [one for one in pages.blocks(REPO / "docs/tuning.md") if one.run_by]
    assert [one.language for one in ours] == ["bash", "text", "bash"]
    printed = [said_by(block, capsys) for block in ours if block.language == "bash"]
    assert printed[0] == ours[1].text
    assert "ratio     1 encode instances" in printed[1]


def said_by(block: pages.Block, capsys: pytest.CaptureFixture[str]) -> str:
    (command,) = pages.commands(block.text)
    model = str(tiny_model.cached("qwen3_vl"))
    assert cli.main([model if word == "/tmp/tiny-model" else word for word in command.words[1:]]) == 0
    return capsys.readouterr().out


def test_a_name_whose_files_are_in_the_cache_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Hugging Face's library lays it out. Nothing is fetched: a name that is not there is refused."""
    here = tmp_path / "models--Some--Model"
    (here / "refs").mkdir(parents=True)
    (here / "refs/main").write_text("0" * 40)
    shutil.copytree(tiny_model.cached("qwen3_vl"), here / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert size.read_model("Some/Model").rows_of_picture(896, 896) == 784
    with pytest.raises(size.CannotSize, match="Some/Other"):
        size.read_model("Some/Other")
