"""The only reader of environment variables: what an operator can set, checked once at start."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from embedding_relay.keys import BadSecret, Keys, read_keys
from embedding_relay.memory.plane import LEAST_WRITE_TIMEOUT, WRITE_TIMEOUT
from embedding_relay.pairing import ALLOWED_HOSTS, AllowedHosts
from embedding_relay.protocol.errors import SettingError
from embedding_relay.protocol.messages import MAX_BLOCKS
from embedding_relay.protocol.timing import Timing

CACHE_BLOCKS: Final = "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE"
BLOCK_SIZE: Final = "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE"
DEFAULT_ALLOCATE: Final = "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE"
MAX_WAITING: Final = "SGLANG_EMBEDDING_MAX_WAITING_REQUESTS"
MAX_IN_FLIGHT: Final = "SGLANG_EMBEDDING_MAX_IN_FLIGHT_MIB"
ROW_CACHE: Final = "SGLANG_EMBEDDING_ROW_CACHE_BYTES"
ADMISSION: Final = "SGLANG_EMBEDDING_ADMISSION_MIB"
ADMISSION_TIMEOUT: Final = "SGLANG_EMBEDDING_ADMISSION_TIMEOUT"
SECRET_FILE: Final = "SGLANG_EMBEDDING_SECRET_FILE"
FIRST_WORD_TIMEOUT: Final = "SGLANG_EMBEDDING_FIRST_WORD_TIMEOUT"
ALLOWED_MEDIA_DIR: Final = "SGLANG_EMBEDDING_ALLOWED_MEDIA_DIR"
PRIVATE_MEDIA_URLS: Final = "SGLANG_EMBEDDING_ALLOW_PRIVATE_MEDIA_URLS"
DATA_PLANE: Final = "SGLANG_EMBEDDING_DATA_PLANE"
PROGRESSIVE: Final = "SGLANG_EMBEDDING_PROGRESSIVE"
PREFIX_PREFILL: Final = "SGLANG_EMBEDDING_PREFIX_PREFILL"
UNTESTED_SGLANG: Final = "SGLANG_EMBEDDING_ALLOW_UNTESTED_SGLANG"
TRACE_EVENTS: Final = "SGLANG_EMBEDDING_TRACE_EVENTS"

# SGLang's own prefill/decode settings, by its own names and with its own defaults (sglang/srt/environ.py).
BOOTSTRAP_TIMEOUT: Final = "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT"
WAITING_TIMEOUT: Final = "SGLANG_DISAGGREGATION_WAITING_TIMEOUT"
HEARTBEAT_INTERVAL: Final = "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL"
HEARTBEAT_MAX_FAILURES: Final = "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE"

# The transport is Mooncake's choice; these are the names its users know.
MOONCAKE_PROTOCOL: Final = "MOONCAKE_PROTOCOL"
MOONCAKE_FORCE_TCP: Final = "MC_FORCE_TCP"
MOONCAKE_TRANSFER_TIMEOUT: Final = "MC_TRANSFER_TIMEOUT"
TRANSPORTS: Final = ("tcp", "rdma", "efa")

AUTO: Final = "auto"
MOONCAKE: Final = "mooncake"
SHARED_MEMORY: Final = "shared_memory"
DATA_PLANES: Final = (AUTO, MOONCAKE, SHARED_MEMORY)

_PREFIX: Final = "SGLANG_EMBEDDING_"
# Block indices and row counts travel as int32.
_LARGEST: Final = 2**31 - 1
_MOST_BYTES: Final = 2**48


@dataclasses.dataclass(frozen=True)
class RelayConfig:
    cache_blocks: int = 512
    block_size: int = 128
    default_allocate_tokens: int | None = 8192
    """Rows that the language side reserves first; None learns it from recent requests (`auto`)."""
    max_waiting_requests: int = 512
    """Requests whose rows are awaited, or awaited by others; one more is answered 503 at once."""
    max_in_flight_mib: int = 4096
    """Rows that the encode side has made and not yet written to their readers; beyond it the tower waits."""
    row_cache_bytes: int | None = None
    """Of rows that a language rank keeps for pictures that come again; None is a part of what is free, 0 keeps none."""
    admission_mib: int | None = None
    """What requests may take of this instance's host memory together; None is a part of what is free, 0 no limit."""
    admission_timeout: float = 60.0
    """How long a request waits at most for memory that others have."""
    bootstrap_timeout: float = 300.0
    first_word_timeout: float = 30.0
    """How long the encode side waits to hear that the language side has the other half of a request."""
    waiting_timeout: float = 300.0
    heartbeat_interval: float = 5.0
    heartbeat_max_failures: int = 2
    progressive: bool = False
    """The encode side sends a request's rows as they are made, item by item."""
    prefix_prefill: bool = False
    """The language side begins to compute with the rows of a prompt that are here, while others are on their way."""
    write_timeout: float = WRITE_TIMEOUT
    """For how long nothing of a write may be confirmed; set by Mooncake's own variable."""
    transport: str | None = None
    """None takes RDMA where the machine has a device for it, else TCP."""
    data_plane: str = AUTO
    """`auto`: shared memory between ranks of one host, Mooncake between all others."""
    allowed_media_dir: Path | None = None
    """Clients may name files below it as their pictures; None for no file at all."""
    private_media_urls: bool = False
    """Pictures may also be fetched from addresses that are not public."""
    keys: Keys | None = None
    """What is made from the secret of this deployment; None lets everybody in."""
    allowed_hosts: AllowedHosts | None = None
    """The encode instances that a request may have asked; None allows any host."""
    trace_events: int = 16384
    """Moments of recent requests that each process remembers for `sglang-relay trace`; with 0 none."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> RelayConfig:
        reader = _Reader(environment)
        config = cls(
            cache_blocks=reader.count(CACHE_BLOCKS, cls.cache_blocks),
            block_size=reader.count(BLOCK_SIZE, cls.block_size),
            default_allocate_tokens=reader.count_or_auto(DEFAULT_ALLOCATE, cls.default_allocate_tokens),
            max_waiting_requests=reader.count(MAX_WAITING, cls.max_waiting_requests),
            max_in_flight_mib=reader.count(MAX_IN_FLIGHT, cls.max_in_flight_mib),
            row_cache_bytes=reader.bytes_or_auto(ROW_CACHE, cls.row_cache_bytes),
            admission_mib=reader.count_or_auto(ADMISSION, cls.admission_mib, least=0),
            admission_timeout=reader.seconds(ADMISSION_TIMEOUT, cls.admission_timeout),
            bootstrap_timeout=reader.count(BOOTSTRAP_TIMEOUT, int(cls.bootstrap_timeout)),
            first_word_timeout=reader.seconds(FIRST_WORD_TIMEOUT, cls.first_word_timeout),
            waiting_timeout=reader.count(WAITING_TIMEOUT, int(cls.waiting_timeout)),
            heartbeat_interval=reader.seconds(HEARTBEAT_INTERVAL, cls.heartbeat_interval),
            heartbeat_max_failures=reader.count(HEARTBEAT_MAX_FAILURES, cls.heartbeat_max_failures),
            write_timeout=max(LEAST_WRITE_TIMEOUT, reader.count(MOONCAKE_TRANSFER_TIMEOUT, int(cls.write_timeout))),
            transport=reader.transport(),
            data_plane=reader.data_plane(),
            allowed_media_dir=reader.directory(ALLOWED_MEDIA_DIR),
            private_media_urls=reader.flag(PRIVATE_MEDIA_URLS, cls.private_media_urls),
            progressive=reader.flag(PROGRESSIVE, cls.progressive),
            prefix_prefill=reader.flag(PREFIX_PREFILL, cls.prefix_prefill),
            keys=reader.keys(),
            allowed_hosts=reader.allowed_hosts(),
            trace_events=reader.count_or_zero(TRACE_EVENTS, cls.trace_events),
        )
        if config.cache_blocks > MAX_BLOCKS:
            raise SettingError(f"{CACHE_BLOCKS} must be at most {MAX_BLOCKS} blocks, not {config.cache_blocks}")
        if config.cache_blocks * config.block_size > _LARGEST:
            raise SettingError(
                f"{CACHE_BLOCKS}={config.cache_blocks} blocks of {BLOCK_SIZE}={config.block_size} tokens"
                f" are more than {_LARGEST} tokens"
            )
        return config

    def may_ask(self, host: str) -> bool:
        return self.allowed_hosts is None or host in self.allowed_hosts

    @property
    def timing(self) -> Timing:
        return Timing(
            bootstrap=self.bootstrap_timeout,
            first_word=self.first_word_timeout,
            waiting=self.waiting_timeout,
            heartbeat_interval=self.heartbeat_interval,
            heartbeat_max_failures=self.heartbeat_max_failures,
        )


def untested_sglang_allowed(environment: Mapping[str, str] = os.environ) -> bool:
    """Apart from the rest, because every process of SGLang asks it, in modes that are not ours too."""
    return environment.get(UNTESTED_SGLANG, "").strip().lower() in ("1", "true")


def misspelt(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that nobody reads, and which of ours each may have been meant to be. SGLang has names like ours too."""
    known = {name: name.removeprefix(_PREFIX) for name in globals().values() if str(name).startswith(_PREFIX)}
    strange = [name for name in environment if name.startswith(_PREFIX) and name not in known]
    alike = {name: difflib.get_close_matches(name.removeprefix(_PREFIX), known.values(), 1, 0.75) for name in strange}
    return {name: _PREFIX + found[0] for name, found in alike.items() if found}


class _Reader:
    """An unset or empty variable means its default, as in SGLang."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def _text(self, name: str) -> str:
        return self._environment.get(name, "").strip()

    def count(self, name: str, default: int) -> int:
        text = self._text(name)
        if not text:
            return default
        # isascii, because int() also takes digits of other scripts; isdigit leaves signs, underscores and points out.
        if not (text.isascii() and text.isdigit()) or not 0 < int(text[:11]) <= _LARGEST or len(text) > 10:
            raise SettingError(f"{name} must be a positive integer, not {_shown(text)}")
        return int(text)

    def count_or_zero(self, name: str, default: int) -> int:
        return 0 if self._text(name) == "0" else self.count(name, default)

    def count_or_auto(self, name: str, default: int | None, least: int = 1) -> int | None:
        text = self._text(name)
        if text.lower() == "auto":
            return None
        if not text:
            return default
        try:
            return self.count(name, 0) if least else self.count_or_zero(name, 0)
        except SettingError:
            number = "a positive integer" if least else "a positive integer, 0"
            raise SettingError(f"{name} must be {number} or `auto`, not {_shown(text)}") from None

    def bytes_or_auto(self, name: str, default: int | None) -> int | None:
        text = self._text(name)
        if text.lower() == "auto":
            return None
        if not text:
            return default
        if not (text.isascii() and text.isdigit()) or len(text) > 15 or int(text) > _MOST_BYTES:
            raise SettingError(f"{name} must be a number of bytes, 0 for none or `auto`, not {_shown(text)}")
        return int(text)

    def seconds(self, name: str, default: float) -> float:
        text = self._text(name)
        if not text:
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise SettingError(f"{name} must be a positive number of seconds, not {_shown(text)}")
        return value

    def transport(self) -> str | None:
        if self._text(MOONCAKE_FORCE_TCP):
            return "tcp"  # Mooncake looks only at whether it is set
        text = self._text(MOONCAKE_PROTOCOL).lower()
        if text and text not in TRANSPORTS:
            raise SettingError(f"{MOONCAKE_PROTOCOL} must be one of {', '.join(TRANSPORTS)}, not {_shown(text)}")
        return text or None

    def data_plane(self) -> str:
        text = self._text(DATA_PLANE).lower()
        if text and text not in DATA_PLANES:
            raise SettingError(f"{DATA_PLANE} must be one of {', '.join(DATA_PLANES)}, not {_shown(text)}")
        return text or AUTO

    def flag(self, name: str, default: bool) -> bool:
        text = self._text(name).lower()
        if text not in ("", "0", "1", "false", "true"):
            raise SettingError(f"{name} must be 1 or 0, not {_shown(text)}")
        return text in ("1", "true") if text else default

    def directory(self, name: str) -> Path | None:
        text = self._text(name)
        if not text:
            return None
        path = Path(text)
        if not path.is_absolute() or path == path.parent or not path.is_dir():
            raise SettingError(f"{name} must be the absolute path of a directory other than /, not {_shown(text, 100)}")
        return path

    def keys(self) -> Keys | None:
        path = self._text(SECRET_FILE)
        try:
            return read_keys(path) if path else None
        except BadSecret as reason:
            raise SettingError(f"{SECRET_FILE}: {_shown(path, 100)} {reason}") from None

    def allowed_hosts(self) -> AllowedHosts | None:
        text = self._text(ALLOWED_HOSTS)
        try:
            return AllowedHosts.parse(text) if text else None
        except ValueError as entry:
            known = "an address, a network, a host name or *.domain"
            raise SettingError(f"{ALLOWED_HOSTS} must have {known} between commas, not {_shown(str(entry))}") from None


def _shown(text: str, longest: int = 40) -> str:
    """One line, however the value looks."""
    return repr(text if len(text) <= longest else text[:longest] + "…")
