"""What a scrape of either half would find after real transfers, and that at rest every table is seen to be empty."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import zmq
from prometheus_client import CollectorRegistry

from embedding_relay import metrics
from embedding_relay.config import RelayConfig
from embedding_relay.protocol.errors import Failure
from embedding_relay.protocol.messages import Address
from embedding_relay.protocol.status import Status
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer
from embedding_relay.transport.encode import EncodeManager, MooncakeEmbeddingSender
from embedding_relay.transport.language import LanguageManager, MooncakeEmbeddingReceiver
from embedding_relay.transport.manager import MooncakeEmbeddingManager
from support.loopback import ENDED, HOST, settle, small_layout
from support.rows import LIMITS, Spec, make_rows

BLOCK = 128
LAYOUT = small_layout(blocks=2, block_size=BLOCK)
CONFIG = RelayConfig(default_allocate_tokens=BLOCK)
ROOM, TOTAL = 1, 500
AT_REST = (
    *("rooms", "waiting_rooms", "followed_rooms", "open_requests", "transfers", "source_rooms"),
    *("leased_blocks", "quarantined_blocks", "quarantined_rooms", "unquiet_rooms"),
)


class Half:
    """A manager that is watched."""

    def __init__(self, mode: str, manager: MooncakeEmbeddingManager) -> None:
        self.manager = manager
        self._mode = mode
        self._registry = CollectorRegistry()
        manager.observer = metrics.RelayMetrics(mode, {}, self._registry)

    def value(self, name: str, **labels: str) -> float:
        return self._registry.get_sample_value(metrics.PREFIX + name, {"mode": self._mode, **labels}) or 0.0

    def values(self) -> dict[str, float]:
        return {name: self.value(name) for name in (*AT_REST, "free_blocks", "remembered_rooms")}

    def settle(self, rooms: int = 0) -> None:
        """So many have been counted and are over: pools full, tables empty."""

        def is_rest(now: dict[str, float]) -> bool:
            return (
                now["remembered_rooms"] == rooms and now["free_blocks"] == 2 and not any(now[name] for name in AT_REST)
            )

        settle(self.values, is_rest)

    def unpublished(self) -> set[str]:
        """Numbers that the manager has and no metric says."""
        known = {metric.source for metric in metrics.METRICS if self._mode in metric.modes}
        numbers = self.manager.metrics()
        unknown_events = {event.value for event in numbers.events if event not in metrics.EVENTS_ABOUT}
        return ({*numbers.sizes, *numbers.totals} - known) | unknown_events


class Pair:
    def __init__(self, encode: Half, language: Half, peer: str) -> None:
        self.encode, self.language = encode, language
        self._peer = peer

    def move(self, refusal: Failure | None = None) -> None:
        sender = MooncakeEmbeddingSender(self.encode.manager, ROOM)
        sender.init()
        receiver = MooncakeEmbeddingReceiver(self.language.manager, self._peer, ROOM)
        receiver.start()

        def ended() -> bool:
            if sender.poll() is Status.WAITING_FOR_INPUT:
                if refusal is None:
                    sender.send_embedding(make_rows(LAYOUT, Spec(ROOM, TOTAL)))
                else:
                    sender.refuse(refusal)
            return sender.poll() in ENDED and receiver.poll() in ENDED

        self._until(ended)
        for half in (self.encode, self.language):
            half.settle(rooms=1)

    def _until(self, condition: Callable[[], bool]) -> None:
        poller = zmq.Poller()
        managers = self.encode.manager, self.language.manager
        for manager in managers:
            poller.register(manager.wakeup_fd, zmq.POLLIN)
        while not condition():
            assert poller.poll(10_000), [manager.metrics() for manager in managers]
            for manager in managers:
                manager.drain_events()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ExitStack() as opened:
        registry = MooncakeEmbeddingBootstrapServer(HOST, 0)
        opened.callback(registry.close)
        registry.start()
        where = Address(HOST, registry.port)
        managers = (
            EncodeManager.open(LAYOUT, CONFIG, host=HOST, bootstrap=where),
            LanguageManager.open(LAYOUT, CONFIG, host=HOST, ranks=1, max_rows=10_000, limits=LIMITS),
        )
        encode, language = (Half(mode, manager) for mode, manager in zip(metrics.BOTH, managers, strict=True))
        for manager in managers:
            opened.callback(manager.close)
            manager.start()
        yield Pair(encode, language, str(where))


def test_rest_is_seen_before_anything_happens(pair: Pair) -> None:
    for half in (pair.encode, pair.language):
        half.settle()
        assert half.value("pool_blocks") == 2


def test_both_halves_count_the_same_transfer(pair: Pair) -> None:
    pair.move()
    for half in (pair.encode, pair.language):
        # One block at first, then never the last free one: four chunks for four blocks of rows.
        assert half.value("chunks_total") == half.value("request_rounds_sum") == 4
        assert half.value("rows_total") == half.value("request_rows_sum") == TOTAL
        assert half.value("bytes_total") == half.value("request_bytes_sum")
        assert half.value("requests_total", status_code="200") == half.value("wait_seconds_count") == 1
        assert half.value("connections") == 1
    assert pair.language.value("resumes_total") == 3
    assert pair.encode.value("workers") == pair.encode.value("sessions") == pair.language.value("peers") == 1


def test_both_halves_count_a_failure_under_its_code(pair: Pair) -> None:
    pair.move(refusal=Failure(400, "bad"))
    for half in (pair.encode, pair.language):
        assert half.value("requests_total", status_code="400") == 1
        assert half.value("requests_total", status_code="200") == half.value("request_rows_count") == 0


def test_every_number_of_a_manager_is_a_metric(pair: Pair) -> None:
    pair.move()
    assert pair.encode.unpublished() == pair.language.unpublished() == set()
