"""What a client says about the other half, in SGLang's own requests: its lists have what was said, and nothing more."""

from __future__ import annotations

from typing import Any

import pytest

from embedding_relay.config import RelayConfig
from embedding_relay.pairing import ALLOWED_HOSTS
from sglang.srt.disaggregation.multimodal import modes
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
from sglang.srt.managers.io_struct import GenerateReqInput

PICTURE = "data:image/png;base64,"


def asked(text: str | list[str], n: int = 1, **where: Any) -> GenerateReqInput:
    """Checked, then taken apart by SGLang."""
    pictures = PICTURE if isinstance(text, str) else [PICTURE] * len(text)
    obj = GenerateReqInput(text=text, image_data=pictures, sampling_params={"n": n}, **where)
    modes.check_pairing(obj)
    obj.normalize_batch_and_arguments()
    return obj


def rooms(obj: GenerateReqInput) -> Any:
    """Of each prompt, as the tokenizer manager reads them."""
    return obj.bootstrap_room if obj.is_single else [obj[index].bootstrap_room for index in range(obj.batch_size)]


def test_one_prompt() -> None:
    obj = asked("a", bootstrap_host="[::1]", bootstrap_port=80, bootstrap_room=7)
    assert (obj.bootstrap_host, obj.bootstrap_port, obj.bootstrap_room) == ("::1", 80, 7)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("said", [7, [7, 8], [7, 8, 9, 10, 11, 12]])
def test_a_batch(n: int, said: int | list[int]) -> None:
    assert rooms(asked(["a", "b"], n=n, bootstrap_host="h", bootstrap_port=[80] * 6, bootstrap_room=said)) == [7, 8]


@pytest.mark.parametrize(("n", "said"), [(1, [7]), (3, 7), (3, [7]), (3, [7, 8, 9])])
def test_samples_share_the_room_of_their_prompt(n: int, said: int | list[int]) -> None:
    found = rooms(asked("a", n=n, bootstrap_host="h", bootstrap_room=said))
    assert found in (7, [7])


@pytest.mark.parametrize(
    "where",
    [
        {"bootstrap_room": -1},
        {"bootstrap_room": "7"},
        {"bootstrap_room": []},
        {"bootstrap_room": [7, 7]},
        {"bootstrap_room": [7]},
        {"bootstrap_port": [80]},
        {"bootstrap_host": ["h"]},
        {"bootstrap_host": "a\nb"},
        {"bootstrap_port": 0},
    ],
    ids=str,
)
def test_what_is_not_usable_is_the_clients_fault(where: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="bootstrap_"):
        asked(["a", "b"], **where)


def test_a_request_of_another_kind_says_nothing() -> None:
    modes.check_pairing(object())


def test_only_hosts_that_the_operator_names_and_the_instance_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RelayConfig.from_environment({ALLOWED_HOSTS: "10.0.0.0/8"})
    monkeypatch.setattr(modes, "_allowed_hosts", lambda: config.allowed_hosts)
    for host in ("10.1.2.3", None):
        assert asked("a", bootstrap_host=host, bootstrap_room=1).bootstrap_host == host
    with pytest.raises(ValueError, match=ALLOWED_HOSTS):
        asked("a", bootstrap_host="169.254.169.254", bootstrap_room=1)


def test_the_host_of_warm_up_requests_is_for_text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the scheduler such a request is its own: it would be answered without its picture."""
    config = RelayConfig.from_environment({ALLOWED_HOSTS: "10.0.0.0/8"})
    monkeypatch.setattr(modes, "_allowed_hosts", lambda: config.allowed_hosts)
    modes.check_pairing(GenerateReqInput(text="a", bootstrap_host=FAKE_BOOTSTRAP_HOST, bootstrap_room=0))
    for text, host in (("a", FAKE_BOOTSTRAP_HOST), (["a", "b"], ["10.1.2.3", FAKE_BOOTSTRAP_HOST])):
        with pytest.raises(ValueError, match="is no encode instance"):
            asked(text, bootstrap_host=host, bootstrap_room=1)
