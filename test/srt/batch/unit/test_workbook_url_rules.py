"""Which URLs are handed on; and templates."""

import socket
import threading
from typing import Any

import pytest

from embedding_relay.batch.workbook import url_rules
from embedding_relay.batch.workbook.url_rules import UrlRules

NAMES = {"public.example": ["8.8.8.8"], "both.example": ["8.8.8.8", "10.0.0.1"], "inside.example": ["fd00::1"]}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The host names that are looked up, answered from a table."""
    names = list[str]()

    def getaddrinfo(host: str, *_: Any, **__: Any) -> list[Any]:
        names.append(host)
        if host not in NAMES:
            raise socket.gaierror("no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in NAMES[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0x7f.1", "127.0.0.1.", "localhost"),
        *("LOCALHOST.", "a.localhost", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "0.0.0.0", "0"),
        *("100.64.0.1", "224.0.0.1", "255.255.255.255", "192.0.2.1", "[::1]", "[::]", "[fe80::1]", "[fd00::1]"),
        *("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[ff02::1]"),
        *(
            "[2001:db8::1]",
            "\uff11\uff12\uff17.0.0.1",
            "127\u30020\u30020\u30021",
            "\u24dbocalhost",
            "both.example",
            "inside.example",
        ),
    ],
)
def test_private_hosts_are_refused_however_they_are_spelt(asked: list[str], host: str) -> None:
    for url in (f"http://{host}/a.png", f"https://user:word@{host}:8080/a.png"):
        assert UrlRules().refusal(url)
        assert not UrlRules(allow_private=True).refusal(url)


@pytest.mark.parametrize(
    "host", ["8.8.8.8", "134744072", "[2001:4860:4860::8888]", "public.example", "unknown.example", "[::ffff:8.8.8.8]"]
)
def test_public_hosts_and_those_that_nobody_knows_are_not(asked: list[str], host: str) -> None:
    assert UrlRules().refusal(f"https://{host}/a.png") == ""


@pytest.mark.parametrize(
    "url",
    [
        *("file:///etc/passwd", "ftp://8.8.8.8/a.png", "/etc/passwd", "//8.8.8.8/a.png", "a.png", "", "https://"),
        *("http:///a.png", "http://8.8.8.8\\@127.0.0.1/", "http://8.8.8.8/\r\nHost: x", "http://[::1", "gopher://x"),
        *("http://8.8.8.8:port/", "http://%31/", "http://a b/", "javascript:alert(1)", f"http://{'a' * 70}.com/"),
    ],
)
@pytest.mark.parametrize("rules", [UrlRules(), UrlRules(allow_private=True)])
def test_what_is_no_url_of_the_web_is_refused_always(asked: list[str], url: str, rules: UrlRules) -> None:
    assert rules.refusal(url)


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("pictures.example", True),
        ("PICTURES.Example.", True),
        ("other.pictures.example", False),
        ("pictures.example.evil.com", False),
        ("münchen.example", True),
        ("xn--mnchen-3ya.example", True),
        ("10.0.0.7", True),
        ("10.0.0.8", False),
        ("[fd00:0::7]", True),
    ],
)
def test_a_list_of_domains_is_the_whole_answer(asked: list[str], host: str, allowed: bool) -> None:
    rules = UrlRules(allowed_domains=("Pictures.example", "münchen.example.", "10.0.0.7", "[fd00::7]"))
    assert (rules.refusal(f"https://{host}/a.png") == "") == allowed
    assert asked == []


@pytest.mark.parametrize("domain", ["", ".", "https://a.example", "a.example:80", "a.example/x", "*.a example", "u@a"])
def test_a_list_with_something_else_in_it_is_refused_at_once(domain: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        UrlRules(allowed_domains=("good.example", domain))


def test_a_name_is_looked_up_once(asked: list[str]) -> None:
    rules = UrlRules()
    for number in range(5):
        assert not rules.refusal(f"https://public.example/{number}.png")
    assert asked == ["public.example"]
    assert not UrlRules().refusal("https://public.example/")
    assert asked == ["public.example"] * 2


def test_a_resolver_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait() and [])
    monkeypatch.setattr(url_rules, "ONE_LOOK_UP_SECONDS", 0.01)
    monkeypatch.setattr(url_rules, "ALL_LOOK_UPS_SECONDS", 0.03)
    rules = UrlRules()
    try:
        refusals = [rules.refusal(f"https://h{number}.example/") for number in range(20)]
    finally:
        release.set()
    assert refusals[0] == ""
    assert "not looked up" in refusals[-1]
