"""Processes of one user ask each other's recorders; nobody else is answered, and nobody waits for who is not there."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from embedding_relay.recorder import Moment, Recorder
from embedding_relay.recorder_socket import (
    MOST_REQUESTS,
    Answer,
    Question,
    Teller,
    ask,
    name_of_http_process,
    name_of_scheduler,
)

_ports = itertools.count(os.getpid() << 8)  # a name is as unique as this process and the test

ASK_AS_ANOTHER_USER = """
import os, sys
from embedding_relay.recorder_socket import Question, ask
name = "\\0" + sys.argv[1]
os.setuid(12345)
print(ask(name, Question(room=7), 1.0))
"""

ANSWER_AS_ANOTHER_USER = """
import os, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
    bound.bind("\\0" + sys.argv[1])
    os.setuid(12345)
    print("bound", flush=True)
    _, asker = bound.recvfrom(1000)
    bound.sendto(b"{}", asker)
    print("answered", flush=True)
"""


@pytest.fixture
def name() -> str:
    return name_of_scheduler("127.0.0.1", next(_ports))


@pytest.fixture
def held() -> Recorder:
    made = Recorder(100)
    made.note(7, "a", 1.0)
    made.note(8, "a", 2.0)
    return made


@pytest.fixture
def teller(held: Recorder, name: str) -> Iterator[Teller]:
    teller = Teller(held)
    teller.start(name)
    yield teller
    teller.close()


@pytest.mark.usefixtures("teller")
def test_who_asks_is_answered(name: str) -> None:
    assert ask(name, Question(room=7)) == Answer(moments=[Moment(1.0, "a")])
    assert ask(name, Question(room=9)) == Answer()
    assert ask(name, Question(latest=1)) == Answer(rooms=[(8, 2.0)])


def test_nobody_lists_more_rooms_than_the_command_asks_for(held: Recorder, teller: Teller) -> None:
    for room in range(100):
        held.note(room, "b", 3.0 + room)
    assert len(teller._answer_to(Question(latest=10**9)).rooms) == MOST_REQUESTS


def test_where_nobody_answers_there_is_no_answer(name: str) -> None:
    assert ask(name, Question(room=7)) is None


@pytest.mark.usefixtures("teller")
@pytest.mark.parametrize(
    "nonsense", [b"", b"?", b"stop", b"{", b'{"room": "x"}', b'{"more": 1}', b'{"room":"\xff"}', b"\xff" * 5000]
)
def test_what_is_no_question_gets_no_answer_and_breaks_nothing(name: str, nonsense: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.bind("")
        stranger.sendto(nonsense, name)
        assert ask(name, Question(room=7)) is not None
        with pytest.raises(BlockingIOError):
            stranger.recv(1, socket.MSG_DONTWAIT)


@pytest.mark.usefixtures("teller")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_process_of_another_user_gets_no_answer(name: str) -> None:
    command = [sys.executable, "-c", ASK_AS_ANOTHER_USER, name[1:]]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "None\n", ended.stderr
    assert ask(name, Question(room=7)) is not None, "it has died of it"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_the_answer_of_another_user_is_none(name: str) -> None:
    """Who takes the name of a process that is not there yet is not believed."""
    command = [sys.executable, "-c", ANSWER_AS_ANOTHER_USER, name[1:]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"bound\n"
        assert ask(name, Question(room=7)) is None
        assert other.stdout.readline() == b"answered\n"


def test_each_process_takes_the_first_name_that_is_free(held: Recorder) -> None:
    port = next(_ports)
    names = [name_of_http_process("127.0.0.1", port, number) for number in range(2)]
    tellers = [Teller(held), Teller(Recorder(100))]
    for teller in tellers:
        teller.start(*names)
    try:
        assert [len(answer.moments) for one in names if (answer := ask(one, Question(room=7)))] == [1, 0]
    finally:
        for teller in tellers:
            teller.close()


def test_without_a_free_name_the_process_works_without(
    name: str, teller: Teller, caplog: pytest.LogCaptureFixture
) -> None:
    second = Teller(Recorder(1))
    second.start(name)
    assert "no trace of requests can be read from this process" in caplog.text
    second.close()


def test_a_recorder_that_is_off_is_not_answered_for(name: str) -> None:
    before = threading.active_count()
    teller = Teller(Recorder(0))
    teller.start(name)
    assert threading.active_count() == before
    assert ask(name, Question(room=7)) is None
    teller.close()


def test_closing_ends_the_thread(held: Recorder, name: str) -> None:
    teller = Teller(held)
    teller.start(name)
    teller.close()
    assert teller._thread is not None
    assert not teller._thread.is_alive()
    teller.close()
    assert ask(name, Question(room=7)) is None
