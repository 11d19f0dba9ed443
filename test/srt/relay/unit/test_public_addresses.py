"""Which addresses are public. The hosts of URLs, however they are spelt, are in test/srt/batch/unit."""

import ipaddress

import pytest

from embedding_relay.public_addresses import is_public


@pytest.mark.parametrize("address", ["1.1.1.1", "2001:4860:4860::8888", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_public_is_what_the_whole_world_can_reach(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "::1", "::", "fe80::1", "fd00::1"),
        *("::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "ff02::1"),
    ],
)
def test_everything_else_is_not(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))
