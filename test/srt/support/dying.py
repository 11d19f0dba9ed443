"""A language rank in a process of its own, to be killed or stopped."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection

from sglang.srt.disaggregation.multimodal.config import RelayConfig
from sglang.srt.disaggregation.multimodal.layout import BufferLayout
from support.forks import fork
from support.loopback import language_rank


class LanguageProcess:
    """Asks for rooms and never looks at what comes of it."""

    def __init__(self, layout: BufferLayout, config: RelayConfig, peer: str, *rooms: int) -> None:
        mine, theirs = multiprocessing.Pipe()
        self.process = fork.Process(target=_main, args=(theirs, layout, config, peer, rooms), daemon=True)
        self.process.start()
        theirs.close()
        mine.recv()
        mine.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()


def _main(pipe: Connection, layout: BufferLayout, config: RelayConfig, peer: str, rooms: tuple[int, ...]) -> None:
    with language_rank(layout, config) as language:
        receivers = language.start(peer, *rooms)
        pipe.send("started")
        time.sleep(600)
        del receivers
