"""What a client may say about the other half of its request; everything else is one sentence, and nobody is asked."""

import re
from typing import Any

import pytest

from embedding_relay.pairing import AllowedHosts, BadPairing, Pairing, settle
from embedding_relay.protocol.codec import MAX_ROOM

GOOD = Pairing("encode-0.example", 8998, 7)


def said(**changes: Any) -> Pairing:
    return GOOD._replace(**changes)


def refusal(pairing: Pairing, prompts: int | None = None, allowed: AllowedHosts | None = None) -> str:
    with pytest.raises(BadPairing) as caught:
        settle(pairing, prompts, allowed)
    line = str(caught.value)
    assert "\n" not in line
    assert line.isprintable()
    assert len(line) < 150
    return line


def test_what_a_router_says_is_taken_as_it_is() -> None:
    assert settle(GOOD, None, None) == GOOD
    assert settle(said(room=0), None, None) == said(room=0)
    assert settle(said(room=MAX_ROOM), None, None) == said(room=MAX_ROOM)


def test_a_request_that_says_nothing_is_left_alone() -> None:
    nothing = Pairing(None, None, None)
    assert settle(nothing, None, AllowedHosts.parse("10.0.0.0/8")) == settle(nothing, 2, None) == nothing


NO_ROOMS = [-1, MAX_ROOM + 1, 2**64, 1 << 20_000, True, False, 1.0, "7", "", b"7", {}, float("nan")]
NO_PORTS = [0, -1, 65536, 99999, 1 << 20_000, True, 80.0, "8998", "http", {}]
NO_HOSTS = [
    *("", " ", "a b", "a\nb", "a\r\nHost: b", "a\0", "a/b", "a?b", "user@host", "ü.example", "-a", ".a", "host:80"),
    *("[", "[]", "[host]", "[::1", "::1]", "[[::1]]", "1::2::3", "[10.0.0.1]:80", "x" * 257, "x" * 10_000),
    *(7, True, None.__class__, b"host", {"a": 1}),
]


@pytest.mark.parametrize("room", NO_ROOMS, ids=range(len(NO_ROOMS)))
def test_a_room_that_63_bits_do_not_hold(room: Any) -> None:
    assert refusal(said(room=room)).startswith(f"bootstrap_room must be an integer from 0 to {MAX_ROOM}, not ")
    assert refusal(said(room=[7, room]), 2).startswith("bootstrap_room must be an integer")


@pytest.mark.parametrize("port", NO_PORTS, ids=range(len(NO_PORTS)))
def test_what_is_no_port(port: Any) -> None:
    assert refusal(said(port=port)).startswith("bootstrap_port must be an integer from 1 to 65535, not ")
    assert refusal(said(port=[port, 80]), 2).startswith("bootstrap_port must be an integer")


@pytest.mark.parametrize("host", NO_HOSTS, ids=range(len(NO_HOSTS)))
def test_what_is_no_host(host: Any) -> None:
    assert refusal(said(host=host)).startswith("bootstrap_host must be a host name or an address, not ")
    assert refusal(said(host=["good", host]), 2).startswith("bootstrap_host must be a host name")


@pytest.mark.parametrize("host", ["encode", "10.0.0.1", "encode-0.encode.svc", "a_b", "::1", "fd00::1", "fe80::1%eth0"])
def test_what_is_a_host(host: str) -> None:
    assert settle(said(host=host), None, None).host == host


def test_an_address_in_brackets_loses_them() -> None:
    """A router takes the host from a URL."""
    assert settle(said(host="[fd00::1]"), None, None).host == "fd00::1"
    assert settle(said(host=["[::1]", "b"]), 2, None).host == ["::1", "b"]


# ---- batches


def test_one_for_each_prompt() -> None:
    batch = Pairing(["a", "b"], [1, 2], [7, 9])
    assert settle(batch, 2, None) == batch
    assert settle(Pairing("a", 1, 7), 2, None) == Pairing("a", 1, 7), "SGLang counts on from the first room"


def test_prompts_without_media_may_say_nothing() -> None:
    batch = Pairing(["a", None], [1, None], [7, None])
    assert settle(batch, 2, None) == batch


@pytest.mark.parametrize("field", ["host", "port", "room"])
def test_a_list_that_is_too_short(field: str) -> None:
    value = getattr(GOOD, field)
    assert refusal(said(**{field: [value]}), 2) == f"bootstrap_{field} has 1 values, and there are 2 prompts"
    assert refusal(said(**{field: []}), None) == f"bootstrap_{field} has 0 values, and there are 1 prompts"


def test_a_router_names_a_room_for_each_sample_and_the_first_counts() -> None:
    assert settle(said(room=[7, 8, 9]), None, None).room == 7
    assert settle(said(room=[7, 8, 9, 10]), 2, None).room == [7, 8]


def test_two_prompts_may_not_share_a_room() -> None:
    """The second would be answered about the pictures of the first."""
    assert refusal(said(room=[7, 7]), 2).startswith("bootstrap_room names one room for two prompts")
    assert settle(said(room=[7, 7, 7, 7]), None, None).room == 7, "samples of one prompt do"


def test_counting_on_must_not_lead_out_of_63_bits() -> None:
    assert settle(said(room=MAX_ROOM - 1), 2, None).room == MAX_ROOM - 1
    assert refusal(said(room=MAX_ROOM), 2).startswith("bootstrap_room must be an integer")


# ---- allowed hosts

ALLOWED = AllowedHosts.parse(" 10.1.9.9/16, fd00::/8 , 192.0.2.7,[2001:db8::7], encode-0.example,*.Encode.Example ,")


@pytest.mark.parametrize(
    "host",
    [
        *("10.1.2.3", "fd00::1", "[fd00::1]", "192.0.2.7", "2001:db8::7", "encode-0.example", "ENCODE-0.example"),
        *("encode-0.example.", "a.encode.example", "a.b.encode.example"),
    ],
)
def test_hosts_that_may_be_asked(host: str) -> None:
    settle(said(host=host), None, ALLOWED)


@pytest.mark.parametrize(
    "host",
    [
        *("10.2.0.1", "192.0.2.8", "fe00::1", "169.254.169.254", "localhost", "127.0.0.1", "::ffff:10.1.2.3"),
        *(
            "10.1.2",
            "0x0a010203",
            "167837955",
            "10.1.2.3.",
            "encode.example",
            "xencode.example",
            "encode-0.example.evil",
        ),
    ],
)
def test_hosts_that_may_not_be_asked(host: str) -> None:
    """Not even under another spelling of an address that is allowed: what it stands for is not looked up."""
    wanted = f"bootstrap_host {host!r} may not be asked: SGLANG_EMBEDDING_ALLOWED_HOSTS does not name it"
    assert refusal(said(host=host), None, ALLOWED) == wanted
    assert refusal(said(host=["10.1.0.1", host]), 2, ALLOWED) == wanted


def test_a_host_that_is_never_asked_need_not_be_allowed() -> None:
    assert settle(said(host="2.2.2.2"), None, ALLOWED, local="2.2.2.2").host == "2.2.2.2"
    with pytest.raises(BadPairing):
        settle(said(host="2.2.2.2"), None, ALLOWED)


@pytest.mark.parametrize(
    "entry", ["10.0.0.0/33", "10.0.0.300", "a b", "*", "*.", "**.a", "a/b", "http://a", "[a]", "a:80"]
)
def test_an_entry_that_is_nothing(entry: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(entry)}$"):
        AllowedHosts.parse(f"10.0.0.1,{entry}")
