"""A run against a real HTTP server that answers as it is told: whatever happens, every row ends once, and rightly."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embedding_relay.batch.asking.endpoint import Endpoint
from embedding_relay.batch.asking.question import chat_request
from embedding_relay.batch.asking.run import Run
from embedding_relay.batch.session.records import Asking, Counts
from embedding_relay.batch.tasks import Outcome, Result, Task
from support.patience import wait_until
from support.stub_endpoint import StubEndpoint, answer_to, stub_endpoint

SECONDS = 60.0


FOLDER = Path("/nonexistent")


class Scene:
    """A run and what it recorded."""

    def __init__(self, endpoint: Endpoint, tasks: Iterable[Task], folder: Path = FOLDER, **options: Any) -> None:
        self.results: list[Result] = []
        tasks = list(tasks)
        options = {
            "concurrency": 32,
            "retries": 5,
            "total": len(tasks),
            "already": Counts(),
            "dice": lambda: 0.05,
        } | options
        record = options.pop("record", self.results.append)
        request_of = options.pop("request_of", lambda task: chat_request(task, Asking(), "stub", folder))
        self.run = Run(iter(tasks), endpoint, request_of, record, **options)

    def by_row(self) -> dict[int, Result]:
        assert max(Counter(result.row for result in self.results).values(), default=1) == 1, "a row was recorded twice"
        return {result.row: result for result in self.results}


@contextlib.asynccontextmanager
async def scene(stub: StubEndpoint, tasks: Iterable[Task], **options: Any) -> AsyncIterator[Scene]:
    async with Endpoint(stub.url, request_seconds=options.pop("request_seconds", 20)) as endpoint:
        yield Scene(endpoint, tasks, **options)
    assert asyncio.all_tasks() == {asyncio.current_task()}


def finished(stub: StubEndpoint, tasks: Iterable[Task], **options: Any) -> Scene:
    """The scene after its run has ended by itself."""

    async def to_its_end() -> Scene:
        async with asyncio.timeout(SECONDS), scene(stub, tasks, **options) as it:
            await it.run.run()
        return it

    return asyncio.run(to_its_end())


async def until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < give_up, "it did not happen"
        await asyncio.sleep(0.01)


def prompts(count: int) -> list[Task]:
    return [Task(row, f"prompt {row}") for row in range(1, count + 1)]


def assert_all_answered(it: Scene, tasks: Iterable[Task]) -> None:
    rows = it.by_row()
    for task in tasks:
        assert rows[task.row].outcome is Outcome.DONE, rows[task.row]
        assert rows[task.row].answer == answer_to(task.prompt)


def test_every_row_is_answered_once(stub: StubEndpoint) -> None:
    tasks = prompts(5000)
    it = finished(stub, tasks)
    assert_all_answered(it, tasks)
    assert set(stub.counts().values()) == {1}
    counts = it.run.counts
    assert (counts.done, counts.failed, counts.running, counts.retries, counts.waiting) == (5000, 0, 0, 0, "")
    assert counts.prompt_tokens == 10_000


def test_requests_are_kept_in_flight_up_to_the_concurrency(stub: StubEndpoint) -> None:
    """Three times as many rows as may be asked at once, half a second each; one after the other would take 48 s."""
    stub.delay(0.5)
    tasks = prompts(96)
    started = time.monotonic()
    it = finished(stub, tasks, concurrency=32)
    assert_all_answered(it, tasks)
    assert stub.seen()["most_in_flight"] == 32
    assert time.monotonic() - started < 12


def test_a_slow_iterator_is_read_beside_the_asking(stub: StubEndpoint) -> None:
    """The loop goes on while the next tasks are being read."""
    release = threading.Event()

    def slowly() -> Iterator[Task]:
        yield from prompts(100)
        assert release.wait(SECONDS)
        yield from (Task(row, f"prompt {row}") for row in range(101, 201))

    async def one_run() -> Scene:
        async with asyncio.timeout(SECONDS), scene(stub, [], total=200) as it:
            it.run._feed._tasks = slowly()
            running = asyncio.create_task(it.run.run())
            await until(lambda: len(it.results) == 64)
            release.set()
            await running
        return it

    assert_all_answered(asyncio.run(one_run()), [Task(row, f"prompt {row}") for row in range(1, 201)])


def test_nobody_reads_tasks_any_more_when_a_run_is_over(stub: StubEndpoint) -> None:
    """Whoever cancels a run may remove its files next."""
    begun, release, ended = threading.Event(), threading.Event(), threading.Event()

    def slowly() -> Iterator[Task]:
        begun.set()
        assert release.wait(SECONDS)
        ended.set()
        yield Task(1, "too late")

    async def one_run() -> None:
        async with asyncio.timeout(SECONDS), scene(stub, []) as it:
            it.run._feed._tasks = slowly()
            running = asyncio.create_task(it.run.run())
            await until(begun.is_set)
            it.run.cancel()
            asyncio.get_running_loop().call_later(0.2, release.set)
            await running
            assert ended.is_set()

    asyncio.run(one_run())


# ---- one row's fault


def test_rows_that_cannot_be_asked_are_told_without_asking(stub: StubEndpoint, tmp_path: Path) -> None:
    tasks = [Task(1, error="row 1 has no prompt"), Task(2, "a", images=("../x.png",)), Task(3, "b"), Task(4, "\ud800")]
    it = finished(stub, tasks, folder=tmp_path)
    rows = it.by_row()
    assert rows[1] == Result(1, Outcome.FAILED, error="row 1 has no prompt")
    assert rows[2].error == "this row cannot be asked: there is no picture '../x.png' in this session"
    assert rows[3].outcome is Outcome.DONE
    assert rows[4].error.startswith("this row cannot be asked: ")
    assert stub.counts() == {"b": 1}


def test_pictures_travel(stub: StubEndpoint, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(3 * 2**20))
    tasks = [Task(row, f"{row}", images=("1.png", "http://there/2.png")) for row in range(1, 21)]
    threads: set[threading.Thread] = set()

    def request_of(task: Task) -> tuple[str, dict[str, Any]]:
        threads.add(threading.current_thread())
        return chat_request(task, Asking(), "stub", tmp_path)

    it = finished(stub, tasks, request_of=request_of)
    assert threading.main_thread() not in threads, "the loop stood still while a picture was read"
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "1.png").read_bytes()).decode()
    for row, result in it.by_row().items():
        assert result.answer == answer_to(f"{row}", [url, "http://there/2.png"])


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_a_refusal_is_the_rows_own(stub: StubEndpoint, status: int) -> None:
    stub.next(None, "^prompt 7$", status=status, message="this is too long")
    it = finished(stub, prompts(50))
    assert it.by_row()[7] == Result(7, Outcome.FAILED, error=f"{status}: this is too long", http_status=status)
    assert (it.run.counts.done, it.run.counts.failed) == (49, 1)
    assert stub.counts()["prompt 7"] == 1


def test_errors_are_tried_again(stub: StubEndpoint) -> None:
    stub.next(3, "^prompt 7$", status=500)
    stub.next(None, "^prompt 9$", status=500, message="division by zero")
    it = finished(stub, prompts(50), retries=3)
    rows = it.by_row()
    assert rows[7].outcome is Outcome.DONE
    assert rows[9].error == "500: division by zero (tried 4 times)"
    assert (stub.counts()["prompt 7"], stub.counts()["prompt 9"]) == (4, 4)
    assert it.run.counts.retries == 6


@pytest.mark.parametrize(
    ("effects", "reason"),
    [
        ({"text": "<html>"}, "the answer is not a JSON object: <html> (tried 2 times)"),
        ({"text": ""}, "the answer is not a JSON object: it is empty (tried 2 times)"),
        ({"body": [1]}, "the answer is not a JSON object: [1] (tried 2 times)"),
        ({"body": {"choices": []}}, "the answer of the endpoint has no choices"),
        ({"text": "x" * (17 * 2**20)}, "the answer is larger than 16 MiB"),
        ({"status": 302, "location": "http://127.0.0.1:1/"}, "302: it points to http://127.0.0.1:1/, not followed"),
    ],
    ids=["html", "empty", "array", "no choices", "too large", "redirect"],
)
def test_an_answer_that_is_none(stub: StubEndpoint, effects: dict[str, Any], reason: str) -> None:
    stub.next(None, "^prompt 3$", **effects)
    it = finished(stub, prompts(20), retries=1)
    assert it.by_row()[3].error == reason
    assert it.run.counts.done == 19


def test_no_answer_in_time(stub: StubEndpoint) -> None:
    stub.next(None, "^prompt 3$", delay=20)
    it = finished(stub, prompts(20), retries=1, request_seconds=0.5)
    assert it.by_row()[3].error == "no answer within 0.5 s (tried 2 times)"


def test_requests_of_others_bring_back_the_whole_answer(stub: StubEndpoint) -> None:
    body = {"messages": [{"role": "user", "content": "theirs"}], "temperature": 2}
    it = finished(stub, [Task(1, custom_id="mine", body=body)])
    result = it.by_row()[1]
    assert (result.custom_id, result.answer) == ("mine", answer_to("theirs"))
    assert result.response is not None
    assert result.response["choices"][0]["message"]["content"] == answer_to("theirs")
    assert stub.seen()["last_body"] == {"model": "stub", **body}


# ---- an endpoint that has too much to do


def test_more_than_it_can_take_is_asked_again(stub: StubEndpoint) -> None:
    stub.capacity(8)
    stub.delay(0.01)
    tasks = prompts(1000)
    it = finished(stub, tasks, retries=0)
    assert_all_answered(it, tasks)
    refused = sum(stub.counts().values()) - 1000
    assert 0 < refused < 500
    assert it.run.counts.retries == refused


def test_a_storm_of_refusals_is_weathered(stub: StubEndpoint) -> None:
    """After it everything is asked as before, and during it nobody was pestered."""
    stub.delay(0.01)
    tasks = prompts(2000)

    async def one_run() -> Scene:
        async with asyncio.timeout(SECONDS), scene(stub, tasks, retries=0) as it:
            running = asyncio.create_task(it.run.run())
            await until(lambda: len(it.results) > 100)
            await asyncio.to_thread(stub.capacity, 0)
            await until(lambda: it.run.counts.waiting != "")
            assert it.run.counts.waiting == (
                f"the endpoint {stub.url} is overloaded (503: too many requests in flight); "
                "asking again little by little"
            )
            asked = sum((await asyncio.to_thread(stub.counts)).values())
            await asyncio.sleep(1.0)  # a second of the storm: what is asked in it is what is tested
            assert sum((await asyncio.to_thread(stub.counts)).values()) - asked < 50
            await asyncio.to_thread(stub.forget)
            await asyncio.to_thread(stub.delay, 0.01)
            await running
        return it

    it = asyncio.run(one_run())
    assert_all_answered(it, tasks)
    assert it.run._schedule._window.size == 32


@pytest.mark.parametrize("status", [429, 503])
def test_the_time_that_it_names_is_kept(stub: StubEndpoint, status: int) -> None:
    stub.next(1, status=status, retry_after=1)
    tasks = prompts(10)
    started = time.monotonic()
    assert_all_answered(finished(stub, tasks, concurrency=1), tasks)
    assert time.monotonic() - started >= 1


def test_patience_ends(stub: StubEndpoint) -> None:
    stub.next(None, "^prompt 3$", status=429, message="not you")
    it = finished(stub, prompts(20), patience=0.2)
    assert it.by_row()[3].error.startswith("429: not you (asked ")
    assert it.run.counts.done == 19


# ---- an endpoint that has nothing but errors


def test_errors_for_everybody_cost_nobody_a_try(stub: StubEndpoint) -> None:
    tasks = prompts(500)
    stub.next(None, "[1-5][0-9][0-9]$", status=502, message="nobody behind me")  # from row 100 on

    async def one_run() -> Scene:
        async with asyncio.timeout(SECONDS), scene(stub, tasks, retries=1) as it:
            running = asyncio.create_task(it.run.run())
            await until(lambda: "nothing but errors (502: nobody behind me)" in it.run.counts.waiting)
            await asyncio.to_thread(stub.forget)
            await running
        return it

    assert_all_answered(asyncio.run(one_run()), tasks)


# ---- an endpoint that is away


def test_an_endpoint_that_is_killed_is_waited_for(tmp_path: Path) -> None:
    tasks = prompts(3000)
    with stub_endpoint(tmp_path) as stub:
        stub.delay(0.02)

        async def one_run() -> Scene:
            async with asyncio.timeout(SECONDS), scene(stub, tasks, retries=0) as it:
                running = asyncio.create_task(it.run.run())
                await until(lambda: len(it.results) > 200)
                paid = await asyncio.to_thread(stub.counts)
                stub.kill()
                await until(lambda: "refused" in it.run.counts.waiting and it.run.counts.running == 0)
                assert it.run.counts.waiting == (
                    f"cannot reach the endpoint {stub.url} (connection refused); asking again every 1 s"
                )
                answered = {f"prompt {result.row}" for result in it.results}
                await asyncio.to_thread(stub.start)
                await running
                again = await asyncio.to_thread(stub.counts)
            assert answered <= paid.keys() | answered
            assert not answered & again.keys(), "a row that had its answer was paid for twice"
            return it

        it = asyncio.run(one_run())
    assert_all_answered(it, tasks)
    assert it.run.counts.waiting == ""
    assert it.run.counts.retries <= 2 * 32


@pytest.mark.parametrize("connection", ["drop", "cut"])
def test_a_poisonous_row_stops_nobody(stub: StubEndpoint, connection: str) -> None:
    stub.next(None, "^prompt 30$", connection=connection)
    it = finished(stub, prompts(300), retries=4)
    rows = it.by_row()
    assert rows.pop(30).error == (
        "the connection broke before the answer was there (4 times, and the endpoint was there again each time)"
    )
    assert all(result.outcome is Outcome.DONE for result in rows.values())
    assert stub.counts()["prompt 30"] == 4


def test_a_connection_that_breaks_once_costs_nothing(stub: StubEndpoint) -> None:
    stub.next(20, "[05]$", connection="drop")
    tasks = prompts(200)
    assert_all_answered(finished(stub, tasks, retries=0), tasks)


def test_a_name_that_nobody_knows() -> None:
    async def one_run() -> str:
        async with asyncio.timeout(SECONDS), Endpoint("http://no-such-host.invalid:1") as endpoint:
            it = Scene(endpoint, prompts(3))
            running = asyncio.create_task(it.run.run())
            await until(lambda: it.run.counts.waiting != "")
            it.run.cancel()
            waiting = it.run.counts.waiting
            await running
            assert it.results == []
        return waiting

    assert "(its name cannot be resolved); asking again" in asyncio.run(one_run())


# ---- what people wish


def test_a_pause_lets_what_is_asked_end_and_asks_nothing_more(stub: StubEndpoint) -> None:
    stub.delay(0.05)
    tasks = prompts(300)

    async def one_run() -> Scene:
        async with asyncio.timeout(SECONDS), scene(stub, tasks) as it:
            running = asyncio.create_task(it.run.run())
            await until(lambda: len(it.results) > 50)
            assert it.run.counts.rate > 0
            assert it.run.counts.seconds_left is not None
            it.run.paused = True
            await until(lambda: it.run.counts.running == 0)
            asked = sum((await asyncio.to_thread(stub.counts)).values())
            assert asked == len(it.results) < 300
            await asyncio.sleep(0.3)  # in which 180 more would be answered
            assert sum((await asyncio.to_thread(stub.counts)).values()) == asked
            it.run.paused = False
            await running
        return it

    assert_all_answered(asyncio.run(one_run()), tasks)
    assert set(stub.counts().values()) == {1}


def test_a_cancelled_run_gives_up_at_once_what_is_asked(stub: StubEndpoint) -> None:
    stub.next(None, "[1-3][0-9][0-9]$", delay=25)  # from row 100 on

    async def one_run() -> Scene:
        async with asyncio.timeout(SECONDS), scene(stub, prompts(300)) as it:
            running = asyncio.create_task(it.run.run())
            await until(lambda: len(it.results) == 99 and it.run.counts.running == 32)
            it.run.cancel()
            started = time.monotonic()
            await running
            assert time.monotonic() - started < 12
            recorded = len(it.results)
            await asyncio.sleep(0.1)
            assert len(it.results) == recorded
            assert it.run.counts.running == 0
        return it

    asyncio.run(one_run()).by_row()


def test_whoever_cancels_the_task_leaves_nothing_behind(stub: StubEndpoint) -> None:
    stub.delay(25)

    async def one_run() -> None:
        async with asyncio.timeout(SECONDS), scene(stub, prompts(300)) as it:
            running = asyncio.create_task(it.run.run())
            await until(lambda: it.run.counts.running == 32)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert it.run._jobs == set()

    asyncio.run(one_run())
    wait_until(lambda: stub.seen()["in_flight"] == 0)


def test_what_recording_raises_ends_the_run(stub: StubEndpoint) -> None:
    recorded: list[Result] = []

    def record(result: Result) -> None:
        recorded.append(result)
        if len(recorded) == 100:
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        finished(stub, prompts(5000), record=record)
    assert len(recorded) == 100  # nothing was written behind what failed


def test_what_the_tasks_raise_ends_the_run(stub: StubEndpoint) -> None:
    def broken() -> Iterator[Task]:
        yield from prompts(100)
        raise RuntimeError("the tasks are gone")

    async def one_run() -> None:
        async with scene(stub, []) as it:
            it.run._feed._tasks = broken()
            await it.run.run()

    with pytest.raises(RuntimeError, match="the tasks are gone"):
        asyncio.run(one_run())
