"""An encode instance on a card, in a process of its own: its rows are still being made when it hands them over."""

from multiprocessing.connection import Connection

import torch
import zmq

from embedding_relay.config import RelayConfig
from embedding_relay.memory.device import everything_queued_on
from embedding_relay.memory.layout import BufferLayout
from embedding_relay.protocol.messages import Address
from embedding_relay.protocol.status import Status
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer
from embedding_relay.transport.encode import EncodeManager, MooncakeEmbeddingSender
from embedding_relay.transport.manager import MooncakeEmbeddingManager, RoomEnd
from support.rows import Spec, make_rows

HOST = "127.0.0.1"


def wait_until(manager: MooncakeEmbeddingManager, end: RoomEnd, *statuses: Status) -> None:
    poller = zmq.Poller()
    poller.register(manager.wakeup_fd, zmq.POLLIN)
    while end.poll() not in statuses:
        poller.poll(1000)
        manager.drain_events()


def encode_instance(pipe: Connection, layout: BufferLayout, rows: int) -> None:
    """Its rows are queued behind a long kernel when they are handed over."""
    registry = MooncakeEmbeddingBootstrapServer(HOST, 0)
    registry.start()
    manager = EncodeManager.open(
        layout, RelayConfig(), host=HOST, bootstrap=Address(HOST, registry.port), device="cuda"
    )
    manager.start()
    pipe.send(registry.port)
    while (room := pipe.recv()) is not None:
        sender = MooncakeEmbeddingSender(manager, room)
        sender.init()
        wait_until(manager, sender, Status.WAITING_FOR_INPUT, Status.FAILED)
        source = make_rows(layout, Spec(room, rows))
        torch.cuda._sleep(200_000_000)
        source.segments = [
            (start, values.pin_memory().to("cuda", non_blocking=True)) for start, values in source.segments
        ]
        source.ready = everything_queued_on(torch.device("cuda"))
        sender.send_embedding(source)
        wait_until(manager, sender, Status.SUCCESS, Status.FAILED)
    manager.close()
    registry.close()
