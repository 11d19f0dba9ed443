"""Processes stopped or killed at random moments: their requests end, all others are bit-exact, nothing leaks."""

from __future__ import annotations

import collections
import random
import time
from collections.abc import Iterator

import pytest
import torch

from embedding_relay.config import RelayConfig
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.protocol.status import Status
from embedding_relay.transport.language import MooncakeEmbeddingReceiver
from support.dying import LanguageProcess
from support.faults import ROUNDS, SEED, Offers, Traffic, stopped, unhurried, wait_for_bytes
from support.loopback import (
    ENDED,
    EncodeInstance,
    LanguageRank,
    assert_all_given_back,
    encode_instance,
    language_rank,
    settle,
    small_layout,
)
from support.planes import both_planes
from support.rooms import next_room
from support.rows import Spec

# Two seconds of silence: a process that is not stopped gets a word in, however busy the machine is.
QUICK = RelayConfig(bootstrap_timeout=20, waiting_timeout=20, heartbeat_interval=0.5, heartbeat_max_failures=3)
# One block at a time, thousands of rounds; and one write of 28 MiB that a stop hits in its middle.
ONE_BLOCK, WIDE = small_layout(hidden_size=512, blocks=2), small_layout(hidden_size=4096, blocks=32)


class Rounds:
    def __init__(self, layout: BufferLayout, language: LanguageRank, witness: EncodeInstance, offers: Offers) -> None:
        self.chance = random.Random(f"{SEED}/{layout.blocks}")
        self.layout = layout
        self.language = language
        self.witness = witness
        self.offers = offers
        self.traffic = Traffic(language, witness, self.chance, most_rows=600 if layout is WIDE else 3000)
        self.seen: collections.Counter[str] = collections.Counter()

    def begin(self, encode: EncodeInstance, on_sight: bool | None = None) -> Spec:
        """A request that is under way when the fault comes, or not yet, or not any more."""
        wide = self.layout is WIDE
        victim = Spec(next_room(), self.chance.choice([3584, 8000] if wide else [100, 5000, 40_000]))
        self.receivers = self.language.start(encode.peer, victim.room, hint_rows=3584 if wide else 128)
        encode.expect(victim)
        if on_sight or (on_sight is None and self.chance.random() < (0.75 if wide else 0.25)):
            wait_for_bytes(self.offers, self.receivers[victim.room])
        else:
            time.sleep(self.chance.uniform(0.0, 0.1))
        return victim

    def end(self, victim: Spec, fault: str) -> None:
        receiver, manager = self.receivers[victim.room], self.language.manager
        self.traffic.until(lambda: receiver.poll() in ENDED and not manager.pool.quarantined)
        if receiver.poll() is Status.SUCCESS:
            self.language.check(self.receivers, [victim])
        else:
            failure = receiver.failure()
            assert failure is not None
            assert failure.code == 502, failure
        self.seen[f"{fault}: {receiver.poll().name}"] += 1

    def stop(self, encode: EncodeInstance) -> None:
        victim = self.begin(encode)
        receiver = self.receivers[victim.room]
        is_short = self.chance.random() < 0.2
        with self.offers.frozen(receiver), stopped(encode):
            if is_short:
                time.sleep(self.chance.uniform(0.0, 0.3))
            else:
                self.others_go_on(receiver)
        self.end(victim, "stopped shortly" if is_short else "stopped")

    def stop_in_a_write(self, encode: EncodeInstance) -> bool:
        """Whether something landed when the writer went on: nobody else used the memory meanwhile."""
        victim = self.begin(encode, on_sight=True)
        receiver = self.receivers[victim.room]
        with self.offers.frozen(receiver), stopped(encode):
            self.others_go_on(receiver)
            before = self.offers.sample(victim.room)
        settle(self.language.manager.metrics, lambda _: not self.language.manager.pool.quarantined)
        landed = not torch.equal(before, self.offers.sample(victim.room))
        self.end(victim, "stopped in a write")
        return receiver.poll() is Status.FAILED and landed

    def others_go_on(self, receiver: MooncakeEmbeddingReceiver) -> None:
        """The writer is stopped: until the heartbeat has missed it, and on while its blocks are in quarantine."""
        self.traffic.until(lambda: receiver.poll() in ENDED)
        if receiver.poll() is Status.FAILED and self.offers.were_made_to(receiver.room):
            assert self.language.manager.pool.quarantined > 0
            self.traffic.until(lambda: True, at_least=5)
            assert self.language.manager.pool.quarantined > 0

    def kill_writer(self) -> None:
        with encode_instance(self.layout, QUICK) as mortal:
            victim = self.begin(mortal)
            mortal.kill()
            self.end(victim, "writer killed")

    def kill_reader(self) -> None:
        mortal = LanguageProcess(self.layout, QUICK, self.witness.peer, room := next_room(), rows=3584)
        self.witness.expect(Spec(room, self.chance.choice([3584, 8000, 40_000 if self.layout is ONE_BLOCK else 8000])))
        time.sleep(self.chance.uniform(0.0, 0.1))
        mortal.kill()
        self.traffic.until(lambda: room in self.witness.ask("ended"), at_least=1)
        self.seen[f"reader killed: {self.witness.end_of(room)[0].name}"] += 1


@pytest.fixture(autouse=True)
def on_a_plane(plane: str) -> None:
    """Before anything else of a test begins."""


@pytest.fixture(params=[ONE_BLOCK, WIDE], ids=["one block at a time", "28 MiB at a time"])
def layout(request: pytest.FixtureRequest) -> BufferLayout:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def writer(layout: BufferLayout) -> Iterator[EncodeInstance]:
    with encode_instance(layout, QUICK) as writer:
        yield writer


@pytest.fixture
def rounds(layout: BufferLayout, writer: EncodeInstance) -> Iterator[Rounds]:
    with (
        encode_instance(layout, QUICK) as witness,
        language_rank(layout, QUICK) as language,
        Offers(language) as offers,
    ):
        rounds = Rounds(layout, language, witness, offers)
        yield rounds
        print(f"RELAY_FAULT_SEED={SEED}: {dict(rounds.seen)}, {rounds.traffic.requests} other requests")
        assert not offers.violations, offers.violations
        assert_all_given_back(language, witness, writer)


@both_planes
@unhurried
def test_random_faults(rounds: Rounds, writer: EncodeInstance) -> None:
    for _ in range(ROUNDS):
        match rounds.chance.choices(["stop", "writer", "reader"], [4, 1, 1])[0]:
            case "stop":
                rounds.stop(writer)
            case "writer":
                rounds.kill_writer()
            case "reader":
                rounds.kill_reader()
        assert not rounds.offers.violations, rounds.offers.violations


@both_planes
@pytest.mark.parametrize("layout", [WIDE], ids=["28 MiB at a time"], indirect=True)
def test_a_writer_that_is_stopped_in_the_middle_of_a_write_finishes_it_in_quarantine(
    rounds: Rounds, writer: EncodeInstance
) -> None:
    """S3: what it has yet to write lands when it goes on, and never among somebody else's rows.

    The signal follows the first bytes, and may come when the last ones are there too: then it is sent another time.
    """
    assert any(rounds.stop_in_a_write(writer) for _ in range(20))
