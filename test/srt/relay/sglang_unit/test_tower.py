"""The vision tower: which requests go through it together, and whose rows come out where.

The model is a stand-in whose rows say which item they are of; SGLang's batching and its cache of rows by hash are real.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Final

import pytest
import torch

from sglang.srt.disaggregation.multimodal.tower import VisionTower, release_pixels
from sglang.srt.managers.mm_utils import init_mm_embedding_cache
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem

MODE = "encode"
pytestmark = pytest.mark.usefixtures("mode", "empty_cache")


class Model:
    """A row is (hash of its item, position in its item); `batches` has the hashes of every call.

    After a pass for several requests each of them follows alone, because the first such passes are compared.
    """

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.forgotten_rows = 0

    def get_video_feature(self, items: list[Any]) -> torch.Tensor:
        return self.get_image_feature(items)

    def get_image_feature(self, items: list[Any]) -> torch.Tensor:
        self.batches.append([item.hash for item in items])
        rows = [torch.tensor([float(item.hash), at]) for item in items for at in range(rows_of(item))]
        return torch.stack(rows[: len(rows) - self.forgotten_rows])


def rows_of(item: Any) -> int:
    return sum(end - start + 1 for start, end in item.offsets)


def item(number: int, *offsets: tuple[int, int], modality: Modality = Modality.IMAGE) -> Any:
    made = MultimodalDataItem(modality=modality, offsets=list(offsets), feature=torch.zeros(1, 1))
    made.set_hash(number)
    return made


def request(*items: Any) -> list[Any]:
    """What goes through the tower of a request."""
    return list(items)


@pytest.fixture
def empty_cache() -> None:
    init_mm_embedding_cache(1 << 20)


@pytest.fixture
def model() -> Model:
    return Model()


def numbers(rows: list[torch.Tensor]) -> list[list[tuple[float, ...]]]:
    return [[tuple(row) for row in one.tolist()] for one in rows]


def test_every_item_of_every_request_gets_its_own_rows_in_one_call(model: Model) -> None:
    first, second = request(item(11, (1, 2)), item(12, (5, 5))), request(item(13, (0, 3)))
    rows = VisionTower(model, "cpu", 100).encode([first, second])
    assert [numbers(one) for one in rows] == [
        [[(11, 0), (11, 1)], [(12, 0)]],
        [[(13, 0), (13, 1), (13, 2), (13, 3)]],
    ]
    assert model.batches == [[11, 12, 13], [11, 12], [13]]


def test_an_item_in_several_places_of_a_prompt_is_one_item(model: Model) -> None:
    [[rows]] = VisionTower(model, "cpu", 100).encode([request(item(21, (1, 2), (7, 9)))])
    assert numbers([rows]) == [[(21, 0), (21, 1), (21, 2), (21, 3), (21, 4)]]


def test_the_videos_of_a_request_go_through_the_tower_together(model: Model) -> None:
    """As in an undivided server: SGLang takes items of several places apart from those of other requests."""
    film = [item(number, (at, at + 1), (at + 4, at + 4), modality=Modality.VIDEO) for number, at in ((25, 1), (26, 8))]
    rows = VisionTower(model, "cpu", 100).encode([request(item(27, (0, 0)), *film), request(item(28, (2, 2)))])
    assert [numbers(one) for one in rows] == [
        [[(27, 0)], [(25, 0), (25, 1), (25, 2)], [(26, 0), (26, 1), (26, 2)]],
        [[(28, 0)]],
    ]
    assert sorted(model.batches) == [[25, 26], [27], [27, 28], [28]]


def test_an_item_that_came_with_its_rows_needs_no_tower(model: Model) -> None:
    given = item(22, (3, 4))
    given.feature, given.precomputed_embeddings = None, torch.tensor([[0.5, 1.5], [2.5, 3.5]])
    rows = VisionTower(model, "cpu", 100).encode([request(item(23, (1, 1)), given), request(item(24, (0, 0)))])
    assert [numbers(one) for one in rows] == [[[(23, 0)], [(0.5, 1.5), (2.5, 3.5)]], [[(24, 0)]]]
    assert model.batches == [[23, 24], [23], [24]]
    model.batches.clear()
    [[alone]] = VisionTower(model, "cpu", 100).encode([request(given)])
    assert torch.equal(alone, given.precomputed_embeddings)
    assert model.batches == []


def test_a_picture_that_was_seen_is_not_encoded_again(model: Model) -> None:
    tower = VisionTower(model, "cpu", 100)
    tower.encode([request(item(31, (0, 1)))])
    [[again, other]] = tower.encode([request(item(31, (4, 5)), item(32, (6, 6)))])
    assert numbers([again, other]) == [[(31, 0), (31, 1)], [(32, 0)]]
    assert model.batches == [[31], [32]]


def test_rows_of_one_request_do_not_keep_the_batch_in_memory(model: Model) -> None:
    rows = VisionTower(model, "cpu", 100).encode([request(item(40 + n, (0, 3))) for n in range(4)])
    for [one] in rows:
        assert one.untyped_storage().nbytes() == one.nbytes


def test_a_tower_that_makes_too_few_rows_is_not_believed(model: Model) -> None:
    model.forgotten_rows = 1
    with pytest.raises(RuntimeError):
        VisionTower(model, "cpu", 100).encode([request(item(51, (0, 3)), item(52, (5, 6)))])


def test_a_modality_that_the_model_lacks_is_named(model: Model) -> None:
    with pytest.raises(RuntimeError, match="Model has no get_audio_feature"):
        VisionTower(model, "cpu", 100).encode([request(item(61, (0, 1), modality=Modality.AUDIO))])


@pytest.mark.parametrize(
    ("budget", "sizes", "together"), [(1, [4, 4], 1), (8, [4, 4, 1], 2), (9, [4, 4, 1], 3), (3, [9, 1], 1)]
)
def test_a_batch_is_the_longest_beginning_of_the_queue_within_the_budget(
    model: Model, budget: int, sizes: list[int], together: int
) -> None:
    queue = [request(item(70 + n, (0, size - 1))) for n, size in enumerate(sizes)]
    assert VisionTower(model, "cpu", budget).next_batch(queue) == queue[:together]


@pytest.mark.parametrize(
    ("tokens", "sizes", "count"),
    [(None, [9, 9], 2), (4, [4, 1], 1), (4, [3, 1, 1], 2), (4, [9, 1], 1), (4, [1, 1], 2), (4, [3, 9, 1], 2)],
)
def test_a_group_of_a_request_is_as_many_items_as_have_the_tokens_that_a_pass_wants(
    model: Model, tokens: int | None, sizes: list[int], count: int
) -> None:
    items = [item(90 + number, (0, size - 1)) for number, size in enumerate(sizes)]
    assert VisionTower(model, "cpu", 1, group_tokens=tokens).group(items) == count


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 128), ("cuda", 2048)])
def test_a_request_is_divided_only_if_its_rows_shall_travel_as_they_are_made(device: str, tokens: int) -> None:
    worker = SimpleNamespace(model_runner=SimpleNamespace(model=Outer()))
    config = SimpleNamespace(hidden_size=8)
    scheduler = SimpleNamespace(device=device, tp_worker=worker, model_config=config, tp_size=1)
    assert VisionTower.of(scheduler).group_tokens is None
    assert VisionTower.of(scheduler, progressive=True).group_tokens == tokens


def test_no_more_is_looked_at_than_one_group_beyond_the_batch(model: Model) -> None:
    looked_at = []

    def groups() -> Any:
        for number in range(9):
            looked_at.append(number)
            yield request(item(95, (0, 1)))

    assert len(VisionTower(model, "cuda", 4).next_batch(groups())) == 2
    assert looked_at == [0, 1, 2]


def test_pixels_of_some_items_are_let_go_and_those_of_others_stay() -> None:
    items = [item(96, (0, 1)), item(97, (2, 3))]
    release_pixels(items[:1])
    assert [one.feature is None for one in items] == [True, False]


def test_on_a_cpu_a_pass_is_shared_by_pictures_whose_features_are_a_row_for_each_patch(model: Model) -> None:
    patches, tiles, sound = item(74, (0, 1)), item(75, (0, 1)), item(76, (0, 1), modality=Modality.AUDIO)
    tiles.feature = torch.zeros(1, 3, 4, 4)
    tower = VisionTower(model, "cpu", 100)
    for other in (tiles, sound):
        for queue in ([request(patches), request(other)], [request(other), request(patches)]):
            assert tower.next_batch(queue) == queue[:1]
            assert VisionTower(model, "cuda", 100).next_batch(queue) == queue


def test_a_tower_that_mixes_requests_gets_one_at_a_time(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    queue = [request(item(number, (0, 1))) for number in (77, 78)]
    tower = VisionTower(model, "cpu", 100)
    assert tower.next_batch(queue) == queue
    encode = model.get_image_feature
    monkeypatch.setattr(model, "get_image_feature", lambda items: encode(items) + len(items))
    rows = tower.encode(queue)
    assert [numbers(one) for one in rows] == [[[(78, 1), (78, 2)]], [[(79, 1), (79, 2)]]], "as each would be alone"
    assert tower.next_batch(queue) == queue[:1]


@pytest.mark.parametrize(("ranks", "together"), [(1, 2), (2, 1)])
def test_the_ranks_of_an_instance_make_the_same_passes(ranks: int, together: int) -> None:
    worker = SimpleNamespace(model_runner=SimpleNamespace(model=Outer()))
    config = SimpleNamespace(hidden_size=8)
    tower = VisionTower.of(SimpleNamespace(device="cpu", tp_worker=worker, model_config=config, tp_size=ranks))
    queue = [request(item(79, (0, 1))), request(item(80, (0, 1)))]
    assert tower.next_batch(queue) == queue[:together]


def test_rows_that_are_narrower_than_those_that_travel_are_filled_up(model: Model) -> None:
    [[rows]] = VisionTower(model, "cpu", 100, width=5).encode([request(item(71, (0, 1)))])
    assert numbers([rows]) == [[(71, 0, 0, 0, 0), (71, 1, 0, 0, 0)]]
    given = item(72, (0, 0))
    given.precomputed_embeddings = torch.tensor([[5.0, 5.0]])
    [[rows]] = VisionTower(model, "cpu", 100, width=3).encode([request(given)])
    assert numbers([rows]) == [[(5, 5, 0)]]


def test_what_was_encoded_is_not_encoded_again_and_counted_as_such(model: Model) -> None:
    tower = VisionTower(model, "cpu", 100)
    tower.encode([request(item(81, (0, 1)), item(82, (2, 3)))])
    tower.encode([request(item(82, (4, 5)), item(83, (0, 1)))])
    assert model.batches == [[81, 82], [83]]
    assert tower.totals == {"media_items": 4, "encoded_items": 3, "left_out_items": 0}


class Thinker(torch.nn.Module):
    get_image_feature = Model.get_image_feature
    use_deepstack: Final = {Modality.IMAGE: True}
    deepstack_visual_indexes: Final = (3, 5)

    def forward(self) -> None: ...


class Outer(torch.nn.Module):
    """As SGLang's Qwen3-Omni."""

    def __init__(self) -> None:
        super().__init__()
        self.thinker = Thinker()
        self.forward = self.thinker.forward


def test_the_getters_may_be_one_level_down() -> None:
    outer = Outer()
    worker = SimpleNamespace(model_runner=SimpleNamespace(model=outer))
    config = SimpleNamespace(hidden_size=8)
    tower = VisionTower.of(SimpleNamespace(device="cpu", tp_worker=worker, model_config=config, tp_size=1))
    assert (tower.model, tower.name, tower.width) == (outer.thinker, "Thinker", 24)
