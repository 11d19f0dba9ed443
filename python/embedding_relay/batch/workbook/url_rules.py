"""Which picture URLs are passed to the endpoint, which fetches them; its own rules are the binding ones.

These rules keep a workbook from naming addresses that only the endpoint's machine can reach. Between this look and the
endpoint's a name may come to mean another address. An encode instance of this plugin looks again, at the address that
it connects to, also after a redirect; any other endpoint beside private services needs SGLang's own
`--allowed-media-domains`.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import time
from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

from embedding_relay.public_addresses import Address, is_public

ONE_LOOK_UP_SECONDS: Final = 2.0
ALL_LOOK_UPS_SECONDS: Final = 60.0
# A line end or a backslash makes one parser see another host than the next one.
TRICKS: Final = re.compile(r"[\x00-\x1f\x7f\\]")


class UrlRules:
    """Remembers what it has looked up. ValueError for an allowed domain that is none."""

    def __init__(self, *, allowed_domains: Iterable[str] = (), allow_private: bool = False) -> None:
        self._allowed = frozenset(map(normalized_host, allowed_domains))
        self._allow_private = allow_private
        self._refusals: dict[str, str] = {}  # by host
        self._look_up_seconds = 0.0

    def refusal(self, url: str) -> str:
        """Why the endpoint is not asked to fetch `url`; "" when nothing speaks against it."""
        if TRICKS.search(url):
            return "the URL holds a backslash or a control character"
        try:
            parts = urlsplit(url)
            host = parts.hostname
            _ = parts.port  # raises where it is no number
        except ValueError:
            return "the URL is malformed"
        if parts.scheme not in ("http", "https"):
            return f"only http and https URLs are fetched, not {parts.scheme or 'bare'} ones"
        if not host:
            return "the URL names no host"
        try:
            host = normalized_host(host)
        except ValueError:
            return "the URL's host name is malformed"
        if host not in self._refusals:
            self._refusals[host] = self._refusal_of_host(host)
        return self._refusals[host]

    def _refusal_of_host(self, host: str) -> str:
        if self._allowed:
            # Whoever lists a private host by its name means it.
            return "" if host in self._allowed else f"the host {host} is not among the allowed ones"
        if self._allow_private:
            return ""
        if host == "localhost" or host.endswith(".localhost"):
            return f"the host {host} is this machine itself"
        literal = literal_address(host)
        if literal is not None:
            return "" if is_public(literal) else f"{host} is not a public address"
        if self._look_up_seconds > ALL_LOOK_UPS_SECONDS:
            return f"the host {host} was not looked up: too many hosts before it could not be looked up in time"
        began = time.monotonic()
        addresses = look_up(host)
        self._look_up_seconds += time.monotonic() - began
        if all(map(is_public, addresses)):
            return ""
        return f"the host {host} has an address that is not public"


def normalized_host(host: str) -> str:
    """One spelling for each host: no brackets, no trailing dot, lower case, punycode. ValueError if it is none."""
    host = host.strip().rstrip(".")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    name = host.encode("idna").decode("ascii").lower().rstrip(".")
    if not name or re.search(r"[\s/?#@:%]", name):
        raise ValueError(f"{host!r} is not the name of a host")
    return name


def literal_address(host: str) -> Address | None:
    """The address that `host` spells: dotted, decimal, octal, hexadecimal or shortened, as the system would read it."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except OSError:
        return None


def look_up(host: str) -> list[Address]:
    """The addresses of a name; none when there are none or the answer takes too long."""
    found: list[Address] = []

    def ask() -> None:
        try:
            answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return
        found.extend(ipaddress.ip_address(str(answer[4][0])) for answer in answers)

    # The system's resolver takes no deadline, so it is left behind when it is late.
    asking = threading.Thread(target=ask, daemon=True, name=f"look-up-{host}")
    asking.start()
    asking.join(ONE_LOOK_UP_SECONDS)
    return list(found)
