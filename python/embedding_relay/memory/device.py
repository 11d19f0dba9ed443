"""Rows on an accelerator: when they may be read, and how they get to host memory beside the model's own work."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

logger = logging.getLogger(__name__)

HOST = torch.device("cpu")


class Synchronizes(Protocol):
    """A `torch.cuda.Event`, for example."""

    def record(self, stream: torch.Stream) -> None: ...

    def synchronize(self) -> None: ...


def device_of(tensors: Iterable[torch.Tensor]) -> torch.device:
    """The accelerator that some of them lie on; host memory if none does."""
    return next((tensor.device for tensor in tensors if tensor.device.type != HOST.type), HOST)


def everything_queued_on(device: torch.device) -> Synchronizes | None:
    """An event behind all that the caller's stream has been asked to do; None where nothing is ever queued.

    A kernel is only queued when the call that starts it returns. Another thread has another stream, which does not wait
    for it: whoever reads its results there must wait for this event first.
    """
    if device.type == HOST.type:
        return None
    # A thread that waits for a blocking event sleeps; only CUDA's own class has them.
    event: Synchronizes = torch.cuda.Event(blocking=True) if device.type == "cuda" else torch.Event(device)
    event.record(torch.accelerator.current_stream(device))
    return event


@contextlib.contextmanager
def copies_from(device: torch.device) -> Iterator[None]:
    """Copies begun inside have ended when the block has, and queue behind none of the model's kernels meanwhile.

    Without a stream of their own they would share the default one with the model, and wait for its next batch.
    """
    if device.type == HOST.type:
        yield
        return
    module = torch.get_device_module(device)
    stream = module.Stream(device)
    try:
        with module.stream(stream):
            yield
    finally:
        stream.synchronize()


def pin(memory: torch.Tensor) -> bool:
    """Page-lock memory of the host, so that copies between it and a device run at full speed and beside other work.

    Registered in place: memory that torch pins itself is rounded up to a power of two.
    """
    code = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(code) != 0:
        logger.warning(
            "relay: %d bytes could not be page-locked (%s): copies to the device are slower", memory.nbytes, code
        )
    return int(code) == 0


def unpin(memory: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
