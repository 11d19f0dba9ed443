"""`sglang` as a bare namespace over this checkout, so that a lane tests these files and proves SGLang is not needed."""

import sys
import types

from support.repo import SOURCE


def use_bare_sglang() -> None:
    if "sglang" in sys.modules:
        raise RuntimeError("sglang was imported before the lane could replace it")
    module = types.ModuleType("sglang")
    module.__path__ = [str(SOURCE / "sglang")]
    sys.modules["sglang"] = module


def is_bare() -> bool:
    module = sys.modules.get("sglang")
    return module is not None and getattr(module, "__file__", None) is None
