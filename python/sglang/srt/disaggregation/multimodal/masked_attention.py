"""A tower's attention on a CPU: the bits of torch's own in a third of the time, with a part of the memory.

SGLang hides the windows and the pictures of a pass from each other by a mask for which torch has no kernel. It goes
step by step then, over all rows by all rows, in float32: a product, the mask, a softmax, a product. Between them it
looks for rows that see nothing, at all weights and in each layer, and what each step makes is new memory. Here the
products and the softmax are torch's as well, in the same shapes, so their bits are the same. But whether a mask hides a
row is asked once, of the mask; and what was made is made anew in the same place.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch.nn import functional

logger = logging.getLogger(__name__)

_NAME: Final = "scaled_dot_product_attention"
_PLAIN: Final[Mapping[str, Any]] = {"dropout_p": 0.0, "is_causal": False, "enable_gqa": False}
_TYPES: Final = (torch.bfloat16, torch.float16, torch.float32)

_WEIGHTS_AT_ONCE: Final = 4 << 20
"""Of as many heads; a single one may have more."""

_MASKS_KEPT: Final = 2
"""A tower has one for its windows and one for its pictures, and gives each to many layers. Small ones are kept besides:
in a pass for several requests each has its own."""


class _Mask(NamedTuple):
    given: torch.Tensor
    added: torch.Tensor | None
    """To the weights; None if it hides nothing."""
    hides_a_row: bool


class MaskedAttention:
    """Of one tower. As long as one is `with` it, torch's function is replaced where everybody finds it.

    The first call of each kind is made in both ways. If their bits differ, all others are torch's own.
    """

    def __init__(self) -> None:
        self.is_equal = True
        self._plain: Callable[..., torch.Tensor] = getattr(functional, _NAME)
        self._replacement = functools.update_wrapper(functools.partial(self._attention), self._plain)
        self._compared: set[tuple[object, ...]] = set()
        self._masks: deque[_Mask] = deque()
        self._weights = torch.empty(0)

    def __enter__(self) -> None:
        setattr(functional, _NAME, self._replacement)

    def __exit__(self, *_: object) -> None:
        setattr(functional, _NAME, self._plain)
        self._masks.clear()
        self._weights = torch.empty(0)

    def _attention(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.is_equal or not _is_step_by_step(args, kwargs):
            return self._plain(*args, **kwargs)
        mask = self._look_at(kwargs["attn_mask"])
        if mask.hides_a_row:  # whose softmax has no numbers, where torch gives zeros
            return self._plain(*args, **kwargs)
        query, key, value = args
        _, heads, rows, width = query.shape
        outputs = self._computed(query, key, value, mask.added, kwargs.get("scale"))
        # What multiplies chooses its way by the size.
        kind = (query.dtype, heads, rows.bit_length(), width, mask.added is None)
        if kind in self._compared:
            return outputs
        plain = self._plain(*args, **kwargs)
        self._compared.add(kind)
        self.is_equal = torch.allclose(outputs, plain, 0, 0, equal_nan=True)
        if not self.is_equal:
            logger.warning(
                "the vision tower's attention is torch's own from now on, and slower: its replacement had other bits"
                " for %d rows in %d heads of %d",
                *(rows, heads, width),
            )
        return plain

    def _look_at(self, given: torch.Tensor) -> _Mask:
        known = next((mask for mask in self._masks if mask.given is given), None)
        if known is None:
            if bool(given.all()):
                known = _Mask(given, None, hides_a_row=False)
            else:
                added = torch.zeros(given.shape).masked_fill_(~given, -math.inf)
                known = _Mask(given, added, hides_a_row=not bool(given.any(-1).all()))
            self._masks.append(known)
            while len(self._masks) > _MASKS_KEPT and sum(mask.given.numel() for mask in self._masks) > _WEIGHTS_AT_ONCE:
                self._masks.popleft()
        return known

    def _computed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        added: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        _, heads, rows, width = query.shape
        factor = math.sqrt(width**-0.5 if scale is None else scale)
        queries = (query.float() * factor).reshape(heads, rows, width)
        keys = (key.float() * factor).reshape(heads, rows, width).transpose(1, 2)
        values = value.float().reshape(heads, rows, width)
        outputs = torch.empty_like(values)
        together = max(1, min(heads, _WEIGHTS_AT_ONCE // rows**2))
        if self._weights.numel() < together * rows**2:
            self._weights = torch.empty(together * rows**2)
        for first in range(0, heads, together):
            some = slice(first, min(heads, first + together))
            weights = self._weights[: (some.stop - first) * rows**2].view(-1, rows, rows)
            torch.bmm(queries[some], keys[some], out=weights)
            if added is not None:
                weights += added
            torch.softmax(weights, -1, out=weights)
            torch.bmm(weights, values[some], out=outputs[some])
        return outputs.view(1, heads, rows, width).to(query.dtype)


def _is_step_by_step(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """How torch goes with a mask of three dimensions, of one sequence."""
    mask, scale = kwargs.get("attn_mask"), kwargs.get("scale")
    if len(args) != 3 or mask is None or any(one.device.type != "cpu" for one in (*args, mask)):
        return False
    shape, dtype = args[0].shape, args[0].dtype
    return (
        all(one.shape == shape and one.dtype is dtype for one in args)
        and dtype in _TYPES
        and len(shape) == 4
        and shape[0] == 1 <= shape[2]
        and mask.dtype is torch.bool
        and mask.shape == (1, shape[2], shape[2])
        and (scale is None or scale > 0)
        and all(_PLAIN.get(name) == given for name, given in kwargs.items() if name not in ("attn_mask", "scale"))
    )
