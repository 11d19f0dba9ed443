"""What becomes of unusual pictures is SGLang's: docs/models.md has it in a table, and here each line of that is tried.

SGLang's tokenizer manager, processor and loaders are real; support/tokenizing.py says what is not there. If one fails,
SGLang or Pillow has changed, and the table changes too.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from sglang.srt.managers.schedule_batch import Modality
from sglang.srt.multimodal import processors
from support.preparing import refusal, uri
from support.tokenizing import IMAGE, TokenizerManagerWithoutScheduler

MODE = "encode"

WIDE, HIGH = 84, 56
ORIENTATION: Final = 0x0112
LIES_ON_ITS_SIDE: Final = 6
GREY_16, RGB_16, RGBA_16 = 0, 2, 6  # the colour types of PNG
HIDDEN: Final = (250, 10, 20)


def two_halves(mode: str, left: Any, right: Any) -> Image.Image:
    image = Image.new(mode, (WIDE, HIGH), left)
    image.paste(right, (WIDE // 2, 0, WIDE, HIGH))
    return image


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


RED_BLUE: Final = two_halves("RGB", "red", "blue")


def png_of_16_bits(colour: int, left: tuple[int, ...], right: tuple[int, ...]) -> bytes:
    """Pillow writes only some of them."""
    row = b"\0" + b"".join(struct.pack(f">{len(side)}H", *side) * (WIDE // 2) for side in (left, right))
    header = struct.pack(">IIBBBBB", WIDE, HIGH, 16, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(row * HIGH)), (b"IEND", b""))
    parts = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def rotated(kind: str) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = LIES_ON_ITS_SIDE
    return file(RED_BLUE, kind, exif=exif)


def palette() -> Image.Image:
    image = two_halves("P", 0, 1)
    image.putpalette([*HIDDEN, 0, 0, 255])
    return image


def with_profile() -> bytes:
    """Of a colour space in which the same numbers are other colours."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    return file(RED_BLUE, icc_profile=profile.tobytes())


def pixels(manager: TokenizerManagerWithoutScheduler, content: bytes) -> torch.Tensor:
    """What goes into the vision tower."""
    (item,) = manager.prepare(text=f"{IMAGE}a", image_data=[uri(content)]).mm_inputs.mm_items
    return torch.as_tensor(item.feature)


# ---- the column of most models


SEEN: Final[dict[str, tuple[Callable[[], bytes], Callable[[], Image.Image]]]] = {
    "rotated by EXIF, PNG": (lambda: rotated("PNG"), lambda: RED_BLUE),
    "rotated by EXIF, WebP": (lambda: rotated("WEBP"), lambda: opened(file(RED_BLUE, "WEBP"))),
    "rotated by EXIF, JPEG": (lambda: rotated("JPEG"), lambda: opened(file(RED_BLUE, "JPEG"))),
    "rotated by its tag, TIFF": (lambda: rotated("TIFF"), lambda: RED_BLUE.transpose(Image.Transpose.ROTATE_270)),
    "transparent": (
        lambda: file(two_halves("RGBA", (*HIDDEN, 0), (0, 0, 255, 255))),
        lambda: two_halves("RGB", HIDDEN, "blue"),
    ),
    "transparent, grey": (
        lambda: file(two_halves("LA", (77, 0), (200, 255))),
        lambda: two_halves("L", 77, 200),
    ),
    "transparent, palette": (
        lambda: file(palette(), transparency=bytes([0, 255])),
        lambda: two_halves("RGB", HIDDEN, "blue"),
    ),
    "transparent, one colour": (
        lambda: file(two_halves("RGB", HIDDEN, "blue"), transparency=HIDDEN),
        lambda: two_halves("RGB", HIDDEN, "blue"),
    ),
    "palette": (lambda: file(palette(), "GIF"), lambda: two_halves("RGB", HIDDEN, "blue")),
    "one bit": (lambda: file(two_halves("1", 0, 1)), lambda: two_halves("RGB", "black", "white")),
    "16 bits, grey": (
        lambda: png_of_16_bits(GREY_16, (200,), (0x4000,)),
        lambda: two_halves("L", 200, 255),
    ),
    "16 bits, grey, TIFF": (
        lambda: file(two_halves("I", 200, 0x4000).convert("I;16"), "TIFF"),
        lambda: two_halves("L", 200, 255),
    ),
    "32 bits, TIFF": (lambda: file(two_halves("I", 200, 0x4000), "TIFF"), lambda: two_halves("L", 200, 255)),
    "fractions, TIFF": (lambda: file(two_halves("F", 0.9, 200.0), "TIFF"), lambda: two_halves("L", 0, 200)),
    "16 bits, colours": (
        lambda: png_of_16_bits(RGB_16, (0x12FF, 0x34FF, 0x5600), (0xFF00, 0x0100, 0)),
        lambda: two_halves("RGB", (0x12, 0x34, 0x56), (0xFF, 1, 0)),
    ),
    "16 bits, colours, transparent": (
        lambda: png_of_16_bits(RGBA_16, (0x12FF, 0x34FF, 0x5600, 0), (0xFF00, 0x0100, 0, 0xFFFF)),
        lambda: two_halves("RGB", (0x12, 0x34, 0x56), (0xFF, 1, 0)),
    ),
    "CMYK": (
        lambda: file(two_halves("CMYK", (255, 0, 0, 0), (0, 0, 0, 255)), "TIFF"),
        lambda: two_halves("RGB", (0, 255, 255), "black"),
    ),
    "with a colour profile": (with_profile, lambda: RED_BLUE),
    **{
        f"several, {kind}": (
            lambda kind=kind, more=more: file(  # type: ignore[misc]
                RED_BLUE, kind, save_all=True, append_images=[ImageOps.invert(RED_BLUE)], **more
            ),
            lambda: RED_BLUE,
        )
        for kind, more in (("GIF", {}), ("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}))
    },
}


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


@pytest.mark.parametrize("name", SEEN)
def test_what_most_models_see(manager: TokenizerManagerWithoutScheduler, name: str) -> None:
    given, expected = (make() for make in SEEN[name])
    seen = pixels(manager, given)
    assert torch.equal(seen, pixels(manager, file(expected.convert("RGB"))))
    assert not torch.equal(seen, pixels(manager, file(expected.convert("RGB").rotate(180)))), "a picture must matter"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO"])
def test_formats_that_are_read(manager: TokenizerManagerWithoutScheduler, kind: str) -> None:
    assert len(pixels(manager, file(RED_BLUE, kind)))


@pytest.mark.parametrize(
    "content",
    [
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100),
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n",
    ],
    ids=["HEIC", "SVG", "PDF"],
)
def test_formats_that_are_refused(manager: TokenizerManagerWithoutScheduler, content: bytes) -> None:
    assert "Could not decode image" in refusal(manager, text=f"{IMAGE}a", image_data=[uri(content)])


# ---- the column of the GLM family


SeenByGlm = Callable[[bytes], Image.Image]


@pytest.fixture(scope="module")
def seen_by_glm() -> SeenByGlm:
    """What is loaded, as it goes to the processor that `transformers` has for the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SGLang's imports warn about hardware that is not there
        from sglang.srt.multimodal.processors import glm4v

    def seen(content: bytes) -> Image.Image:
        image = glm4v.Glm4vImageProcessor._load_single_item(uri(content), Modality.IMAGE)
        assert isinstance(image, Image.Image)
        assert image.mode == "RGB"
        return image

    return seen


def test_glm_rotates(seen_by_glm: SeenByGlm) -> None:
    assert seen_by_glm(rotated("PNG")).tobytes() == RED_BLUE.transpose(Image.Transpose.ROTATE_270).tobytes()


@pytest.mark.parametrize(
    ("visible", "background"), [((250, 250, 250), (32, 32, 32)), ((9, 9, 9), (240, 240, 240)), (None, (255, 255, 255))]
)
def test_glm_puts_what_is_transparent_on_a_plain_background(
    seen_by_glm: SeenByGlm, visible: tuple[int, int, int] | None, background: tuple[int, int, int]
) -> None:
    """The choice is made by the brightness of what can be seen at the edge."""
    right = (*visible, 255) if visible else (*HIDDEN, 0)
    seen = seen_by_glm(file(two_halves("RGBA", (*HIDDEN, 0), right)))
    assert seen.tobytes() == two_halves("RGB", background, visible or background).tobytes()


def test_glm_clips_16_bits_too(seen_by_glm: SeenByGlm) -> None:
    seen = seen_by_glm(png_of_16_bits(GREY_16, (200,), (0x4000,)))
    assert seen.tobytes() == two_halves("RGB", (200,) * 3, "white").tobytes()


# ---- which models are in which column


@pytest.mark.parametrize(
    ("words", "known"), [("smart_rgb_conversion = True", {"glm4v.py"}), ("discard_alpha_channel=False", {"kimi_k3.py"})]
)
def test_no_other_processor_has_a_way_of_its_own(words: str, known: set[str]) -> None:
    """Read, not imported: all of them would take seconds."""
    sources = list(Path(processors.__path__[0]).glob("**/*.py"))
    assert len(sources) > 30
    assert {source.name for source in sources if words in source.read_text()} <= known
