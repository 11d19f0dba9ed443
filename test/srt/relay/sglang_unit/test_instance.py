"""What an instance tells others about itself and its model, and what it lets be handed to it; by SGLang's settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from embedding_relay.config import AUTO, MOONCAKE, SHARED_MEMORY, RelayConfig
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.protocol.messages import Handshake
from embedding_relay.tools import tiny_model
from embedding_relay.transport.neighbours import ALONE
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.disaggregation.multimodal import instance
from sglang.srt.managers.schedule_batch import Modality

FAMILIES = ("qwen2_5_vl", "qwen3_vl")


def configured(path: Path, **arguments: Any) -> ModelConfig:
    """As the schedulers of both halves have it."""
    return ModelConfig(model_path=str(path), **arguments)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Path:
    return tiny_model.cached(request.param)


def copied(model: Path, where: Path, **changes: Any) -> Path:
    """The same model under another name, with another configuration. A key of a part is `part.key`."""
    shutil.copytree(model, where, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((where / "config.json").read_text())
    for name, value in changes.items():
        part, _, key = name.rpartition(".")
        (config[part] if part else config)[key] = value
    (where / "config.json").write_text(json.dumps(config))
    return where


def test_the_halves_of_a_model_are_alike_wherever_it_lies(model: Path, tmp_path: Path) -> None:
    elsewhere = copied(model, tmp_path / "another name")
    one = instance.fingerprint(configured(model))
    assert one == instance.fingerprint(configured(elsewhere))
    assert {"architecture", "vocabulary", "image_token_id", "vision_config.depth"} <= dict(one).keys()


def test_how_its_numbers_are_stored_does_not_matter(model: Path, tmp_path: Path) -> None:
    """A quantized language half goes with an encode half that is not; the rows' own type is compared elsewhere."""
    fp8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    other_writer = {"transformers_version": "9.9", "eos_token_id": 7, "pad_token_id": 7}
    quantized = copied(model, tmp_path / "quantized", quantization_config=fp8, **other_writer)
    one, other = configured(model), configured(quantized, dtype="float16")
    assert one.dtype != other.dtype
    assert instance.fingerprint(one) == instance.fingerprint(other)


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"image_token_id": 11}, "image_token_id"),
        ({"vision_config.depth": 9}, "vision_config.depth"),
        ({"vision_config.patch_size": 7}, "vision_config.patch_size"),
        ({"architectures": ["Another"]}, "architecture"),
    ],
)
def test_another_model_is_told_by_name(change: dict[str, Any], fact: str, model: Path, tmp_path: Path) -> None:
    other = copied(model, tmp_path / "other", **change)
    ours, theirs = (dict(instance.fingerprint(configured(path))) for path in (model, other))
    assert [name for name in ours if ours[name] != theirs[name]] == [fact]


def test_families_are_told_apart() -> None:
    prints = [instance.fingerprint(configured(tiny_model.cached(family))) for family in FAMILIES]
    assert len(set(prints)) == len(FAMILIES)


def test_a_handshake_takes_it_whatever_a_configuration_holds() -> None:
    vision = {"depth": "", "patch_size": (2, 14)}
    odd = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=["Ünusual model\n" * 20], vision_config=vision),
        vocab_size=1,
        hidden_size=2,
        num_hidden_layers=3,
    )
    facts = instance.fingerprint(odd)
    assert dict(facts)["vision_config.patch_size"] == "2,14"
    said = BufferLayout(8, "bfloat16", 0, 128, 4, facts).handshake()
    assert msgspec.json.decode(msgspec.json.encode(said), type=Handshake) == said


@pytest.mark.parametrize("family", FAMILIES)
def test_what_may_be_handed_to_a_model(family: str) -> None:
    config = configured(tiny_model.cached(family))
    model = SimpleNamespace(get_image_feature=None, get_video_feature=None)
    worker = SimpleNamespace(model_runner=SimpleNamespace(model=model))
    limits = instance.model_limits(SimpleNamespace(model_config=config, tp_worker=worker))
    assert (limits.vocabulary, limits.modalities) == (config.vocab_size, {1, 2})
    assert limits.positions == config.context_len
    assert limits.narrow == {}
    model.use_deepstack = {Modality.IMAGE: True, Modality.VIDEO: True}
    narrow = instance.model_limits(SimpleNamespace(model_config=config, tp_worker=worker)).narrow
    assert narrow[Modality.AUDIO.value] == config.hidden_size
    assert not {Modality.IMAGE.value, Modality.VIDEO.value} & narrow.keys()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0"])
def test_all_addresses_become_one_that_others_reach(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance, "get_serving", lambda: SimpleNamespace(host=host))
    monkeypatch.setattr(instance, "get_local_ip_auto", lambda: "192.0.2.7")
    assert instance.reachable_host() == "192.0.2.7"


def test_the_operators_address_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance, "get_serving", lambda: SimpleNamespace(host="localhost"))
    assert instance.reachable_host() == "localhost"


# ---- which ranks receive


def test_an_instance_of_one_rank_asks_nobody() -> None:
    assert instance._neighbours(SimpleNamespace(world_size=1), RelayConfig()) is ALONE


@pytest.mark.parametrize(("plane", "may_share"), [(AUTO, True), (SHARED_MEMORY, True), (MOONCAKE, False)])
def test_ranks_share_rows_where_memory_may_be_shared(
    plane: str, may_share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(instance, "meet", lambda *arguments, **options: asked.append((arguments, options)))
    group = SimpleNamespace(world_size=4, rank_in_group=2, all_gather_object=list)
    instance._neighbours(group, RelayConfig(data_plane=plane))
    assert asked == [((2, list), {"may_share": may_share})]
