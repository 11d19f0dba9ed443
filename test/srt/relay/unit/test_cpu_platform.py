"""The CPU platform takes a machine only when asked to or when nothing else could."""

from collections.abc import Callable, Sequence

import pytest

from embedding_relay import cpu_platform
from embedding_relay.cpu_platform import decide


def no_others() -> Sequence[str]:
    return []


def no_accelerator() -> str | None:
    return None


def must_not_be_asked() -> None:
    raise AssertionError("this probe is slow or imports torch; its answer does not matter here")


def test_chosen_by_name_it_serves_whatever_the_machine_has() -> None:
    serves, _ = decide({"SGLANG_PLATFORM": "relay_cpu"}, must_not_be_asked, must_not_be_asked)  # type: ignore[arg-type]
    assert serves


@pytest.mark.parametrize(
    ("environ", "others", "accelerator", "reason"),
    [
        ({"SGLANG_PLATFORM": "vendor"}, no_others, no_accelerator, "SGLANG_PLATFORM=vendor"),
        ({"SGLANG_USE_CPU_ENGINE": "1"}, no_others, no_accelerator, "SGLang's own CPU engine was asked for"),
        ({}, lambda: ["vendor"], no_accelerator, "another platform plugin is installed: vendor"),
        ({}, no_others, lambda: "/dev/nvidia0", "accelerator: /dev/nvidia0"),
    ],
)
def test_it_stays_out_of_the_way(
    environ: dict[str, str],
    others: Callable[[], Sequence[str]],
    accelerator: Callable[[], str | None],
    reason: str,
) -> None:
    assert decide(environ, others, accelerator) == (False, reason)


@pytest.mark.parametrize("environ", [{}, {"SGLANG_PLATFORM": ""}, {"SGLANG_USE_CPU_ENGINE": "0"}])
def test_it_serves_a_machine_with_nothing_else(environ: dict[str, str]) -> None:
    assert decide(environ, no_others, no_accelerator) == (True, "no accelerator")


class TestProbes:
    @pytest.fixture(autouse=True)
    def empty_machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu_platform.glob, "glob", lambda pattern: [])
        monkeypatch.setattr(cpu_platform.platform, "system", lambda: "Linux")
        monkeypatch.setattr(cpu_platform.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(cpu_platform, "_torch_accelerator", lambda: None)

    def test_nothing_there(self) -> None:
        assert cpu_platform.find_accelerator() is None

    def test_a_device_node_is_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The driver's Python side may be broken; that wants a repair, not a silent CPU.
        monkeypatch.setattr(cpu_platform.glob, "glob", lambda pattern: ["/dev/kfd"] if pattern == "/dev/kfd" else [])
        assert cpu_platform.find_accelerator() == "/dev/kfd"

    def test_a_vendors_torch_extension_is_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        found = {"torch_npu": object()}
        monkeypatch.setattr(cpu_platform.importlib.util, "find_spec", found.get)
        assert cpu_platform.find_accelerator() == "torch_npu"

    def test_what_torch_says_counts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cpu_platform, "_torch_accelerator", lambda: "torch.cuda")
        assert cpu_platform.find_accelerator() == "torch.cuda"

    def test_a_probe_that_breaks_means_there_may_be_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken() -> None:
            raise OSError("driver version mismatch")

        monkeypatch.setattr(cpu_platform, "_torch_accelerator", broken)
        assert cpu_platform.find_accelerator() == "torch could not tell (OSError: driver version mismatch)"


def test_activate_answers_the_class_path_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLATFORM", "relay_cpu")
    path = cpu_platform.activate()
    assert path is not None
    assert path.startswith("sglang.srt.disaggregation.multimodal.cpu_platform:")
    monkeypatch.setenv("SGLANG_PLATFORM", "vendor")
    assert cpu_platform.activate() is None
