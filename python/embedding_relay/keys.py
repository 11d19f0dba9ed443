"""The secret of a deployment: the file that holds it, and the keys that are made from it."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path
from typing import Final

# Hexadecimal, so that a length is an amount of randomness: 32 bytes.
_DIGITS: Final = 64
# Different bytes, of 32: a placeholder has fewer, and chance alone never gives as few.
_FEWEST_VALUES: Final = 16
_LARGEST_FILE: Final = 4096

# A key made under one label says nothing about a key made under another. The number changes with the use of the key.
_CONTROL: Final = b"sglang-embedding-relay control 1"
_REGISTRY: Final = b"sglang-embedding-relay registry 1"


class BadSecret(ValueError):
    """A file that cannot serve as a secret; the message begins with a verb and never quotes the file's content."""


@dataclasses.dataclass(frozen=True)
class Keys:
    """What every instance of one deployment derives from the same file. Never printed."""

    control: bytes = dataclasses.field(repr=False)
    """The private half of the key pair of the control sockets: 32 bytes."""
    registry: bytes = dataclasses.field(repr=False)
    """Seals what is said to the bootstrap registry, and what it answers: 32 bytes."""

    @classmethod
    def of(cls, secret: bytes) -> Keys:
        return cls(control=hkdf(secret, info=_CONTROL), registry=hkdf(secret, info=_REGISTRY))


def hkdf(secret: bytes, *, info: bytes, salt: bytes = b"") -> bytes:
    """The first 32 bytes of HKDF-SHA256 (RFC 5869)."""
    extracted = hmac.digest(salt or bytes(hashlib.sha256().digest_size), secret, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def read_keys(path: str) -> Keys:
    """Raise BadSecret for a file that others may open, or that holds no secret."""
    try:
        # Without waiting: what somebody has put there may be a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # a ValueError for a path with a null character
        raise BadSecret(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise BadSecret("is not an ordinary file")
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise BadSecret(f"is open to other users (mode {stat.S_IMODE(mode):04o}): chmod 600")
        return Keys.of(_secret(os.read(descriptor, _LARGEST_FILE)))
    finally:
        os.close(descriptor)


def _secret(content: bytes) -> bytes:
    try:
        secret = bytes.fromhex(content.strip().decode("ascii"))
    except ValueError:
        raise BadSecret(f"must hold {_DIGITS} hexadecimal digits and nothing else") from None
    if len(secret) * 2 < _DIGITS:
        raise BadSecret(f"is too short: {len(secret) * 2} hexadecimal digits, where {_DIGITS} are needed")
    if len(set(secret)) < _FEWEST_VALUES:
        raise BadSecret("is not random: `sglang-relay make-secret FILE` makes one that is")
    return secret


def make_secret(path: Path) -> None:
    """Write a new secret, for its owner only; raises FileExistsError rather than replace one that may be in use."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "w") as file:
        file.write(secrets.token_hex(_DIGITS // 2) + "\n")
