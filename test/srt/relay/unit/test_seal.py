"""Seals of the bootstrap registry: who may speak to it, when, and how often."""

import dataclasses

import pytest

from embedding_relay.registry import seal as seals
from embedding_relay.registry.seal import WINDOW_NS, Request, SealCheck

KEY, OTHER = b"k" * 32, b"o" * 32
STARTED = 10**18
NOW = STARTED + WINDOW_NS // 2
PUT = Request("PUT", "/relay/ranks", b'{"rank":0}', "10.0.0.1:8998")
GET = Request("GET", "/relay/ranks/0", b"")


@pytest.fixture
def check() -> SealCheck:
    return SealCheck(KEY, STARTED)


@pytest.mark.parametrize("request_", [PUT, GET])
def test_a_sealed_request_is_let_in_once(check: SealCheck, request_: Request) -> None:
    headers = seals.seal_request(KEY, request_, NOW)
    assert check.refusal(request_, headers, NOW + 1) is None
    assert check.refusal(request_, headers, NOW + 2) == "the same request was received before"
    assert check.refusal(request_, seals.seal_request(KEY, request_, NOW), NOW + 3) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"method": "GET"},
        {"path": "/relay/ranks/1"},
        {"body": b'{"rank":1}'},
        {"method": "PU", "path": "T/relay/ranks"},
    ],
)
def test_nothing_of_a_request_can_be_changed(check: SealCheck, changed: dict[str, str]) -> None:
    headers = seals.seal_request(KEY, PUT, NOW)
    assert "another secret" in str(check.refusal(dataclasses.replace(PUT, **changed), headers, NOW))
    assert check.refusal(PUT, headers, NOW) is None


def test_an_announcement_is_for_one_registry(check: SealCheck) -> None:
    elsewhere = dataclasses.replace(PUT, to="10.0.0.2:8998")
    said = check.refusal(elsewhere, seals.seal_request(KEY, PUT, NOW), NOW)
    assert said == "the request was sent to 10.0.0.1:8998, and has arrived at 10.0.0.2:8998"
    to_anyone = seals.seal_request(KEY, dataclasses.replace(PUT, to=""), NOW)
    assert "sent to nobody" in str(check.refusal(PUT, to_anyone, NOW))


@pytest.mark.parametrize("name", [seals.TIME, seals.NONCE, seals.TO, seals.SEAL])
@pytest.mark.parametrize("value", ["1", "é", "\udcff", "x" * 10_000])
def test_nothing_of_a_seal_can_be_changed(check: SealCheck, name: str, value: str) -> None:
    headers = seals.seal_request(KEY, PUT, NOW) | {name: value}
    assert "another secret" in str(check.refusal(PUT, headers, NOW))


def test_without_a_seal_or_with_another_secret(check: SealCheck) -> None:
    headers = seals.seal_request(KEY, PUT, NOW)
    del headers[seals.SEAL]
    for missing in ({}, headers):
        assert "is missing where the request came from" in str(check.refusal(PUT, missing, NOW))
    assert "is another secret" in str(check.refusal(PUT, seals.seal_request(OTHER, PUT, NOW), NOW))


@pytest.mark.parametrize("off", [-WINDOW_NS, WINDOW_NS])
def test_clocks_may_be_a_minute_apart(off: int) -> None:
    check = SealCheck(KEY, STARTED)
    now = NOW + 10 * WINDOW_NS
    assert check.refusal(GET, seals.seal_request(KEY, GET, now + off), now) is None
    too_far = now + off + (10**9 if off > 0 else -(10**9))
    refused = str(check.refusal(GET, seals.seal_request(KEY, GET, too_far), now))
    assert refused == "the clocks of the two machines are 61 s apart, more than 60 s"


def test_a_new_registry_does_not_hear_what_was_said_to_the_old_one(check: SealCheck) -> None:
    """It has forgotten the nonces. A question may be asked again: its answer is of use only to who asked."""
    said, asked = seals.seal_request(KEY, PUT, STARTED - 1), seals.seal_request(KEY, GET, STARTED - 1)
    assert check.refusal(PUT, said, NOW) == "the request was made before this registry started"
    assert check.refusal(GET, asked, NOW) is None


@pytest.mark.parametrize("ahead", [-WINDOW_NS, 0, WINDOW_NS])
def test_a_nonce_is_remembered_for_as_long_as_it_could_be_used(check: SealCheck, ahead: int) -> None:
    now = NOW + 10 * WINDOW_NS
    headers = seals.seal_request(KEY, GET, now + ahead)
    assert check.refusal(GET, headers, now) is None
    for later in range(0, 4 * WINDOW_NS, WINDOW_NS // 7):
        assert check.refusal(GET, headers, now + later) is not None


def test_what_is_remembered_is_bounded_and_only_good_requests_fill_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seals, "_MAX_REMEMBERED", 10)
    check = SealCheck(KEY, STARTED)
    for _ in range(50):
        assert check.refusal(GET, seals.seal_request(OTHER, GET, NOW), NOW) is not None
    for _ in range(10):
        assert check.refusal(GET, seals.seal_request(KEY, GET, NOW), NOW) is None
    assert "too many" in str(check.refusal(GET, seals.seal_request(KEY, GET, NOW), NOW))
    later = NOW + 2 * WINDOW_NS + 1
    assert check.refusal(GET, seals.seal_request(KEY, GET, later), later) is None


def test_an_answer_belongs_to_one_question_and_comes_from_who_has_the_secret() -> None:
    seal = seals.seal_answer(KEY, "nonce", 200, b"body")
    assert seals.is_sealed_answer(KEY, "nonce", 200, b"body", seal)
    for key, nonce, status, body in [
        (OTHER, "nonce", 200, b"body"),
        (KEY, "another", 200, b"body"),
        (KEY, "nonce", 404, b"body"),
        (KEY, "nonce", 200, b"other"),
    ]:
        assert not seals.is_sealed_answer(key, nonce, status, body, seal)
    for wrong in ("", "é", seal[:-1], seal.upper()):
        assert not seals.is_sealed_answer(KEY, "nonce", 200, b"body", wrong)


def test_the_seal_of_a_request_is_none_of_an_answer() -> None:
    headers = seals.seal_request(KEY, GET, NOW)
    assert not seals.is_sealed_answer(KEY, headers[seals.NONCE], 200, GET.body, headers[seals.SEAL])
