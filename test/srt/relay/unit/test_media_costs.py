"""What media will take: read from headers without decoding, guessed for what nobody can know yet, and learned."""

from __future__ import annotations

import base64
import dataclasses
import io
import random
from typing import Any

import pytest
from PIL import Image

from embedding_relay import media_costs
from embedding_relay.media_costs import AUDIO, IMAGE, VIDEO, MediaCosts, Source, sources


def encoded(width: int, height: int, kind: str = "png", **more: Any) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (width, height), (10, 20, 30)).save(held, kind, **more)
    return held.getvalue()


def uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@dataclasses.dataclass
class ImageData:
    """As SGLang has it: its picture is in `url`, beside other fields."""

    url: str
    detail: str = "auto"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "gif", "tiff"])
def test_the_size_of_a_picture_is_read_from_its_header(kind: str) -> None:
    data = encoded(300, 200, kind)
    bare = base64.b64encode(data).decode()
    for media in (uri(data), data, *([bare] if not bare.startswith("/") else [])):  # a slash: the name of a file
        (found,) = sources(media, IMAGE)
        assert (found.modality, found.units) == (IMAGE, 60_000)
        assert len(data) <= found.data <= len(data) + 2


def test_no_pixel_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    assert [one.units for one in sources(uri(encoded(40, 50)), IMAGE)] == [2000]


def test_a_header_behind_large_metadata_is_found() -> None:
    data = encoded(300, 200, "jpeg", exif=b"Exif\0\0" + bytes(60_000), icc_profile=random.Random(1).randbytes(60_000))
    assert [one.units for one in sources(uri(data), IMAGE)] == [60_000]


def test_every_shape_in_which_a_request_has_its_media() -> None:
    one, two = uri(encoded(10, 10)), uri(encoded(20, 10))
    for media in (
        [one, two],
        [[one], [two]],
        [{"url": one, "detail": one}, ImageData(two)],
        (one, {"image": {"a": two}}),
    ):
        assert [found.units for found in sources(media, IMAGE)] == [100, 200]
    assert list(sources(None, IMAGE)) == []


@pytest.mark.parametrize("media", ["https://example.org/a.png", "file:///srv/a.png", "/srv/a.png"])
def test_what_must_be_fetched_first_has_no_size_yet(media: str) -> None:
    assert list(sources(media, IMAGE)) == [Source(IMAGE, None, 0)]


@pytest.mark.parametrize(
    "media", ["data:image/png;base64,", "data:,%%%", "", "AAAA", "x" * 99, b"", b"\x89PNG\r\n\x1a\n"]
)
def test_nonsense_is_nobodys_business_here(media: Any) -> None:
    (found,) = sources(media, IMAGE)
    assert found.units is None


def test_a_header_that_promises_more_pixels_than_are_decoded_is_one_without_a_size() -> None:
    data = bytearray(encoded(10, 10, "bmp"))
    data[18:22] = data[22:26] = (50_000).to_bytes(4, "little")
    assert [one.units for one in sources(bytes(data), IMAGE)] == [None]


def test_media_that_lie_too_deep_are_not_looked_for() -> None:
    media: Any = uri(encoded(10, 10))
    for _ in range(2000):
        media = [media]
    assert list(sources(media, IMAGE)) == []


def test_video_and_audio_count_by_their_bytes() -> None:
    text = "data:video/mp4;base64," + base64.b64encode(bytes(3000)).decode()
    assert list(sources(text, VIDEO)) == [Source(VIDEO, 3000, 3000)]
    assert list(sources(bytes(500), AUDIO)) == [Source(AUDIO, 500, 500)]


# ---- guesses


def picture(side: int) -> Source:
    return Source(IMAGE, side * side, 1000)


def test_a_first_guess_is_rather_too_much() -> None:
    guess = MediaCosts().guess([picture(1000), picture(1000)])
    assert guess.prepared == 2 * 24 * 1_000_000
    assert guess.beside == 2 * (6 * 1_000_000 + 1000)


def test_a_picture_becomes_no_larger_than_its_processor_makes_it() -> None:
    guess = MediaCosts(most_pixels=1_000_000).guess([picture(4000)])
    assert guess.prepared == 24 * 1_000_000
    assert guess.beside == 6 * 16_000_000 + 1000  # it is decoded whole


def test_what_was_prepared_is_learned_at_once_where_it_is_more_and_slowly_where_it_is_less() -> None:
    costs = MediaCosts()
    guess = costs.guess([picture(1000)])
    costs.learn(guess, {IMAGE: 10_000_000})
    assert costs.guess([picture(1000)]).prepared == 10_000_000
    costs.learn(guess, {IMAGE: 30_000_000})
    assert costs.guess([picture(1000)]).prepared == 30_000_000
    costs.learn(guess, {IMAGE: 14_000_000})
    assert costs.guess([picture(1000)]).prepared == 29_000_000


def test_pictures_of_one_size_say_nothing_about_those_of_another() -> None:
    """Or a stranger could teach that large pictures become small, and then send many of the middle."""
    costs = MediaCosts()
    costs.learn(costs.guess([picture(10_000)]), {IMAGE: 1_000_000})
    assert costs.guess([picture(1000)]).prepared == 24_000_000


def test_a_mixture_teaches_nothing() -> None:
    costs = MediaCosts()
    costs.learn(costs.guess([picture(100), picture(2000)]), {IMAGE: 1000})
    costs.learn(costs.guess([]), {IMAGE: 1000})
    assert costs.guess([picture(100)]).prepared == 240_000


def test_what_must_be_fetched_is_guessed_from_what_was_fetched_before() -> None:
    costs = MediaCosts()
    unknown = [Source(IMAGE, None, 0)]
    first = costs.guess(unknown)
    assert first.prepared == 24 * media_costs._UNITS_UNSEEN[IMAGE]
    costs.learn(first, {IMAGE: 5_000_000})
    assert costs.guess(unknown).prepared == pytest.approx(5_000_000, abs=2)
