"""The benchmark of repeated pictures asks so many at once, counts what moved, and compares what was asked the same."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support import servers
from support.repo import REPO


@pytest.fixture
def reuse(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "trace", None)  # Python has a module of that name
    del sys.modules["trace"]
    monkeypatch.syspath_prepend(REPO / "benchmark")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as it does itself, for good
    import reuse

    return reuse


def run(candidate: str, turn: int, rate: float, **more: Any) -> dict[str, Any]:
    every = {"reuse": 0.0, "failed": 0, "first_ms": [10.0], "shown": 3, "encoded": 3, "row_bytes": 5e6, "bytes": 6e6}
    return (
        {"candidate": candidate, "turn": turn, "requests_per_s": rate, "processor_s": 1.0, "others": 0.0} | every | more
    )


# ---- what is asked


def test_so_many_are_asked_at_once_and_all_of_them(reuse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    together, lengths = threading.Barrier(3, timeout=30), []

    def first_token(url: str, body: dict[str, Any]) -> tuple[int, int]:
        lengths.append(body["max_tokens"])
        together.wait()
        if body["max_tokens"] == 5:
            raise SystemExit("refused")
        return 1_000_000, 5_000_000

    monkeypatch.setattr(reuse.waterfall, "first_token", first_token)
    drawn = [reuse.workload.Request(0.0, (reuse.workload.Picture(0, 4),), 2, output) for output in range(6)]
    asked = reuse.ask_level("", drawn, 1, at_once=3)
    assert sorted(lengths) == list(range(6))
    assert (asked["first_ms"], asked["failed"], asked["shown"]) == ([4.0] * 5, 1, 6)
    assert asked["requests_per_s"] > 0


def test_a_picture_comes_again_behind_other_words_and_text_is_as_long(reuse: Any) -> None:
    def parts(kind: str, salt: int = 1) -> list[list[str]]:
        contents = [body["messages"][0]["content"] for body in reuse.bodies(kind, 2, salt)]
        return [[part.get("text") or part["image_url"]["url"] for part in content] for content in contents]

    first, again, text = (parts(kind) for kind in reuse.KINDS)
    assert [one[1] for one in first] == [one[1] for one in again]
    assert len({one[0] for one in (*first, *again, *text)}) == 6
    assert {one[1].count(reuse.FILLER.strip()) for one in text} == {reuse.SIDE**2 + 2}
    assert first[0][1] != first[1][1]
    assert parts(reuse.FIRST, salt=2)[0][1] != first[0][1]


def test_candidates_have_the_caches_that_the_page_says(reuse: Any, tmp_path: Path) -> None:
    made = {name: make(servers.options(tmp_path, tmp_path)) for name, make in reuse.SERVERS.items()}
    assert "--enable-prefix-mm-cache" in made[reuse.SPLIT]["encoder"].command
    names = {name: [member.name for member in cluster.members] for name, cluster in made.items()}
    assert names[reuse.TWO_ENCODE] == ["encode", "encode-1", "language"]
    assert names[reuse.PAIR] == names[reuse.NO_CACHE] == ["encode", "language"]
    two = made[reuse.TWO_ENCODE]
    assert {two["encode"].url, two["encode-1"].url} < set(two["language"].command)
    kept = {name: cluster["language"].environ.get("SGLANG_EMBEDDING_ROW_CACHE_BYTES") for name, cluster in made.items()}
    assert kept == dict.fromkeys(reuse.SERVERS) | {reuse.NO_CACHE: "0"}


def test_an_even_number_of_pictures_is_refused(reuse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["reuse.py", "--pictures", "8"])
    with pytest.raises(SystemExit):
        reuse.parsed()


# ---- what is counted


def test_what_moved_is_divided_into_rows_and_what_is_sent_for_each_row(
    reuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests of 30 tokens together, of which 20 are rows of pictures."""
    layout = reuse.BufferLayout(256, "bfloat16", 0, 128, 512)
    numbers = {
        "language": {"bytes_total": 30 * 32 + 2 * 64 + 20 * 512, "rows_total": 30, "requests_total{200}": 2},
        "encode": {"encoded_items_total": 3, "requests_total{200}": 1},
        "encode-1": {"encoded_items_total": 1, "requests_total{200}": 1},
    }
    cluster = reuse.LocalCluster("", [[SimpleNamespace(name=name) for name in numbers]])
    monkeypatch.setattr(reuse, "numbers_of", lambda server: numbers[server.name])
    counted = reuse.counts(cluster, layout)
    assert counted["row_bytes"] == 20 * 512
    assert (counted["encoded"], counted["asked 0"], counted["asked 1"]) == (4, 1, 1)


def test_of_the_split_what_its_cache_had_did_not_go_through_its_tower(
    reuse: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = {
        "sglang:encoder_mm_items_per_request_sum": 9.0,
        "sglang:encoder_mm_items_per_request_count": 4.0,
        "sglang:encoder_cache_hit_files_total": 2.0,
    }
    monkeypatch.setattr(reuse, "numbers_of", lambda server: numbers)
    assert reuse.counts_of(SimpleNamespace(name="encoder")) == (7.0, 4.0)


# ---- what is compared


def test_turns_are_compared_with_the_turn_that_had_the_same_requests(reuse: Any) -> None:
    runs = [run("split", 1, 2.0), run("split", 2, 8.0), run("pair", 1, 3.0), run("pair", 2, 8.0), run("pair", 3, 99.0)]
    shown = reuse.ratios(runs, "pair", "split", lambda one: one["requests_per_s"])
    assert shown == str(reuse.Figures.of([1.5, 1.0]))
    assert reuse.ratios(runs, "pair", "no row cache", lambda one: one["requests_per_s"]) == ""


def test_tables_say_whether_the_goals_are_reached(reuse: Any, capsys: pytest.CaptureFixture[str]) -> None:
    levels = [run("split", 1, 2.0, bytes=0), run("pair", 1, 3.0, **{"asked 0": 1}), run("no row cache", 1, 4.0)]
    kinds = [
        run(name, 1, 0, kind=kind, first_ms=[ms], encoded=0, row_bytes=0.0, bytes=sent, **{"asked 0": 4, "asked 1": 5})
        for name, sent in (("split", 0), ("pair", 700))
        for kind, ms in zip(reuse.KINDS, (100.0, 30.0, 20.0), strict=True)
    ]
    reuse.show({"levels": levels, "kinds": kinds}, 8)
    printed = capsys.readouterr().out
    assert "With 0 % again, a pair has 1.5 (1.5 to 1.5) times the split's requests per second (goal 1)." in printed
    assert "With 0 % again, the row cache makes the requests per second 0.75" in printed
    assert "| 0 % | not counted | 5.00 of 6.00 | 5.00 of 6.00 |" in printed
    assert "| 0.30 | 1.50 | 0 of 1 | 0 | 700 | 4 + 5 |" in printed
    assert "| 0.30 | 1.50 | 0 of 1 | not counted | not counted | 4 + 5 |" in printed
    assert "| 0 % | 0 of 1 | 1 of 1 | 0 of 1 |" in printed  # reached an encoder
    assert reuse.plot(levels, 8).count("<polyline") == 3


def test_what_was_asked_otherwise_is_not_added_to(reuse: Any, tmp_path: Path) -> None:
    asked = {"requests": 48, "shrink": 16, "at_once": 8}
    reuse.report.save(tmp_path, "reuse", {}, {"levels": [], "kinds": [], **asked})
    again = SimpleNamespace(add=True, out=tmp_path)
    assert reuse.earlier(again, asked)["levels"] == []
    with pytest.raises(SystemExit, match="--at-once 8"):
        reuse.earlier(again, asked | {"at_once": 4})
