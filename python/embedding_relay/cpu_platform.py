"""Runs SGLang on any CPU: a platform plugin that takes a machine when asked to, or when nothing else could serve it.

Stock SGLang has a CPU engine (`SGLANG_USE_CPU_ENGINE=1`), but it needs its own build of `sgl_kernel` (AMX).
Where that build is absent, SGLang stops at the rotary embedding or at the attention backend. This platform names the
torch-native implementations instead: slow, but the same scheduler, models and HTTP server, which is what tests, the
demo and a first look on a laptop need.

Otherwise it stays out of the way. Unless it was named (`SGLANG_PLATFORM=relay_cpu`), `activate` answers None when
  - the stock CPU engine was asked for,
  - another platform plugin is installed (two active ones stop SGLang), or
  - there is, or may be, an accelerator: any torch backend, any device node, any vendor's torch extension.
What is left is a machine on which stock SGLang falls back to its base platform and cannot serve a model.

Where another vendor's platform plugin is installed, leave SGLANG_PLATFORM unset: naming that platform makes SGLang skip
the general plugins of every distribution that brings another one, and with them this package's modes.
"""

from __future__ import annotations

import glob
import importlib.util
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points

from embedding_relay.doors import open_doors

logger = logging.getLogger(__name__)

NAME = "relay_cpu"
_GROUP = "sglang.srt.platforms"
_CLASS = "sglang.srt.disaggregation.multimodal.cpu_platform:RelayCpuPlatform"

# Device nodes exist even when the driver's Python side is broken: such a machine wants a repair, not a silent CPU.
_DEVICE_NODES = (
    "/dev/nvidia[0-9]*",
    "/dev/nvidiactl",
    "/dev/dxg",  # a GPU under WSL
    "/dev/nvhost-*",  # Jetson
    "/dev/kfd",  # ROCm
    "/dev/davinci*",  # Ascend
    "/dev/accel/*",  # Gaudi, TPU, NPUs of the accel subsystem
    "/dev/accel[0-9]*",
    "/dev/hl[0-9]*",  # Gaudi, older driver
    "/dev/mtgpu*",  # Moore Threads
    "/dev/cambricon*",
    "/dev/xpu[0-9]*",  # Kunlun
    "/dev/vfio/[0-9]*",  # TPU VMs pass their chips through VFIO
)
_TORCH_EXTENSIONS = ("torch_npu", "torch_musa", "torchada", "habana_frameworks", "torch_xla", "torch_mlu", "torch_xpu")


def decide(
    environ: Mapping[str, str],
    other_platforms: Callable[[], Sequence[str]],
    accelerator: Callable[[], str | None],
) -> tuple[bool, str]:
    """Whether this platform serves, and why. The probes are called only when their answer matters."""
    chosen = environ.get("SGLANG_PLATFORM", "")
    if chosen:
        return chosen == NAME, f"SGLANG_PLATFORM={chosen}"
    if environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return False, "SGLang's own CPU engine was asked for"
    if others := other_platforms():
        return False, f"another platform plugin is installed: {', '.join(others)}"
    if found := accelerator():
        return False, f"accelerator: {found}"
    return True, "no accelerator"


def other_platforms() -> list[str]:
    return sorted(entry.name for entry in entry_points(group=_GROUP) if entry.name != NAME)


def find_accelerator() -> str | None:
    """A word for the accelerator this machine has or may have; None only when every probe came back empty."""
    for pattern in _DEVICE_NODES:
        if found := glob.glob(pattern):
            return found[0]
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "Apple GPU"
    for name in _TORCH_EXTENSIONS:
        if importlib.util.find_spec(name) is not None:
            return name
    try:
        return _torch_accelerator()
    except Exception as error:  # a vendor's runtime may raise anything; a broken one still means "there is one"
        return f"torch could not tell ({type(error).__name__}: {error})"


def _torch_accelerator() -> str | None:
    import torch

    for backend in ("cuda", "xpu", "npu", "hpu", "musa", "mlu", "mps", "mtia"):
        module = getattr(torch, backend, None)
        available = getattr(module, "is_available", None)
        if available is not None and available():
            return f"torch.{backend}"
    return None


def activate() -> str | None:
    """The entry point SGLang calls: the platform's class path, or None."""
    serves, reason = decide(os.environ, other_platforms, find_accelerator)
    logger.debug("%s: %s (%s)", NAME, "active" if serves else "not active", reason)
    if not serves:
        return None
    open_doors()  # the class has SGLang's name
    return _CLASS
