"""What is decided before an instance starts: what its processes are told about cores, and which ranks it may have."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from embedding_relay.protocol.errors import SettingError
from sglang.srt import platforms
from sglang.srt.disaggregation.multimodal import server_settings
from sglang.srt.disaggregation.multimodal.cpu_platform import RelayCpuPlatform
from sglang.srt.environ import envs

ON_CORES = RelayCpuPlatform()
ON_A_CARD = SimpleNamespace(device_type="cuda")


@pytest.fixture
def own_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What this process, whose libgomp is loaded, was set to; its environment is an empty one."""
    monkeypatch.setattr(os, "environ", {})
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    return given


def test_processes_on_cores_are_told(
    own_threads: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(platforms, "_current_platform", ON_CORES)
    with caplog.at_level("INFO"):
        server_settings.share_cores()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert own_threads == [1]
    assert [record.message for record in caplog.records if record.message.startswith("relay cores: ")]


def test_what_the_operator_said_stays(own_threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "_current_platform", ON_CORES)
    os.environ |= {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}
    server_settings.share_cores()
    assert told() == {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"}
    assert own_threads == []


def test_nothing_is_said_where_a_card_computes(own_threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "_current_platform", ON_A_CARD)
    server_settings.share_cores()
    assert (told(), own_threads) == ({}, [])


def told() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}


# ---- how rows get there


@pytest.mark.parametrize(("plane", "starts"), [("auto", 1), ("mooncake", 1), ("shared_memory", 0)])
def test_a_device_is_tried_where_an_engine_will_use_it(
    plane: str, starts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    class Plane:
        """Would be an engine over RDMA."""

        is_tcp = False

        def __init__(self, host: str, transport: str, device: str) -> None:
            self.device = device

        def start(self, regions: object) -> None:
            started.append(self.device)

        def close(self) -> None: ...

    monkeypatch.setattr(server_settings, "MooncakeDataPlane", Plane)
    monkeypatch.setattr(server_settings, "resolving_view", lambda _: SimpleNamespace(disaggregation_ib_device="mlx5_0"))
    monkeypatch.setenv("SGLANG_EMBEDDING_DATA_PLANE", plane)
    server_settings.check_transport(None)
    assert started == ["mlx5_0"] * starts


# ---- which ranks there may be


def settled(monkeypatch: pytest.MonkeyPatch, mode: str, **sizes: Any) -> dict[str, Any]:
    """What follows from these arguments; raises SettingError."""
    plain = {"tp_size": 1, "pp_size": 1, "dp_size": 1, "attn_cp_size": 1, "attn_dp_size": 1}
    others = {"enable_dp_attention": False, "disaggregation_transfer_backend": "mooncake", "host": "127.0.0.1"}
    more = {"max_running_requests": None, "encoder_urls": [], "disaggregation_mode": mode}
    arguments = SimpleNamespace(**{**plain, **others, **more, **sizes})
    declared: dict[str, Any] = {}
    monkeypatch.setattr(server_settings, "resolving_view", lambda asked: asked)
    monkeypatch.setattr(server_settings, "declare_resolution", lambda _asked, _source, **what: declared.update(what))
    monkeypatch.setattr(server_settings.modes, "of", lambda _asked: mode)
    monkeypatch.setattr(os, "environ", {**os.environ})
    server_settings.settle(arguments)
    return declared


@pytest.mark.parametrize("mode", ["encode", "language"])
@pytest.mark.parametrize("sizes", [{}, {"tp_size": 2}, {"tp_size": 4}, {"dp_size": 2}, {"tp_size": 2, "dp_size": 2}])
def test_both_halves_may_have_tensor_and_data_parallel_ranks(
    monkeypatch: pytest.MonkeyPatch, mode: str, sizes: dict[str, int]
) -> None:
    assert bool(settled(monkeypatch, mode, **sizes)) is (mode == "encode")


def test_pipeline_stages_are_for_the_language_half(monkeypatch: pytest.MonkeyPatch) -> None:
    settled(monkeypatch, "language", pp_size=2)
    with pytest.raises(SettingError, match=r"^--pp-size: "):
        settled(monkeypatch, "encode", pp_size=2)


@pytest.mark.parametrize("mode", ["encode", "language"])
@pytest.mark.parametrize(
    ("sizes", "flag"),
    [
        ({"enable_dp_attention": True, "dp_size": 2, "tp_size": 2}, "--enable-dp-attention"),
        ({"attn_dp_size": 2, "tp_size": 2}, "--attn-dp-size"),
        ({"attn_cp_size": 2, "tp_size": 2}, "--attn-cp-size"),
    ],
)
def test_what_nobody_has_tried_is_refused_by_its_flag(
    monkeypatch: pytest.MonkeyPatch, mode: str, sizes: dict[str, Any], flag: str
) -> None:
    with pytest.raises(SettingError, match=flag):
        settled(monkeypatch, mode, **sizes)


@pytest.mark.parametrize("mode", ["encode", "language"])
def test_sglangs_server_in_rust_is_refused(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """None of our hooks would see a request before the scheduler does: nobody would ask the rules about media."""
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    with pytest.raises(SettingError, match="SGLANG_RUST_SERVER"):
        settled(monkeypatch, mode)


@pytest.mark.parametrize("mode", ["encode", "language"])
@pytest.mark.parametrize(("said", "seconds"), [({}, 120), ({"SGLANG_TIMEOUT_KEEP_ALIVE": "7"}, 7)])
def test_idle_connections_outlive_those_of_routers_unless_the_operator_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, mode: str, said: dict[str, str], seconds: int
) -> None:
    monkeypatch.setattr(os, "environ", said)
    settled(monkeypatch, mode)
    assert envs.SGLANG_TIMEOUT_KEEP_ALIVE.get() == seconds


# ---- an instance that knows its encode instances


@pytest.mark.parametrize("url", ["http://encode-0:30000", "https://10.0.0.1", "http://[::1]:30000/"])
def test_encode_instances_are_named_by_their_address(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    settled(monkeypatch, "language", encoder_urls=[url])
    settled(monkeypatch, "language", encoder_urls=[url], disaggregation_mode="prefill")


@pytest.mark.parametrize("url", ["encode-0:30000", "http://", "tcp://a:1", "http://a:1/generate"])
def test_anything_else_is_refused_with_an_example(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    with pytest.raises(SettingError, match="is like http://host:30000"):
        settled(monkeypatch, "language", encoder_urls=[url])


def test_an_encode_instance_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="this one encodes"):
        settled(monkeypatch, "encode", encoder_urls=["http://a:1"])


@pytest.mark.parametrize("size", ["dp_size", "pp_size"])
def test_a_prefill_instance_has_one_data_parallel_rank_and_one_stage(
    monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    one: dict[str, Any] = {"encoder_urls": ["http://a:1"], "disaggregation_mode": "prefill"}
    settled(monkeypatch, "language", **one, tp_size=2)
    with pytest.raises(SettingError, match=f"--{size.replace('_', '-')} 2: .* more instances"):
        settled(monkeypatch, "language", **one, **{size: 2})


def test_the_cache_of_a_prefill_instance_may_travel_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    other: dict[str, Any] = {"disaggregation_transfer_backend": "nixl", "encoder_urls": ["http://a:1"]}
    settled(monkeypatch, "language", **other, disaggregation_mode="prefill")
    with pytest.raises(SettingError, match="embeddings travel over mooncake only"):
        settled(monkeypatch, "language", **other)


@pytest.mark.parametrize(("said", "declared"), [(None, {"disaggregation_decode_retraction_backup": "none"}), ("x", {})])
def test_a_decode_instance_on_cores_backs_nothing_up_unless_told_to(
    monkeypatch: pytest.MonkeyPatch, said: str | None, declared: dict[str, Any]
) -> None:
    found: dict[str, Any] = {}
    monkeypatch.setattr(server_settings, "resolving_view", lambda asked: asked)
    monkeypatch.setattr(server_settings, "declare_resolution", lambda _asked, _source, **what: found.update(what))
    server_settings.settle_decode(SimpleNamespace(disaggregation_decode_retraction_backup=said))
    assert found == declared
