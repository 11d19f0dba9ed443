"""One half of a model: what takes memory, what is loaded, and what becomes of a class that resists."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from embedding_relay.protocol.errors import SettingError
from sglang.srt.disaggregation.multimodal import halves, modes
from sglang.srt.managers.mm_utils import general_mm_embed_routine

WIDTH = 4


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((WIDTH, WIDTH), 3.0))
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        assert bool((self.bias == 0).all()), "some constructors look into vectors"
        self.weight.weight_loader = load
        self.quant_method = "some"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


def load(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    parameter.data.copy_(weight)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angles", torch.arange(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.angles


class Model(nn.Module):
    """Built as SGLang's are: an outline of it is built before, and its layers may be copies of each other."""

    remembered: list[Positions] = []  # noqa: RUF012  (as SGLang remembers them, across models)

    def __init__(self) -> None:
        super().__init__()
        if not self.remembered:
            self.remembered.append(Positions())
        self.table = self.remembered[0]
        one = Layer()
        self.visual = nn.ModuleList([one, copy.deepcopy(one)])
        self.language = nn.Sequential(Layer(), Layer())

    def get_image_feature(self, items: list[Any]) -> torch.Tensor:
        for layer in self.visual:
            items = layer(items)
        return items  # type: ignore[return-value]

    def forward(self, input_ids: Any, forward_batch: Any) -> Any:
        self.table(input_ids)
        return general_mm_embed_routine(input_ids, forward_batch, self.language, multimodal_model=self)

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        parameters = dict(self.named_parameters())
        for name, weight in weights.items():
            getattr(parameters[name], "weight_loader", load)(parameters[name], weight)


CHECKPOINT = {name: torch.full_like(parameter, 7.0) for name, parameter in Model().named_parameters()}


@pytest.fixture(autouse=True)
def nothing_failed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halves, "_load_all", False)
    monkeypatch.setattr(Model, "remembered", [])


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was() -> Iterator[None]:
    before = nn.Module.__init__, nn.Module.register_parameter
    yield
    assert (nn.Module.__init__, nn.Module.register_parameter) == before


def held(model: nn.Module) -> set[str]:
    return {name.partition(".")[0] for name, parameter in model.named_parameters() if not parameter.is_meta}


@pytest.mark.parametrize(
    ("mode", "here", "elsewhere"),
    [(modes.ENCODE, "visual", "language"), (modes.LANGUAGE, "language", "visual")],
)
def test_one_half_is_held_and_loaded(mode: str, here: str, elsewhere: str) -> None:
    model = halves.build(Model, mode)
    assert held(model) == {here}
    model.load_weights(CHECKPOINT)
    for name, parameter in model.named_parameters():
        assert parameter.is_meta or bool((parameter == 7).all()), name
    assert halves.parameters_held(model) == sum(p.numel() for n, p in Model().named_parameters() if n.startswith(here))
    assert not next(model.parameters()).is_meta, "of which code asks for the model's device"
    assert next(getattr(model, elsewhere).parameters()).device == torch.device("cpu"), "though none of it is here"
    assert len(list(model.parameters())) == len(CHECKPOINT)
    assert {name.partition(".")[0] for name in model.state_dict()} == {here, "table"}, "and the table of positions"
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            assert (module.quant_method is None) == name.startswith(elsewhere)


def test_a_language_instance_has_nothing_that_encodes() -> None:
    model = halves.build(Model, modes.LANGUAGE)
    with pytest.raises(RuntimeError, match=r"this language instance has no vision tower, but \w+ was asked"):
        model.get_image_feature(torch.zeros(1, WIDTH))


def test_an_encode_instance_has_nothing_that_generates() -> None:
    model = halves.build(Model, modes.ENCODE)
    with pytest.raises(RuntimeError, match="this encode instance has no language model, but Sequential was asked"):
        model.language(torch.zeros(1, WIDTH))
    assert bool(torch.isfinite(model.get_image_feature(torch.zeros(1, WIDTH))).all())


class Peeks(Model):
    """Its constructor looks into a matrix, which an outline has not."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = self.language[0].weight.max().item()


def test_a_class_that_cannot_be_built_in_halves_is_loaded_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    built: list[nn.Module] = []
    halves.load(lambda: built.append(halves.build(Peeks, modes.ENCODE)), modes.ENCODE)
    assert held(built[0]) == {"visual", "language"}
    assert "the encode half alone could not be loaded, so everything is" in caplog.text
    assert "Peeks keeps the half that it does not use" in caplog.text


class Lazy(Model):
    """Some loaders of SGLang find out at loading how large a parameter is."""

    def __init__(self) -> None:
        super().__init__()
        self.language[0].weight = nn.parameter.UninitializedParameter()


def test_a_parameter_without_a_size_is_left_alone() -> None:
    model = halves.build(Lazy, modes.LANGUAGE)
    assert isinstance(model.language[0].weight, nn.parameter.UninitializedParameter)
    assert held(model) == {"language"}


class Lost(Exception):
    pass


def test_a_model_that_fails_as_a_whole_too_has_failed() -> None:
    def lose() -> None:
        raise Lost

    with pytest.raises(Lost):
        halves.load(lose, modes.LANGUAGE)


class TextOnly(nn.Module):
    def forward(self, input_ids: Any) -> Any:
        return input_ids


def test_a_class_that_cannot_be_divided_at_all_is_not_tried_again() -> None:
    asked = []

    def build() -> None:
        asked.append(1)
        halves.build(TextOnly, modes.LANGUAGE)

    with pytest.raises(SettingError, match="TextOnly cannot be divided"):
        halves.load(build, modes.LANGUAGE)
    assert len(asked) == 1


def test_an_encode_instance_takes_prompts_as_long_as_the_model_does() -> None:
    scheduler = SimpleNamespace(model_config=SimpleNamespace(context_len=1000), max_req_len=15, max_req_input_len=10)
    halves.restore_prompt_limits(scheduler)
    assert (scheduler.max_req_len, scheduler.max_req_input_len) == (999, 994)
