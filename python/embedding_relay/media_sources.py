"""What a client may name as a picture, video or audio: URLs and data, and files of one directory if there is one."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

# A loader that finds none of these takes a string for base64, or for the name of a file: which one depends on the
# medium and on what is on the disk. So here it is decided by what the string looks like, and nothing else is let by.
_URL: Final = re.compile(r"https?://")
_DATA_URI: Final = re.compile(r"data:[^,]*,")
_BASE64: Final = re.compile(r"[A-Za-z0-9+][A-Za-z0-9+/]*={0,2}")  # a slash at the beginning is a path to the loaders

# Of a medium that is an object of its own: what describes it and names no source.
_DESCRIPTIONS: Final = frozenset({"format", "modality", "detail", "content_hash"})
_DEEPEST: Final = 8
_MIB: Final = 2**20

# Everything else that opening a file can fail with is about its name, and is answered as if it named nothing.
_FAULTS_OF_THE_SERVER: Final = frozenset({errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM})


class NotAccepted(ValueError):
    """A source that this server does not read from, in a sentence that says nothing about what is on its disk."""

    def __init__(self) -> None:
        super().__init__(
            "a picture, video or audio must be an http or https URL, a data: URI or base64:"
            " other sources, files of the server among them, are not read"
        )


class MediaSources:
    """`directory`: whose files clients may name; None for none. `most_mib`: of one file; 0 for any size."""

    def __init__(self, directory: Path | None = None, most_mib: int = 0) -> None:
        self._roots = () if directory is None else (str(directory), os.path.realpath(directory))
        self._most_mib = most_mib

    def accepted(self, media: Any, depth: int = 0) -> Any:
        """The same media as a loader may have them, files read and base64 marked as such; NotAccepted for the rest."""
        if depth > _DEEPEST:
            raise NotAccepted
        match media:
            case str():
                return self._source(media)
            case list() | tuple():
                return [self.accepted(one, depth + 1) for one in media]
            case Mapping():
                return {
                    key: value if key in _DESCRIPTIONS else self.accepted(value, depth + 1)
                    for key, value in media.items()
                }
            case _ if hasattr(media, "url"):  # SGLang's ImageData and VideoData
                return dataclasses.replace(media, url=self.accepted(media.url, depth + 1))
        return media  # bytes, tensors, pictures: only who calls from within the process has them

    def _source(self, text: str) -> str | bytes:
        if _URL.match(text) or _DATA_URI.match(text):
            return text
        if len(text) % 4 == 0 and _BASE64.fullmatch(text):
            return f"data:;base64,{text}"
        path = os.path.normpath(_local_path(text))
        if not self._has(path):
            raise NotAccepted  # whether or not it exists: the disk was not asked
        return self._read(path)

    def _has(self, path: str) -> bool:
        return any(path.startswith(root.rstrip("/") + "/") for root in self._roots)

    def _read(self, path: str) -> bytes:
        """Of an open file it is certain where it lies; of a name only until somebody changes a link."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in _FAULTS_OF_THE_SERVER:
                raise
            raise NotAccepted from None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or not self._has(os.path.realpath(f"/proc/self/fd/{descriptor}")):
                raise NotAccepted
            if self._most_mib and status.st_size > self._most_mib * _MIB:
                raise ValueError(f"the file is larger than the {self._most_mib} MiB that are read of one")
            with open(descriptor, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(descriptor)


def _local_path(text: str) -> str:
    """The path that `text` means, as SGLang's loaders read it: only that of a URL is percent-encoded. "" for none."""
    if text.startswith("/"):
        return text
    try:
        parts = urlsplit(text)
    except ValueError:
        return ""
    return unquote(parts.path) if parts.scheme == "file" and parts.netloc in ("", "localhost") else ""
