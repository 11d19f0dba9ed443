"""One half of a model: an encode instance without the language model, a language instance without the tower.

A model is built twice. The first time none of its parameters takes memory; then it is known which of them this half
needs (`parts`). The second time those of the other half alone are left without memory: on torch's `meta` device, with
their names, so that SGLang's classes find whatever a checkpoint has a weight for, and load nothing into it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.nn.parameter import is_lazy

from embedding_relay.protocol.errors import SettingError
from sglang.srt.disaggregation.multimodal import modes, parts

logger = logging.getLogger(__name__)

_KEY: Final = "_relay_key"

_Key = tuple[str, int, str]
"""Of a parameter: the class of its module, the how manyth of that class it is, and the parameter's name there.

A layer that both builds share (SGLang remembers tables of rotary positions) shifts the count of its own class alone.
"""

_load_all = False
"""Loading a half has failed in this process."""


class Absent(torch.nn.Parameter):  # type: ignore[misc]  # torch is left out of the type check
    """A parameter of the other half: it has a name, a shape and a type, and no memory."""

    def __new__(cls, parameter: torch.Tensor, *_: Any, **__: Any) -> Absent:
        absent: Absent = super().__new__(cls, torch.empty_like(parameter, device="meta"), requires_grad=False)
        return absent


def check_class(server_args: Any) -> None:
    """SettingError for a model whose class alone tells that it cannot be divided."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader.utils import get_model_architecture

    config = ModelConfig.from_server_args(server_args)
    kind, _ = get_model_architecture(config)
    parts.check_class(kind, config.hf_config)


def load(original: Callable[[], None], mode: str) -> None:
    """Around the loading of a model. A class that cannot be loaded in halves is loaded as a whole."""
    global _load_all
    try:
        return original()
    except SettingError:
        raise
    except Exception as error:
        if _load_all:
            raise
        logger.warning("relay: the %s half alone could not be loaded, so everything is: %r", mode, error)
        _load_all = True
    return original()


def build(original: Callable[[], Any], mode: str) -> Any:
    """A model whose other half takes no memory; SettingError for one that cannot be divided."""
    absent: set[str] = set()
    keys: set[_Key] = set()
    if not _load_all:
        with _without_memory(lambda key: True):
            outline = original()
        parts.check(outline)
        absent, keys = _of_other_half(parts.media_part(outline), mode)
        del outline
    with _without_memory(keys.__contains__):
        model = original()
    parts.check(model)
    part = parts.media_part(model)
    _leave_out(part, absent, mode)
    if mode == modes.LANGUAGE and parts.is_generic(part):
        from sglang.srt.disaggregation.multimodal import generic

        generic.take_rows(part)
    _report(type(model).__name__, part, mode)
    return model


def _of_other_half(part: Any, mode: str) -> tuple[set[str], set[_Key]]:
    """The names of its parameters, and how they will be known while the model is built again."""
    of_tower, of_language_model = parts.needed_by_one_half(part)
    other = of_language_model if mode == modes.ENCODE else of_tower
    names, keys = set(), set()
    for prefix, module in part.named_modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in other:
                names.add(f"{prefix}.{name}".lstrip("."))
                if made := vars(module).get(_KEY):
                    keys.add((*made, name))
    return names, keys


@contextmanager
def _without_memory(chosen: Callable[[_Key], bool]) -> Iterator[None]:
    """While a model is built: of the chosen parameters only an outline stays.

    A tensor that was made for one is let go as soon as it is registered, before anything is written to it. Vectors
    stay, because constructors look into some.
    """
    make, register = torch.nn.Module.__init__, torch.nn.Module.register_parameter
    made: Counter[str] = Counter()

    def make_numbered(module: Any, *args: Any, **kwargs: Any) -> None:
        make(module, *args, **kwargs)
        kind = type(module).__qualname__  # not the class itself: some are made anew for each layer
        vars(module)[_KEY] = (kind, made[kind])
        made[kind] += 1

    def register_chosen(module: Any, name: str, parameter: Any) -> None:
        if _KEY in vars(module) and chosen((*vars(module)[_KEY], name)) and _is_matrix(parameter):
            parameter = Absent(parameter)
        register(module, name, parameter)

    torch.nn.Module.__init__, torch.nn.Module.register_parameter = make_numbered, register_chosen
    try:
        yield
    finally:
        torch.nn.Module.__init__, torch.nn.Module.register_parameter = make, register


def _is_matrix(parameter: Any) -> bool:
    lazy = parameter is None or is_lazy(parameter)
    return not lazy and not parameter.is_meta and parameter.dim() > 1


def _leave_out(part: Any, absent: set[str], mode: str) -> None:
    """Exactly these are absent, whatever order the modules were made in; and who asks for what is not here is told."""
    for prefix, module in part.named_modules():
        for name, parameter in module._parameters.items():
            here = f"{prefix}.{name}".lstrip(".") not in absent
            if here and isinstance(parameter, Absent):
                raise RuntimeError(f"{prefix}.{name} was taken for a parameter of the other half")
            if not here:
                parameter = parameter if isinstance(parameter, Absent) else Absent(parameter)
                parameter.weight_loader = _load_nothing
                module._parameters[name] = parameter
    part.register_state_dict_post_hook(_forget_absent)
    device = next(parameter.device for parameter in part.parameters() if not isinstance(parameter, Absent))
    for module in part.modules():
        _say_where(module, device)
        if _is_absent(module):
            module.register_forward_pre_hook(_refuse(mode))
            if hasattr(module, "quant_method"):
                module.quant_method = None  # SGLang prepares weights after loading: here there are none


def _forget_absent(_module: Any, state: dict[str, Any], _prefix: str, _metadata: Any) -> None:
    """Whoever asks for all weights, to save them or to fill them, gets those that are here."""
    for name in [name for name, value in state.items() if getattr(value, "is_meta", False)]:
        del state[name]


def _say_where(module: Any, device: torch.device) -> None:
    """Code asks the first parameter of a module for its device: that is never `meta`, even if no parameter is here."""
    listed = type(module).parameters
    absent = [one for one in listed(module) if isinstance(one, Absent)]
    if not absent:
        return
    nothing = torch.nn.Parameter(torch.empty(0, dtype=absent[0].dtype, device=device), requires_grad=False)

    def parameters(recurse: bool = True) -> Iterator[Any]:
        here = [one for one in listed(module, recurse) if not isinstance(one, Absent)]
        return iter([*(here or [nothing]), *(one for one in listed(module, recurse) if isinstance(one, Absent))])

    module.parameters = parameters


def _load_nothing(*_: Any, **__: Any) -> None:
    """What SGLang's classes call with the weight that a checkpoint has for a parameter."""


def _is_absent(module: torch.nn.Module) -> bool:
    own = list(type(module).parameters(module))
    return bool(own) and all(isinstance(parameter, Absent) for parameter in own)


def _refuse(mode: str) -> Callable[..., None]:
    other = "language model" if mode == modes.ENCODE else "vision tower"

    def refuse(module: Any, _: Any) -> None:
        raise RuntimeError(f"this {mode} instance has no {other}, but {type(module).__name__} was asked to compute")

    return refuse


def _report(name: str, part: Any, mode: str) -> None:
    here, total = parameters_held(part), _size(part.parameters())
    logger.info("relay half=%s class=%s held=%d of=%d", mode, name, here, total)
    if here == total:
        logger.warning("%s keeps the half that it does not use: no part of it could be told apart", name)


def parameters_held(model: Any) -> int:
    return _size(parameter for parameter in model.parameters() if not isinstance(parameter, Absent))


def _size(parameters: Iterable[Any]) -> int:
    return sum(parameter.numel() for parameter in parameters if not is_lazy(parameter))


def restore_prompt_limits(scheduler: Any) -> None:
    """The tiny KV pool of an encode instance must not shorten the prompts that it accepts."""
    scheduler.max_req_len = scheduler.model_config.context_len - 1
    scheduler.max_req_input_len = scheduler.max_req_len - 5
