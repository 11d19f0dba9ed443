"""The modes in SGLang's own types: names, what a client says about the other half, and what the encode half drops.

Where a tokenizer manager takes part it is SGLang's own; support/tokenizing.py says what is not there.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from embedding_relay.config import RelayConfig
from embedding_relay.pairing import ALLOWED_HOSTS
from embedding_relay.protocol.errors import Failure
from embedding_relay.tools.chat_client import data_uri, picture
from sglang.srt import runtime_context
from sglang.srt.disaggregation.multimodal import modes
from sglang.srt.disaggregation.multimodal.front import abort_message
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST, DisaggregationMode
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.utils import common
from support import tokenizing
from support.tokenizing import IMAGE, TokenizerManagerWithoutScheduler, answers, run

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


def test_who_knows_its_encode_instances_asks_no_others_unless_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "encode_urls", lambda: ["http://10.0.0.1:30000", "http://[fd00::1]:1", "http://e-0"])
    monkeypatch.delenv(ALLOWED_HOSTS, raising=False)
    allowed = modes._allowed_hosts.__wrapped__()
    assert all(host in allowed for host in ("10.0.0.1", "fd00::1", "e-0"))
    assert "10.0.0.2" not in allowed
    monkeypatch.setenv(ALLOWED_HOSTS, "10.0.0.2")
    assert "10.0.0.1" not in modes._allowed_hosts.__wrapped__()
    monkeypatch.setattr(modes, "encode_urls", list)
    monkeypatch.delenv(ALLOWED_HOSTS)
    assert modes._allowed_hosts.__wrapped__() is None


def test_the_host_of_warm_up_requests_is_for_text_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the scheduler such a request is its own: it would be answered without its picture."""
    config = RelayConfig.from_environment({ALLOWED_HOSTS: "10.0.0.0/8"})
    monkeypatch.setattr(modes, "_allowed_hosts", lambda: config.allowed_hosts)
    modes.check_pairing(GenerateReqInput(text="a", bootstrap_host=FAKE_BOOTSTRAP_HOST, bootstrap_room=0))
    for text, host in (("a", FAKE_BOOTSTRAP_HOST), (["a", "b"], ["10.1.2.3", FAKE_BOOTSTRAP_HOST])):
        with pytest.raises(ValueError, match="is no encode instance"):
            asked(text, bootstrap_host=host, bootstrap_room=1)


# ---- their names


def test_members_of_sglangs_enum_that_others_hold_already_know_ours() -> None:
    """Added in place: what was imported or pickled before is the same class."""
    before = DisaggregationMode, DisaggregationMode.PREFILL
    modes.extend_enum()
    modes.extend_enum()
    assert before == (type(DisaggregationMode("encode")), DisaggregationMode("prefill"))
    for name in (modes.ENCODE, modes.LANGUAGE):
        member = DisaggregationMode(name)
        assert [one.value for one in DisaggregationMode].count(name) == 1
        assert pickle.loads(pickle.dumps(member)) is member
        assert copy.deepcopy(member) is member
        assert DisaggregationMode[name.upper()] is member


@pytest.mark.parametrize(("given", "ours"), [("encode", "encode"), ("language", "language"), ("prefill", None)])
def test_other_modes_are_none_of_ours(given: str, ours: str | None) -> None:
    assert modes.of(settings(given)) == ours


@pytest.mark.parametrize(
    ("given", "more", "ours"),
    [
        ("prefill", {}, "language"),
        ("prefill", {"language_only": True}, None),  # SGLang's own encoder split
        ("decode", {}, None),
        ("null", {}, None),
    ],
)
def test_a_prefill_instance_that_knows_encode_instances_is_a_language_half(
    given: str, more: dict[str, Any], ours: str | None
) -> None:
    assert modes.of(settings(given, encoder_urls=["http://a:1"], **more)) == ours


def settings(mode: str, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"disaggregation_mode": mode, "encoder_urls": [], "language_only": False, **more})


def test_plugins_are_loaded_by_whoever_unpickles_first(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setattr("sglang.srt.plugins.load_plugins", lambda: loaded.append("plugins"))
    sent = pickle.dumps(modes.LoadsPlugins({"port": 1}))
    assert loaded == []
    assert pickle.loads(sent) == {"port": 1}
    assert loaded == ["plugins"]


# ---- the encode half of a request


@pytest.fixture(scope="module")
def encode() -> Iterator[TokenizerManagerWithoutScheduler]:
    with tokenizing.serving("encode") as made:
        made.watch_nobody()
        yield made


def sent_by(encode: TokenizerManagerWithoutScheduler, **request: Any) -> Any:
    """What the encode half's scheduler would get."""
    encode.sent.clear()
    where = {"bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 7}
    given = {"text": f"{IMAGE}a", "image_data": [data_uri(picture(56, 56, seed=1))], "sampling_params": {}}
    obj = GenerateReqInput(**{**given, **where, **request})
    run(answers(encode, obj, lambda rid: abort_message(rid, Failure(99, "the end"))))
    (sent,) = (one for one in encode.sent if isinstance(one, TokenizedGenerateReqInput))
    return sent


@pytest.mark.parametrize(
    "wish",
    [
        {"custom_logit_processor": "x"},
        {"lora_path": "an-adapter"},
        {"max_thinking_tokens": 7},
        {"return_hidden_states": True},
        {"return_routed_experts": True},
        {"return_sampling_mask": True, "sampling_logprobs_mode": "support"},
        {"session_params": {"id": "s"}},
        {"watermark": {"enabled": True}},
    ],
    ids=lambda wish: next(iter(wish)),
)
def test_what_only_the_language_half_can_serve_is_nothing_to_the_encode_half(
    encode: TokenizerManagerWithoutScheduler, wish: dict[str, Any]
) -> None:
    """Its flags need not be those of the language half. What neither can serve, the language half refuses."""
    assert sent_by(encode, **wish).bootstrap_room == 7


@pytest.mark.parametrize(
    "sampling",
    [{"json_schema": "{}"}, {"regex": "("}, {"ebnf": "x"}, {"structural_tag": "x"}, {"watermark": {"enabled": True}}],
    ids=lambda sampling: next(iter(sampling)),
)
def test_nor_is_what_the_answer_will_look_like(
    encode: TokenizerManagerWithoutScheduler, sampling: dict[str, Any]
) -> None:
    sent = sent_by(encode, sampling_params={"max_new_tokens": 4, **sampling})
    assert all(getattr(sent.sampling_params, name) is None for name in sampling)
    assert sent.sampling_params.max_new_tokens == 4


def test_samples_are_one_request_of_the_encode_half(encode: TokenizerManagerWithoutScheduler) -> None:
    sent = sent_by(encode, sampling_params={"n": 3})
    assert (sent.sampling_params.n, sent.bootstrap_room) == (1, 7)


@pytest.mark.parametrize("prompt", ["text", "input_ids"])
def test_the_pictures_of_samples_are_a_list_of_lists_to_both_halves(
    encode: TokenizerManagerWithoutScheduler, prompt: str
) -> None:
    """A prompt with several samples is a batch of one to SGLang, and its pictures are those of a batch."""
    pictures = [data_uri(picture(56, 56, seed=seed)) for seed in (1, 2)]
    text = f"{IMAGE}and{IMAGE}"
    given = {"text": text} if prompt == "text" else {"text": None, "input_ids": encode.tokenizer.encode(text)}
    sent = sent_by(encode, **given, image_data=[pictures], sampling_params={"n": 2})
    assert len(sent.mm_inputs.mm_items) == 2
    assert (sent.sampling_params.n, sent.bootstrap_host, sent.bootstrap_room) == (1, "10.0.0.1", 7)
    with pytest.raises(ValueError, match="length of image_data should be equal to the batch size"):
        sent_by(encode, **given, image_data=pictures, sampling_params={"n": 2})


def test_a_request_for_an_embedding_model_is_left_to_sglang() -> None:
    obj = EmbeddingReqInput(text="a")
    modes.ask_for_rows_only(obj)
    assert not hasattr(obj, "custom_logit_processor")


def test_a_process_that_serves_nothing_has_no_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever loads a picture with SGLang's functions has our hooks, and no server's arguments."""
    monkeypatch.setattr(runtime_context.get_context(), "_config_bags", None)
    assert modes.current() is None
    assert isinstance(common.get_mm_http_session(), requests.Session)
