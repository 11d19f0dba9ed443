"""What a processor says about media beside their pixels (sizes, positions), on its way to the scheduler.

torch pickles a tensor as a file with its storage in it, and reads that file again. For tensors of a few hundred bytes,
of which a request has several, that takes twenty times as long as their bytes do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

_LARGEST: Final = 2**20
"""In bytes: two copies more, which the file of a larger tensor is worth."""


class SmallTensor(torch.Tensor):  # type: ignore[misc]  # torch is left out of the type check
    """To everybody the tensor that it was; whoever unpickles it gets a plain one."""

    def __deepcopy__(self, memo: Any) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., torch.Tensor], tuple[bytes, torch.dtype, list[int]]]:
        plain = self.as_subclass(torch.Tensor).resolve_conj().resolve_neg().contiguous()
        return _tensor, (plain.reshape(-1).view(torch.uint8).numpy().tobytes(), plain.dtype, list(plain.shape))


def _tensor(held: bytes, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    return torch.frombuffer(bytearray(held), dtype=dtype).reshape(shape)


def make_small(inputs: Any) -> None:
    """All that go with these inputs of the model, but for the pixels themselves, which do not go this way."""
    for name in inputs.__struct_fields__:
        if is_small(value := getattr(inputs, name)):
            setattr(inputs, name, value.as_subclass(SmallTensor))
    for item in inputs.mm_items:
        for name, value in item.model_specific_data.items():
            if is_small(value):
                item.model_specific_data[name] = value.as_subclass(SmallTensor)


def is_small(value: Any) -> bool:
    """A subclass may hold more than its bytes; so does a tensor that wants a gradient or lies elsewhere."""
    return (
        type(value) is torch.Tensor
        and value.layout is torch.strided
        and value.is_cpu
        and not value.requires_grad
        and 0 < value.nbytes <= _LARGEST
    )
