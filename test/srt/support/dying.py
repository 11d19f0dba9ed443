"""A language rank in a process of its own, to be killed or stopped."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

from embedding_relay.config import RelayConfig
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.observer import Numbers
from support.forks import fork, spare_the_collector
from support.loopback import language_rank, on_the_plane
from support.signals import send_signal


class LanguageProcess:
    """Asks for rooms; what comes of it shows in its numbers only."""

    def __init__(
        self, layout: BufferLayout, config: RelayConfig, peer: str, *rooms: int, rows: int | None = None
    ) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self.process = fork.Process(
            target=_main, args=(theirs, layout, on_the_plane(config), peer, rooms, rows), daemon=True
        )
        self.process.start()
        theirs.close()
        self._pipe.recv()

    def metrics(self) -> Numbers:
        self._pipe.send("metrics")
        answer: Numbers = self._pipe.recv()
        return answer

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        send_signal(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self._pipe.close()


def _main(
    pipe: Connection,
    layout: BufferLayout,
    config: RelayConfig,
    peer: str,
    rooms: tuple[int, ...],
    rows: int | None,
) -> None:
    spare_the_collector()
    with language_rank(layout, config) as language:
        receivers = language.start(peer, *rooms, hint_rows=rows)
        pipe.send("started")
        while receivers:
            pipe.recv()
            pipe.send(language.manager.metrics())
