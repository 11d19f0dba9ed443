"""Which data-parallel rank takes a request, and which of the encode instance's is asked for its rows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from embedding_relay.protocol.errors import SettingError
from embedding_relay.protocol.messages import Address
from embedding_relay.registry.client import InstanceSizes
from sglang.srt.disaggregation.multimodal import dp_ranks, modes, server_settings
from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST
from sglang.srt.runtime_context import get_parallel
from support.tokenizing import IMAGE, TokenizerManagerWithoutScheduler, run

MODE = "language"

WHERE = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 9}


class Sizes:
    """Encode instances with two ranks each; `asked` has the registries in order."""

    def __init__(self) -> None:
        self.asked: list[Address] = []

    def known(self, registry: Address, now: float) -> int | None:
        return 2 if registry in self.asked else None

    def ask(self, registry: Address) -> int:
        self.asked.append(registry)
        return 2


@pytest.fixture(autouse=True)
def sizes(manager: TokenizerManagerWithoutScheduler, monkeypatch: pytest.MonkeyPatch) -> Sizes:
    manager.make_current()
    made = Sizes()
    monkeypatch.setattr(dp_ranks, "_sizes", lambda: made)
    return made


@pytest.fixture(params=[1, 3])
def size(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many ranks this instance has."""
    with get_parallel().override(num_dp_ranks=request.param):
        yield request.param


def with_picture(manager: TokenizerManagerWithoutScheduler, room: int | None, **more: Any) -> Any:
    return manager.prepare(text=IMAGE, image_data=["not looked at"], **WHERE, bootstrap_room=room, **more)


def test_all_samples_of_a_room_go_to_one_rank(manager: TokenizerManagerWithoutScheduler, size: int) -> None:
    routed = {with_picture(manager, 7).routed_dp_rank for _ in range(3)}
    assert routed == {7 % size if size > 1 else None}


def test_text_without_a_room_goes_where_sglang_sends_it(manager: TokenizerManagerWithoutScheduler, size: int) -> None:
    assert manager.prepare(text="hello").routed_dp_rank is None


@pytest.mark.parametrize("meant", [None, 1])
def test_health_requests_go_to_each_rank_in_turn_or_to_the_one_that_is_meant(
    manager: TokenizerManagerWithoutScheduler, size: int, meant: int | None
) -> None:
    where = {"bootstrap_host": FAKE_BOOTSTRAP_HOST, "bootstrap_room": 0}
    assert manager.prepare(text="hello", **where, routed_dp_rank=meant).routed_dp_rank == meant


def test_a_client_may_choose_the_language_rank(manager: TokenizerManagerWithoutScheduler) -> None:
    with get_parallel().override(num_dp_ranks=3):
        assert with_picture(manager, 7, routed_dp_rank=2).routed_dp_rank == 2


def test_the_encode_rank_follows_from_the_room(manager: TokenizerManagerWithoutScheduler, sizes: Sizes) -> None:
    assert [with_picture(manager, room).disagg_prefill_dp_rank for room in (6, 7)] == [0, 1]
    assert sizes.asked == [Address("127.0.0.1", 9)]


def test_a_client_does_not_choose_the_encode_rank(manager: TokenizerManagerWithoutScheduler) -> None:
    assert with_picture(manager, 6, disagg_prefill_dp_rank=1).disagg_prefill_dp_rank == 0


def test_nobody_is_asked_for_text(manager: TokenizerManagerWithoutScheduler, sizes: Sizes) -> None:
    manager.prepare(text="hello", **WHERE, bootstrap_room=7)
    assert sizes.asked == []


def test_at_the_encode_instance_the_room_alone_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "current", lambda: modes.ENCODE)
    fields = {"bootstrap_room": 7, "need_wait_for_mm_inputs": None, "bootstrap_host": "127.0.0.1"}
    said = SimpleNamespace(routed_dp_rank=2, disagg_prefill_dp_rank=5, **fields)
    with get_parallel().override(num_dp_ranks=3):
        run(dp_ranks.route(said))
    assert (said.routed_dp_rank, said.disagg_prefill_dp_rank) == (1, 0)


def test_what_is_known_of_an_instance_grows_old() -> None:
    sizes, registry = InstanceSizes(), Address("127.0.0.1", 9)
    assert sizes.known(registry, 0.0) is None
    assert sizes.ask(registry) == 1, "nobody answers there"
    (asked_at, _), *_ = sizes._known.values()
    assert sizes.known(registry, asked_at + 9.0) == 1
    assert sizes.known(registry, asked_at + 11.0) is None


def test_clients_that_name_many_registries_fill_no_memory() -> None:
    sizes = InstanceSizes()
    sizes._known = {Address("invented", port): (0.0, 1) for port in range(1, 1001)}
    sizes.ask(Address("127.0.0.1", 9))
    assert len(sizes._known) == 1000


def test_a_method_that_ends_the_controller_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = SimpleNamespace(load_balance_method="follow_bootstrap_room")
    monkeypatch.setattr(server_settings, "resolving_view", lambda _: asked)
    with pytest.raises(SettingError, match="--load-balance-method follow_bootstrap_room"):
        server_settings.settle_load_balancing(None)


def test_requests_that_arrive_together_ask_once(sizes: Sizes) -> None:
    async def together() -> list[int]:
        return await asyncio.gather(*(dp_ranks.of_encode_instance("127.0.0.1", 9, room) for room in range(4)))

    assert run(together()) == [0, 1, 0, 1]
    assert sizes.asked == [Address("127.0.0.1", 9)]
    assert dp_ranks._asking == {}
