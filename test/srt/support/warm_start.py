"""SGLang servers start in a third of the time: forked from a process that has imported SGLang, and started nothing.

Most of a start are imports, in each of a server's three processes or more, and in the router. Here one process imports,
once for a whole lane, and a server is a fork of it in which its own command runs, with its environment and a log of its
own. Where that server starts a child with Python's `spawn`, it gets a fork too, of a twin that it left behind before
it ran anything: the child runs what `spawn` would have run, and has the same parent. The same goes for what that child
starts, as the controller of data-parallel ranks does.

What this does not reproduce, and so must be shown by servers that start as a user's do (those of the demo): the order
in which modules and plugins are imported, and variables that are read only when a library is loaded (those of OpenMP
are therefore this process's own).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import json
import multiprocessing.util
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, NoReturn

import setproctitle

from embedding_relay import cores
from embedding_relay.tools.local_cluster import COMMON_ENVIRON, CPU_ENVIRON
from embedding_relay.tools.local_process import LocalProcess
from support.repo import REPO
from support.side_by_side import NAME

PRELOADED: Final = (
    "sglang.cli.main",
    "sglang.launch_server",
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.scheduler",
    "sglang.srt.models.registry",
    # All that a router imports but its own module, which is run.
    "sglang_router.mini_lb",
    "sglang_router.router",
)
PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
CLONE_NEWNET: Final = 0x40000000
LARGEST_MESSAGE: Final = 1 << 20
LOW_NUMBERS: Final = range(3, 500)
"""Of descriptors, for those of the servers. What imports open, and may close by its number, gets higher ones."""


class WarmProcess(LocalProcess):
    """A server of this machine that is a fork. Its command is a Python script's, or `python -c CODE ARGUMENT...`, or
    `python -m MODULE ARGUMENT...`, and `ip netns exec NAME` may precede it.
    """

    def _launch(self, log: BinaryIO, environ: Mapping[str, str]) -> Fork:
        return fork_server().start(self.command, environ, log)


class Fork:
    """What this needs of `subprocess.Popen`. Its parent is the fork server, which is asked for its status."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self._server = server
        self._returncode: int | None = None

    def poll(self) -> int | None:
        if self._returncode is None:
            self._returncode = self._server.ask({"poll": self.pid})
        return self._returncode

    def wait(self) -> int:
        if self._returncode is None:
            self._returncode = self._server.ask({"wait": self.pid})
        assert self._returncode is not None
        return self._returncode


class ForkServer:
    """The process that has imported everything, seen from the one that runs the tests. It ends with that one."""

    def __init__(self, log: Path) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environ = os.environ | COMMON_ENVIRON | CPU_ENVIRON
        environ |= cores.share(os.environ, len(os.sched_getaffinity(0)), cores.usable_cores()).environ
        log.parent.mkdir(parents=True, exist_ok=True)
        with theirs, log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.warm_start", str(theirs.fileno())],
                cwd=Path(__file__).parents[1],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._socket = ours
        self._lock = threading.Lock()

    def start(self, command: Sequence[str], environ: Mapping[str, str], log: BinaryIO) -> Fork:
        request = {"command": list(command), "environ": dict(environ), "folder": os.getcwd()}
        pid = self.ask(request, [log.fileno()])
        assert pid is not None
        return Fork(self, pid)

    def ask(self, request: dict[str, Any], descriptors: Sequence[int] = ()) -> int | None:
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            answer = self._socket.recv(LARGEST_MESSAGE)
        if not answer:
            raise RuntimeError(f"the process that servers are forked from has ended: {self._process.wait()}")
        result: int | None = json.loads(answer)
        return result

    def stop(self) -> None:
        self._socket.close()
        self._process.wait()


@functools.cache
def fork_server() -> ForkServer:
    """Started when the first server is, or earlier by whoever has something else to do meanwhile."""
    server = ForkServer(REPO / "test-output" / f"warm-start-{NAME}.log")
    atexit.register(server.stop)
    return server


# ---- the process that is forked from


def main(descriptor: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # It looks for the place of the title when it is first asked for one, and cannot find it after `become`.
    setproctitle.setproctitle("what servers of tests are forked from")
    gc.disable()  # nothing of what is imported could be freed
    with low_numbers_taken():
        preload()
    gc.freeze()
    gc.enable()
    with socket.socket(fileno=descriptor) as tests:
        while True:
            message, descriptors, _, _ = socket.recv_fds(tests, LARGEST_MESSAGE, 1)
            if not message:
                return
            request = json.loads(message)
            if "command" not in request:
                answer = status(request)
            elif (answer := os.fork()) == 0:
                tests.close()
                run_server(request, descriptors[0])
            for number in descriptors:
                os.close(number)
            tests.send(json.dumps(answer).encode())


@contextlib.contextmanager
def low_numbers_taken() -> Iterator[None]:
    nowhere = os.open(os.devnull, os.O_RDONLY)
    taken = [nowhere]
    while taken[-1] + 1 < LOW_NUMBERS.stop:
        taken.append(os.dup(nowhere))
    yield
    for number in taken:
        os.close(number)


def preload() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    # With these come numba and others; SGLang imports all of them, and does without those that cannot be imported.
    processors = importlib.import_module("sglang.srt.multimodal.processors")
    for module in pkgutil.iter_modules(processors.__path__, f"{processors.__name__}."):
        with contextlib.suppress(ImportError):
            importlib.import_module(module.name)


def status(request: dict[str, int]) -> int | None:
    if "wait" in request:
        return os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
    pid, ended = os.waitpid(request["poll"], os.WNOHANG)
    return os.waitstatus_to_exitcode(ended) if pid else None


def run_server(request: dict[str, Any], log: int) -> NoReturn:
    """As if this process had just been started with that command; but it is told to end when the tests have ended,
    be it that they were killed. They end what they have started, so that is when there is nobody left to do it.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    os.setsid()
    os.chdir(request["folder"])
    take_places({1: os.dup(log), 2: log})
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    program, *arguments = enter_namespace(request["command"])
    leave_twin_behind()
    if arguments[:1] == ["-c"]:
        become(request["environ"], ["-c", *arguments[2:]])
        exec(arguments[1], {"__name__": "__main__"})
    elif arguments[:1] == ["-m"]:
        become(request["environ"], arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        become(request["environ"], [program, *arguments])
        runpy.run_path(program, run_name="__main__")
    sys.exit()


def enter_namespace(command: list[str]) -> list[str]:
    """The command that is left when its network namespace is this process's."""
    if command[:3] != ["ip", "netns", "exec"]:
        return command
    with open(f"/run/netns/{command[3]}") as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {command[3]}")
    return command[4:]


def become(environ: Mapping[str, str], arguments: Sequence[str]) -> None:
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = list(arguments)


def take_places(wanted: Mapping[int, int]) -> None:
    """Let each descriptor have the number that it shall have."""
    moved = {}
    for number, descriptor in wanted.items():
        moved[number] = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, LOW_NUMBERS.stop)
        os.close(descriptor)
    for number, descriptor in moved.items():
        os.dup2(descriptor, number)
        os.close(descriptor)


# ---- children of a server


def leave_twin_behind(own: Sequence[int] = ()) -> None:
    """From now on, what `spawn` starts is a fork of what this process is now, without its `own` descriptors."""
    server = os.getpid()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        for number in own:
            os.close(number)
        be_twin(theirs, server)
        os._exit(0)
    theirs.close()
    # A grandchild whose own parent has ended becomes this process's child.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    multiprocessing.util.spawnv_passfds = functools.partial(  # type: ignore[attr-defined]
        spawn, ours, multiprocessing.util.spawnv_passfds
    )


def spawn(
    twin: socket.socket, otherwise: Any, path: bytes, arguments: Sequence[str], descriptors: Sequence[int]
) -> int:
    """Instead of `multiprocessing.util.spawnv_passfds`."""
    if "--multiprocessing-fork" not in arguments:
        return int(otherwise(path, arguments, descriptors))  # such as the resource tracker's
    program = arguments[arguments.index("-c") + 1]
    numbers = sorted(set(map(int, descriptors)))
    request = {"program": program, "environ": dict(os.environ), "numbers": numbers}
    socket.send_fds(twin, [json.dumps(request).encode()], numbers)
    return int(twin.recv(LARGEST_MESSAGE))


def be_twin(server: socket.socket, server_pid: int) -> None:
    while True:
        message, descriptors, _, _ = socket.recv_fds(server, LARGEST_MESSAGE, 64)
        if not message:
            return
        if (between := os.fork()) == 0:
            if child := os.fork():
                server.send(str(child).encode())
                os._exit(0)
            server.close()
            run_child(json.loads(message), descriptors, server_pid)
        os.waitpid(between, 0)
        for number in descriptors:
            os.close(number)


def run_child(request: dict[str, Any], descriptors: Sequence[int], server_pid: int) -> NoReturn:
    """As if `spawn` had just started this process."""
    while os.getppid() != server_pid:
        os.sched_yield()  # until the process between has ended
    leave_twin_behind(descriptors)
    take_places(dict(zip(request["numbers"], descriptors, strict=True)))
    become(request["environ"], ["-c", "--multiprocessing-fork"])
    exec(request["program"], {"__name__": "__main__"})
    sys.exit()


if __name__ == "__main__":
    main(int(sys.argv[1]))
