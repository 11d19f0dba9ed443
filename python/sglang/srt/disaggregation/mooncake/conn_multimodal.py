"""The doors of the transfer, by the names that people know: a manager per rank, and for each room a sender or receiver.

What is behind them is an ordinary package: `embedding_relay.transport.manager`, `embedding_relay.registry.server`.
"""

from __future__ import annotations

from embedding_relay.protocol.effects import TransferEmbeddingChunk
from embedding_relay.protocol.messages import TransferEmbeddingInfo
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer
from embedding_relay.transport.manager import (
    MooncakeEmbeddingManager,
    MooncakeEmbeddingReceiver,
    MooncakeEmbeddingSender,
)

__all__ = [
    "MooncakeEmbeddingBootstrapServer",
    "MooncakeEmbeddingManager",
    "MooncakeEmbeddingReceiver",
    "MooncakeEmbeddingSender",
    "TransferEmbeddingChunk",
    "TransferEmbeddingInfo",
]
