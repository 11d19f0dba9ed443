"""`sglang-relay demo`: starts both instances and the router on this machine and sends one large picture through."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from embedding_relay.cpu_platform import find_accelerator
from embedding_relay.tools import demo_keep, local_cluster, tiny_model, trace
from embedding_relay.tools.chat_client import Answer, ask, data_uri, picture
from embedding_relay.tools.local_cluster import LocalCluster, Options
from embedding_relay.tools.local_process import LocalProcess, ProcessFailed

if TYPE_CHECKING:
    from PIL.Image import Image

# About a thousand tokens for the tiny models: many rounds, and a few seconds of their vision tower on two cores.
PICTURE_SIDE = 896
BLOCK_SIZE = 16
REPORT = re.compile(
    r"relay(?:-encode)? room=(?P<room>\d+) status=Success rows=(?P<rows>\d+) rounds=(?P<rounds>\d+) "
    r"bytes=(?P<bytes>\d+) wait_ms=(?P<wait_ms>[\d.]+) transfer_ms=(?P<transfer_ms>[\d.]+)"
)
REPORT_SECONDS = 5.0


@dataclass(frozen=True)
class TransferReport:
    """What an instance logged about one finished request.

    `wait_ms` is the wait for free receive blocks (language side) or for the tower's rows (encode side).
    `transfer_ms` is the rest of that side's time: on the encode side nothing but the rounds.
    """

    room: int
    rows: int
    rounds: int
    bytes: int
    wait_ms: float
    transfer_ms: float


def last_report(log: str) -> TransferReport | None:
    found = None
    for found in REPORT.finditer(log):  # noqa: B007  (the last one is wanted)
        pass
    if found is None:
        return None
    return TransferReport(
        room=int(found["room"]),
        rows=int(found["rows"]),
        rounds=int(found["rounds"]),
        bytes=int(found["bytes"]),
        wait_ms=float(found["wait_ms"]),
        transfer_ms=float(found["transfer_ms"]),
    )


class Reporter:
    """Progress: on a terminal one line that counts the seconds, in a file or a pipe a line per change.

    Whether anybody reads it is nothing to the servers: they are stopped all the same.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._live = sys.stdout.isatty()
        self._stages: dict[str, str] = {}

    def say(self, text: str) -> None:
        clear = "\r\x1b[K" if self._live else ""
        self.show(f"{clear}[{time.monotonic() - self._started:6.1f} s] {text}")

    def show(self, line: str, end: str = "\n") -> None:
        """As it is: what can be pasted must stand alone."""
        with contextlib.suppress(OSError):
            print(line, end=end, flush=True)

    def progress(self, name: str, stage: str, seconds: float) -> None:
        changed = self._stages.get(name) != stage
        self._stages[name] = stage
        if stage in ("ready", "stopped"):
            self.say(f"{name} {stage} after {seconds:.1f} s")
        elif self._live:
            busy = ", ".join(f"{who} {what}" for who, what in self._stages.items() if what in ("starting", "stopping"))
            self.show(f"\r\x1b[K[{time.monotonic() - self._started:6.1f} s] {busy} ...", end="")
        elif changed:
            self.say(f"{name} {stage}")


def run(arguments: argparse.Namespace) -> int:
    if missing := _missing(arguments.device):
        print(f"sglang-relay demo: {missing}", file=sys.stderr)
        return 2
    _let_signals_interrupt()
    reporter = Reporter()
    logs = Path(tempfile.mkdtemp(prefix="sglang-relay-demo-"))
    try:
        _demonstrate(arguments, logs, reporter)
    except ProcessFailed as failure:
        reporter.say(f"failed: {failure}")
        return 1
    except DemoFailed as failure:
        left = f" (logs: {logs})" if any(logs.iterdir()) else ""
        reporter.say(f"failed: {failure}{left}")
        return 1
    except KeyboardInterrupt:
        reporter.say("interrupted; everything is stopped")
        shutil.rmtree(logs)
        return 130
    shutil.rmtree(logs)
    return 0


class DemoFailed(RuntimeError):
    """The servers run, but they did not do what the demo is to show."""


def _missing(device: str) -> str | None:
    if device == "accelerator" and find_accelerator() is None:
        return "--device accelerator: this machine has none that torch or SGLang could use"
    needed = (
        ("torch", "sglang"),
        ("mooncake", "cpu (or cuda12, cuda13)"),
        ("sglang_router", "router"),
    )
    for module, extra in needed:
        if importlib.util.find_spec(module) is None:
            return f"the module {module} is missing: install the extra {extra} of sglang-embedding-relay"
    try:
        # Not by its module: a checkout has a directory of that name.
        importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return "SGLang is missing: install the extra sglang of sglang-embedding-relay"
    return None


def _let_signals_interrupt() -> None:
    """A service manager's stop and a terminal that is closed are cleaned up after like a Ctrl-C."""
    # By name: a shell starts what it puts into the background with SIGINT ignored.
    signal.signal(signal.SIGINT, _exit_on_signal)
    signal.signal(signal.SIGTERM, _exit_on_signal)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` has asked for that
        signal.signal(signal.SIGHUP, _exit_on_signal)


def _exit_on_signal(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _demonstrate(arguments: argparse.Namespace, logs: Path, reporter: Reporter) -> None:
    image, model = _image(arguments.image), arguments.model
    if model is not None and not (model / "config.json").is_file():
        raise DemoFailed(f"--model {model}: it is no directory with a config.json")
    flags: tuple[str, ...] = ()
    if model is None:
        reporter.say(f"making a tiny {arguments.family} model (random weights: the answer means nothing)")
        model, flags = tiny_model.cached(arguments.family), tiny_model.FAMILIES[arguments.family].arguments
    reporter.say(f"model: {model}")
    blocks = max(1, -(-arguments.default_tokens // BLOCK_SIZE))
    buffers = {
        "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": str(BLOCK_SIZE),
        "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": str(arguments.default_tokens),
    }
    options = Options(model=model, logs=logs, device=arguments.device, arguments=flags, environ=buffers)
    metrics = ("--enable-metrics",) if arguments.keep else ()
    cluster = local_cluster.relay(
        options,
        encode_arguments=metrics,
        language_arguments=metrics,
        # No more blocks than the first offer: otherwise the second round would already take all the rest.
        language_environ={"SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": str(blocks)},
        progress=reporter.progress,
    )
    where = "the CPU" if options.on_cpu() else f"the accelerator ({find_accelerator()})"
    reporter.say(f"starting an encode instance, a language instance and the router on {where}")
    with cluster:
        _show_answer(arguments, image, cluster, reporter)
        if arguments.keep:
            _keep(cluster, reporter)
        else:
            reporter.say("`sglang-relay demo --keep` leaves everything running, and shows what to ask")


def _image(path: Path | None) -> Image:
    if path is None:
        return picture(PICTURE_SIDE, PICTURE_SIDE)
    from PIL import Image

    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DemoFailed(f"--image {path}: {getattr(error, 'strerror', None) or error}") from None


def _show_answer(arguments: argparse.Namespace, image: Image, cluster: LocalCluster, reporter: Reporter) -> None:
    reporter.say(f"asking about a picture of {image.width} x {image.height} pixels: {arguments.prompt}")
    answer = ask(cluster.url, [data_uri(image)], arguments.prompt, max_tokens=arguments.max_tokens)
    if not answer.ok:
        raise DemoFailed(f"status {answer.status}: {answer.body}")
    language, encode = (_await_report(cluster[name]) for name in ("language", "encode"))
    for line in summary(answer, language, encode, arguments.default_tokens):
        reporter.say(line)
    if arguments.svg is not None:
        _draw(arguments.svg, language, cluster)
        reporter.say(f"drawn: {arguments.svg}")


def _draw(path: Path, transfer: TransferReport, cluster: LocalCluster) -> None:
    urls = [cluster["encode"].url, cluster["language"].url]
    try:
        trace.draw(path, transfer.room, urls, "One request across both instances")
    except (OSError, LookupError) as error:
        raise DemoFailed(f"--svg {path}: {getattr(error, 'strerror', None) or error}") from None


def _await_report(member: LocalProcess) -> TransferReport:
    """The answer may arrive before the log line is written."""
    deadline = time.monotonic() + REPORT_SECONDS
    while (report := last_report(member.log_text())) is None:
        if time.monotonic() > deadline:
            raise DemoFailed(f"the {member.name} instance logged no finished transfer")
        time.sleep(0.1)
    return report


def summary(answer: Answer, language: TransferReport, encode: TransferReport, default_tokens: int) -> list[str]:
    total = answer.seconds * 1000
    rest = max(0.0, total - language.wait_ms - encode.wait_ms - encode.transfer_ms)
    return [
        f"answer: {answer.text!r}",
        f"transferred: {language.rows} rows, one for each token of picture and text, {language.bytes:,} bytes, in "
        f"{language.rounds} rounds, because the receive buffers have space for {default_tokens} rows at a time",
        f"time: {total:.0f} ms = {encode.wait_ms:.0f} vision tower + {encode.transfer_ms:.0f} rounds + "
        f"{language.wait_ms:.0f} wait for receive buffers + {rest:.0f} all else (router, picture, text)",
    ]


def _keep(cluster: LocalCluster, reporter: Reporter) -> None:
    enter = demo_keep.Enter()
    for line in demo_keep.directions(cluster, enter.possible()):
        reporter.show(line)
    demo_keep.Keeper(cluster.members, reporter.say, enter).run()
