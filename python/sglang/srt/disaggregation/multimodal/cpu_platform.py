"""The platform class itself, and whether it serves; apart from `cpu_platform` because importing it imports torch."""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform


class RelayCpuPlatform(CpuDeviceMixin, SRTPlatform):  # type: ignore[misc]  # SGLang is untyped
    """A CPU that uses torch's own implementations throughout."""

    # Not PlatformEnum.CPU: that one makes SGLang look for the CPU build of sgl_kernel.
    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def is_pin_memory_available(self, device: object = None) -> bool:
        return False


def serves() -> bool:
    """Whether this process computes on it."""
    from sglang.srt.platforms import current_platform

    return isinstance(current_platform, RelayCpuPlatform)
