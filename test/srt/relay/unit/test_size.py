"""`sglang-relay size`: its figures are those of the code that lays buffers out and hands blocks out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from embedding_relay import config
from embedding_relay.config import RelayConfig
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.protocol.language.reserve import AT_ONCE
from embedding_relay.protocol.messages import TransferEmbeddingInfo
from embedding_relay.protocol.status import Status
from embedding_relay.tools import cli, size
from embedding_relay.tools.size import CannotSize, read_model
from support.protocol import BLOCK, ENCODE, PEER, PROVED, language_side, report, sent

# What the published models of these kinds say.
QWEN2_5_VL = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "model_type": "qwen2_5_vl",
    "hidden_size": 3584,
    "torch_dtype": "bfloat16",
    "vision_config": {"patch_size": 14, "spatial_merge_size": 2},
}
QWEN2_5_VL_PROCESSOR = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "merge_size": 2}
QWEN3_VL = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "model_type": "qwen3_vl",
    "text_config": {"hidden_size": 4096, "dtype": "bfloat16"},
    "vision_config": {"patch_size": 16, "spatial_merge_size": 2, "deepstack_visual_indexes": [8, 16, 24]},
}
QWEN3_VL_PROCESSOR = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}


def model_folder(folder: Path, config: dict[str, Any], processor: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    return model_folder(tmp_path, QWEN3_VL, QWEN3_VL_PROCESSOR)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (config.CACHE_BLOCKS, config.BLOCK_SIZE, config.DEFAULT_ALLOCATE):
        monkeypatch.delenv(name, raising=False)


def figures(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert cli.main(["size", "--json", *map(str, arguments)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found, dict)
    return found


# ---- from the configuration


@pytest.mark.parametrize(
    ("width", "height", "rows"),
    [(1024, 1024, 1024), (64, 64, 64), (10_000, 10_000, 16_384), (1000, 500, 496)],
    ids=["a grid of squares", "scaled up", "scaled down", "each side to the nearest multiple"],
)
def test_the_rows_of_a_picture(qwen3: Path, width: int, height: int, rows: int) -> None:
    assert read_model(str(qwen3)).rows_of_picture(width, height) == rows


def test_an_older_configuration_has_its_parts_at_the_top(tmp_path: Path) -> None:
    model = read_model(str(model_folder(tmp_path, QWEN2_5_VL, QWEN2_5_VL_PROCESSOR)))
    assert (model.hidden_size, model.dtype, model.deepstack_rows) == (3584, "bfloat16", 0)
    assert model.rows_of_picture(896, 896) == 32 * 32


def test_a_model_that_makes_as_many_rows_of_every_picture(tmp_path: Path) -> None:
    gemma = {"model_type": "gemma3", "mm_tokens_per_image": 256, "text_config": {"hidden_size": 2560}}
    model = read_model(str(model_folder(tmp_path, gemma)))
    assert {model.rows_of_picture(100, 100), model.rows_of_picture(2000, 100)} == {256}


@pytest.mark.parametrize(
    ("said", "wanted", "taken"),
    [
        ({"dtype": "float32", "model_type": "qwen3_vl_text"}, "auto", "float16"),
        ({"dtype": "float32", "model_type": "gemma3_text"}, "auto", "bfloat16"),
        ({}, "auto", "float16"),
        ({"dtype": "bfloat16"}, "half", "float16"),
    ],
)
def test_the_type_of_values_is_what_sglang_takes(tmp_path: Path, said: dict[str, str], wanted: str, taken: str) -> None:
    changed = {**QWEN3_VL, "text_config": {"hidden_size": 64, **said}}
    assert read_model(str(model_folder(tmp_path, changed)), wanted).dtype == taken


def test_the_file_itself_may_be_named(qwen3: Path) -> None:
    assert read_model(str(qwen3 / "config.json")).hidden_size == 4096


@pytest.mark.parametrize(
    ("config", "processor", "named"),
    [
        ({**QWEN3_VL, "model_type": "internvl"}, QWEN3_VL_PROCESSOR, "--rows-per-picture"),
        (QWEN3_VL, None, "preprocessor_config.json"),
        ({**QWEN3_VL, "text_config": {}}, QWEN3_VL_PROCESSOR, "hidden_size"),
        ({**QWEN3_VL, "text_config": {"hidden_size": 8, "dtype": "float64"}}, QWEN3_VL_PROCESSOR, "float64"),
    ],
)
def test_what_is_missing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, Any], processor: Any, named: str
) -> None:
    assert cli.main(["size", "--model", str(model_folder(tmp_path, config, processor))]) == 1
    said = capsys.readouterr()
    assert named in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_configuration_that_cannot_be_read(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CannotSize, match=r"config\.json"):
        read_model(str(tmp_path))


def test_a_kind_that_is_not_known_can_be_sized_with_its_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder(tmp_path, {**QWEN3_VL, "model_type": "internvl"})
    assert figures(capsys, "--model", folder, "--rows-per-picture", 256)["rows_per_picture"] == 256


# ---- what follows from it


def layout(blocks: int = 512, block_size: int = 128) -> BufferLayout:
    return BufferLayout(hidden_size=4096, dtype="bfloat16", deepstack_rows=3, block_size=block_size, blocks=blocks)


def test_memory_is_what_the_layout_says(qwen3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "--model", qwen3)
    assert found["pool_bytes"] == 512 * (sum(layout().item_lens) + 128 * 32)
    assert found["bytes_per_row"] == 4096 * 2 * 4 + 32
    assert found["picture_bytes"] == 1024 * 4096 * 2 * 4
    assert found["request_bytes"] == 1024 * 4096 * 2 * 4 + (1024 + 512) * 32 + 64


def first_offers_of(blocks: int, default: int | None, rows: int, requests: int) -> list[int]:
    """Rows on offer, at first, to so many requests of one encode instance that has delivered a request before."""
    side = language_side(blocks=blocks, default=default)
    side.request(PROVED, PEER, 0.0, hint_rows=rows)
    side.peer_resolved(PEER, ENCODE, "encode-1", 0.0)
    side.receive(report(Status.SUCCESS, rows, room=PROVED), 0.0)
    side.copied(PROVED, rows, rows, 0.0)
    effects = [one for room in range(100, 100 + requests) for one in sent(side.request(room, PEER, 0.0))]
    return [one.allocated_tokens for one in effects if isinstance(one, TransferEmbeddingInfo)]


@pytest.mark.parametrize("default", [1, BLOCK, 10, 64, None])
@pytest.mark.parametrize("blocks", [4, 8, 100, 512])
def test_requests_that_are_admitted_are_those_that_get_blocks(default: int | None, blocks: int) -> None:
    offers = first_offers_of(blocks, default, 10, blocks + 1)
    assert size.admitted(layout(blocks, BLOCK), default, 10, 1) == len(offers)


@pytest.mark.parametrize("at_once", [1, 7, AT_ONCE, 40])
@pytest.mark.parametrize("rows", [1, BLOCK, 10])
def test_the_recommended_pool_is_the_smallest_that_does(rows: int, at_once: int) -> None:
    blocks = size.blocks_for(rows, at_once, BLOCK)
    assert fully_offered(blocks, rows, at_once) == at_once
    assert blocks <= -(-rows // BLOCK) or fully_offered(blocks - 1, rows, at_once) < at_once


def fully_offered(blocks: int, rows: int, at_once: int) -> int:
    """Requests that are offered blocks for all of their rows at once, with `auto`."""
    return sum(offered >= rows for offered in first_offers_of(blocks, None, rows, at_once))


def test_recommended_settings_are_taken(qwen3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "--model", qwen3, "--at-once", 40, "--block-size", 64)
    taken = RelayConfig.from_environment(found["recommended"])
    assert (taken.block_size, taken.default_allocate_tokens) == (64, None)
    assert found["recommended_pool_bytes"] == taken.cache_blocks * (sum(layout(block_size=64).item_lens) + 64 * 32)


def test_a_pool_that_no_instance_would_take_is_refused(qwen3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["size", "--model", str(qwen3), "--at-once", "100000"]) == 1
    assert config.CACHE_BLOCKS in capsys.readouterr().err


def test_the_pool_that_is_described_is_that_of_the_environment(
    qwen3: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(config.CACHE_BLOCKS, "64")
    monkeypatch.setenv(config.DEFAULT_ALLOCATE, "auto")
    assert figures(capsys, "--model", qwen3)["blocks"] == 64
    changed = figures(capsys, "--model", qwen3, "--blocks", 32, "--default-rows", 256)
    assert (changed["blocks"], changed["default_rows"]) == (32, 256)


# ---- rates


def test_the_network_and_the_instances_that_a_rate_needs(qwen3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measured = ("--images-per-second", 30, "--per-request", 2, "--encode-per-second", 8, "--answers-per-second", 4)
    found = figures(capsys, "--model", qwen3, *measured, "--transfer-ms", 2000)
    assert found["requests_per_second"] == 15
    assert found["wire_bytes_per_second"] == 15 * found["request_bytes"]
    assert (found["encode_instances"], found["language_instances"]) == (4, 4)
    assert found["encode_per_language"] == 1
    assert found["at_once"] == 30, "15 per second, each for two seconds"


def test_nothing_is_said_that_was_not_measured(qwen3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, "--model", qwen3, "--images-per-second", 30)
    assert {"encode_instances", "language_instances", "encode_per_language"} & set(found) == set()
    assert found["at_once"] == AT_ONCE


def test_every_figure_is_told(qwen3: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["size", "--model", str(qwen3), "--images-per-second", "10", "--encode-per-second", "4"]
    assert cli.main([*arguments, "--answers-per-second", "3"]) == 0
    said = capsys.readouterr().out
    for told in (
        *("hidden size 4096 and 3 deepstack rows, bfloat16", "1,024 rows, 32 MiB", "row       32,800 bytes"),
        *("SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE=auto", "3 instances", "4 instances", "0.75 encode instances"),
    ):
        assert told in said
    assert max(map(len, said.splitlines())) <= 120


@pytest.mark.parametrize("option", [("--side", "0"), ("--side", "10x"), ("--per-request", "-1"), ("--at-once", "x")])
def test_wrong_numbers_are_refused(qwen3: Path, option: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["size", "--model", str(qwen3), *option])
    assert ended.value.code == 2
