"""What the demo reads and says; the servers it starts are the e2e lane's business."""

import importlib.util
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from embedding_relay.tools import cli, demo, local_cluster, tiny_model
from embedding_relay.tools.chat_client import Answer
from embedding_relay.tools.demo import Reporter, TransferReport, last_report, summary
from embedding_relay.tools.demo_keep import Enter, Keeper, directions
from embedding_relay.tools.local_cluster import LocalCluster
from embedding_relay.tools.local_process import LocalProcess, free_ports, wait_all_ready
from support.patience import wait_until

LANGUAGE_LOG = """\
[04:07:14] relay room=1 status=Failed reason="the encode instance is gone"
[04:07:15] relay room=2 status=Success rows=500 rounds=1 bytes=264000 wait_ms=0.1 transfer_ms=12.0
[04:07:16] relay room=9007199254740993 status=Success rows=1030 rounds=9 bytes=543840 wait_ms=7.4 transfer_ms=854.1
"""
ENCODE_LOG = """\
[4:07] relay-encode room=9007199254740993 status=Success rows=1030 rounds=9 bytes=543840 wait_ms=812.4 transfer_ms=41.7
"""
LANGUAGE = TransferReport(9007199254740993, 1030, 9, 543840, 7.4, 854.1)
ENCODE = TransferReport(9007199254740993, 1030, 9, 543840, 812.4, 41.7)


def test_the_last_report_of_a_log() -> None:
    assert last_report(LANGUAGE_LOG) == LANGUAGE
    assert last_report(ENCODE_LOG) == ENCODE
    assert last_report("nothing of ours") is None


def test_the_summary_names_rounds_bytes_and_times() -> None:
    body = {"choices": [{"message": {"content": "an answer"}}]}
    said = "\n".join(summary(Answer(200, body, 1.0), LANGUAGE, ENCODE, 128))
    parts = (
        "'an answer'",
        "1030 rows",
        "9 rounds",
        "543,840 bytes",
        "128 rows at a time",
        "1000 ms = 812 vision tower + 42 rounds + 7 wait for receive buffers + 139 all else",
    )
    for part in parts:
        assert part in said


def test_progress_without_a_terminal_is_a_line_per_change(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter()
    for seconds in (0.0, 0.2, 0.4):
        reporter.progress("encode", "starting", seconds)
    reporter.progress("encode", "ready", 0.6)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("] ")[2] for line in lines] == ["encode starting", "encode ready after 0.6 s"]


def test_a_missing_package_is_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sglang_router" else object())
    assert demo.run(cli.build_parser().parse_args(["demo"])) == 2
    assert "install the extra router" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--default-tokens", "0"], ["--max-tokens", "-1"], ["--device", "toaster"]])
def test_wrong_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", *arguments])
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_an_accelerator_that_is_not_there_is_named_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "find_accelerator", lambda: None)
    assert cli.main(["demo", "--device", "accelerator"]) == 2
    assert "--device accelerator: this machine has none" in capsys.readouterr().err


# ---- on servers that answer at once, and do nothing else


SERVER = """
import http.server, json, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": "red"}}]}).encode())
print("relay room=1 status=Success rows=9 rounds=3 bytes=72 wait_ms=1.0 transfer_ms=2.0", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """Neither instances nor a router: nothing is transferred, and none of them asks another."""
    (tmp_path / "logs").mkdir()
    members = []
    for name, port in zip(("encode", "language", "router"), free_ports(3), strict=True):
        command = [sys.executable, "-c", SERVER, str(port)]
        members.append(LocalProcess(name, command, f"http://127.0.0.1:{port}", tmp_path / "logs" / f"{name}.log"))
    made = LocalCluster(members[-1].url, [members])
    yield made
    made.stop(grace=0)


@pytest.fixture
def demonstrate(monkeypatch: pytest.MonkeyPatch, cluster: LocalCluster, tmp_path: Path) -> Iterator[Callable[..., int]]:
    """The command, with that cluster in place of SGLang's servers and no tiny model."""
    monkeypatch.setattr(demo, "_missing", lambda device: None)
    monkeypatch.setattr(demo.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "logs"))
    monkeypatch.setattr(tiny_model, "cached", lambda family: tmp_path)
    monkeypatch.setattr(local_cluster, "relay", lambda options, **_: cluster)
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield lambda *arguments: cli.main(["demo", "--device", "cpu", *arguments])
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_it_ends_on_its_own_and_leaves_nothing(
    demonstrate: Callable[..., int], cluster: LocalCluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demonstrate() == 0
    assert [member.group_members() for member in cluster.members] == [[], [], []]
    assert not (tmp_path / "logs").exists()
    said = capsys.readouterr().out
    assert "answer: 'red'" in said
    assert "in 3 rounds" in said
    assert "demo --keep" in said


def test_it_stops_everything_though_nobody_reads_what_it_says(
    demonstrate: Callable[..., int], cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `sglang-relay demo | head -1`, or when the terminal is closed."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert demonstrate() == 0
    assert [member.group_members() for member in cluster.members] == [[], [], []]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_each_signal_that_means_stop_stops_everything_also_while_a_part_is_gone(
    demonstrate: Callable[..., int],
    cluster: LocalCluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    def kill_one_then_stop(_enter: Enter, _seconds: float) -> bool:
        if cluster["encode"].returncode() is None:
            os.kill(cluster["encode"].pid, signal.SIGKILL)
            wait_until(lambda: cluster["encode"].returncode() is not None)
        else:
            signal.raise_signal(number)
        return False

    monkeypatch.setattr(Enter, "pressed", kill_one_then_stop)
    monkeypatch.setattr(Enter, "possible", lambda _enter: True)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as in a terminal; a test run may be under `nohup`
    assert demonstrate("--keep") == 130
    assert [member.group_members() for member in cluster.members] == [[], [], []]
    assert "encode has ended: killed by SIGKILL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--image", "nothing.png"], "--image nothing.png: No such file or directory"),
        (["--image", __file__], "cannot identify image file"),
        (["--model", "nothing"], "--model nothing: it is no directory with a config.json"),
    ],
)
def test_what_is_not_there_is_named_before_anything_starts(
    demonstrate: Callable[..., int],
    cluster: LocalCluster,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    assert demonstrate(*arguments) == 1
    assert words in capsys.readouterr().out
    assert [member.returncode() for member in cluster.members] == [None, None, None]


# ---- --keep


class Typist(Enter):
    """Nobody types; whether somebody could is what a test says."""

    def __init__(self, can_type: bool) -> None:
        self._can_type = can_type

    def possible(self) -> bool:
        return self._can_type


def test_a_part_that_ends_is_named_and_enter_starts_it_again(cluster: LocalCluster) -> None:
    said: list[str] = []
    keeper = Keeper(cluster.members, said.append, Typist(True))
    with cluster:
        keeper.look()
        assert said == []
        for name in ("encode", "router"):
            os.kill(cluster[name].pid, signal.SIGKILL)
            wait_until(lambda name=name: cluster[name].returncode() is not None)  # type: ignore[misc]
        keeper.look()
        keeper.look()
        assert [line for line in said if "has ended" in line] == [
            f"{name} has ended: killed by SIGKILL; its log is {cluster[name].log}" for name in ("encode", "router")
        ]
        assert "  press Enter to start encode again" in said
        assert any("answered with 5xx, text too" in line for line in said)
        assert any("nobody can connect" in line for line in said)
        keeper.restart()
        wait_all_ready(cluster.members, 30)
        keeper.look()
        assert [line.partition(" is ready again")[0] for line in said if "ready again" in line] == ["encode", "router"]
        assert cluster["encode"].log_text().count("relay room=1") == 2, "what it said before it ended is still there"


def test_a_part_that_ends_while_it_starts_is_named_again(cluster: LocalCluster) -> None:
    said: list[str] = []
    keeper = Keeper(cluster.members, said.append, Typist(False))
    with cluster:
        os.kill(cluster["language"].pid, signal.SIGKILL)
        wait_until(lambda: cluster["language"].returncode() is not None)
        keeper.look()
        cluster["language"].command = (sys.executable, "-c", "raise SystemExit(3)")
        keeper.restart()
        wait_until(lambda: cluster["language"].returncode() is not None)
        keeper.look()
    assert any("language has ended: status 3" in line for line in said)
    assert said[-1].strip() == cluster["language"].command_line(), "where nobody can press Enter"


def test_enter_is_noticed_until_standard_input_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, writes = os.pipe()
    with os.fdopen(reads) as ours, os.fdopen(writes, "wb", buffering=0) as theirs:
        monkeypatch.setattr(sys, "stdin", ours)
        enter = Enter()
        assert enter.possible()
        assert not enter.pressed(0)
        theirs.write(b"\n")
        assert enter.possible()
        assert enter.pressed(30)
        assert not enter.pressed(0)
        theirs.close()
        assert not enter.possible()
        assert not enter.pressed(0)


@pytest.mark.parametrize("stdin", [None, os.devnull])
def test_nobody_can_press_enter_without_standard_input(monkeypatch: pytest.MonkeyPatch, stdin: str | None) -> None:
    with open(stdin or os.devnull) as opened:
        monkeypatch.setattr(sys, "stdin", stdin and opened)
        assert not Enter().possible()


def test_a_terminal_of_another_job_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in the background would be stopped for it."""
    monkeypatch.setattr(os, "tcgetpgrp", lambda descriptor: os.getpgrp() + 1)
    reads, writes = os.pipe()
    with os.fdopen(reads) as ours, os.fdopen(writes, "wb", buffering=0) as theirs:
        monkeypatch.setattr(sys, "stdin", ours)
        theirs.write(b"\n")
        assert not Enter().pressed(0)


def test_directions_can_be_pasted(cluster: LocalCluster) -> None:
    """What the commands print is seen in the e2e lane, where real servers answer."""
    with cluster:
        lines = list(directions(cluster, can_restart=True))
        commands = [shlex.split(line) for line in lines if line.startswith("  curl ")]
        assert len(commands) == 7
        chat = json.loads(commands[0][commands[0].index("-d") + 1])
        assert chat["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
        assert max(map(len, lines[:2])) < 600, "a person still likes to paste it"
        for member in cluster.members:
            assert f"    {member.command_line()}" in lines
            assert sum(f"{member.url}/" in " ".join(words) for words in commands) >= 2
        assert [line.split()[1:3] for line in lines if "/sglang-relay " in line] == [
            ["trace", "--last"],
            ["top", cluster["encode"].url],
        ]
        assert f"To see one fail: kill -9 {cluster['encode'].pid}" in lines
        assert "press Enter" in lines[-1]
    assert "the command that starts it" in [*directions(cluster, can_restart=False)][-1]
