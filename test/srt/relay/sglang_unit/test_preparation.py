"""Around tokenizing on the encode half: which media are loaded, and whose fault it is when that fails.

SGLang's tokenizer manager, processor and loaders are real; support/tokenizing.py says what is not there.
"""

from __future__ import annotations

import base64
import io
import os
import re
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import HTTPException
from PIL import Image

from embedding_relay.media_sources import MediaSources, NotAccepted
from embedding_relay.protocol.errors import INTERNAL, UNAVAILABLE
from embedding_relay.tools.chat_client import data_uri, picture
from sglang.srt.disaggregation.multimodal import preparation
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor
from sglang.srt.utils import ImageData
from support import tokenizing
from support.tokenizing import IMAGE, VIDEO, TokenizerManagerWithoutScheduler

GOOD = picture(56, 56, seed=1)
GOOD_URI = data_uri(GOOD)
PNG = base64.b64decode(GOOD_URI.partition(",")[2])


@pytest.fixture(scope="module")
def manager() -> Iterator[TokenizerManagerWithoutScheduler]:
    with tokenizing.serving("encode") as made:
        yield made


def uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def refusal(manager: TokenizerManagerWithoutScheduler, **request: Any) -> str:
    """The sentence of a 400, which never shows what Python or the disk look like."""
    with pytest.raises(ValueError, match=r".") as refused:
        manager.prepare(**request)
    assert not isinstance(refused.value, HTTPException)
    sentence = str(refused.value)
    assert not re.search(r"<_io|0x[0-9a-f]{6}|Traceback|Errno|Error|\w\(|/etc|/tmp|base64,", sentence), sentence
    return sentence


def fault(manager: TokenizerManagerWithoutScheduler, words: str = "its log says why", **request: Any) -> HTTPException:
    with pytest.raises(HTTPException) as failed:
        manager.prepare(**request)
    assert failed.value.detail.startswith("this encode instance cannot ")
    assert failed.value.detail.endswith(words)
    return failed.value


# ---- which media are loaded


@pytest.mark.parametrize("medium", ["image", "video", "audio"])
@pytest.mark.parametrize("path", [__file__, f"file://{__file__}", "/etc/nothing.png", "FILE:///etc/passwd", "~/a.png"])
def test_files_are_refused_in_the_same_words_whether_or_not_they_exist(
    manager: TokenizerManagerWithoutScheduler, medium: str, path: str
) -> None:
    placeholder = {"image": IMAGE, "video": VIDEO, "audio": ""}[medium]
    for media in (path, [path], [ImageData(path)], [{"url": path}]):
        assert refusal(manager, text=f"{placeholder}a", **{f"{medium}_data": media}) == str(NotAccepted())


def test_a_file_of_the_allowed_directory_is_the_picture_itself(
    manager: TokenizerManagerWithoutScheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    monkeypatch.setattr(preparation, "_sources", lambda: MediaSources(tmp_path))
    of_file = manager.prepare(text=f"{IMAGE}a", image_data=[ImageData(f"file://{tmp_path}/a.png")])
    of_data = manager.prepare(text=f"{IMAGE}a", image_data=[GOOD_URI])
    assert [item.hash for item in of_file.mm_inputs.mm_items] == [item.hash for item in of_data.mm_inputs.mm_items]
    assert torch.equal(of_file.mm_inputs.mm_items[0].feature, of_data.mm_inputs.mm_items[0].feature)


@pytest.mark.parametrize("given", [GOOD_URI, GOOD_URI.partition(",")[2], ImageData(GOOD_URI), PNG, GOOD])
def test_all_that_names_no_file_is_loaded_as_before(manager: TokenizerManagerWithoutScheduler, given: Any) -> None:
    prepared = manager.prepare(text=f"{IMAGE}a", image_data=[given])
    assert len(prepared.mm_inputs.mm_items) == 1


# ---- URLs


class Pictures(BaseHTTPRequestHandler):
    """/picture is one, /to-<address> redirects there, /<number> answers with it."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        name = self.path[1:]
        self.send_response(200 if name == "picture" else 302 if name.startswith("to-") else int(name))
        if name.startswith("to-"):
            self.send_header("Location", f"http://{name[3:]}/picture")
        self.end_headers()
        if name == "picture":
            self.wfile.write(PNG)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Pictures) as http:
        http.asked = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield http
        http.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def fresh_sessions(manager: TokenizerManagerWithoutScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has its own connections: what one may connect to is decided when it is opened."""
    from sglang.srt.utils import common

    monkeypatch.setattr(common, "_mm_http_session", threading.local())
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def names(monkeypatch: pytest.MonkeyPatch, **addresses: list[str]) -> None:
    """What names mean, one answer after the other; the last one stays. Addresses mean themselves."""
    real = socket.getaddrinfo

    def look_up(host: Any, port: Any, *more: Any, **named: Any) -> Any:
        known = addresses.get(str(host).replace(".", "_"))
        meant = known.pop(0) if known and len(known) > 1 else known[0] if known else host
        return real(meant, port, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def fetch(manager: TokenizerManagerWithoutScheduler, url: str) -> str:
    return refusal(manager, text=f"{IMAGE}a", image_data=[ImageData(url)])


def test_a_private_address_is_not_connected_to(manager: TokenizerManagerWithoutScheduler, server: HTTPServer) -> None:
    for host in ("127.0.0.1", "localhost", "2130706433", "[::ffff:127.0.0.1]"):
        for scheme in ("http", "https"):
            url = f"{scheme}://{host}:{server.server_port}/picture"
            assert "has an address that is not public" in fetch(manager, url)
    assert server.asked == []  # type: ignore[attr-defined]


def test_whether_a_private_port_is_open_does_not_show(manager: TokenizerManagerWithoutScheduler) -> None:
    assert "has an address that is not public" in fetch(manager, "http://127.0.0.1:9/picture")


def test_a_name_that_means_a_private_address_a_moment_later_is_sent_nothing(
    manager: TokenizerManagerWithoutScheduler, server: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    names(monkeypatch, two_faced=["8.8.8.8", "127.0.0.1"])
    assert "has an address that is not public" in fetch(manager, f"http://two_faced:{server.server_port}/picture")
    assert server.asked == []  # type: ignore[attr-defined]


def test_a_redirect_to_a_private_address_is_not_followed(
    manager: TokenizerManagerWithoutScheduler, server: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first host counts as public here, as nobody can have a public address in a test."""
    from sglang.srt.disaggregation.multimodal import fetching

    real = fetching.is_public
    monkeypatch.setattr(fetching, "is_public", lambda address: str(address) == "127.0.0.1" or real(address))
    url = f"http://127.0.0.1:{server.server_port}/to-127.0.0.2:{server.server_port}"
    assert "or one that it redirects to" in fetch(manager, url)
    assert server.asked == [f"/to-127.0.0.2:{server.server_port}"]  # type: ignore[attr-defined]


@pytest.fixture
def private_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_private_urls_allowed", lambda: True)


@pytest.mark.usefixtures("private_urls")
def test_an_operator_can_allow_private_addresses(manager: TokenizerManagerWithoutScheduler, server: HTTPServer) -> None:
    there = f"127.0.0.1:{server.server_port}"
    for url in (f"http://{there}/picture", f"http://{there}/to-{there}"):
        assert len(manager.prepare(text=f"{IMAGE}a", image_data=[url]).mm_inputs.mm_items) == 1


def test_a_list_of_domains_is_the_whole_answer(
    manager: TokenizerManagerWithoutScheduler, server: HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host on it may be private; the list itself is the operator's affair."""
    from sglang.srt.runtime_context import get_mm
    from sglang.srt.utils import common

    common.configure_media_url_security(["127.0.0.1"])
    try:
        with get_mm().override(allowed_media_domains=["127.0.0.1"]):
            url = f"http://127.0.0.1:{server.server_port}/picture"
            assert len(manager.prepare(text=f"{IMAGE}a", image_data=[url]).mm_inputs.mm_items) == 1
            words = fetch(manager, f"http://localhost:{server.server_port}/picture")
            assert words == "a media URL names a host that this server does not fetch from"
    finally:
        common.configure_media_url_security([])


@pytest.mark.usefixtures("private_urls")
def test_what_the_server_of_a_url_does_is_the_clients_affair(
    manager: TokenizerManagerWithoutScheduler, server: HTTPServer
) -> None:
    there = f"127.0.0.1:{server.server_port}"
    assert "its server answered 404" in fetch(manager, f"http://{there}/404")
    assert "its server answered 503" in fetch(manager, f"http://{there}/503")
    assert "could not be reached" in fetch(manager, "http://127.0.0.1:9/picture")
    assert "malformed" in fetch(manager, "http://[::1/picture")


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
    assert words == "Prompt has 2 image placeholders but 1 image inputs were provided"


# ---- what the server did


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, name: str = "_call_processor") -> None:
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


def test_nor_is_a_video_on_a_server_without_its_decoder(
    manager: TokenizerManagerWithoutScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang makes a ValueError of whatever its decoder says. This is what torchcodec says without FFmpeg."""

    class Decoder:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("Could not load libtorchcodec. Likely causes: FFmpeg is not properly installed")

    monkeypatch.setattr("sglang.srt.utils.common.VideoDecoderWrapper", Decoder)
    video = {"text": f"{VIDEO}a", "video_data": [uri(b"video", "video/mp4")]}
    assert fault(manager, "lacks FFmpeg's libraries", **video).status_code == INTERNAL


def test_but_a_damaged_video_is(manager: TokenizerManagerWithoutScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    class Decoder:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("Could not open input file: Invalid data found when processing input")

    monkeypatch.setattr("sglang.srt.utils.common.VideoDecoderWrapper", Decoder)
    words = refusal(manager, text=f"{VIDEO}a", video_data=[uri(b"video", "video/mp4")])
    assert words == "Could not decode video: it is damaged, or in no format that is known here"


# ---- media that somebody has processed already


def precomputed(rows: Any, **more: Any) -> dict[str, Any]:
    grid = torch.tensor([[1, 4, 4]])
    return {"format": "precomputed_embedding", "feature": rows, "image_grid_thw": grid, **more}


@pytest.mark.parametrize(
    "given",
    [
        precomputed([[0.5] * 256] * 4),
        {"format": "precomputed_embedding"},
        {"format": "processor_output", "pixel_values": [[0.5] * 1176] * 16, "image_grid_thw": [[1, 4, 4]]},
        {"format": "processor_output", "precomputed_embeddings": [[0.5] * 256] * 4},
        {"format": ["unhashable"]},
    ],
)
def test_precomputed_media_in_json_are_refused(manager: TokenizerManagerWithoutScheduler, given: Any) -> None:
    for media in (given, [given], [[given]]):
        assert "only a caller in the same process" in refusal(manager, text=f"{IMAGE}a", image_data=media)


def test_precomputed_embeddings_of_another_number_or_width_are_refused(
    manager: TokenizerManagerWithoutScheduler,
) -> None:
    ids = [1, *[manager.mm_processor.mm_tokens.image_token_id] * 4, 2]
    for shape in ((3, 256), (4, 255), (4, 2, 128), (0, 256)):
        words = refusal(manager, input_ids=ids, image_data=[precomputed(torch.zeros(shape))])
        assert "4 placeholder tokens" in words


@pytest.mark.parametrize("key", ["feature", "precomputed_embeddings"])
def test_precomputed_embeddings_pass(manager: TokenizerManagerWithoutScheduler, key: str) -> None:
    ids = [1, *[manager.mm_processor.mm_tokens.image_token_id] * 4, 2]
    rows = torch.arange(4 * 256).reshape(4, 256) / 1000
    given = precomputed(rows)
    if key == "precomputed_embeddings":
        given = {"format": "processor_output", key: rows, "image_grid_thw": given["image_grid_thw"]}
    (item,) = manager.prepare(input_ids=ids, image_data=[given]).mm_inputs.mm_items
    assert torch.equal(getattr(item, key).float(), rows.to(getattr(item, key).dtype).float())
    assert item.offsets == [(1, 4)]


def test_nothing_of_this_leaves_a_descriptor_or_a_thread_open(manager: TokenizerManagerWithoutScheduler) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        refusal(manager, text=f"{IMAGE}a", image_data=["http://127.0.0.1:9/picture"])
        refusal(manager, text=f"{IMAGE}a", image_data=[uri(b"garbage")])
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_a_picture_is_prepared_as_without_us(manager: TokenizerManagerWithoutScheduler) -> None:
    buffer = io.BytesIO()
    GOOD.save(buffer, "PNG")
    prepared = manager.prepare(text=f"{IMAGE}a", image_data=[uri(buffer.getvalue())])
    assert prepared.input_ids.count(manager.mm_processor.mm_tokens.image_token_id) == 4
