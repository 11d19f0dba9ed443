"""Whose fault it is when a prompt and its media cannot be prepared, and what the client is told.

SGLang's tokenizer manager, processor and loaders are real; support/tokenizing.py says what is not there.
"""

from __future__ import annotations

import io
import logging
import os
import struct
import zlib
from typing import Any

import pytest
import soundfile
import torch
import torchcodec
from PIL import Image

from embedding_relay.protocol.errors import INTERNAL, UNAVAILABLE
from embedding_relay.tools.chat_client import data_uri
from sglang.srt.disaggregation.multimodal import faults
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from sglang.srt.utils.common import load_audio
from support.preparing import GOOD_URI, PNG, fault, refusal, uri
from support.tokenizing import IMAGE, VIDEO, TokenizerManagerWithoutScheduler

MODE = "encode"


# ---- what the picture or the prompt did


def damaged(at: int) -> bytes:
    return PNG[:at] + b"\0\0\0\0\0\0" + PNG[at + 6 :]


def bomb() -> bytes:
    """A PNG whose header promises more pixels than Pillow decodes."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return PNG[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + PNG[33:]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\0\0\0", "Could not decode image: it is in no format"),
        (b"", "Could not decode image"),
        (PNG[: len(PNG) // 2], "Could not decode image: it is damaged"),
        (PNG[:20], "Could not decode image: it is damaged"),
        (damaged(60), "Could not decode image: it is damaged"),
        (bomb(), "more pixels than are decoded"),
    ],
    ids=["garbage", "empty", "half", "head", "damaged", "bomb"],
)
def test_a_picture_that_cannot_be_decoded(
    manager: TokenizerManagerWithoutScheduler, content: bytes, words: str
) -> None:
    assert words in refusal(manager, text=f"{IMAGE}a", image_data=[uri(content)])


def test_base64_that_is_none(manager: TokenizerManagerWithoutScheduler) -> None:
    assert "not valid base64" in refusal(manager, text=f"{IMAGE}a", image_data=["data:image/png;base64,A!"])


def test_a_shape_that_the_model_does_not_take(manager: TokenizerManagerWithoutScheduler) -> None:
    line = data_uri(Image.new("RGB", (3000, 1)))
    assert "aspect ratio" in refusal(manager, text=f"{IMAGE}a", image_data=[line])


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text",
    [
        f"{IMAGE}{IMAGE}a",
        f"{IMAGE}a<|image_pad|>",
        f"{IMAGE}a<|vision_start|>",
        f"{IMAGE}a<|video_pad|>",
        "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>a",
        "",
    ],
)
def test_a_prompt_that_does_not_fit_its_pictures(manager: TokenizerManagerWithoutScheduler, text: str) -> None:
    """Some of these a server of SGLang's answers with 500, and some never: its future cannot take a StopIteration."""
    assert refusal(manager, text=text, image_data=[GOOD_URI])
    if text:
        assert refusal(manager, input_ids=manager.tokenizer.encode(text), image_data=[GOOD_URI])


@pytest.mark.parametrize("special", ["<|image_pad|>", "<|vision_start|>"])
def test_a_token_too_many_is_named(manager: TokenizerManagerWithoutScheduler, special: str) -> None:
    words = refusal(manager, text=f"{IMAGE}a{special}", image_data=[GOOD_URI])
    assert words == f"the prompt has 2 tokens {special}, but 1 media were sent"


def test_ids_outside_the_vocabulary(manager: TokenizerManagerWithoutScheduler) -> None:
    ids = [-5, *manager.tokenizer.encode(f"{IMAGE}a")]
    assert "vocabulary" in refusal(manager, input_ids=ids, image_data=[GOOD_URI])


def test_what_sglang_says_about_a_prompt_is_passed_on(manager: TokenizerManagerWithoutScheduler) -> None:
    with pytest.raises(ValueError, match="content_hash must use the form 'sha256:<64 hex digits>'"):
        manager.prepare(text=f"{IMAGE}a", image_data=[GOOD_URI], mm_content_hashes=["x"])
    words = refusal(manager, text=f"{IMAGE}{IMAGE}a", image_data=[GOOD_URI])
    # 0.5.22 says nothing about it, and fails on it: then we do.
    ours = "the prompt has 2 image placeholders, but 1 were sent"
    assert words in ("Prompt has 2 image placeholders but 1 image inputs were provided", ours)


# ---- what the server did


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, name: str = "process_mm_data") -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(BaseMultimodalProcessor, name, fail)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ImportError("no module named av"), INTERNAL),
        (AttributeError("'NoneType' object has no attribute 'x'"), INTERNAL),
        (TypeError("unsupported"), INTERNAL),
        (RuntimeError("CUDA error: device-side assert triggered"), INTERNAL),
        (OSError(28, "No space left on device"), INTERNAL),
        (KeyError("pixel_values"), INTERNAL),
        (MemoryError(), UNAVAILABLE),
        (torch.OutOfMemoryError("CUDA out of memory"), UNAVAILABLE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_fault_of_the_server_is_not_put_down_to_the_client(
    manager: TokenizerManagerWithoutScheduler, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    failing(monkeypatch, error)
    assert fault(manager, text=f"{IMAGE}a", image_data=[GOOD_URI]).status_code == code


@pytest.mark.parametrize("error", [ImportError("no libjpeg"), MemoryError(), OSError(24, "Too many open files")])
def test_nor_is_one_that_a_loader_wrapped(
    manager: TokenizerManagerWithoutScheduler, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """In a RuntimeError without a cause, whose text is all that is left: SGLang's way out of its threads."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("sglang.srt.multimodal.processors.base_processor.load_image", fail)
    assert fault(manager, text=f"{IMAGE}a", image_data=[GOOD_URI]).status_code in (INTERNAL, UNAVAILABLE)


NO_FFMPEG = "it lacks FFmpeg's libraries (apt-get install ffmpeg)"


@pytest.fixture
def no_ffmpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchcodec as it is where it finds no library of FFmpeg, with all that it says then."""

    def cannot_be_loaded(path: str) -> None:
        raise OSError(f"{path}: libavutil.so.58: cannot open shared object file: No such file or directory")

    load = torchcodec._core.ops.load_core_libraries.__wrapped__
    monkeypatch.setattr(torchcodec, "ffmpeg_major_version", None)
    monkeypatch.setattr(torch.ops, "load_library", cannot_be_loaded)
    for decoder in ("sglang.srt.utils.common.VideoDecoderWrapper", "torchcodec.decoders.AudioDecoder"):
        monkeypatch.setattr(decoder, lambda *_, **__: load())


@pytest.mark.usefixtures("no_ffmpeg")
def test_nor_is_a_video_on_a_server_without_its_decoder(
    manager: TokenizerManagerWithoutScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    """SGLang makes a ValueError of whatever its decoder says."""
    video = {"text": f"{VIDEO}a", "video_data": [uri(b"video", "video/mp4")]}
    with caplog.at_level(logging.INFO):
        assert fault(manager, NO_FFMPEG, **video).status_code == INTERNAL
    assert caplog.text.count("\n") == len(caplog.records), "a line each"
    assert f"relay: this encode instance cannot decode a video: {NO_FFMPEG}" in caplog.text


@pytest.mark.usefixtures("no_ffmpeg")
def test_an_audio_there_is_decoded_and_its_log_is_one_line(
    manager: TokenizerManagerWithoutScheduler, caplog: pytest.LogCaptureFixture
) -> None:
    """SGLang tries torchcodec first, and logs all that it says: a traceback for each version of FFmpeg."""
    sound = io.BytesIO()
    soundfile.write(sound, [0.5] * 160, 16_000, format="WAV")
    manager.prepare(text=f"{IMAGE}a", image_data=[GOOD_URI])
    assert len(load_audio(sound.getvalue())) == 160
    (said,) = [record.getMessage() for record in caplog.records if "torchcodec" in record.getMessage()]
    assert said == (
        "torchcodec AudioDecoder failed (FFmpeg's libraries are missing); falling back to soundfile + torchaudio."
    )


@pytest.mark.usefixtures("no_ffmpeg")
def test_a_machine_without_it_says_so_at_start(caplog: pytest.LogCaptureFixture) -> None:
    faults.warn_without_ffmpeg()
    (record,) = caplog.records
    assert record.getMessage() == f"relay: this encode instance answers requests with videos with 500: {NO_FFMPEG}"


def test_a_machine_with_it_says_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torchcodec, "ffmpeg_major_version", 5)
    faults.warn_without_ffmpeg()
    assert caplog.records == []


def test_but_a_damaged_video_is(manager: TokenizerManagerWithoutScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    class Decoder:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("Could not open input file: Invalid data found when processing input")

    monkeypatch.setattr("sglang.srt.utils.common.VideoDecoderWrapper", Decoder)
    words = refusal(manager, text=f"{VIDEO}a", video_data=[uri(b"video", "video/mp4")])
    assert words == "Could not decode video: it is damaged, or in no format that is known here"


def test_nothing_of_this_leaves_a_descriptor_or_a_thread_open(manager: TokenizerManagerWithoutScheduler) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        refusal(manager, text=f"{IMAGE}a", image_data=["http://127.0.0.1:9/picture"])
        refusal(manager, text=f"{IMAGE}a", image_data=[uri(b"garbage")])
    assert len(os.listdir("/proc/self/fd")) <= before + 1
