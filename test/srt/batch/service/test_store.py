"""One contract for both stores: what a worker writes another reads, and racing workers lose nothing."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedding_relay.batch.store.contract import Store, StoreAway
from embedding_relay.batch.store.opening import open_store
from support.effort import effort, unhurried
from support.patience import wait_until
from support.redis_server import redis_server
from support.repo import REPO

WORKERS = 4
FOREVER = 1000.0


@pytest.fixture(scope="module", params=["diskcache", "redis"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    where = tmp_path_factory.mktemp("store")
    if request.param == "diskcache":
        yield str(where / "cache")
        return
    with redis_server(where) as url:
        yield url


@pytest.fixture
def store(place: str) -> Iterator[Store]:
    opened = open_store(place)
    yield opened
    opened.close()


@pytest.fixture
def key() -> str:
    return f"session:{uuid.uuid4().hex}"


def test_what_one_writes_another_reads(place: str, store: Store, key: str) -> None:
    assert store.get(key) is None
    assert store.create(key, b"\x00one\xff", FOREVER)
    other = open_store(place)
    assert other.get(key) == b"\x00one\xff"
    other.close()


def test_a_key_is_created_once(store: Store, key: str) -> None:
    assert store.create(key, b"one", FOREVER)
    assert not store.create(key, b"two", FOREVER)
    assert store.get(key) == b"one"


def test_a_change_sees_and_replaces(store: Store, key: str) -> None:
    store.create(key, b"1", FOREVER)
    assert store.change(key, FOREVER, lambda value: value + b"2") == b"12"
    assert store.get(key) == b"12"


def test_nothing_is_changed_that_is_not_there(store: Store, key: str) -> None:
    assert store.change(key, FOREVER, lambda value: value + b"2") is None
    assert store.get(key) is None


def test_a_change_that_raises_changes_nothing(store: Store, key: str) -> None:
    store.create(key, b"1", FOREVER)

    def refuse(value: bytes) -> bytes:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        store.change(key, FOREVER, refuse)
    assert store.get(key) == b"1"
    assert store.change(key, FOREVER, lambda value: value + b"2") == b"12", "and it can be changed afterwards"


def test_delete_says_whether_it_was_there(store: Store, key: str) -> None:
    store.create(key, b"1", FOREVER)
    assert store.delete(key)
    assert not store.delete(key)
    assert store.get(key) is None


def test_keys_are_those_with_the_prefix(store: Store, key: str) -> None:
    mine = sorted(f"{key}*[{number}]:" for number in range(3))
    for each in mine:
        store.create(each, b"", FOREVER)
    store.create("other" + key, b"", FOREVER)
    assert sorted(store.keys(key)) == mine
    assert store.keys(f"{key}*[2") == [mine[2]], "no letter of a prefix stands for others"
    assert store.keys(key.replace("session", "s*n")) == []


def test_values_expire(store: Store, key: str) -> None:
    store.create(key, b"1", 0.3)
    wait_until(lambda: store.get(key) is None, 10)
    assert store.keys(key) == []
    assert store.change(key, FOREVER, lambda value: value) is None
    assert store.create(key, b"2", FOREVER)


def test_a_change_gives_a_value_new_time(store: Store, key: str) -> None:
    store.create(key, b"1", 0.5)
    store.change(key, FOREVER, lambda value: value)
    short = f"{key} short"
    store.create(short, b"1", 0.6)
    wait_until(lambda: store.get(short) is None, 10)
    assert store.get(key) == b"1"


def test_a_claim_has_one_holder(store: Store, key: str) -> None:
    assert store.claim(key, "one", FOREVER)
    assert not store.claim(key, "two", FOREVER)
    assert store.claim(key, "one", FOREVER), "its holder may renew it"
    store.release(key, "two")
    assert not store.claim(key, "two", FOREVER), "nobody else gives it up"
    store.release(key, "one")
    assert store.claim(key, "two", FOREVER)


def test_a_claim_runs_out(store: Store, key: str) -> None:
    started = time.monotonic()
    assert store.claim(key, "one", 0.5)
    wait_until(lambda: store.claim(key, "two", FOREVER), 10)
    assert time.monotonic() - started >= 0.5


@pytest.mark.parametrize("moved", [-3600.0, 3600.0])
def test_a_claim_does_not_depend_on_what_time_it_is(
    store: Store, key: str, monkeypatch: pytest.MonkeyPatch, moved: float
) -> None:
    """The clock of this process is set, which is the one that diskcache looks at. That of Redis is not."""
    assert store.claim(key, "one", 0.4)
    assert store.claim(f"{key} long", "one", FOREVER)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + moved)
    assert not store.claim(key, "two", FOREVER), "set forward, it has not run out"
    assert not store.claim(f"{key} long", "two", FOREVER)
    wait_until(lambda: store.claim(key, "two", FOREVER), 10)
    assert not store.claim(f"{key} long", "two", FOREVER)


def test_a_claim_is_no_value(store: Store, key: str) -> None:
    store.claim(key, "one", FOREVER)
    assert store.get(key) is None
    assert store.keys(key) == []


def test_a_store_that_is_away_says_so(tmp_path: Path) -> None:
    with redis_server(tmp_path) as url:
        store = open_store(url)
        store.create("a", b"1", FOREVER)
    for use in (lambda: store.get("a"), lambda: store.keys(""), lambda: store.claim("a", "me", 1)):
        with pytest.raises(StoreAway, match="cannot be used"):
            use()
    store.close()


def test_a_change_whose_answer_is_lost_is_not_made_again(tmp_path: Path) -> None:
    """It is away, the caller hears. A second start would be refused, although the first one was accepted."""
    with redis_server(tmp_path) as url, losing_answers_to(b"started", int(url.split(":")[2].split("/")[0])) as port:
        behind, store = open_store(url), open_store(f"redis://127.0.0.1:{port}/0")
        store.create("a", b"analysed", FOREVER)
        store.change("a", FOREVER, lambda before: b"split")
        befores = list[bytes]()

        def start(before: bytes) -> bytes:
            befores.append(before)
            return b"started"

        with pytest.raises(StoreAway, match="cannot be used"):
            store.change("a", FOREVER, start)
        assert befores == [b"split"]
        assert behind.get("a") == b"started", "Redis has done it: that is the case which is tried here"
        assert store.get("a") == b"started", "and the next call finds its way"
        behind.close()
        store.close()


@contextmanager
def losing_answers_to(what: bytes, redis_port: int) -> Iterator[int]:
    """A port that leads to Redis, and whose connections end before the answer to anything with these bytes in it."""

    def carry(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", redis_port)) as server:
            while asked := client.recv(65536):
                server.sendall(asked)
                answer = server.recv(65536)
                if what in asked:
                    return
                client.sendall(answer)

    def serve() -> None:
        with contextlib.suppress(OSError):  # it was closed
            while True:
                threading.Thread(target=carry, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=serve)
        serving.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        serving.join()


# ---- several processes at once


class Racers:
    """Processes of their own, each with its own connection to the store."""

    def __init__(self, place: str) -> None:
        command = [sys.executable, str(REPO / "test/srt/support/store_process.py"), place]
        self._processes = [
            subprocess.Popen([*command, f"racer {number}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for number in range(WORKERS)
        ]
        self._threads = ThreadPoolExecutor(WORKERS)

    def race(self, steps: list[list[list[str]]]) -> list[list[object]]:
        """What each process's steps returned; all of them begin at once."""
        return list(self._threads.map(self._do, self._processes, steps))

    @staticmethod
    def _do(process: subprocess.Popen[str], steps: list[list[str]]) -> list[object]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(steps) + "\n")
        process.stdin.flush()
        answers: list[object] = json.loads(process.stdout.readline())
        return answers

    def close(self) -> None:
        self._threads.shutdown()
        for process in self._processes:
            process.communicate()
            assert process.returncode == 0


@pytest.fixture(scope="module")
def racers(place: str) -> Iterator[Racers]:
    racing = Racers(place)
    yield racing
    racing.close()


VERBS = st.sampled_from(["append", "append", "append", "create", "claim"])
STEPS = st.lists(st.tuples(VERBS, st.sampled_from("ab")), max_size=20)


@unhurried
@effort(daily=100)
@given(plans=st.lists(STEPS, min_size=WORKERS, max_size=WORKERS))
def test_racing_processes_lose_nothing(place: str, racers: Racers, plans: list[list[tuple[str, str]]]) -> None:
    """The model is a list per key: what was created and then appended, each once, each worker's own in its order."""
    run = uuid.uuid4().hex
    steps = [
        [[verb, f"{run}:{key}", f"{worker}.{at}"] for at, (verb, key) in enumerate(plan)]
        for worker, plan in enumerate(plans)
    ]
    answers = racers.race(steps)
    store = open_store(place)
    try:
        for key in "ab":
            done = [
                (verb, text, answer)
                for mine, returned in zip(steps, answers, strict=True)
                for (verb, where, text), answer in zip(mine, returned, strict=True)
                if where == f"{run}:{key}"
            ]
            check_key(store.get(f"{run}:{key}"), done)
    finally:
        store.close()


def check_key(value: bytes | None, done: list[tuple[str, str, object]]) -> None:
    created = [text for verb, text, answer in done if verb == "create" and answer]
    appended = [(text, answer) for verb, text, answer in done if verb == "append" and answer is not None]
    claimed = {text.partition(".")[0] for verb, text, answer in done if verb == "claim" and answer}
    assert len(claimed) <= 1, f"two holders of one claim: {claimed}"
    if not any(verb == "create" for verb, _, _ in done):
        assert (value, appended) == (None, [])
        return
    assert len(created) == 1
    assert value is not None
    final = json.loads(value)
    assert final[0] == created[0]
    assert sorted(final[1:]) == sorted(text for text, _ in appended), "an update is lost, or was made twice"
    for text, answer in appended:
        assert isinstance(answer, list)
        assert answer == final[: len(answer)], "an update was told something that never was"
        assert answer[-1] == text
    for worker in range(WORKERS):
        mine = [text for text in final[1:] if text.startswith(f"{worker}.")]
        assert mine == sorted(mine, key=lambda text: int(text.partition(".")[2])), "one worker's updates changed places"
