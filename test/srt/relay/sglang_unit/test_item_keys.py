"""Which items have equal keys, and which must not: with SGLang's own items and a model of two parameters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sglang.srt.disaggregation.multimodal import media
from sglang.srt.disaggregation.multimodal.item_keys import ItemKeys, fingerprint
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalInputFormat

TENANT = {"extra_key": None, "cache_salt": None, "lora_id": None}


def picture(content: int = 7, modality: Any = Modality.IMAGE, offsets: Any = ((1, 4),), **more: Any) -> Any:
    item = MultimodalDataItem(modality=modality, offsets=list(offsets), feature=torch.zeros(4, 2))
    item.set_hash(content)
    item.model_specific_data.update(more)
    return item


def request(*items: Any, **tenant: Any) -> Any:
    return SimpleNamespace(multimodal_inputs=SimpleNamespace(mm_items=list(items)), **{**TENANT, **tenant})


def model(seed: int = 1) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 5000), torch.nn.Linear(2, 2, dtype=torch.bfloat16))


def keys(weights: Any = None, **facts: Any) -> ItemKeys:
    there = model() if weights is None else weights
    return ItemKeys(facts, lambda: fingerprint(there))


def test_the_same_picture_has_the_same_key_everywhere() -> None:
    grid = {"image_grid_thw": torch.tensor([[1, 2, 2]]), "extra": [1, 2.5, "x", None, b"y", {"z": np.arange(3)}]}
    here = keys(hidden=4).key(picture(**grid), request())
    there = keys(hidden=4).key(picture(offsets=((9, 10), (20, 21)), **grid), request())
    assert here == there
    assert len(here) == 32
    assert int(here, 16) > 0


DIFFERENT: Any = [
    (picture(8), {}),
    (picture(modality=Modality.VIDEO), {}),
    (picture(offsets=((1, 5),)), {}),
    (picture(image_grid_thw=torch.tensor([[1, 2, 2]])), {}),
    (picture(image_grid_thw=torch.tensor([[1, 4, 1]])), {}),
    (picture(image_grid_thw=torch.tensor([1, 4, 1])), {}),
    (picture(image_grid_thw=np.array([[1, 4, 1]])), {}),
    (picture(image_grid_thw=[[1, 4, 1]]), {}),
    (picture(image_grid_thw=[1, [4], 1]), {}),
    (picture(a="1"), {}),
    (picture(a=1), {}),
    (picture(a={"1": 1}), {}),
    (picture(), {"extra_key": "a"}),
    (picture(), {"extra_key": "b"}),
    (picture(), {"extra_key": ""}),
    (picture(), {"cache_salt": "a"}),
    (picture(), {"lora_id": "a"}),
]


def test_whatever_tells_items_or_their_tenants_apart_tells_their_keys_apart() -> None:
    made = keys()
    found = {made.key(item, request(**tenant)) for item, tenant in [(picture(), {}), *DIFFERENT]}
    assert "" not in found
    assert len(found) == 1 + len(DIFFERENT)


def test_models_differ_by_their_facts_and_by_any_weight() -> None:
    changed = model()
    with torch.no_grad():
        changed[1].bias[1] += 1
    found = {
        made.key(picture(), request()) for made in (keys(), keys(width=1), keys(width=2), keys(model(2)), keys(changed))
    }
    assert len(found) == 5
    assert keys(model(1)).key(picture(), request()) in found


def test_parameters_without_memory_do_not_count() -> None:
    with_other_half = model()
    with_other_half.append(torch.nn.Linear(2, 2, device="meta"))
    assert fingerprint(with_other_half) == fingerprint(model())
    with_other_half.append(torch.nn.LazyLinear(2))
    assert fingerprint(with_other_half) == fingerprint(model())


def test_new_weights_make_new_keys() -> None:
    there = model()
    made = keys(there)
    made.renew()  # nobody has asked for a key yet: nothing is known that could have changed
    before = made.key(picture(), request())
    assert before == keys().key(picture(), request())
    with torch.no_grad():
        there[0].bias.fill_(0)
    assert made.key(picture(), request()) == before, "nobody has said so yet"
    made.renew()
    after = made.key(picture(), request())
    assert after == keys(there).key(picture(), request()) != before


def test_weights_that_look_the_same_may_be_others_all_the_same() -> None:
    made = keys()
    found = {made.key(picture(), request())}
    for _ in range(3):
        made.renew()
        found.add(made.key(picture(), request()))
    assert len(found) == 4


def _without_hash() -> Any:
    item = picture()
    item.hash = None
    return item


def _precomputed() -> Any:
    item = picture()
    item.precomputed_embeddings = torch.zeros(4, 2)
    return item


def _declared() -> Any:
    item = picture()
    item.format = MultimodalInputFormat.PRECOMPUTED_EMBEDDING
    return item


@pytest.mark.parametrize(
    "item",
    [
        _without_hash(),
        _precomputed(),
        _declared(),
        picture(what=object()),
        picture(what=[object()]),
        picture(what=torch.zeros(3 << 20, dtype=torch.int16)),
        picture(what=[torch.zeros(3 << 20, dtype=torch.uint8)] * 2),
    ],
)
def test_what_nobody_can_compare_has_no_key(item: Any) -> None:
    assert keys().key(item, request()) == ""


def test_how_pixels_came_is_no_part_of_them() -> None:
    assert keys().key(picture(_sglang_retained_proxy=object()), request()) == keys().key(picture(), request())


def test_the_items_of_a_request_are_told_in_order() -> None:
    made, first, second = keys(), picture(1, offsets=((3, 4), (8, 8))), picture(2, offsets=((5, 6),))
    items = media.manifest_items(request(first, second), made)
    assert [item.runs for item in items] == [((3, 5), (8, 9)), ((5, 7),)]
    assert [item.key for item in items] == [made.key(one, request()) for one in (first, second)]
    assert media.manifest_items(request(first, picture(offsets=())), made) == ()
