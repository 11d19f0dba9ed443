"""What a row looks like as a request, and which files may be part of it."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_relay.batch.asking.question import CHAT, Unaskable, chat_request
from embedding_relay.batch.session.records import Asking
from embedding_relay.batch.tasks import Task
from support.effort import effort, unhurried

PNG = b"\x89PNG\r\n\x1a\n rest"
NO_FOLDER = Path("/nonexistent")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A session's folder, with a secret beside it."""
    (tmp_path / "secret.png").write_bytes(PNG)
    session = tmp_path / "session"
    (session / "pictures").mkdir(parents=True)
    (session / "pictures/1.png").write_bytes(PNG)
    return session


def urls(task: Task, folder: Path) -> list[str]:
    _, body = chat_request(task, Asking(), "m", folder)
    return [part["image_url"]["url"] for part in body["messages"][-1]["content"] if part["type"] == "image_url"]


def test_a_prompt_alone_is_a_plain_message() -> None:
    path, body = chat_request(Task(1, "hello"), Asking(), "m", NO_FOLDER)
    assert path == CHAT == "/v1/chat/completions"
    assert body == {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def test_what_the_run_says_goes_along() -> None:
    asking = Asking(system="be brief", max_tokens=5, temperature=0.0)
    _, body = chat_request(Task(1, "hello"), asking, "m", NO_FOLDER)
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    assert (body["max_tokens"], body["temperature"]) == (5, 0.0)


def test_images_come_first_and_in_their_order(folder: Path) -> None:
    task = Task(1, "what is it?", images=("pictures/1.png", "https://there/2.jpg", "data:image/gif;base64,AAAA"))
    _, body = chat_request(task, Asking(), "m", folder)
    picture = "data:image/png;base64," + base64.b64encode(PNG).decode()
    wanted = [picture, "https://there/2.jpg", "data:image/gif;base64,AAAA"]
    content = body["messages"][0]["content"]
    assert content == [
        *({"type": "image_url", "image_url": {"url": url}} for url in wanted),
        {"type": "text", "text": "what is it?"},
    ]


def test_a_picture_without_a_prompt_has_no_empty_text(folder: Path) -> None:
    _, body = chat_request(Task(1, images=("pictures/1.png",)), Asking(), "m", folder)
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url"]


@pytest.mark.parametrize(
    ("content", "name", "media_type"),
    [
        (b"\xff\xd8\xff\xe0 rest", "wrong.png", "image/jpeg"),
        (b"GIF89a rest", "a", "image/gif"),
        (b"RIFF\x00\x00\x00\x00WEBP rest", "a", "image/webp"),
        (b"BM rest", "a", "image/bmp"),
        (b"II*\x00 rest", "a", "image/tiff"),
        (b"something new", "a.avif", "image/avif"),
    ],
)
def test_the_content_tells_the_kind_before_the_name(tmp_path: Path, content: bytes, name: str, media_type: str) -> None:
    (tmp_path / name).write_bytes(content)
    (url,) = urls(Task(1, images=(name,)), tmp_path)
    assert url.startswith(f"data:{media_type};base64,")


def test_what_is_no_picture_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("my notes")
    with pytest.raises(Unaskable, match=r"'notes\.txt' is not a picture"):
        chat_request(Task(1, images=("notes.txt",)), Asking(), "m", tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.png", "pictures/../../secret.png", "pictures/link.png", "linked/secret.png"),
        *("{outside}/secret.png", "file://{outside}/secret.png", "~/secret.png", "", ".", "pictures", "pictures/2.png"),
        *("a\0b", "x" * 5000, "loop", "javascript:alert(1)", "data:text/html,x", "ftp://there/1.png", "//there/1.png"),
    ],
)
def test_no_name_leads_out_of_the_session(folder: Path, name: str) -> None:
    (folder / "pictures/link.png").symlink_to(folder.parent / "secret.png")
    (folder / "linked").symlink_to(folder.parent)
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.raises(Unaskable):
        chat_request(Task(1, images=(name.format(outside=folder.parent),)), Asking(), "m", folder)


@unhurried
@effort(300)
@given(parts=st.lists(st.sampled_from(["..", ".", "pictures", "session", "secret.png", "1.png", "/", ""]), max_size=8))
def test_no_path_whatever_leads_out(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    outside = tmp_path_factory.getbasetemp() / "paths"
    session = outside / "session"
    (session / "pictures").mkdir(parents=True, exist_ok=True)
    (outside / "secret.png").write_bytes(PNG + b"secret")
    (session / "pictures/1.png").write_bytes(PNG)
    try:
        sent = urls(Task(1, images=("/".join(parts),)), session)
    except Unaskable:
        return
    assert sent == ["data:image/png;base64," + base64.b64encode(PNG).decode()]


def test_a_request_of_its_owner_goes_out_as_it_is() -> None:
    body = {"model": "theirs", "input": ["a"], "temperature": 9}
    assert chat_request(Task(1, body=body), Asking(max_tokens=3, system="no"), "m", NO_FOLDER, "/v1/embeddings") == (
        "/v1/embeddings",
        body,
    )


@pytest.mark.parametrize("model", [{}, {"model": ""}, {"model": None}])
def test_a_missing_model_is_filled_in(model: dict[str, str | None]) -> None:
    _, body = chat_request(Task(1, body={"messages": [], **model}), Asking(), "m", NO_FOLDER)
    assert body == {"messages": [], "model": "m"}


def test_nobody_reads_a_stream() -> None:
    given = {"model": "x", "stream": True, "stream_options": {"include_usage": True}}
    _, body = chat_request(Task(1, body=given), Asking(), "m", NO_FOLDER)
    assert body == {"model": "x"}


@pytest.mark.parametrize("path", ["@elsewhere/v1", "v1", "/v1/x\r\nX: y", "/v1/a b", "//elsewhere/v1", "/v1?x=1", "/"])
def test_a_path_is_a_path(path: str) -> None:
    with pytest.raises(Unaskable, match="requests go to a path like"):
        chat_request(Task(1, "hello"), Asking(), "m", NO_FOLDER, path)
