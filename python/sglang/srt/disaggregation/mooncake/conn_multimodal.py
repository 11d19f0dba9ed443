"""The doors of the transfer, by the names that people know: managers, senders, receivers, the bootstrap server.

Behind them is an ordinary package that knows nothing of SGLang, `embedding_relay`:
  MooncakeEmbeddingManager          what the manager of an encode rank and that of a language rank have in common
  MooncakeEmbeddingSender           the encode scheduler's end of one room
  MooncakeEmbeddingReceiver         the language scheduler's end of one room; its `init` and `resume_transfer` are
                                    called when such an offer, which the room itself has made, is sent
  MooncakeEmbeddingBootstrapServer  the registry, in the HTTP process of an encode instance
  TransferEmbeddingInfo             the message of an init or a resume
  TransferEmbeddingChunk            a unit of work of the transfer workers
"""

from __future__ import annotations

from embedding_relay.protocol.effects import TransferEmbeddingChunk
from embedding_relay.protocol.messages import TransferEmbeddingInfo
from embedding_relay.registry.server import MooncakeEmbeddingBootstrapServer
from embedding_relay.transport.borrowing import BorrowingManager
from embedding_relay.transport.encode import EncodeManager, MooncakeEmbeddingSender
from embedding_relay.transport.language import LanguageManager, MooncakeEmbeddingReceiver
from embedding_relay.transport.manager import MooncakeEmbeddingManager

__all__ = [
    "BorrowingManager",
    "EncodeManager",
    "LanguageManager",
    "MooncakeEmbeddingBootstrapServer",
    "MooncakeEmbeddingManager",
    "MooncakeEmbeddingReceiver",
    "MooncakeEmbeddingSender",
    "TransferEmbeddingChunk",
    "TransferEmbeddingInfo",
]
