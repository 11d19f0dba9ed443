"""Small tensors on their way to the scheduler arrive as they were, and are no file."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sglang.srt.disaggregation.multimodal.small_tensors import SmallTensor, is_small, make_small
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, MultimodalProcessorOutput

MODE = "encode"
FILE = b"_load_from_bytes"
"""How torch has a tensor read again."""


def sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).reshape(2, 3),
        torch.arange(12).reshape(3, 4).T[1:, ::2],
        torch.tensor(True),
        torch.tensor(7, dtype=torch.int32),
        torch.linspace(0, 1, 24, dtype=torch.bfloat16).reshape(2, 3, 4)[..., 1],
        torch.tensor([float("nan"), -0.0, float("inf")]).expand(2, 3),
        torch.tensor([1 + 2j]).conj(),
        torch._neg_view(torch.tensor([1.0, 2.0])),
    ],
)
def test_what_arrives_is_the_tensor_and_plain(tensor: torch.Tensor) -> None:
    arrived = sent(tensor.as_subclass(SmallTensor))
    assert type(arrived) is torch.Tensor
    assert (arrived.dtype, arrived.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(torch.nan_to_num(arrived, nan=5.0), torch.nan_to_num(tensor, nan=5.0))
    arrived.zero_()  # it has memory of its own, to write to
    assert type(copied := copy.deepcopy(tensor.as_subclass(SmallTensor))) is torch.Tensor
    assert torch.equal(torch.nan_to_num(copied, nan=5.0), torch.nan_to_num(tensor, nan=5.0))


def test_what_cannot_be_told_by_its_bytes_goes_as_before() -> None:
    for other in (
        torch.zeros(2**18 + 1),
        torch.zeros(0, 3),
        torch.zeros(3, requires_grad=True),
        torch.zeros(3, device="meta"),
        torch.eye(3).to_sparse(),
        torch.nn.Parameter(torch.zeros(3), requires_grad=False),
        [1, 2],
        None,
    ):
        assert not is_small(other)
    assert is_small(torch.zeros(2**18))


def made() -> MultimodalProcessorOutput:
    item = MultimodalDataItem(
        modality=Modality.IMAGE,
        offsets=[(1, 4)],
        feature=torch.rand(16, 1176),
        model_specific_data={"image_grid_thw": torch.tensor([[1, 4, 4]]), "sizes": [4, 4]},
    )
    positions = torch.arange(18).reshape(3, 6)
    return MultimodalProcessorOutput(
        mm_items=[item], mrope_positions=positions, mrope_position_delta=torch.tensor([[-2]]), im_token_id=5
    )


def tensors(inputs: MultimodalProcessorOutput) -> Iterator[Any]:
    yield inputs.mrope_positions
    yield inputs.mrope_position_delta
    yield inputs.mm_items[0].image_grid_thw


def test_all_beside_the_pixels_go_so() -> None:
    inputs, before = made(), made()
    assert pickle.dumps(inputs, protocol=5).count(FILE)
    make_small(inputs)
    pixels, inputs.mm_items[0].feature = inputs.mm_items[0].feature, None
    assert type(pixels) is torch.Tensor
    assert not pickle.dumps(inputs, protocol=5).count(FILE)
    arrived = sent(inputs)
    for was, here, there in zip(tensors(before), tensors(inputs), tensors(arrived), strict=True):
        assert torch.equal(here, was)
        assert type(there) is torch.Tensor
        assert torch.equal(there, was)
    assert (arrived.im_token_id, arrived.mm_items[0].sizes, arrived.mm_items[0].offsets) == (5, [4, 4], [(1, 4)])
