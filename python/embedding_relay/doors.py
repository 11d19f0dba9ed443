"""Makes our modules importable under SGLang's name, however SGLang is installed. A .pth file calls it.

The modules that run inside SGLang are named `sglang.srt.disaggregation.…`. A wheel that put them into a directory
`sglang` of its own would hide an SGLang that is installed from its source, as official images have it: Python finds a
directory before it asks the finder of an editable install. So the wheel carries them in `_doors` here, a checkout has
them where they belong, and a finder names them. It comes last: what is SGLang's own is never taken over.

Every Python process of the environment runs this at its start, so it imports almost nothing.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

_HERE = os.path.dirname(os.path.abspath(__file__))
_IN_WHEEL = os.path.join(_HERE, "_doors")
_IN_CHECKOUT = os.path.join(os.path.dirname(_HERE), "sglang", "srt", "disaggregation")
_BELOW = "sglang.srt.disaggregation."


class DoorFinder:
    """Finds the modules of `place` below `sglang.srt.disaggregation`."""

    def __init__(self, place: str) -> None:
        self._place = place

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(_BELOW):
            return None
        from importlib.util import spec_from_file_location

        where = os.path.join(self._place, *name.removeprefix(_BELOW).split("."))
        package = os.path.join(where, "__init__.py")
        if os.path.isfile(package):
            return spec_from_file_location(name, package, submodule_search_locations=[where])
        if os.path.isfile(f"{where}.py"):
            return spec_from_file_location(name, f"{where}.py")
        return None


class RealSGLangFirst:
    """For a checkout, whose directory `python` is on the path and has one named `sglang`: that is no SGLang."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "sglang":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.origin is not None:
                return spec
        return None


def open_doors() -> None:
    """Imports nothing of SGLang; a second call does nothing."""
    if any(type(finder).__name__ == DoorFinder.__name__ for finder in sys.meta_path):
        return
    is_wheel = os.path.isdir(_IN_WHEEL)
    sys.meta_path.append(DoorFinder(_IN_WHEEL if is_wheel else _IN_CHECKOUT))
    if not is_wheel:
        sys.meta_path.insert(0, RealSGLangFirst())


def activate() -> None:
    """Entry point of the group `sglang.srt.plugins`. Opens the doors itself where no .pth file was read."""
    open_doors()
    from importlib import import_module

    import_module("sglang.srt.disaggregation.multimodal.hooks").activate()
