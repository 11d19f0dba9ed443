"""`sglang-relay top`: what it reads from /metrics, what it makes of two samples, and how that looks on 80 columns."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from embedding_relay.metrics import RelayMetrics
from embedding_relay.observer import Numbers, Summary
from embedding_relay.tools import cli, top
from embedding_relay.tools.local_process import free_ports
from embedding_relay.tools.top import Instance, Paint, Sample
from support.stub_pages import serving

PLAIN = Paint(False)
LABELS = {"model_name": "m", "tp_rank": 0}
HEADING = "sglang-relay top"


class Served:
    """The metrics of an instance, made by what makes them there."""

    def __init__(self, mode: str) -> None:
        self.registry = CollectorRegistry()
        self.metrics = RelayMetrics(mode, LABELS, self.registry)

    def page(self) -> str:
        return generate_latest(self.registry).decode()


def busy(mode: str) -> Served:
    served = Served(mode)
    sizes = {"blocks": 512, "blocks_free": 128, "rooms": 12, "waiting_for_blocks": 3, "blocks_quarantined": 4}
    sizes |= {"quarantine_overdue": 1, "peers": 2, "sessions": 2, "mapped": 1, "transfers": 5, "unquiet": 1}
    served.metrics.counted(Numbers(sizes=sizes, totals={"rows": 5000, "bytes": 10_000_000}, failures={502: 3, 503: 1}))
    served.metrics.parked({"parked": 7})
    for rounds in (1, 3):
        served.metrics.succeeded(Summary(rows=100, rounds=rounds, bytes=1000, wait_s=0.25, transfer_s=1.0))
    return served


def sample(at: float = 0.0, mode: str = "language", **numbers: float) -> Sample:
    return Sample(at, mode, numbers)


# ---- what instances say


@pytest.mark.parametrize("mode", ["encode", "language"])
def test_the_page_of_an_instance_is_understood(mode: str) -> None:
    understood = top.understand(busy(mode).page(), 5.0)
    assert (understood.at, understood.mode) == (5.0, mode)
    numbers = understood.numbers
    assert {name: numbers[name] for name in ("pool_blocks", "free_blocks", "rooms", "rows", "bytes")} == {
        "pool_blocks": 512,
        "free_blocks": 128,
        "rooms": 12,
        "rows": 5000,
        "bytes": 10_000_000,
    }
    assert (numbers["requests"], numbers["failed"]) == (6, 4)
    assert (numbers["request_rounds_sum"], numbers["request_rounds_count"]) == (4, 2)


def test_ranks_of_one_instance_are_added_up() -> None:
    lines = [f'sglang:embedding_relay_rooms{{mode="encode",dp_rank="{rank}"}} {rank + 1}.0' for rank in range(3)]
    assert top.understand("\n".join(lines) + "\n", 0.0).numbers["rooms"] == 6


def test_every_number_on_the_screen_is_one_that_an_instance_serves() -> None:
    """Else it would be a zero for ever."""
    served = {name for mode in ("encode", "language") for name in top.understand(busy(mode).page(), 0.0).numbers}
    asked_for: set[str] = set()

    class Noted(Instance):
        def number(self, name: str) -> float:
            asked_for.add(name)
            return super().number(name)

        def grown(self, name: str) -> float:
            asked_for.add(name)
            return super().grown(name)

    for mode in ("encode", "language"):
        instance = Noted("http://a:1")
        for at in (0.0, 1.0):
            instance.hear(Sample(at, mode, {}))
        top.screen([instance], 0.0, HEADING, PLAIN)
    assert len(asked_for) > 10
    assert asked_for - served == set()


@pytest.mark.parametrize("page", ["", "sglang:num_running_reqs 3.0\n", "<html>hello</html>"])
def test_a_page_without_our_metrics(page: str) -> None:
    with pytest.raises(top.NoMetrics):
        top.understand(page, 0.0)


def test_numbers_that_are_none_are_left_out() -> None:
    page = 'sglang:embedding_relay_rooms{mode="encode"} NaN\nsglang:embedding_relay_pool_blocks{mode="encode"} +Inf\n'
    assert top.understand(page, 0.0).numbers == {}


# ---- two samples


def test_rates_are_those_between_two_samples() -> None:
    instance = Instance("http://a:1")
    instance.hear(sample(10.0, requests=4, rows=100, request_rounds_sum=8, request_rounds_count=4))
    assert instance.rate("rows") is None
    instance.hear(sample(12.0, requests=6, rows=500, request_rounds_sum=18, request_rounds_count=6))
    assert instance.rate("rows") == 200
    assert instance.mean("request_rounds") == 5
    assert instance.mean("wait_seconds") is None, "nothing was waited for meanwhile"


def test_an_instance_that_was_restarted_begins_anew() -> None:
    instance = Instance("http://a:1")
    instance.hear(sample(10.0, requests=400, rows=9000))
    instance.hear(sample(12.0, requests=1, rows=10))
    assert instance.rate("rows") is None
    instance.hear(sample(13.0, requests=2, rows=30))
    assert instance.rate("rows") == 20


def test_since_when_an_instance_is_silent() -> None:
    instance = Instance("http://a:1")
    instance.hear(sample(requests=1))
    for now in (100.0, 102.0, 104.0):
        instance.miss("Connection refused", now)
    lines = top.screen([instance], 110.0, HEADING, PLAIN)
    since = time.strftime("%H:%M:%S", time.localtime(100.0))
    assert any(line.startswith("a:1") and f"no answer since {since} (10 s)" in line for line in lines)
    assert any("Connection refused" in line for line in lines)
    assert any(line.startswith("LANGUAGE") for line in lines), "it stays where it was"
    instance.hear(sample(requests=1))
    assert not any("since" in line for line in top.screen([instance], 111.0, HEADING, PLAIN))


# ---- the screen


def shown(mode: str) -> list[str]:
    instance, served = Instance("http://10.0.0.1:30000"), busy(mode)
    instance.hear(top.understand(served.page(), 10.0))
    served.metrics.counted(Numbers(totals={"rows": 15_000, "bytes": 210_000_000}))
    for _ in range(4):
        served.metrics.succeeded(Summary(rows=100, rounds=2, bytes=1000, wait_s=0.05, transfer_s=1.0))
    instance.hear(top.understand(served.page(), 12.0))
    return top.screen([instance], 0.0, HEADING, PLAIN)


def columns(lines: list[str]) -> dict[str, str]:
    titles = next(line for line in lines if line.startswith(("ENCODE", "LANGUAGE")))
    values = lines[lines.index(titles) + 1].replace("## ", "##").replace(".. ", "..")
    return dict(zip(titles.split()[1:], values.split()[1:], strict=True))


def test_a_language_instance_at_a_glance() -> None:
    lines = shown("language")
    assert columns(lines) == {
        "pool": "######..75%",
        "queue": "3",
        "req/s": "2",
        "rows/s": "5k",
        "B/s": "100M",
        "rounds": "2",
        "wait": "50ms",
    }
    assert "  rooms: 12; shared memory with 1 of 2 encode ranks" in lines
    assert "  4 failed, 4 blocks in quarantine, 1 overdue" in lines


def test_an_encode_instance_at_a_glance() -> None:
    lines = shown("encode")
    found = columns(lines)
    assert (found["parked"], found["writes"], found["req/s"], found["B/s"]) == ("7", "5", "2", "100M")
    assert "  rooms: 12; shared memory with 1 of 2 language ranks" in lines
    assert any("1 unquiet" in line for line in lines)


def test_eighty_columns_are_enough() -> None:
    """Whatever the numbers and the names are."""
    instances = []
    for mode in ("encode", "language"):
        instance = Instance(f"http://{mode}-instance-with-a-long-name.some.domain.example:30000")
        numbers = top.understand(busy(mode).page(), 0.0).numbers
        instance.hear(Sample(0.0, mode, {name: 0.0 if "count" in name else 1.0 for name in numbers}))
        instance.hear(Sample(1.0, mode, dict.fromkeys(numbers, 123456789012.0) | {"free_blocks": 0.0}))
        instances.append(instance)
    silent = Instance("http://[2001:db8::1]:30000")
    silent.miss("a reason " * 30, 5.0)
    lines = top.screen([*instances, silent], 1e5, HEADING, PLAIN)
    assert len(lines) > 10
    assert [line for line in lines if len(line) > 80] == []
    assert any(":30000" in line for line in lines), "of a long name the end is kept"


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, "-"), (0, "0"), (7, "7"), (0.25, "0.25"), (999, "999"), (999.7, "1k"), (5234, "5.23k"), (8.1e7, "81M")],
)
def test_numbers_are_short(number: float | None, text: str) -> None:
    assert top._short(number) == text


# ---- a server


def test_what_does_not_answer_and_what_has_no_metrics_are_told_apart() -> None:
    refused = Instance(f"http://127.0.0.1:{free_ports(1)[0]}")
    top.look_at(refused)
    assert (refused.is_silent, refused.problem) == (True, "Connection refused")
    with serving() as server:
        silent = Instance(server.url)
        top.look_at(silent)
        assert not silent.is_silent
        assert "--enable-metrics" in silent.problem
        server.pages["/metrics"] = (503, "")
        top.look_at(silent)
        assert (silent.is_silent, silent.problem) == (True, "it answers 503")
        server.pages["/metrics"] = (200, busy("encode").page())
        top.look_at(silent)
        assert silent.missed_since is None
        assert silent.number("rooms") == 12


def test_the_instances_of_a_router_are_found_again_at_every_look() -> None:
    with serving(metrics=busy("encode").page()) as instance, serving() as router:
        watch = top.Watch([], router.url)
        assert watch.refresh() == []
        assert "sglang-router" in watch.problem
        workers = [{"url": f"{instance.url}/"}, {"url": "file:///etc/passwd"}, {"url": "http://\033[2J:1"}]
        router.pages["/workers"] = (200, json.dumps({"workers": workers}))
        [found] = watch.refresh()
        assert (found.url, found.missed_since, watch.problem) == (instance.url, None, "")
        router.pages.clear()
        assert watch.refresh() == [found], "those that it had"
        assert watch.problem


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top, "_ONCE_INTERVAL", 0.01)


@pytest.mark.usefixtures("at_once")
def test_once_prints_one_picture_and_says_by_its_status_whether_all_were_seen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with serving(metrics=busy("language").page()) as server:
        assert cli.main(["top", "--once", server.url]) == 0
        printed = capsys.readouterr().out
        assert printed.count("LANGUAGE") == 1
        assert "\033" not in printed
        assert cli.main(["top", "--once", server.url, f"127.0.0.1:{free_ports(1)[0]}"]) == 1
    assert "1 not seen" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["interrupt", "terminate"])
def test_the_terminal_is_given_back(number: signal.Signals) -> None:
    ours, theirs = pty.openpty()
    with serving(metrics=busy("language").page()) as server:
        command = [sys.executable, "-m", "embedding_relay", "top", server.url, "--interval", "0.1"]
        running = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        seen = read_until(ours, b"rows/s")
        running.send_signal(number)
        seen += read_to_the_end(ours)
        assert running.wait(20) == 0
    os.close(ours)
    assert seen.startswith(b"\033[?1049h")
    assert seen.endswith(b"\033[?25h\033[?1049l")
    assert b"Traceback" not in seen


def read_until(descriptor: int, what: bytes) -> bytes:
    seen = b""
    while what not in seen:
        assert select.select([descriptor], [], [], 20)[0], seen
        seen += os.read(descriptor, 65536)
    return seen


def read_to_the_end(descriptor: int) -> bytes:
    seen = b""
    try:
        while part := os.read(descriptor, 65536):
            seen += part
    except OSError:  # of a terminal, this is its end
        pass
    return seen


def test_without_a_terminal_pictures_follow_each_other() -> None:
    with serving(metrics=busy("language").page()) as server:
        command = [sys.executable, "-m", "embedding_relay", "top", server.url, "--interval", "0.1"]
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert running.stdout is not None
        assert running.stderr is not None
        seen = b""
        while len(re.findall(rb"^sglang-relay top", seen, re.MULTILINE)) < 2:
            part = os.read(running.stdout.fileno(), 65536)
            assert part, running.stderr.read()
            seen += part
        running.stdout.close()  # as `| head` does
        assert running.wait(20) == 0
        assert running.stderr.read() == b""
        running.stderr.close()
    assert b"\033" not in seen


@pytest.mark.parametrize(
    "arguments", [["top"], ["top", "a:b"], ["top", "a"], ["top", "ftp://a:1"], ["top", "a:1", "--interval", "0"]]
)
def test_what_cannot_be_watched_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert "usage: sglang-relay top" in capsys.readouterr().err
