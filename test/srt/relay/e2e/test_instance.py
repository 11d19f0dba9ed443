"""Where an instance tells others that it is, by what SGLang was told. Needs SGLang, but no server."""

import warnings
from types import SimpleNamespace

import pytest

from support.sglang_ci import register_cpu_ci, run_tests

register_cpu_ci(est_time=120, suite="base-c-test-cpu")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang's imports warn about hardware that is not there
    from sglang.srt.disaggregation.multimodal import instance


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "0"])
def test_all_addresses_become_one_that_others_reach(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance, "get_serving", lambda: SimpleNamespace(host=host))
    monkeypatch.setattr(instance, "get_local_ip_auto", lambda: "192.0.2.7")
    assert instance.reachable_host() == "192.0.2.7"


def test_the_operators_address_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance, "get_serving", lambda: SimpleNamespace(host="localhost"))
    assert instance.reachable_host() == "localhost"


if __name__ == "__main__":
    run_tests(__file__)
