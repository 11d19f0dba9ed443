"""The verdict of a soak: each kind of growth is named, memory that only moves is not, and right is told from wrong."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from embedding_relay import metrics
from embedding_relay.tools.chat_client import Answer
from stress.growth import HALVES, KEPT, MIB, Holding, Moment, Verdict, growth
from stress.traffic import TOLERANCE, Disturbances, Prompt, WrongAnswer, distance
from support.server_numbers import EMPTY_AT_REST

ALLOWED = 8.0
HELD = Holding(memory=1000 * MIB, descriptors=50, threads=20)
IDLE = {"pool_blocks": 12.0, "free_blocks": 12.0, "remembered_rooms": 10.0, "requests_total{200}": 10.0}
ONLY_LANGUAGE = {"request_rounds_bucket{1.0}": 0.0}


def moment(at: float, held: Holding = HELD, **numbers: float) -> Moment:
    return Moment(at, {"encode scheduler": held}, {half: {**IDLE, **ONLY_LANGUAGE, **numbers} for half in HALVES})


def problems(last: Moment, memory: Mapping[float, float] | None = None) -> list[str]:
    """`memory`: MiB on top at times."""
    samples = [
        moment(at, HELD._replace(memory=int(HELD.memory + more * MIB))) for at, more in (memory or LEVEL).items()
    ]
    return Verdict(moment(0.0), last, samples, ALLOWED).problems()


LEVEL = {float(at): 0.0 for at in range(1, 100)}
END = 101.0


def test_nothing_grew() -> None:
    assert problems(moment(END)) == []


@pytest.mark.parametrize("what", ["descriptors", "threads"])
def test_one_more_is_named(what: str) -> None:
    held = HELD._replace(**{what: getattr(HELD, what) + 1})
    (problem,) = problems(moment(END, held))
    assert what in problem
    assert "encode scheduler" in problem


@pytest.mark.parametrize("table", [*EMPTY_AT_REST, *KEPT])
def test_an_entry_that_stayed_is_named(table: str) -> None:
    found = problems(moment(END, **{table: IDLE.get(table, 0.0) + 1}))
    assert found
    assert all(table in problem or "free_blocks" in problem for problem in found)


def test_a_block_that_stayed_is_named() -> None:
    assert problems(moment(END, free_blocks=11.0)) == [
        f"at rest after: {half}: free_blocks 11 of 12" for half in HALVES
    ]


@pytest.mark.parametrize(("remembered", "is_right"), [(30.0, True), (31.0, False)])
def test_rooms_are_remembered_for_ten_minutes(remembered: float, is_right: bool) -> None:
    """A hundred had ended ten minutes ago, thirty more have since."""
    samples = [moment(float(at), **{"requests_total{200}": 100.0}) for at in range(100)]
    last = moment(END + 600, remembered_rooms=remembered, **{"requests_total{200}": 120.0, "requests_total{502}": 10.0})
    assert (Verdict(moment(0.0), last, samples, ALLOWED).problems() == []) is is_right


def test_a_pool_that_nobody_has_to_wait_for_is_no_test() -> None:
    assert "one round" in problems(moment(END, **{"request_rounds_bucket{1.0}": 3.0}))[0]


# ---- memory


def test_a_leak_is_named() -> None:
    (problem,) = problems(moment(END), {at: at * 0.3 for at in LEVEL})
    assert "encode scheduler: memory grew by 14." in problem


def test_a_leak_below_noise_is_named_too() -> None:
    dice = random.Random(1)
    (problem,) = problems(moment(END), {at: at * 0.5 + dice.uniform(-5, 5) for at in LEVEL})
    assert "memory grew" in problem


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_leak(seed: int) -> None:
    dice = random.Random(seed)
    assert problems(moment(END), {at: dice.choice([0.0, 40.0]) for at in LEVEL}) == []


def test_what_the_first_half_took_is_no_leak() -> None:
    assert problems(moment(END), {at: min(at, 45.0) * 5 for at in LEVEL}) == []


def test_a_straight_line_is_certain() -> None:
    line = growth([(float(at), 3.0 * at) for at in range(11)])
    assert line.rise == pytest.approx(30.0)
    assert line.certain == pytest.approx(30.0)


def test_steps_are_less_certain_than_scatter_of_their_size() -> None:
    """Neighbours that move together say less than as many that do not."""
    steps = growth([(float(at), float(at // 10 % 2)) for at in range(60)])
    scatter = growth([(float(at), float(at % 2)) for at in range(60)])
    assert steps.uncertainty > 2 * scatter.uncertainty


# ---- answers

KNOWN = Prompt("image-1", {}, rows=90, tokens=[("a", -1.0), ("b", -2.0)])


def answer(*tokens: tuple[str, float], rows: int = 90) -> Answer:
    content = [{"token": token, "logprob": logprob} for token, logprob in tokens]
    return Answer(200, {"usage": {"prompt_tokens": rows}, "choices": [{"logprobs": {"content": content}}]}, 0.1)


def test_the_known_answer_is_right() -> None:
    KNOWN.check(answer(("a", -1.0 + TOLERANCE / 2), ("b", -2.0)))


@pytest.mark.parametrize(
    "wrong",
    [
        answer(("a", -1.0), ("b", -2.0), rows=91),
        answer(("a", -1.0), ("c", -2.0)),
        answer(("a", -1.0)),
        answer(),
        answer(("a", -1.0 + 2 * TOLERANCE), ("b", -2.0)),
    ],
)
def test_another_answer_is_wrong(wrong: Answer) -> None:
    with pytest.raises(WrongAnswer, match="image-1"):
        KNOWN.check(wrong)


def test_every_sample_is_looked_at() -> None:
    both = answer(("a", -1.0), ("b", -2.0))
    both.body["choices"] += answer(("a", -1.0), ("z", -2.0)).body["choices"]
    with pytest.raises(WrongAnswer):
        KNOWN.check(both)


def test_no_tokens_are_near_none() -> None:
    assert distance([], []) == float("inf")


def test_a_fault_excuses_what_meets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("stress.traffic.time.monotonic", lambda: next(clock))
    disturbances = Disturbances()
    with disturbances.span():
        assert disturbances.met(began=99.0)
        assert disturbances.met(began=105.0)
    assert disturbances.met(began=110.0 + Disturbances.AFTERWARDS - 0.1)
    assert not disturbances.met(began=110.0 + Disturbances.AFTERWARDS + 0.1)


def test_the_tables_are_metrics() -> None:
    exist = {metric.name for metric in metrics.METRICS}
    assert {name for name in (*EMPTY_AT_REST, *KEPT) if not name.startswith("sglang:")} <= exist
