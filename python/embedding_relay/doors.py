"""Makes our modules importable under SGLang's name, however SGLang is installed. A .pth file calls it.

The modules that run inside SGLang are named `sglang.srt.disaggregation.…`. A wheel that put them into a directory
`sglang` of its own would hide an SGLang that is installed from its source, as official images have it: Python finds a
directory before it asks the finder of an editable install. So the wheel carries them in `_doors` here, a checkout has
them where they belong, and a finder names them. It comes last: what is SGLang's own is never taken over.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Final

_HERE: Final = os.path.dirname(os.path.abspath(__file__))
_IN_WHEEL: Final = os.path.join(_HERE, "_doors")
_IN_CHECKOUT: Final = os.path.join(os.path.dirname(_HERE), "sglang", "srt", "disaggregation")
_BELOW: Final = "sglang.srt.disaggregation."


class DoorFinder:
    """Finds the modules of `place` below `sglang.srt.disaggregation`."""

    def __init__(self, place: str) -> None:
        self._place = place

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(_BELOW):
            return None
        where = os.path.join(self._place, *name.removeprefix(_BELOW).split("."))
        package = os.path.join(where, "__init__.py")
        if os.path.isfile(package):
            return importlib.util.spec_from_file_location(name, package, submodule_search_locations=[where])
        if os.path.isfile(f"{where}.py"):
            return importlib.util.spec_from_file_location(name, f"{where}.py")
        return None


def open_doors() -> None:
    """Called once in every Python process of an environment that has this package; imports nothing of SGLang."""
    sys.meta_path.append(DoorFinder(_IN_WHEEL if os.path.isdir(_IN_WHEEL) else _IN_CHECKOUT))
