"""`sglang-relay trace`: two halves on one clock, the terminal's 80 columns, the picture, and who is asked with what."""

from __future__ import annotations

import json
import random
import re
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest

from embedding_relay import recorder
from embedding_relay.recorder import MOST_ROUNDS, Moment
from embedding_relay.spans import Span
from embedding_relay.tools import cli, trace_svg, trace_text
from embedding_relay.tools.trace import draw
from embedding_relay.tools.trace_story import Lane, Request, Story, Told, tell
from support.repo import REPO

ROOM = (1 << 63) - 7
SVG = "{http://www.w3.org/2000/svg}"


def test_two_chunks_at_a_time_take_their_time_once() -> None:
    chunks = [Span("chunk", 5.0, 6.0), Span("chunk", 1.0, 3.0), Span("chunk", 2.0, 4.0), Span("chunk", 7.0, None)]
    assert Lane("encode", "chunk", chunks).seconds == 4.0


def halves(
    rounds: int = 3, ahead: float = 0.0, delays: Sequence[float] = (0.001,), machines: tuple[str, str] = ("a", "b")
) -> list[Told]:
    """A request of `rounds`; the encode half's clock is `ahead`, and messages take these delays in turn."""
    way = iter(delays * (2 * rounds))
    encode = [
        Moment(0.0, recorder.RECEIVED),
        Moment(0.3, recorder.PREPARED),
        Moment(0.31, recorder.PARKED),
        Moment(0.32, recorder.TOWER_BEGAN),
        Moment(2.0, recorder.TOWER_ENDED, rows=16 * rounds),
    ]
    language = [Moment(0.002, recorder.RECEIVED), Moment(0.01, recorder.PREPARED), Moment(0.011, recorder.PARKED)]
    at = 0.02
    for number in range(rounds):
        language.append(Moment(at, recorder.OFFERED, 16 * number, 16))
        encode.append(Moment(at := at + next(way), recorder.ASKED, 16 * number, 16))
        at = max(at, 2.001)
        encode.append(Moment(at, recorder.CHUNK_BEGAN, 16 * number, 16))
        encode.append(Moment(at := at + 0.004, recorder.CHUNK_WRITTEN, 16 * number, 16, 1000))
        language.append(Moment(at := at + next(way), recorder.COPY_BEGAN, 16 * number, 16))
        language.append(Moment(at := at + 0.001, recorder.COPIED, 16 * number, 16))
    encode += [Moment(at, recorder.SENT, 0, 16 * rounds, 1000 * rounds, rounds), Moment(at, recorder.ANSWERED)]
    language += [
        Moment(at, recorder.COMPLETE, 0, 16 * rounds, 1000 * rounds, rounds),
        Moment(at + 0.001, recorder.HANDED_OVER),
        Moment(at + 0.002, recorder.PREFILL_BEGAN),
        Moment(at + 0.5, recorder.PREFILL_ENDED),
        Moment(at + 0.51, recorder.FIRST_TOKEN),
    ]
    encode = [msgspec.structs.replace(moment, at=moment.at + ahead) for moment in encode]
    return [
        Told("encode", machines[0], 10.0 + ahead, 1_700_000_000.0, [Request(ROOM, encode)]),
        Told("language", machines[1], 10.0, 1_700_000_000.0, [Request(ROOM, language)]),
    ]


def story_of(told: Sequence[Told]) -> Story:
    story = tell(ROOM, told)
    assert story is not None
    return story


# ---- one clock


@pytest.mark.parametrize("seed", range(20))
def test_the_clocks_of_two_machines_are_as_far_apart_as_is_said(seed: int) -> None:
    dice = random.Random(seed)
    ahead = dice.uniform(-1e6, 1e6)
    delays = [dice.uniform(1e-5, 0.05) for _ in range(8)]
    clocks = story_of(halves(4, ahead, delays)).clocks
    assert clocks.uncertain is not None
    assert abs(-clocks.shift - ahead) <= clocks.uncertain + 1e-6
    assert clocks.uncertain <= (min(delays[::2]) + min(delays[1::2])) / 2 + 1e-6
    assert "lined up by 8 messages" in clocks.about


def test_a_message_that_was_lost_and_sent_again_bounds_the_clocks_all_the_same() -> None:
    told = halves(2, 5.0, [0.001, 0.002])
    noted = told[0].requests[0].moments
    (late,) = [n for n, moment in enumerate(noted) if moment.what == recorder.ASKED and moment.first_row == 0]
    noted[late] = msgspec.structs.replace(noted[late], at=noted[late].at + 1.0)
    clocks = story_of(told).clocks
    assert clocks.uncertain is not None
    assert abs(-clocks.shift - 5.0) <= clocks.uncertain


def test_on_one_machine_there_is_one_clock() -> None:
    clocks = story_of(halves(machines=("a", "a"))).clocks
    assert (clocks.shift, clocks.uncertain) == (0.0, 0.0)


def test_without_messages_each_clock_is_taken_at_its_word() -> None:
    told = halves(ahead=77.0)
    told[1].requests[0].moments[:] = told[1].requests[0].moments[:3]
    clocks = story_of(told).clocks
    assert clocks.uncertain is None
    assert clocks.shift == pytest.approx(-77.0)
    assert "each as its machine has it" in clocks.about


# ---- one story


def test_lanes_are_those_of_both_halves() -> None:
    lanes = {(lane.half, lane.name): lane for lane in story_of(halves(3)).lanes()}
    assert list(lanes) == [
        *(("encode", name) for name in ("preprocess", "wait", "tower", "chunk")),
        *(("language", name) for name in ("tokenize", "wait for blocks", "copy", "queue", "prefill")),
    ]
    assert lanes["encode", "chunk"].seconds == pytest.approx(0.012)
    assert lanes["encode", "tower"].seconds == pytest.approx(1.68)


def test_one_half_alone_is_told_and_the_other_one_missed() -> None:
    story = story_of(halves()[1:])
    assert story.first(recorder.COMPLETE) is not None
    assert story.missing == ["nothing of the encode half: no encode instance that was asked knows of this request"]


def test_a_process_that_does_not_answer_is_named() -> None:
    told = halves()
    told[0].silent = ["scheduler", "scheduler"]
    assert story_of(told).missing == ["the encode instance's scheduler did not answer"]


def test_of_several_instances_the_one_that_has_the_request_is_believed() -> None:
    refused = Told("encode", "c", 10.0, 1.0, [Request(ROOM, [Moment(1.0, recorder.RECEIVED)])])
    asked = [refused, *halves(), Told("encode", "d", 1.0, 1.0, [])]
    for in_order in (asked, asked[::-1]):
        assert story_of(in_order).first(recorder.SENT) is not None


def test_nobody_knows_of_it() -> None:
    assert tell(1, halves()) is None


# ---- in a terminal


@pytest.mark.parametrize("rounds", [1, 3, 40])
@pytest.mark.parametrize("plain", [False, True])
def test_80_columns(rounds: int, plain: bool) -> None:
    told = halves(rounds)
    told[1].requests[0].moments.append(Moment(3.0, recorder.FAILED, text="502: \x1b[31m" + "a long reason, " * 20))
    told[0].requests[0].moments.append(Moment(2.9, "what only another version notes, " * 4))
    lines = list(trace_text.lines(story_of(told), plain=plain))
    assert max(map(len, lines)) <= trace_text.WIDTH
    assert all(line.isprintable() for line in lines), "a reason may quote what moves the cursor"
    assert not plain or all(line.isascii() for line in lines)


def test_every_step_is_told() -> None:
    text = "\n".join(trace_text.lines(story_of(halves(2))))
    for said in (
        "32 rows in 2 rounds, 2,000 bytes; first token after 2,5",
        "request received",
        "prompt processed",
        "vision tower ends: 32 rows",
        "asked for rows from 16 on",
        "rows 0-15 written",
        "rows 0-15 copied",
        "resume: blocks for row 16 on",
        "all 32 rows are here",
        "handed over to SGLang",
        "prefill began",
        "first token",
    ):
        assert said in text


def test_rounds_in_the_middle_of_many_are_left_out_unless_asked_for() -> None:
    story = story_of(halves(40))
    short, long = ("\n".join(trace_text.lines(story, every_round=every)) for every in (False, True))
    copied = "rows {}-{} copied".format
    assert all(copied(16 * n, 16 * n + 15) in long for n in range(40))
    assert [n for n in range(40) if copied(16 * n, 16 * n + 15) in short] == [0, 1, 2, 39]
    assert short.count("--rounds shows all") == 1
    assert "--rounds" not in long


def test_rounds_that_were_not_noted_are_counted() -> None:
    told = halves(3)
    noted = told[1].requests[0].moments
    (at,) = [n for n, moment in enumerate(noted) if moment.what == recorder.COMPLETE]
    noted[at] = msgspec.structs.replace(noted[at], rounds=MOST_ROUNDS + 5)
    assert "the last 5 rounds were not noted one by one" in list(trace_text.lines(story_of(told)))


def test_a_chunk_that_never_ended_is_told_as_begun() -> None:
    told = halves(2)
    noted = told[0].requests[0].moments
    told[0].requests[0].moments = [m for m in noted if m.what != recorder.CHUNK_WRITTEN or m.first_row == 0]
    text = "\n".join(trace_text.lines(story_of(told)))
    assert "writes rows 16-31" in text
    assert "writes rows 0-15" not in text
    assert re.search(r"encode   chunk x2 .* ms\?", text)


def test_short_rounds_are_shown_again_larger() -> None:
    assert any("the rounds, from" in line for line in trace_text.lines(story_of(halves(3))))
    assert not any("the rounds, from" in line for line in trace_text.lines(story_of(halves(1))))


# ---- as a picture


def test_the_picture_is_svg_with_a_bar_for_each_span() -> None:
    story = story_of(halves(3))
    root = ElementTree.fromstring(trace_svg.drawn(story))
    bars = [one for one in root.iter(f"{SVG}rect") if one.get("class") != "page"]
    assert len(bars) == sum(len(lane.spans) for lane in (*story.lanes(), *story.rounds()))
    assert {bar.get("class") for bar in bars} == {"other", "wait", "tower", "chunk", "copy", "prefill"}
    assert len([one for one in root.iter(f"{SVG}path") if one.get("class") == "there"]) == 3
    assert len([one for one in root.iter(f"{SVG}path") if one.get("class") == "back"]) == 2, "the first is too early"
    assert "first token" in [one.text for one in root.iter(f"{SVG}text")]


def test_everything_in_the_picture_is_within_it() -> None:
    root = ElementTree.fromstring(trace_svg.drawn(story_of(halves(9))))
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for bar in root.iter(f"{SVG}rect"):
        x, y, wide, high = (float(bar.attrib[name]) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + wide <= width
        assert 0 <= y <= y + high <= height
    for text in root.iter(f"{SVG}text"):
        assert 0 <= float(text.attrib["x"]) <= width
        assert 0 <= float(text.attrib["y"]) <= height


def test_the_picture_has_nothing_that_runs() -> None:
    told = halves()
    told[0].requests[0].moments.append(Moment(3.0, recorder.FAILED, text="</text><script>alert(1)</script>"))
    root = ElementTree.fromstring(trace_svg.drawn(story_of(told), "<script>"))
    assert {one.tag for one in root.iter()} <= {
        f"{SVG}{tag}" for tag in ("svg", "style", "rect", "path", "text", "title")
    }


def test_the_picture_follows_a_dark_page() -> None:
    assert "prefers-color-scheme:dark" in trace_svg.drawn(story_of(halves()))


def test_the_picture_in_the_docs_is_one_that_would_be_drawn_now() -> None:
    """`scripts/demo --svg docs/plots/demo-timeline.svg` draws it anew."""
    kept = (REPO / "docs/plots/demo-timeline.svg").read_text()
    assert ElementTree.fromstring(kept).find(f"{SVG}style").text == trace_svg._STYLE  # type: ignore[union-attr]


@pytest.mark.parametrize("only", [0, 1])
def test_one_half_alone_is_drawn(only: int) -> None:
    ElementTree.fromstring(trace_svg.drawn(story_of([halves()[only]])))


def test_a_single_moment_is_drawn() -> None:
    told = Told("encode", "a", 1.0, 1.0, [Request(ROOM, [Moment(0.5, recorder.RECEIVED)])])
    story = story_of([told])
    ElementTree.fromstring(trace_svg.drawn(story))
    assert list(trace_text.lines(story))


# ---- the command


class Instance:
    """Answers as the call of an instance does. Who may ask is not reproduced: sglang_unit/test_tracing.py has that."""

    def __init__(self, told: Told | None = None, status: int = 200, body: str = "") -> None:
        instance = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                instance.asked.append((self.path, self.headers["Authorization"]))
                answer = instance.answer(parse_qs(urlsplit(self.path).query))
                self.send_response(instance.status)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: Any) -> None: ...

        self.told, self.status, self.body = told, status, body
        self.asked: list[tuple[str, str | None]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, query: dict[str, list[str]]) -> bytes:
        if self.told is None:
            return self.body.encode()
        wanted = [one for one in self.told.requests if "last" in query or str(one.room) in query["room"]]
        return msgspec.json.encode(
            Told(self.told.mode, self.told.machine, self.told.monotonic, self.told.wall, wanted, self.told.silent)
        )

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def instances() -> Iterator[list[Instance]]:
    made = [Instance(one) for one in halves()]
    yield made
    for instance in made:
        instance.close()


def urls(instances: Sequence[Instance]) -> list[str]:
    return [instance.url for instance in instances]


def test_one_request_by_its_room(instances: list[Instance], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", str(ROOM), *urls(instances)]) == 0
    said = capsys.readouterr()
    assert f"room {ROOM}" in said.out
    assert "48 rows in 3 rounds" in said.out
    assert said.err == ""
    assert instances[0].asked == [(f"/relay/trace?room={ROOM}", None)]


def test_the_latest_request(instances: list[Instance], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", "--last", "1", *(url.removeprefix("http://") for url in urls(instances))]) == 0
    assert f"room {ROOM}" in capsys.readouterr().out


def test_a_list_of_the_latest_has_a_line_for_each(
    instances: list[Instance], capsys: pytest.CaptureFixture[str]
) -> None:
    for instance in instances:
        assert instance.told is not None
        instance.told.requests.append(Request(5, [Moment(9.0, recorder.RECEIVED)]))
    assert cli.main(["trace", "--last", "2", *urls(instances)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert str(ROOM) in first
    assert " 5 " in second
    assert max(len(first), len(second)) <= 100


def test_the_key_comes_from_a_file(instances: list[Instance], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    assert cli.main(["trace", str(ROOM), *urls(instances), "--key-file", str(tmp_path / "key")]) == 0
    assert instances[1].asked == [(f"/relay/trace?room={ROOM}", "Bearer secret")]


def test_a_room_that_nobody_knows(instances: list[Instance], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", "8", *urls(instances)]) == 1
    said = capsys.readouterr().err
    assert "room 8 is not known to http://127.0.0.1:" in said
    assert "--last 10" in said


def test_json_for_scripts(instances: list[Instance], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", str(ROOM), *urls(instances), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["mode"] for one in told] == ["encode", "language"]


def test_the_picture_is_written(instances: list[Instance], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", str(ROOM), *urls(instances), "--svg", str(tmp_path / "a.svg")]) == 0
    ElementTree.parse(tmp_path / "a.svg")
    assert cli.main(["trace", str(ROOM), *urls(instances), "--svg", str(tmp_path / "absent" / "a.svg")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def test_the_demo_draws_what_both_instances_tell(instances: list[Instance], tmp_path: Path) -> None:
    draw(tmp_path / "a.svg", ROOM, urls(instances), "What became of it")
    assert "What became of it" in (tmp_path / "a.svg").read_text()
    with pytest.raises(LookupError, match="nobody has noted room 8"):
        draw(tmp_path / "a.svg", 8, urls(instances), "")


REFUSALS = {
    "no key": (401, '{"error": "Unauthorized"}', "--key-file"),
    "not from here": (403, '{"detail": "only this machine itself is answered"}', "only this machine itself"),
    "switched off": (404, '{"detail": "this instance notes nothing"}', "this instance notes nothing"),
    "another server": (404, '{"detail": "Not Found"}', "no encode or language instance"),
    "no server of ours": (404, "<html>", "no encode or language instance"),
    "ill": (500, "x\x1b[2J", "it answers 500"),
    "another version": (200, '{"mode": 1}', "no trace of this version"),
    "no JSON": (200, "hello", "no trace of this version"),
}


@pytest.mark.parametrize(("status", "body", "words"), REFUSALS.values(), ids=REFUSALS)
def test_an_instance_that_does_not_tell(
    status: int, body: str, words: str, instances: list[Instance], capsys: pytest.CaptureFixture[str]
) -> None:
    instances[0].told, instances[0].status, instances[0].body = None, status, body
    assert cli.main(["trace", str(ROOM), *urls(instances)]) == 0
    said = capsys.readouterr()
    assert words in said.err
    assert "\x1b" not in said.err
    assert "nothing of the encode half" in said.out
    assert cli.main(["trace", str(ROOM), instances[0].url]) == 2


def test_where_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", "7", "http://127.0.0.1:1"]) == 2
    assert "http://127.0.0.1:1: it cannot be reached (Connection refused)" in capsys.readouterr().err


WRONG = {
    "no room": (["http://a"], "name one room"),
    "two rooms": (["1", "2", "http://a"], "name one room"),
    "room and last": (["1", "http://a", "--last", "1"], "name one room"),
    "no instance": (["1"], "name the instances"),
    "a picture of many": (["--last", "2", "http://a", "--svg", "x"], "--svg draws one"),
    "a key for a router": (["1", "--router", "http://a", "--key-file", "x"], "the key would go"),
    "no key": (["1", "http://a", "--key-file", "/absent"], "No such file"),
}


@pytest.mark.parametrize(("arguments", "words"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-1", "51", "x", "10000000"])
def test_a_wrong_number_of_requests(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["trace", "--last", number, "http://a"])
    assert ended.value.code == 2
    assert "--last" in capsys.readouterr().err
