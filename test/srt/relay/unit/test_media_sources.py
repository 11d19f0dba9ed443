"""Which sources of media a client may name, on a disk that a test can count the touches of."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embedding_relay.media_sources import MediaSources, NotAccepted


@dataclasses.dataclass
class ImageData:
    """As SGLang's: where the picture is, and how it is to be looked at."""

    url: str | bytes
    detail: str = "auto"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory that clients may name files of, with files, links and what is no file; and a secret beside it."""
    directory = tmp_path / "media"
    (directory / "deep").mkdir(parents=True)
    (directory / "a.png").write_bytes(b"picture")
    (directory / "deep" / "ä b%20.png").write_bytes(b"deep picture")
    (directory / "inside.png").symlink_to(directory / "a.png")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (directory / "outside.png").symlink_to(tmp_path / "secret.png")
    (directory / "up").symlink_to(tmp_path)
    os.mkfifo(directory / "pipe.png")
    return directory


@pytest.fixture
def touched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is asked of the disk."""
    asked: list[str] = []
    for name in ("open", "stat", "lstat", "readlink"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path, *a, _real=real, **k: asked.append(str(path)) or _real(path, *a, **k))
    yield asked
    monkeypatch.undo()


PATHS = [
    *("/etc/passwd", "/etc/passwd.png", "//etc/passwd", "etc/passwd", "./a.png", "../a.png", "a.png", "~/a.png", "~"),
    *("file:///etc/passwd", "FILE:///etc/passwd", "file:/etc/passwd", "file://localhost/etc/passwd", "file:etc/passwd"),
    *(
        "file://host/share/a.png",
        "file:///%65tc/passwd",
        "%2Fetc%2Fpasswd",
        "file:%2f%2f/etc/passwd",
        "\\\\host\\a.png",
    ),
    *(
        "C:\\a.png",
        "c:/a.png",
        "video:/etc/passwd",
        "HTTP://host/a.png",
        "ftp://host/a.png",
        "/dev/stdin",
        " /etc/passwd",
    ),
    *(
        "/etc/passwd\0.png",
        "\n/etc/passwd",
        "http:/etc/passwd",
        "http:///../etc".replace("http:", "s3:"),
        "",
        "[]",
        "data:",
    ),
    *("file://[::1", "Data:image/png;base64,AAAA", "AAAA\nAAAA", "A===", "<svg/>", "javascript:0"),
]


@pytest.mark.parametrize("path", PATHS)
def test_what_is_no_url_and_no_data_is_refused_and_the_disk_not_asked(path: str, touched: list[str]) -> None:
    for media in (path, [path], [[path]], ImageData(path), [ImageData(path)], {"url": path}, [{"url": path, "fps": 1}]):
        with pytest.raises(NotAccepted):
            MediaSources().accepted(media)
    assert touched == []


@pytest.mark.parametrize("path", PATHS)
def test_nor_is_it_with_a_directory_that_it_is_not_in(path: str, root: Path, touched: list[str]) -> None:
    sources = MediaSources(root)
    touched.clear()
    with pytest.raises(NotAccepted):
        sources.accepted([path])
    assert touched == []


@pytest.mark.parametrize("source", ["http://host/a.png", "https://host/a.png", "data:image/png;base64,AAAA", "data:,"])
def test_urls_and_data_pass_as_they_are(source: str) -> None:
    assert MediaSources().accepted(source) == source
    assert MediaSources().accepted([[source]]) == [[source]]
    assert MediaSources().accepted(ImageData(source, "low")) == ImageData(source, "low")
    described = {"url": source, "detail": "low", "fps": 2}
    assert MediaSources().accepted(described) == described


@pytest.mark.parametrize("text", ["AAAA", "iVBORw0KGgo=", "a+/b"])
def test_base64_is_marked_as_such_so_that_no_loader_looks_for_a_file_of_this_name(text: str) -> None:
    assert MediaSources().accepted([text]) == [f"data:;base64,{text}"]


def test_what_only_a_caller_within_the_process_can_have_passes() -> None:
    tensor = object()
    media = [b"bytes", None, tensor, 3, {"format": "precomputed_embedding", "feature": tensor}]
    assert MediaSources().accepted(media) == media


def test_a_name_hidden_in_a_description_is_found() -> None:
    with pytest.raises(NotAccepted):
        MediaSources().accepted({"format": "processor_output", "anything": {"deeper": ["/etc/passwd"]}})


def test_nesting_has_an_end() -> None:
    media: Any = "AAAA"
    for _ in range(10_000):
        media = [media]
    with pytest.raises(NotAccepted):
        MediaSources().accepted(media)


def test_files_of_the_directory_are_read(root: Path) -> None:
    sources = MediaSources(root)
    assert sources.accepted(str(root / "a.png")) == b"picture"
    assert sources.accepted(f"file://{root}/a.png") == b"picture"
    assert sources.accepted(f"FILE://localhost{root}/a.png") == b"picture"
    assert sources.accepted(f"{root}/deep/../a.png") == b"picture"
    assert sources.accepted(str(root / "inside.png")) == b"picture"
    assert sources.accepted(ImageData(str(root / "a.png"), "low")) == ImageData(b"picture", "low")


def test_only_the_path_of_a_url_is_percent_encoded(root: Path) -> None:
    sources = MediaSources(root)
    assert sources.accepted(f"file://{root}/deep/%C3%A4%20b%2520.png") == b"deep picture"
    assert sources.accepted(f"{root}/deep/ä b%20.png") == b"deep picture"
    with pytest.raises(NotAccepted):
        sources.accepted(f"{root}/deep/%C3%A4%20b%2520.png")


def test_a_directory_that_is_a_link_may_be_named_either_way(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    sources = MediaSources(tmp_path / "link")
    assert sources.accepted(f"{tmp_path}/link/a.png") == b"picture"
    assert sources.accepted(f"{root}/a.png") == b"picture"


@pytest.mark.parametrize(
    "name",
    [
        *("outside.png", "up/secret.png", "up/media/../secret.png", "missing.png", "a.png/b.png", "deep", "", "."),
        *("pipe.png", "x" * 5000, "a\0.png", "up/up/secret.png"),
    ],
)
def test_what_is_no_file_of_the_directory_is_refused_in_the_same_words(root: Path, name: str) -> None:
    with pytest.raises(NotAccepted) as refused:
        MediaSources(root).accepted(f"{root}/{name}")
    assert str(refused.value) == str(NotAccepted())


@pytest.mark.parametrize("name", ["../secret.png", "../missing.png", "deep/../../secret.png", "/etc/passwd"])
def test_outside_it_is_the_same_whether_or_not_there_is_a_file(root: Path, name: str, touched: list[str]) -> None:
    sources = MediaSources(root)
    touched.clear()
    with pytest.raises(NotAccepted):
        sources.accepted(os.path.join(root, name))
    assert touched == []


def test_a_directory_of_a_similar_name_is_another_one(root: Path, tmp_path: Path) -> None:
    (tmp_path / "media2").mkdir()
    (tmp_path / "media2" / "a.png").write_bytes(b"other")
    with pytest.raises(NotAccepted):
        MediaSources(root).accepted(f"{tmp_path}/media2/a.png")


def test_a_link_that_is_changed_between_the_look_and_the_reading_gains_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was opened is looked at, not what its name meant before."""
    real = os.open

    def swap_then_open(path: str, flags: int, *more: Any, **named: Any) -> int:
        (root / "a.png").unlink()
        (root / "a.png").symlink_to(tmp_path / "secret.png")
        return real(path, flags, *more, **named)

    sources = MediaSources(root)
    monkeypatch.setattr(os, "open", swap_then_open)
    with pytest.raises(NotAccepted):
        sources.accepted(f"{root}/a.png")


def test_a_large_file_is_not_read(root: Path) -> None:
    with open(root / "large.png", "wb") as file:
        file.truncate(2**20 + 1)
    with pytest.raises(ValueError, match="larger than the 1 MiB"):
        MediaSources(root, most_mib=1).accepted(f"{root}/large.png")
    assert len(MediaSources(root).accepted(f"{root}/large.png")) == 2**20 + 1


def test_a_fault_of_the_servers_disk_is_not_put_down_to_the_client(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_descriptor(*_: Any, **__: Any) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    sources = MediaSources(root)
    monkeypatch.setattr(os, "open", no_descriptor)
    with pytest.raises(OSError, match="too many open files"):
        sources.accepted(f"{root}/a.png")


def test_no_descriptor_is_left_open(root: Path) -> None:
    sources, before = MediaSources(root, most_mib=1), len(os.listdir("/proc/self/fd"))
    for name in ("a.png", "outside.png", "pipe.png", "deep"):
        with contextlib.suppress(NotAccepted):
            sources.accepted(f"{root}/{name}")
    assert len(os.listdir("/proc/self/fd")) == before
