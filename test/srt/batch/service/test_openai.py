"""The unmodified `openai` client against the real service: its Files and Batches API, on four workers."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import Batch

from support import pages
from support.batch_service import BatchService, batch_service
from support.patience import wait_until
from support.repo import REPO
from support.stub_endpoint import StubEndpoint, answer_to

CHAT = "/v1/chat/completions"
LADDER = ["validating", "in_progress", "finalizing", "completed"]
OVER = ("completed", "failed", "cancelled")


@pytest.fixture(scope="module")
def service(stub: StubEndpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BatchService]:
    """Its saving can take a little, so that everything which happens while it is saved can be seen."""
    where = tmp_path_factory.mktemp("openai")
    with batch_service(where, stub.url, saving_seconds=0) as service:
        yield service


def client_of(service: BatchService, key: str = "any") -> openai.OpenAI:
    # On a new connection each time, so that any worker may get the call; and nothing is tried twice behind our back.
    http = httpx.Client(trust_env=False, limits=httpx.Limits(max_keepalive_connections=0))
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0, http_client=http)


@pytest.fixture
def client(service: BatchService) -> Iterator[openai.OpenAI]:
    with client_of(service) as client:
        yield client


def line(custom_id: str, prompt: str, **changes: Any) -> dict[str, Any]:
    body = {"model": "stub", "messages": [{"role": "user", "content": prompt}]}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body} | changes


def upload(client: openai.OpenAI, *lines: dict[str, Any] | str) -> str:
    texts = [one if isinstance(one, str) else json.dumps(one) for one in lines]
    return client.files.create(file=("requests.jsonl", "\n".join(texts).encode()), purpose="batch").id


def create(client: openai.OpenAI, *lines: dict[str, Any] | str, **options: Any) -> Batch:
    file_id = upload(client, *lines)
    return client.batches.create(input_file_id=file_id, endpoint=CHAT, completion_window="24h", **options)


def wait_over(client: openai.OpenAI, batch: Batch, seconds: float = 30) -> Batch:
    wait_until(lambda: client.batches.retrieve(batch.id).status in OVER, seconds)
    return client.batches.retrieve(batch.id)


def lines_of(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    """By custom_id."""
    if file_id is None:
        return {}
    lines = [json.loads(text) for text in client.files.content(file_id).text.splitlines()]
    return {line["custom_id"]: line for line in lines}


# ---- the way of a batch


def test_the_whole_ladder_and_never_a_step_too_early(
    client: openai.OpenAI, service: BatchService, stub: StubEndpoint
) -> None:
    stub.delay(0.1)
    prompts = {f"row-{number}": f"question {number}" for number in range(300)}
    lines = [line(custom_id, prompt) for custom_id, prompt in prompts.items()]
    with service.saving(0.2):
        batch = create(client, *lines, metadata={"for": "us"})
        assert batch.status == "validating"
        seen, give_up = [batch], time.monotonic() + 40
        while seen[-1].status != "completed":  # as fast as it goes
            assert time.monotonic() < give_up, seen[-1]
            seen.append(client.batches.retrieve(batch.id))
            assert seen[-1].status in LADDER, seen[-1]
            if seen[-1].status != "completed":
                assert seen[-1].output_file_id is None
    output = lines_of(client, seen[-1].output_file_id)

    steps = [LADDER.index(one.status) for one in seen]
    assert steps == sorted(steps)
    assert set(steps) == {0, 1, 2, 3}
    assert output.keys() == prompts.keys()
    for custom_id, prompt in prompts.items():
        response = output[custom_id]["response"]
        assert response["status_code"] == 200
        assert response["body"]["choices"][0]["message"]["content"] == answer_to(prompt)
    last = seen[-1]
    assert last.error_file_id is None
    assert last.errors is None
    assert last.metadata == {"for": "us"}
    assert last.request_counts is not None
    assert last.request_counts.to_dict() == {"total": 300, "completed": 300, "failed": 0}
    moments = [last.created_at, last.in_progress_at, last.finalizing_at, last.completed_at]
    assert moments == sorted(moment or 0 for moment in moments)
    assert max(stub.counts().values()) == 1


def test_the_example_of_the_page(service: BatchService, stub: StubEndpoint, tmp_path: Path) -> None:
    """Both blocks of batch-sessions.md as they are printed, but for the address of the service."""
    blocks = pages.blocks(REPO / "docs/batch-sessions.md")
    lines, code = (block.text for block in blocks if block.run_by.endswith("::test_the_example_of_the_page"))
    (tmp_path / "requests.jsonl").write_text(lines)
    command = [sys.executable, "-c", code.replace("http://127.0.0.1:8600", service.url)]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("completed ")
    assert answer_to("Hello") in ended.stdout


def test_plain_completions(client: openai.OpenAI) -> None:
    path = "/v1/completions"
    file_id = upload(client, line("a", "", url=path, body={"prompt": "once upon"}), line("b", "", url=path, body={}))
    wrong = client.batches.create(input_file_id=file_id, endpoint=path, completion_window="24h")
    assert wrong.status == "failed"
    file_id = upload(client, line("a", "", url=path, body={"prompt": "once upon"}))
    batch = client.batches.create(input_file_id=file_id, endpoint=path, completion_window="24h")
    (answer,) = lines_of(client, wait_over(client, batch).output_file_id).values()
    assert answer["response"]["body"]["choices"][0]["text"] == answer_to("once upon")


def test_refused_requests_are_in_the_error_file(client: openai.OpenAI, stub: StubEndpoint) -> None:
    stub.next(None, "bad", status=400, message="this is <no> question")
    batch = wait_over(client, create(client, line("a", "good"), line("b", "bad"), line("c", "also good")))
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (2, 1)
    assert lines_of(client, batch.output_file_id).keys() == {"a", "c"}
    (error,) = lines_of(client, batch.error_file_id).values()
    assert error["custom_id"] == "b"
    assert error["error"] is None
    assert error["response"]["status_code"] == 400
    assert "this is <no> question" in error["response"]["body"]["error"]["message"]


def test_a_batch_of_which_all_fails_has_no_output(client: openai.OpenAI, stub: StubEndpoint) -> None:
    stub.next(None, "", status=404, message="no such model")
    batch = wait_over(client, create(client, line("a", "1"), line("b", "2")))
    assert (batch.status, batch.output_file_id) == ("completed", None)
    assert lines_of(client, batch.error_file_id).keys() == {"a", "b"}


def test_cancel_in_the_middle_keeps_what_was_answered(client: openai.OpenAI, stub: StubEndpoint) -> None:
    stub.delay(0.2)
    ids = [f"row-{number}" for number in range(1000)]
    batch = create(client, *[line(one, one) for one in ids])

    def some_are_done() -> bool:
        counts = client.batches.retrieve(batch.id).request_counts
        return counts is not None and counts.completed > 0

    wait_until(some_are_done)
    cancelling = client.batches.cancel(batch.id)
    assert cancelling.status == "cancelling"
    assert client.batches.cancel(batch.id).cancelling_at == cancelling.cancelling_at
    over = wait_over(client, batch)
    assert over.status == "cancelled"
    assert over.cancelled_at
    assert over.completed_at is None
    output, errors = lines_of(client, over.output_file_id), lines_of(client, over.error_file_id)
    assert output
    assert errors
    assert output.keys() | errors.keys() == set(ids)
    assert not output.keys() & errors.keys()
    assert {one["error"]["code"] for one in errors.values()} == {"batch_cancelled"}
    assert {one["response"] for one in errors.values()} == {None}
    with pytest.raises(openai.BadRequestError, match="cannot be cancelled"):
        client.batches.cancel(batch.id)


def test_cancel_before_the_run_has_begun(client: openai.OpenAI, service: BatchService, stub: StubEndpoint) -> None:
    with service.saving(60):
        batch = create(client, line("a", "never asked"), line("b", "nor this"))
        assert client.batches.cancel(batch.id).status == "cancelling"
    over = wait_over(client, batch)
    assert (over.status, over.output_file_id) == ("cancelled", None)
    assert lines_of(client, over.error_file_id).keys() == {"a", "b"}
    assert stub.counts() == {}


# ---- input that cannot be asked


def test_bad_lines_make_a_failed_batch_that_names_them(client: openai.OpenAI, stub: StubEndpoint) -> None:
    batch = create(
        client,
        line("a", "good"),
        "{}",
        line("a", "again"),
        line("d", "x", url="/v1/other"),
        line("e", "x", body=1),
    )
    assert batch.status == "failed"
    assert batch.failed_at
    assert batch.output_file_id is None
    assert batch.errors is not None
    errors = [(error.line, error.code, error.param) for error in batch.errors.data or []]
    assert errors == [
        *[(2, "missing_required_parameter", name) for name in ("custom_id", "method", "url", "body")],
        (3, "duplicate_custom_id", "custom_id"),
        (4, "url_mismatch", "url"),
        (5, "invalid_value", "body"),
    ]
    assert client.batches.retrieve(batch.id).to_dict() == batch.to_dict()
    assert stub.counts() == {}


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"\x89PNG\r\n\x1a\n" + bytes(100), "invalid_json_line"), (b"{no json", "invalid_json_line"), (b"", "empty_file")],
)
def test_a_file_that_is_something_else_is_refused(client: openai.OpenAI, content: bytes, code: str) -> None:
    before = [stored.id for stored in client.files.list(purpose="batch")]
    with pytest.raises(openai.BadRequestError, match="the file must be JSON lines") as refused:
        client.files.create(file=("a.jsonl", content), purpose="batch")
    assert (refused.value.code, refused.value.param) == (code, "file")
    assert [stored.id for stored in client.files.list(purpose="batch")] == before


# ---- files


def test_files(client: openai.OpenAI) -> None:
    content = json.dumps(line("ä", "☃")).encode()
    stored = client.files.create(
        file=("snow ☃.jsonl", io.BytesIO(content)),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 7200},
    )
    assert stored.filename == "snow ☃.jsonl"
    assert stored.bytes == len(content)
    assert stored.expires_at == stored.created_at + 7200
    assert client.files.retrieve(stored.id).to_dict() == stored.to_dict()
    assert client.files.content(stored.id).content == content
    assert client.files.delete(stored.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(stored.id)


def test_a_batch_does_not_need_its_input_any_more(client: openai.OpenAI) -> None:
    batch = create(client, line("a", "hello"))
    client.files.delete(batch.input_file_id)
    assert wait_over(client, batch).status == "completed"


def test_output_can_be_listed_and_deleted(client: openai.OpenAI) -> None:
    batch = wait_over(client, create(client, line("a", "hello")))
    assert batch.output_file_id
    outputs = {stored.id: stored for stored in client.files.list(purpose="batch_output")}
    assert outputs[batch.output_file_id].filename.endswith(".jsonl")
    assert outputs[batch.output_file_id].bytes == len(client.files.content(batch.output_file_id).content)
    client.files.delete(batch.output_file_id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(batch.output_file_id)


def test_lists_with_cursors(client: openai.OpenAI) -> None:
    made = [create(client, "{}").id for _ in range(5)]
    page = client.batches.list(limit=2)
    assert [batch.id for batch in page.data] == made[:-3:-1]
    assert page.has_more
    assert [batch.id for batch in client.batches.list(limit=2)][:5] == made[::-1]
    assert [batch.id for batch in client.batches.list(limit=1, after=made[3]).data] == [made[2]]
    files = [upload(client, "{}") for _ in range(3)]
    newest = [stored.id for stored in client.files.list(limit=2, purpose="batch")][:3]
    assert newest == files[::-1]
    (last,) = client.files.list(limit=1, order="asc").data
    assert last.id not in files
    with pytest.raises(openai.BadRequestError):
        client.batches.list(after="batch_" + "0" * 16)
    with pytest.raises(openai.BadRequestError):
        client.batches.list(limit=0)


# ---- mistakes


def test_unknown_ids(client: openai.OpenAI) -> None:
    for unknown in ("file-" + "0" * 24, "file-out-" + "0" * 16, "file-x", "..%2f..%2fetc"):
        for ask in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError):
                ask(unknown)
    for unknown in ("batch_" + "0" * 16, "x"):
        for about in (client.batches.retrieve, client.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                about(unknown)


def test_a_session_without_an_order_is_no_batch(client: openai.OpenAI, service: BatchService) -> None:
    session_id = service.upload(b"prompt\nhello\n")["session_id"]
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve(f"batch_{session_id}")
    assert session_id not in {batch.id.removeprefix("batch_") for batch in client.batches.list()}


def test_a_batch_is_a_session(client: openai.OpenAI, service: BatchService) -> None:
    batch = wait_over(client, create(client, line("a", "hello")))
    session_id = batch.id.removeprefix("batch_")
    assert service.get(f"/api/sessions/{session_id}")["stage"] == "completed"
    service.call("DELETE", f"/api/sessions/{session_id}")
    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve(batch.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(str(batch.output_file_id))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"key": "x" * 513}}, "metadata"),
        ({"metadata": {"k" * 65: "x"}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
    ],
)
def test_a_wrong_order_names_its_parameter(client: openai.OpenAI, changes: dict[str, Any], param: str) -> None:
    order: dict[str, Any] = {"input_file_id": upload(client, "{}"), "endpoint": CHAT, "completion_window": "24h"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.batches.create(**order | changes)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_an_unknown_input_file(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.batches.create(input_file_id="file-" + "0" * 24, endpoint=CHAT, completion_window="24h")
    assert caught.value.param == "input_file_id"


def test_another_purpose(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("a.jsonl", b"{}"), purpose="fine-tune")


def test_the_key(stub: StubEndpoint, tmp_path: Path) -> None:
    with batch_service(tmp_path, stub.url, workers=1, environ={"SESSION_API_KEY": "secret"}) as service:
        with client_of(service, "wrong") as stranger, pytest.raises(openai.AuthenticationError) as caught:
            stranger.batches.list()
        assert caught.value.type == "invalid_request_error"
        with client_of(service, "secret") as client:
            assert wait_over(client, create(client, line("a", "hello"))).status == "completed"
