"""What is read from the code of model classes. The classes here are small, and do what SGLang's do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from embedding_relay.protocol.errors import SettingError
from sglang.srt.disaggregation.multimodal import parts
from sglang.srt.managers.mm_utils import general_mm_embed_routine


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(4, 4)

    @property
    def dtype(self) -> torch.dtype:
        return self.patches.bias.dtype

    @property
    def device(self) -> torch.device:
        return self.patches.weight.device

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.patches(pixels)


class Divisible(nn.Module):
    """Its halves are in plain sight."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = Tower()
        self.language = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.newline = nn.Parameter(torch.zeros(4))

    def get_image_feature(self, items: list[Any]) -> torch.Tensor:
        return torch.cat([self._encode(item) for item in items] + [self.newline])

    def _encode(self, item: Any) -> torch.Tensor:
        return self.visual(item.feature)

    def forward(self, input_ids: Any, forward_batch: Any) -> Any:
        hidden = general_mm_embed_routine(input_ids, forward_batch, self.language, multimodal_model=self)
        return self.head(hidden)


def names(model: nn.Module, ids: set[int]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def halves(model: nn.Module) -> tuple[set[str], set[str]]:
    """The names that only the tower needs, and those that only the language model does."""
    tower, language = parts.needed_by_one_half(model)
    return names(model, tower), names(model, language)


VISUAL = {"visual.patches.weight", "visual.patches.bias"}
LANGUAGE = {"language.weight", "language.bias", "head.weight", "head.bias"}


def test_what_the_getters_use_and_what_the_forward_pass_uses() -> None:
    assert halves(Divisible()) == ({*VISUAL, "newline"}, LANGUAGE)
    parts.check(Divisible())


class ChecksItself(Divisible):
    def get_image_feature(self, items: list[Any]) -> torch.Tensor:
        _require_vision(self)
        return super().get_image_feature(items)


def _require_vision(model: Any) -> None:
    if getattr(model, "language_model_only", False):
        raise ValueError


def test_what_functions_do_with_the_model_that_they_are_given_is_read_and_so_is_what_is_inherited() -> None:
    assert halves(ChecksItself()) == ({*VISUAL, "newline"}, LANGUAGE)


class Unknown(Divisible):
    def get_image_feature(self, items: list[Any]) -> torch.Tensor:
        return len(self)  # type: ignore[arg-type]  # any function that has no source


class Computed(Divisible):
    def get_image_feature(self, items: list[Any]) -> torch.Tensor:
        for name in ("visual", "language"):
            getattr(self, name)
        return torch.zeros(0)


class LooksAtItsTower(Divisible):
    def forward(self, input_ids: Any, forward_batch: Any) -> Any:
        input_ids = input_ids.to(self.visual.device, self.visual.dtype)
        return super().forward(input_ids, forward_batch)


def test_a_forward_pass_may_look_at_a_parameter_of_the_tower() -> None:
    tower, _ = halves(LooksAtItsTower())
    assert tower == {"visual.patches.bias", "newline"}


class AsksForADevice(Divisible):
    def get_image_feature(self, items: list[Any]) -> torch.Tensor:
        return self.visual(items[0].feature.to(next(self.language.parameters()).device))


def test_who_asks_parameters_for_their_device_does_not_use_them() -> None:
    _, language = halves(AsksForADevice())
    assert language == LANGUAGE


class LooksThroughAll(Divisible):
    def get_image_feature(self, items: list[Any]) -> torch.Tensor:
        return next(one for one in self.children() if isinstance(one, Tower))(items[0].feature)


class Callable:
    def __call__(self, module: Any, items: list[Any]) -> torch.Tensor:
        raise NotImplementedError


class CallsAnything(Divisible):
    encode = Callable()

    def get_image_feature(self, items: list[Any]) -> torch.Tensor:
        return self.encode(self, items)


@pytest.mark.parametrize("vague", [Unknown, Computed, LooksThroughAll, CallsAnything])
def test_where_the_code_is_vague_everything_counts_as_used(vague: type[nn.Module]) -> None:
    _, language = halves(vague())
    assert language == set(), "an encode instance keeps what its getters might use"


class Tied(Divisible):
    def __init__(self) -> None:
        super().__init__()
        self.visual.patches.weight = self.head.weight


def test_a_parameter_that_both_share_belongs_to_neither_alone() -> None:
    tower, language = halves(Tied())
    assert tower == {"visual.patches.bias", "newline"}
    assert language == {"language.weight", "language.bias", "head.bias"}


class Outer(nn.Module):
    """As SGLang's Qwen3-Omni: everything is one level down."""

    def __init__(self) -> None:
        super().__init__()
        self.thinker = Divisible()
        self.forward = self.thinker.forward


class NoModule:
    """As SGLang's MiniCPM-V."""

    def __init__(self) -> None:
        self.inner = Divisible()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_the_part_that_makes_rows_and_takes_them() -> None:
    model, outer, wrapper = Divisible(), Outer(), NoModule()
    assert parts.media_part(model) is model
    assert parts.media_part(outer) is outer.thinker
    assert parts.media_part(wrapper) is wrapper.inner
    parts.check(outer)
    parts.check(wrapper)


class TextOnly(nn.Module):
    def forward(self, input_ids: Any) -> Any:
        return input_ids


class PixelsOnly(Divisible):
    """As those of SGLang's classes that insert embeddings by themselves."""

    def forward(self, input_ids: Any, forward_batch: Any) -> Any:
        return self.head(self.language(self.visual(forward_batch.pixels)))


class Generic(PixelsOnly):
    """What tells SGLang's wrapper around models of transformers, and the deepstack of one of them."""

    config = SimpleNamespace(vision_config=SimpleNamespace(deepstack_visual_indexes=[1, 2]))

    def _collect_mm_kwargs(self) -> None: ...

    def _run_hf_backbone(self) -> None: ...


@pytest.mark.parametrize(
    ("model", "reason"),
    [(TextOnly, "has no get_image_feature"), (PixelsOnly, "would ignore those"), (Generic, "of the inner layers")],
)
def test_a_class_that_cannot_be_divided_is_refused_with_its_reason(model: type[nn.Module], reason: str) -> None:
    for check in (lambda: parts.check(model()), lambda: parts.check_class(model, Generic.config)):
        with pytest.raises(SettingError, match=f"{model.__name__} cannot be divided: .*{reason}"):
            check()


@pytest.mark.parametrize("model", [Divisible, ChecksItself, Outer, NoModule, LooksAtItsTower])
def test_of_a_class_alone_only_what_it_tells_is_held_against_it(model: type) -> None:
    parts.check_class(model, Generic.config)


def test_how_many_rows_of_inner_layers_go_with_each_row() -> None:
    assert parts.deepstack_rows(SimpleNamespace(deepstack_visual_indexes=[5, 11, 17], use_deepstack={1: True})) == 3
    assert parts.deepstack_rows(SimpleNamespace(deepstack_visual_indexes=[5, 11, 17], use_deepstack={})) == 0
    assert parts.deepstack_rows(SimpleNamespace()) == 0
