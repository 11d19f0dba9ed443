"""One pass of the vision tower for several requests on a CPU, in which each keeps the bits that it has alone.

Two things in a tower depend on who else is in the pass. Matrices with more rows are multiplied in another order
(oneDNN, in bfloat16), and attention without kernels of an accelerator is over all rows at once, with a mask that hides
the others: its cost is the square of the whole. Here both are done request by request. What is left, and is most of the
time with small pictures, is done once for all: norms, activations, positions, and Python between them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Final

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

logger = logging.getLogger(__name__)

Encode = Callable[[list[Any]], torch.Tensor]

_CONVOLUTIONS: Final = {functional.conv2d: 4, functional.conv3d: 5}
"""And how many dimensions their input has if the first of them is the patches."""

_COMPARED: Final = 4
"""So many passes in common are compared; if they were equal, the others are believed."""


class SharedPasses:
    """The passes of one tower. The first of them are compared with what each request has alone."""

    def __init__(self) -> None:
        self.are_equal = True
        """Until one was not. Then there is no pass in common any more."""
        self._compared = 0

    def encode(self, encode: Encode, requests: Sequence[list[Any]]) -> torch.Tensor:
        """The rows of all requests, whose items have patches as rows of `feature`."""
        patches = [sum(len(item.feature) for item in items) for items in requests]
        if len(requests) == 1:
            return encode(requests[0])
        if not self.are_equal:
            return torch.cat([encode(items) for items in requests])
        rows, difference = None, ""
        try:
            # What SGLang compiles would be compiled anew for every mode; on this platform that changes no result.
            with torch.compiler.set_stance("force_eager"), _EachRequestForItself(patches):
                rows = encode([item for items in requests for item in items])
        except Exception as error:  # by one of the requests, which fails alone as well, or by the pass in common
            difference = f"the pass failed ({type(error).__name__}: {error})"
        if rows is not None and self._compared == _COMPARED:
            return rows
        alone = torch.cat([encode(items) for items in requests])
        self._compared += 1
        if rows is not None and not torch.equal(rows, alone):
            most = float((rows.float() - alone.float()).abs().max())
            difference = f"their rows differed by up to {most:.2g} from those that each has alone"
        if difference:
            self.are_equal = False
            logger.warning(
                "the vision tower takes one request at a time from now on: with %d together, %s",
                *(len(requests), difference),
            )
        return alone


class _EachRequestForItself(TorchFunctionMode):  # type: ignore[misc]  # torch is left out of the type check
    def __init__(self, patches: Sequence[int]) -> None:
        super().__init__()
        self._patches = patches
        self._seen: torch.Tensor | None = None
        """The last mask that hides the requests from each other: one is made for many layers."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is functional.linear and args:
            return self._by_rows(function, range(args[0].ndim - 1), args, kwargs)
        if function in _CONVOLUTIONS and args and args[0].ndim == _CONVOLUTIONS[function]:
            return self._by_rows(function, range(1), args, kwargs)
        if function is functional.scaled_dot_product_attention and len(args) == 3:
            return self._attention(args, kwargs)
        return function(*args, **kwargs)

    def _by_rows(self, function: Any, leading: Iterable[int], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """`leading`: dimensions of the first argument whose entries are all treated alike, and apart."""
        rows, *rest = args
        for dimension in leading:
            if (lengths := self._lengths(rows.shape[dimension])) is not None:
                parts = torch.split(rows, lengths, dimension)
                return torch.cat([function(part, *rest, **kwargs) for part in parts], dimension)
        return function(*args, **kwargs)

    def _lengths(self, rows: int) -> list[int] | None:
        """Of each request, where there is a row for every patch, or one for so many patches."""
        total = sum(self._patches)
        if not len(self._patches) <= rows <= total or total % rows:
            return None
        merged = total // rows
        return None if any(one % merged for one in self._patches) else [one // merged for one in self._patches]

    def _attention(self, args: Sequence[torch.Tensor], kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("attn_mask")
        total = sum(self._patches)
        if mask is None or not self._hides_others(mask) or args[0].shape[-2] != total:
            return functional.scaled_dot_product_attention(*args, **kwargs)
        outputs = []
        for start, stop in pairwise(accumulate(self._patches, initial=0)):
            own = kwargs | {"attn_mask": mask[..., start:stop, start:stop]}
            outputs.append(functional.scaled_dot_product_attention(*(one[..., start:stop, :] for one in args), **own))
        return torch.cat(outputs, dim=-2)

    def _hides_others(self, mask: torch.Tensor) -> bool:
        if mask is self._seen:
            return True
        total = sum(self._patches)
        if mask.dtype is not torch.bool or mask.shape[-2:] != (total, total):
            return False
        spans = pairwise(accumulate(self._patches, initial=0))
        own = sum(int(mask[..., start:stop, start:stop].count_nonzero()) for start, stop in spans)
        if own != int(mask.count_nonzero()):
            return False
        self._seen = mask
        return True
