"""One pass of the vision tower for several requests on a CPU, in which each keeps the bits that it has alone.

Two things in a tower depend on who else is in the pass. Matrices with more rows are multiplied in another order
(oneDNN, in bfloat16), and attention without kernels of an accelerator is over all rows at once, with a mask that hides
the others: its cost is the square of the whole. Here both are done request by request. What is left, and is most of the
time with small pictures, is done once for all: norms, activations, positions, and Python between them.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, Final

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

logger = logging.getLogger(__name__)

Encode = Callable[[list[Any]], torch.Tensor]
Function = Callable[..., Any]

_CONVOLUTIONS: Final = {"conv2d": 4, "conv3d": 5}
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
        is_compared = self._compared < _COMPARED
        rows, difference = None, ""
        try:
            # What SGLang compiles holds torch's functions fast; on this platform that changes no result.
            with (
                torch.compiler.set_stance("force_eager"),
                _EachRequestForItself(patches) as each,
                _Watch(each) if is_compared else contextlib.nullcontext(),
            ):
                rows = encode([item for items in requests for item in items])
            if each.passed_by:
                difference = f"it calls {' and '.join(sorted(each.passed_by))} in a way of its own"
        except Exception as error:  # by one of the requests, which fails alone as well, or by the pass in common
            difference = f"the pass failed ({type(error).__name__}: {error})"
        if rows is not None and not is_compared:
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


class _EachRequestForItself:
    """Meanwhile the functions that give a request other bits beside others treat each for itself.

    They are replaced where everybody finds them. A mode of torch would see them wherever they are called from, but all
    other functions too, and that takes as long as two pictures of the smallest size.
    """

    def __init__(self, patches: Sequence[int]) -> None:
        self._patches = patches
        self._own_masks: list[tuple[torch.Tensor, list[torch.Tensor]]] = []
        """Masks that hide the requests from each other, each with the masks of these: one is made for many layers."""
        self.plain: dict[str, Function] = {}
        self.is_inside = False
        """One of the plain functions was called by its replacement."""
        self.passed_by: set[str] = set()
        """Names of functions that were called without."""

    def __enter__(self) -> _EachRequestForItself:
        replacements = {"linear": self._linear, "scaled_dot_product_attention": self._attention}
        replacements |= {name: functools.partial(self._convolution, name) for name in _CONVOLUTIONS}
        for name, replacement in replacements.items():
            self.plain[name] = getattr(functional, name)
            setattr(functional, name, replacement)
        return self

    def __exit__(self, *_: object) -> None:
        for name, plain in self.plain.items():
            setattr(functional, name, plain)

    def _call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        self.is_inside = True
        try:
            return self.plain[name](*args, **kwargs)
        finally:
            self.is_inside = False

    def _linear(self, *args: Any, **kwargs: Any) -> Any:
        return self._by_rows("linear", range(args[0].ndim - 1) if args else (), args, kwargs)

    def _convolution(self, name: str, *args: Any, **kwargs: Any) -> Any:
        has_patches = args and args[0].ndim == _CONVOLUTIONS[name]
        return self._by_rows(name, range(1) if has_patches else (), args, kwargs)

    def _by_rows(self, name: str, leading: Iterable[int], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """`leading`: dimensions of the first argument whose entries are all treated alike, and apart."""
        for dimension in leading:
            if (lengths := self._lengths(args[0].shape[dimension])) is not None:
                parts = torch.split(args[0], lengths, dimension)
                return torch.cat([self._call(name, part, *args[1:], **kwargs) for part in parts], dimension)
        return self._call(name, *args, **kwargs)

    def _lengths(self, rows: int) -> list[int] | None:
        """Of each request, where there is a row for every patch, or one for so many patches."""
        total = sum(self._patches)
        if not len(self._patches) <= rows <= total or total % rows:
            return None
        merged = total // rows
        return None if any(one % merged for one in self._patches) else [one // merged for one in self._patches]

    def _attention(self, *args: Any, **kwargs: Any) -> Any:
        name, mask = "scaled_dot_product_attention", kwargs.get("attn_mask")
        is_over_all = len(args) == 3 and args[0].shape[-2] == sum(self._patches)
        if mask is None or not is_over_all or not (own_masks := self._masks_of_each(mask)):
            return self._call(name, *args, **kwargs)
        of_each = zip(*(torch.split(one, self._patches, dim=-2) for one in args), strict=True)
        outputs = [
            self._call(name, *parts, **kwargs | {"attn_mask": own})
            for parts, own in zip(of_each, own_masks, strict=True)
        ]
        return torch.cat(outputs, dim=-2)

    def _masks_of_each(self, mask: torch.Tensor) -> list[torch.Tensor]:
        """Empty if this one does not hide the requests from each other."""
        for seen, own in self._own_masks:
            if seen is mask:
                return own
        total = sum(self._patches)
        if mask.dtype is not torch.bool or mask.shape[-2:] != (total, total):
            return []
        spans = pairwise(accumulate(self._patches, initial=0))
        own = [mask[..., start:stop, start:stop] for start, stop in spans]
        if sum(int(one.count_nonzero()) for one in own) != int(mask.count_nonzero()):
            return []
        self._own_masks.append((mask, own))
        return own


class _Watch(TorchFunctionMode):  # type: ignore[misc]  # torch is left out of the type check
    """Sees a model that has taken one of the functions from elsewhere. Its bits might differ some day only."""

    def __init__(self, each: _EachRequestForItself) -> None:
        super().__init__()
        self._each = each
        self._names = {inspect.unwrap(plain): name for name, plain in each.plain.items()}

    def __torch_function__(self, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if not self._each.is_inside and (name := self._names.get(function)) is not None:
            self._each.passed_by.add(name)
        return function(*args, **(kwargs or {}))
