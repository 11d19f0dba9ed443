"""What preparing a picture, video or audio takes of memory: guessed from its first bytes, learned from those before."""

from __future__ import annotations

import binascii
import dataclasses
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

_DATA_URI: Final = re.compile(r"data:[^,]{0,200},")
_URL: Final = re.compile(r"https?://")
_HEAD: Final = 65536
"""Characters of base64 in which the header of a picture is looked for; a multiple of four."""
_LONGER_HEAD: Final = 16 * _HEAD
_DEEPEST: Final = 8
_DESCRIPTIONS: Final = frozenset({"format", "modality", "detail", "content_hash", "uuid"})

IMAGE, VIDEO, AUDIO = "image", "video", "audio"

# Before anything was learned. A picture becomes three float32 a pixel, for Qwen's towers twice; of compressed video and
# audio nobody knows without decoding it.
_PREPARED_PER_UNIT: Final = {IMAGE: 24.0, VIDEO: 64.0, AUDIO: 16.0}
# What is decoded is there beside what it becomes: three bytes a pixel, and a copy while its colours are converted.
_DECODED_PER_UNIT: Final = {IMAGE: 6.0, VIDEO: 0.0, AUDIO: 0.0}
# Of a source whose size is not known before it is fetched.
_UNITS_UNSEEN: Final = {IMAGE: 4 * 2**20, VIDEO: 8 * 2**20, AUDIO: 2**20}
_FORGETTING: Final = 16
"""What is learned falls by this part of the difference with each request, and rises at once."""


class Source(NamedTuple):
    modality: str
    units: int | None
    """Pixels of a picture, bytes of anything else; None if that is not known before it is fetched."""
    data: int
    """Bytes that are sent with the request, once they are no text any more."""

    @property
    def kind(self) -> tuple[str, int]:
        """Sources that take about as much for each of their units: within a factor of four in size."""
        return self.modality, -1 if self.units is None else self.units.bit_length() // 2


@dataclasses.dataclass(frozen=True)
class Guess:
    sources: tuple[Source, ...]
    prepared: int
    """Bytes of what the processor will make of them."""
    beside: int
    """Bytes that are needed on the way there only."""


class MediaCosts:
    """Belongs to one thread. `most_pixels`: to which the processor makes larger pictures smaller; None: it does not."""

    def __init__(self, most_pixels: int | None = None) -> None:
        self._most_pixels = most_pixels
        self._prepared: dict[tuple[str, int], float] = {}
        """Bytes for each unit, by the kind of a source."""

    def guess(self, sources: Sequence[Source]) -> Guess:
        prepared = sum(self._per_unit(one) * self._prepared_units(one) for one in sources)
        beside = sum(one.data + _DECODED_PER_UNIT[one.modality] * _units(one) for one in sources)
        return Guess(tuple(sources), int(prepared), int(beside))

    def learn(self, guess: Guess, prepared: Mapping[str, int]) -> None:
        """`prepared`: by modality, the bytes of what the processor made. Of a mixture nobody knows which took what."""
        for modality, made in prepared.items():
            of_it = [one for one in guess.sources if one.modality == modality]
            kinds = {one.kind for one in of_it}
            units = sum(map(self._prepared_units, of_it))
            if len(kinds) != 1 or not units:
                continue
            (kind,), found = kinds, made / units
            known = self._prepared.get(kind)
            falls = known is not None and found < known
            self._prepared[kind] = known + (found - known) / _FORGETTING if known is not None and falls else found

    def _prepared_units(self, source: Source) -> int:
        if source.modality == IMAGE and self._most_pixels is not None:
            return min(_units(source), self._most_pixels)
        return _units(source)

    def _per_unit(self, source: Source) -> float:
        return self._prepared.get(source.kind, _PREPARED_PER_UNIT[source.modality])


def _units(source: Source) -> int:
    return _UNITS_UNSEEN[source.modality] if source.units is None else source.units


# ---- sources


def sources(media: Any, modality: str, depth: int = 0) -> Iterator[Source]:
    """Of whatever a request has in its field for this modality. Nothing is fetched, opened or decoded."""
    if media is None or depth > _DEEPEST:
        return
    if isinstance(media, str | bytes):
        yield _source(media, modality)
    elif isinstance(media, Mapping):
        yield from _all((value for key, value in media.items() if key not in _DESCRIPTIONS), modality, depth)
    elif isinstance(media, list | tuple):
        yield from _all(media, modality, depth)
    elif hasattr(media, "url"):  # SGLang's ImageData and VideoData
        yield from sources(media.url, modality, depth + 1)
    elif isinstance(size := getattr(media, "nbytes", None), int):  # an array or a tensor of a caller in this process
        yield Source(modality, None if modality == IMAGE else size, size)


def _all(several: Iterable[Any], modality: str, depth: int) -> Iterator[Source]:
    for one in several:
        yield from sources(one, modality, depth + 1)


def _source(media: str | bytes, modality: str) -> Source:
    if isinstance(media, str) and (_URL.match(media) or media.startswith(("/", "file:"))):
        return Source(modality, None, 0)
    begin = 0
    if isinstance(media, str):
        found = _DATA_URI.match(media)
        begin = found.end() if found else 0
    data = len(media) if isinstance(media, bytes) else (len(media) - begin) // 4 * 3
    if modality != IMAGE:
        return Source(modality, data, data)
    return Source(modality, _pixels(media, begin), data)


def _pixels(media: str | bytes, begin: int) -> int | None:
    """As the header of the picture says, which lies further in where large metadata come before it."""
    for length in (_HEAD, _LONGER_HEAD):
        if (pixels := _pixels_of_head(_head(media, begin, length))) is not None:
            return pixels
        if len(media) - begin <= length:
            break
    return None


def _head(media: str | bytes, begin: int, length: int) -> bytes:
    if isinstance(media, bytes):
        return media[:length]
    text = media[begin : begin + length]
    try:
        return binascii.a2b_base64(text[: len(text) // 4 * 4])
    except (binascii.Error, ValueError):
        return b""  # whoever loads it says what is wrong with it


def _pixels_of_head(head: bytes) -> int | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(head)) as picture:
            return picture.width * picture.height
    except Exception:  # decoders fail in any way on data of strangers; its loader says what is wrong with it
        return None
