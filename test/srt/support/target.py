"""A process that has nothing but memory to be written to, for tests of the engine alone."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection

import torch

from embedding_relay.memory.engine import MooncakeDataPlane
from embedding_relay.memory.plane import Entry, Region
from support.forks import fork
from support.signals import send_signal

SIZE = 64 << 20


class Target:
    """A process with 64 MiB that others may write to."""

    def __init__(self, host: str) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        self.process = fork.Process(target=_target_main, args=(theirs, host), daemon=True)
        self.process.start()
        theirs.close()
        self.session_id, self.pointer = self._pipe.recv()

    def ones(self) -> int:
        """How many bytes have been written."""
        self._pipe.send("count")
        return int(self._pipe.recv())

    def clear(self) -> None:
        self._pipe.send("clear")
        self._pipe.recv()

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        send_signal(self.process.pid, number)

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self._pipe.close()


def write_over_ipv6() -> None:
    """In a process of its own, because Mooncake decides once per process which family it speaks."""
    process = fork.Process(target=_ipv6_main)
    process.start()
    process.join()
    assert process.exitcode == 0
    process.close()


def _ipv6_main() -> None:
    memory = torch.ones(2 * SIZE, dtype=torch.uint8)
    memory[SIZE:] = 0
    plane = MooncakeDataPlane("::1", "tcp")
    plane.start([Region(memory.data_ptr(), memory.numel())])
    link = plane.link(plane.session_id)
    assert plane.session_id.startswith("[::1]:")
    link.write([Entry(memory.data_ptr(), memory.data_ptr() + SIZE, SIZE)])
    assert memory.all()
    link.close()
    plane.close()


def _target_main(pipe: Connection, host: str) -> None:
    memory = torch.zeros(SIZE, dtype=torch.uint8)
    plane = MooncakeDataPlane(host, "tcp")
    plane.start([Region(memory.data_ptr(), SIZE)])
    pipe.send((plane.session_id, memory.data_ptr()))
    while True:
        if pipe.recv() == "clear":
            memory.zero_()
            pipe.send("cleared")
        else:
            pipe.send(int(memory.sum(dtype=torch.int64)))
