"""The page docs/life-of-a-request.md names the files that a request really goes through, and no others."""

from __future__ import annotations

import dataclasses
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from types import FrameType
from typing import Any

import zmq

from embedding_relay.config import RelayConfig
from embedding_relay.protocol.messages import Address
from embedding_relay.protocol.status import Status
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer
from embedding_relay.transport.encode import EncodeManager, MooncakeEmbeddingSender
from embedding_relay.transport.language import LanguageManager, MooncakeEmbeddingReceiver
from support.loopback import ENDED, HOST, PLANES, small_layout
from support.repo import REPO, SOURCE
from support.rows import LIMITS, Spec, make_rows

PACKAGE = SOURCE / "embedding_relay"
PAGE = REPO / "docs/life-of-a-request.md"
LAYOUT = small_layout()
# Used before the request comes, or when it does not go well; pairing.py, pulse.py and those of admission are the HTTP
# process's, recorder_socket.py and spans.py are for whoever asks about a request,
# doors.py is asked whenever Python imports something, and the last four are those of an instance with several ranks.
BESIDE = {
    "admission.py",
    "fair_line.py",
    "media_costs.py",
    "config.py",
    "doors.py",
    "protocol/errors.py",
    "protocol/counts.py",
    "pairing.py",
    "pulse.py",
    "recorder_socket.py",
    "spans.py",
    "transport/ranks.py",
    "transport/neighbours.py",
    "transport/borrowing.py",
    "memory/shared_rows.py",
}
# It says what a data plane promises, and has no code of its own to be called.
INTERFACE = {"memory/plane.py"}


@contextmanager
def noting_files() -> Iterator[set[str]]:
    """Files of the package of which a function is called, in whatever thread."""
    seen: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(f"{PACKAGE}/"):
            seen.add(frame.f_code.co_filename.removeprefix(f"{PACKAGE}/"))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield seen
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]  # the stubs of this Python know no way to end it


def until(condition: Callable[[], bool], *managers: EncodeManager | LanguageManager) -> None:
    poller = zmq.Poller()
    for manager in managers:
        poller.register(manager.wakeup_fd, zmq.POLLIN)
    while not condition():
        assert poller.poll(30_000), "nothing came of it"
        for manager in managers:
            manager.drain_events()


def request_rows(encode: EncodeManager, peer: str, spec: Spec, config: RelayConfig) -> None:
    with closing(LanguageManager.open(LAYOUT, config, host=HOST, ranks=1, max_rows=10_000, limits=LIMITS)) as language:
        language.start()
        sender = MooncakeEmbeddingSender(encode, spec.room)
        receiver = MooncakeEmbeddingReceiver(language, peer, spec.room)
        sender.init()
        receiver.start()
        until(lambda: sender.poll() is Status.WAITING_FOR_INPUT, encode, language)
        sender.send_embedding(make_rows(LAYOUT, spec))
        until(lambda: sender.poll() in ENDED and receiver.poll() in ENDED, encode, language)
        assert receiver.poll() is Status.SUCCESS
        assert receiver.rounds > 1, "the way of a resume is part of the page"


def test_the_page_names_the_files_of_the_way() -> None:
    config = RelayConfig(default_allocate_tokens=1024)
    with ExitStack() as opened, noting_files() as seen:
        registry = MooncakeEmbeddingBootstrapServer(HOST, 0)
        opened.callback(registry.close)
        registry.start()
        where = Address(HOST, registry.port)
        encode = EncodeManager.open(LAYOUT, config, host=HOST, bootstrap=where)
        opened.callback(encode.close)
        encode.start()
        for room, plane in enumerate(PLANES):
            request_rows(encode, str(where), Spec(room, total=3000), dataclasses.replace(config, data_plane=plane))
    named = {name for name in re.findall(r"`([a-z_/]+\.py)`", PAGE.read_text()) if (PACKAGE / name).exists()}
    assert seen - BESIDE - named == set(), "used, and not on the page"
    assert named - BESIDE - INTERFACE - seen == set(), "on the page, and not used"
