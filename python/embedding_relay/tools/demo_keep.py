"""`sglang-relay demo --keep`: what to ask the running servers, and what is done when one of them ends."""

from __future__ import annotations

import base64
import io
import json
import os
import select
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from embedding_relay.tools.chat_client import chat_body
from embedding_relay.tools.local_cluster import LocalCluster
from embedding_relay.tools.local_process import LocalProcess, ProcessFailed

Say = Callable[[str], None]

LOOK_SECONDS: Final = 0.5

# This router sends each request to both instances. docs/operations.md says what a request gets that is under way.
_BOTH_ARE_ASKED: Final = "until it is back every request is answered with 5xx, text too, because the router asks both"
_CONSEQUENCES: Final = {
    "encode": _BOTH_ARE_ASKED,
    "language": _BOTH_ARE_ASKED,
    "router": "until it is back nobody can connect; the two instances are not touched",
}
# They are asked every five seconds, and one good answer is enough.
_TAKEN_BACK: Final = "; the router takes it back with its next health check, which is at most 5 s away"


# ---- what to ask


def directions(cluster: LocalCluster, can_restart: bool) -> Iterator[str]:
    """Lines for a terminal. What can be pasted stands alone on its line."""
    yield "Everything runs until Ctrl-C. In another terminal, ask about a picture:"
    yield f"  {_chat(cluster.url)}"
    yield "the metrics of both instances and of the router:"
    for member in cluster.members:
        yield f"  curl -sS {_metrics_url(member)} | grep {'smg_' if member.name == 'router' else 'embedding_relay'}"
    yield "and who is healthy (the router: whether it has healthy instances):"
    for member in cluster.members:
        yield f"  curl -sS -o /dev/null -w '{member.name} %{{http_code}}\\n' {member.url}{member.ready_path}"
    yield "The latest request as a timeline, and what both instances are doing now:"
    instances = " ".join(cluster[name].url for name in ("encode", "language"))
    yield f"  {_command()} trace --last 1 {instances}"
    yield f"  {_command()} top {instances}"
    yield "The parts, with process, log and command:"
    for member in cluster.members:
        yield f"  {member.name}: process {member.pid}, log {member.log}"
        yield f"    {member.command_line()}"
    yield f"To see one fail: kill -9 {cluster['encode'].pid}"
    yield "A part that has ended is " + (
        "started again when you press Enter here." if can_restart else "named here, with the command that starts it."
    )


def _chat(url: str) -> str:
    body = chat_body([_small_picture()], "What is in this picture?", max_tokens=16)
    del body["logprobs"]
    header = "Content-Type: application/json"
    return shlex.join(["curl", "-sS", f"{url}/v1/chat/completions", "-H", header, "-d", json.dumps(body)])


def _command() -> str:
    """Whatever the PATH of the other terminal says."""
    return shlex.quote(str(Path(sys.executable).with_name("sglang-relay")))


def _small_picture() -> str:
    """So small that its data fit on a command line which a person still likes to paste."""
    from PIL import Image

    image = Image.new("RGB", (64, 64), "red")
    image.paste("blue", (0, 0, 32, 32))
    buffer = io.BytesIO()
    image.quantize(2).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _metrics_url(member: LocalProcess) -> str:
    """The router has a port of its own for them."""
    if "--prometheus-port" not in member.command:
        return f"{member.url}/metrics"
    port = member.command[member.command.index("--prometheus-port") + 1]
    return f"{member.url.rpartition(':')[0]}:{port}/metrics"


# ---- when a part ends


class Enter:
    """Whether somebody has pressed Enter. Nobody can where standard input is at its end, as in a service."""

    def __init__(self) -> None:
        self._is_open = sys.stdin is not None
        self._pressed = False

    def possible(self) -> bool:
        self._look(0)
        return self._is_open

    def pressed(self, seconds: float) -> bool:
        """Since the last call; waits for it, at most for so long."""
        if not self._pressed:
            self._look(seconds)
        pressed, self._pressed = self._pressed, False
        return pressed

    def _look(self, seconds: float) -> None:
        if not self._is_open or _belongs_to_another_job(sys.stdin.fileno()):
            time.sleep(seconds)
        elif select.select([sys.stdin], [], [], seconds)[0]:
            typed = os.read(sys.stdin.fileno(), 4096)
            self._is_open = bool(typed)
            self._pressed |= b"\n" in typed


def _belongs_to_another_job(descriptor: int) -> bool:
    """A process in the background that read from its terminal would be stopped."""
    try:
        return os.tcgetpgrp(descriptor) != os.getpgrp()
    except OSError:
        return False  # not a terminal, or not the one of this session


class Keeper:
    """Looks at the parts of a cluster, says which has ended, and starts it again when Enter is pressed."""

    def __init__(self, members: list[LocalProcess], say: Say, enter: Enter) -> None:
        self._members = members
        self._say = say
        self._enter = enter
        self._ended: list[LocalProcess] = []
        self._starting: list[LocalProcess] = []

    def run(self) -> None:
        """Until an exception, such as the one of Ctrl-C."""
        while True:
            self.look()
            if self._enter.pressed(LOOK_SECONDS):
                self.restart()

    def look(self) -> None:
        for member in self._members:
            if member in self._ended:
                continue
            if member.returncode() is not None:
                self._tell_of_end(member)
            elif member in self._starting and member.healthy():
                self._starting.remove(member)
                back = "" if member.name == "router" else _TAKEN_BACK
                self._say(f"{member.name} is ready again after {member.elapsed():.0f} s{back}")

    def _tell_of_end(self, member: LocalProcess) -> None:
        self._ended.append(member)
        self._say(f"{member.name} has ended: {_how(member)}; its log is {member.log}")
        if member in self._starting:
            self._starting.remove(member)
        else:
            self._say(f"  {_CONSEQUENCES[member.name]}")
        if self._enter.possible():
            self._say(f"  press Enter to start {member.name} again")
        else:
            self._say("  this starts it again, in another terminal, where you end it yourself:")
            self._say(f"  {member.command_line()}")

    def restart(self) -> None:
        for member in self._ended:
            try:
                member.restart()
            except (ProcessFailed, OSError) as error:
                self._say(f"{member.name} cannot be started: {error}")
                continue
            self._starting.append(member)
            self._say(f"{member.name} is starting, as process {member.pid}")
        self._ended = [member for member in self._ended if member not in self._starting]


def _how(member: LocalProcess) -> str:
    code = member.returncode()
    assert code is not None
    if code >= 0:
        return f"status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
