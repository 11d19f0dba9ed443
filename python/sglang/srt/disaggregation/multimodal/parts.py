"""What a model's code says of itself: which part makes rows, which takes them, and the parameters that each needs.

Read from the source of its methods, so that no class has to be known by its name. Where the code is vague (an attribute
whose name is computed, the model handed on as a whole), everything behind it counts as used.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any, Final

import torch

from embedding_relay.protocol.errors import SettingError

_GETTERS: Final = tuple(f"get_{kind}_feature{end}" for kind in ("image", "video", "audio") for end in ("", "s"))
# SGLang's routines that put rows, precomputed ones too, where their placeholders are. They get the whole model, but use
# its getters only.
_ROUTINES: Final = frozenset({"general_mm_embed_routine", "prepare_mm_inputs", "embed_mm_inputs"})


def media_part(model: Any) -> Any:
    """The module that has the getters and runs the forward pass: the model, or one that it leaves all that to."""
    part = getattr(getattr(model, "forward", None), "__self__", model)
    return part if _has_getters(part) else model


def check(model: Any) -> None:
    """SettingError for a class that makes no rows, or would do without those that come from elsewhere."""
    part = media_part(model)
    if reason := _why_not(part):
        raise SettingError(f"{type(model).__name__} cannot be divided: {reason}")


def check_class(kind: Any, config: Any) -> None:
    """The same as far as the class alone tells, before anything is built of it."""
    if hasattr(kind, "__getattr__") and kind.__getattr__ is not torch.nn.Module.__getattr__:
        return  # it leaves everything to another one, which its constructor chooses
    if "self.forward" in inspect.getsource(kind.__init__):
        return
    outline = kind.__new__(kind)
    torch.nn.Module.__init__(outline)
    outline.config = config
    try:
        check(outline)
    except (AttributeError, TypeError):
        return  # its forward pass is about parts that are not there yet


def _why_not(part: Any) -> str:
    if not _has_getters(part):
        return "SGLang's class has no get_image_feature, nor one for video or audio"
    if not takes_rows(part):
        return "its forward pass makes embeddings of pixels itself, and would ignore those of an encode instance"
    vision = getattr(getattr(part, "config", None), "vision_config", None)
    if is_generic(part) and getattr(vision, "deepstack_visual_indexes", None):
        return "SGLang's wrapper around models of transformers makes no rows of the inner layers of their towers"
    return ""


def takes_rows(part: Any) -> bool:
    """Its forward pass uses rows that are there already, in place of pixels."""
    return bool(_used_by_forward(part).functions & _ROUTINES) or is_generic(part)


def is_generic(part: Any) -> bool:
    """SGLang's wrapper around any model of `transformers`, which collects pixels and has those insert their rows."""
    return hasattr(part, "_collect_mm_kwargs") and hasattr(part, "_run_hf_backbone")


def deepstack_rows(part: Any) -> int:
    """How many rows of inner layers of the tower go with each row."""
    return len(getattr(part, "deepstack_visual_indexes", ())) if getattr(part, "use_deepstack", None) else 0


def without_deepstack(part: Any) -> set[Any]:
    """The modalities whose rows go alone, in a model where others do not."""
    from sglang.srt.managers.schedule_batch import Modality

    with_it = getattr(part, "use_deepstack", None) or {}
    return {modality for modality in Modality if not with_it.get(modality)} if with_it else set()


def needed_by_one_half(part: Any) -> tuple[set[int], set[int]]:
    """The ids of parameters that only the tower needs, and of those that only the language model does."""
    getters, forward = _Used(by_forward=False), _used_by_forward(part)
    getters.whole(part)
    return getters.parameters - forward.parameters, forward.parameters - getters.parameters


def _has_getters(module: Any) -> bool:
    return any(hasattr(module, name) for name in _GETTERS)


def _used_by_forward(part: Any) -> _Used:
    used = _Used(by_forward=True)
    used.whole(part)
    return used


class _Used:
    """The parameters and global functions that the getters of a module use, or its forward pass without them."""

    def __init__(self, *, by_forward: bool) -> None:
        self.by_forward = by_forward
        self.parameters: set[int] = set()
        self.functions: set[str] = set()
        self._seen: set[tuple[int, Any, int | str]] = set()

    def whole(self, module: torch.nn.Module) -> None:
        """A module is used. Of one that has both halves, what belongs to this one."""
        if not _has_getters(module):
            self.parameters.update(map(id, module.parameters()))
        elif self.by_forward:
            self._step(module, ["forward"])
        else:
            for name in filter(functools.partial(hasattr, module), _GETTERS):
                self._step(module, [name])

    def everything(self, module: torch.nn.Module) -> None:
        self.parameters.update(map(id, module.parameters()))

    def chain(self, module: torch.nn.Module, names: list[str]) -> None:
        """`module.a.b.c`, as it stands in the module's code."""
        if not names:
            self.whole(module)
        elif not (self.by_forward and names[0] in _GETTERS):
            self._step(module, names)

    def _step(self, module: torch.nn.Module, names: list[str]) -> None:
        name = names[0]
        if name in ("dtype", "parameters"):
            return  # asked for these, a half says what the whole would: see `halves`
        if name == "get_input_embeddings":  # vague in `transformers`, but anybody may call it
            self.whole(module.get_input_embeddings())
        elif name in ("children", "modules", "named_children", "named_modules", "named_parameters", "state_dict"):
            self.everything(module)
        elif name in module._modules:
            if (child := module._modules[name]) is not None:
                self.chain(child, names[1:])
        elif name in module._parameters:
            self.parameters.add(id(module._parameters[name]))
        elif name in vars(module):
            bound = getattr(vars(module)[name], "__self__", None)  # as in `self.forward = self.thinker.forward`
            if isinstance(bound, torch.nn.Module):
                self.function(bound, type(bound), vars(module)[name].__func__)
        else:
            self.inherited(module, type(module).__mro__, name)

    def inherited(self, module: torch.nn.Module, classes: tuple[type, ...], name: str) -> None:
        owner = next((one for one in classes if name in vars(one)), torch.nn.Module)
        if owner is not torch.nn.Module:
            found = vars(owner)[name]
            found = found.fget if isinstance(found, property) else found
            found = found.func if isinstance(found, functools.cached_property) else found
            if callable(found) and not isinstance(found, type | staticmethod):
                self.function(module, owner, found)

    def function(self, module: torch.nn.Module, owner: type, function: Any, place: int | str = 0) -> None:
        """A function that has the module at this place among its parameters, or under this name."""
        function = inspect.unwrap(function)
        if (id(module), function, place) in self._seen:
            return
        self._seen.add((id(module), function, place))
        tree = _tree_of(function)
        parameters = (
            [one.arg for one in (*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs)] if tree else []
        )
        called = place if isinstance(place, str) else next(iter(parameters[place:]), None)
        if tree is None or called not in parameters:  # no source, or `*args`: nobody knows what it uses
            self.everything(module)
        else:
            reader = _Reader(self, module, owner, called, function.__globals__)
            for statement in tree.body:
                reader.visit(statement)


@functools.cache
def _tree_of(function: Any) -> ast.FunctionDef | None:
    if not inspect.isfunction(function):
        return None
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


class _Reader(ast.NodeVisitor):
    """Goes through the code of one method, and tells what it uses of its module."""

    def __init__(self, used: _Used, module: torch.nn.Module, owner: type, called: str, known: dict[str, Any]) -> None:
        self.used, self.module, self.owner, self.called, self.known = used, module, owner, called, known

    def visit_Attribute(self, node: ast.Attribute) -> None:
        names: list[str] = []
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            names.insert(0, root.attr)
            root = root.value
        self._chain(root, names)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id == self.called:
            self.used.everything(self.module)

    def visit_Call(self, node: ast.Call) -> None:
        match node.func:
            case ast.Name(id="getattr" | "hasattr") if len(node.args) > 1:
                self._getattr(node)
                return
            case ast.Name(id="super" | "type" | "isinstance"):
                return
            case ast.Name(id=name) | ast.Attribute(attr=name):
                self.used.functions.add(name)
                self._arguments(node, name)
            case _:
                self._arguments(node, "")
        self.visit(node.func)

    def _arguments(self, node: ast.Call, name: str) -> None:
        """Where the module itself is one, the function says what it wants with it."""
        places: list[tuple[int | str, ast.expr]] = list(enumerate(node.args))
        for place, argument in places + [(keyword.arg or "", keyword.value) for keyword in node.keywords]:
            if not (isinstance(argument, ast.Name) and argument.id == self.called):
                self.visit(argument)
            elif name not in _ROUTINES:
                helper = self.known.get(name) if isinstance(node.func, ast.Name) else None
                self.used.function(self.module, self.owner, helper, place)

    def _getattr(self, node: ast.Call) -> None:
        where, what, *rest = node.args
        for argument in rest:
            self.visit(argument)
        match what:
            case ast.Constant(value=str(name)):
                self.visit(ast.Attribute(value=where, attr=name))
            case _:
                self.visit(where)

    def _chain(self, root: ast.expr, names: list[str]) -> None:
        match root:
            case ast.Name(id=self.called):
                self.used.chain(self.module, names)
            case ast.Call(func=ast.Name(id="super")):
                mro = type(self.module).__mro__
                self.used.inherited(self.module, mro[mro.index(self.owner) + 1 :], names[0])
            case _:
                self.visit(root)
