"""What a request says about its other half: checked, and refused with a 400, before anything is done about it.

Whoever sends a request chooses which host a language instance asks, on which port, and by which number.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from embedding_relay.protocol.messages import HOST, MAX_ROOM

ALLOWED_HOSTS: Final = "SGLANG_EMBEDDING_ALLOWED_HOSTS"

_HOST: Final = re.compile(HOST)
_NAME: Final = re.compile(r"(?:\*\.)?[0-9a-z_][0-9a-z_.-]{0,252}")
_MOST_SHOWN: Final = 40


class BadPairing(ValueError):
    """One sentence for the client."""


@dataclasses.dataclass(frozen=True)
class AllowedHosts:
    """The encode instances that may be asked: addresses by their networks, names as they are written."""

    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]
    names: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> AllowedHosts:
        """Commas between them: `10.1.0.0/16`, `fd00::/8`, `192.0.2.7`, `encode-0.example`, `*.encode.example`.

        Raises ValueError with the entry that is none of these.
        """
        networks, names = [], []
        for entry in filter(None, (part.strip().lower() for part in text.split(","))):
            try:
                networks.append(ipaddress.ip_network(entry.removeprefix("[").removesuffix("]"), strict=False))
            except ValueError:
                if not _NAME.fullmatch(entry) or entry.replace(".", "").isdecimal():
                    raise ValueError(entry) from None
                names.append(entry)
        return cls(tuple(networks), frozenset(names))

    def __contains__(self, host: str) -> bool:
        """No name is looked up: what it stands for could be another address a moment later."""
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            name = host.lower().removesuffix(".")
            suffixes = (name[at:] for at, character in enumerate(name) if character == ".")
            return name in self.names or any(f"*{suffix}" in self.names for suffix in suffixes)
        return any(address in network for network in self.networks)


class Pairing(NamedTuple):
    """Each a value, or for a batch a list with one for each prompt; None where the request says nothing."""

    host: Any
    port: Any
    room: Any


def settle(said: Pairing, prompts: int | None, allowed: AllowedHosts | None, local: str = "") -> Pairing:
    """What a request says, once it is known to be usable; raises BadPairing.

    `prompts`: how many a batch has, None for a single prompt. A router may name a room for each sample of a prompt; the
    first is the prompt's. `local` is a host that is never asked.
    """

    def host(value: Any) -> str:
        checked = _host(value)
        if allowed is not None and checked != local and checked not in allowed:
            raise BadPairing(f"bootstrap_host {_shown(checked)} may not be asked: {ALLOWED_HOSTS} does not name it")
        return checked

    settled = Pairing(
        _each("bootstrap_host", said.host, prompts, host),
        _each("bootstrap_port", said.port, prompts, _port),
        _each("bootstrap_room", said.room, prompts, _room),
    )
    _check_rooms(settled.room, prompts or 1)
    return settled


def _each(field: str, value: Any, prompts: int | None, check: Callable[[Any], Any]) -> Any:
    if not isinstance(value, list):
        return None if value is None else check(value)
    if len(value) < (prompts or 1):
        raise BadPairing(f"{field} has {len(value)} values, and there are {prompts or 1} prompts")
    checked = [None if one is None else check(one) for one in value[: prompts or 1]]
    return checked[0] if prompts is None else checked


def _check_rooms(rooms: Any, prompts: int) -> None:
    if isinstance(rooms, int):
        _room(rooms + prompts - 1)  # SGLang counts on from the first
    elif rooms is not None and len(named := [room for room in rooms if room is not None]) != len(set(named)):
        raise BadPairing("bootstrap_room names one room for two prompts, and each needs its own")


def _room(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_ROOM:
        raise BadPairing(f"bootstrap_room must be an integer from 0 to {MAX_ROOM}, not {_shown(value)}")
    return value


def _port(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 65536:
        raise BadPairing(f"bootstrap_port must be an integer from 1 to 65535, not {_shown(value)}")
    return value


def _host(value: Any) -> str:
    """A router takes the host from a URL, where an IPv6 address stands in brackets."""
    if isinstance(value, str):
        host = value[1:-1] if value.startswith("[") and value.endswith("]") and ":" in value else value
        if _HOST.fullmatch(host) and (":" not in host or _is_address(host)):
            return host
    raise BadPairing(f"bootstrap_host must be a host name or an address, not {_shown(value)}")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _shown(value: Any) -> str:
    """Short and one line, whatever it is."""
    if isinstance(value, str):
        return repr(value if len(value) <= _MOST_SHOWN else value[:_MOST_SHOWN] + "…")
    if isinstance(value, bool | float) or (isinstance(value, int) and value.bit_length() <= 128):
        return str(value)
    return f"a value of type {type(value).__name__}"
