"""How many rows the language side reserves before it can know how many there will be, and what one peer may hold."""

from __future__ import annotations

import collections
from typing import Final

from embedding_relay.protocol.language.peers import Peer

_UNTIL_LEARNED: Final = 8192
_REMEMBERED: Final = 256
_QUANTILE: Final = 0.9
# Requests that shall have blocks beside each other, however few there are now: blocks are held while pictures wait for
# the tower, so the first requests of a burst would take all of a small pool (benchmark/pool.py).
AT_ONCE: Final = 16
# Of the pool: what one peer leaves to the others, how much of it may be in quarantine before it gets no more, and what
# its requests with many items leave to those with few. Of that part in turn: what one of these takes at most.
_SHARES: Final = 8
# Items of a request with few. On published traces nineteen requests of twenty have no more pictures than that.
_FEW: Final = 4


class DefaultReservation:
    """A fixed number; or with None, what nine of ten recent requests needed, within a fair share of the pool."""

    def __init__(self, fixed: int | None, capacity: int, block_size: int = 1) -> None:
        """`capacity`: rows of the pool."""
        self._fixed = fixed
        self._capacity = capacity
        self._block_size = block_size
        self._recent: collections.deque[int] = collections.deque(maxlen=_REMEMBERED)

    def observe(self, total: int) -> None:
        self._recent.append(total)

    def rows(self, rooms: int) -> int:
        """For one of `rooms` requests that share the pool now."""
        if self._fixed is not None:
            return self._fixed
        learned = _UNTIL_LEARNED
        if self._recent:
            ordered = sorted(self._recent)
            learned = ordered[min(len(ordered) - 1, int(len(ordered) * _QUANTILE))]
        # A block is the least that there is to have.
        return min(learned, max(self._block_size, self._capacity // max(AT_ONCE, rooms)))


def has_many(items: int) -> bool:
    """Whether a request with so many pictures, videos or sounds leaves some of the pool to those with fewer."""
    return items > _FEW


class PeerShare:
    """How many blocks one peer may hold. Whatever becomes of it, there are some for others, those to come included."""

    def __init__(self, capacity: int) -> None:
        self._an_eighth = capacity // _SHARES
        self.most = capacity - self._an_eighth

    def left(self, peer: Peer) -> int:
        """How many more it may have now."""
        return 0 if self.why_none(peer) else max(0, self.most - peer.held)

    def left_for_many(self, peer: Peer, held_by_many: int) -> int:
        """How many more a room with many items may have. `held_by_many`: blocks of such rooms, whoever their peer is.

        Blocks are held while pictures wait for the tower, and how long that takes nobody knows beforehand. So a request
        with few pictures finds some, however many requests with many pictures are there.
        """
        of_this, of_all = self.most - self._an_eighth - peer.held_by_many, self.most - held_by_many
        return max(0, min(self.left(peer), of_this, of_all))

    def first_for_few(self, peer: Peer, held_by_many: int) -> int:
        """How many a room with few items may have at first. `held_by_many`: as in `left_for_many`.

        What those with many leave is divided: of the last eighth each takes an eighth, so that many find some.
        """
        left = self.left(peer)
        return min(left, max(1, left // _SHARES, left - self._an_eighth)) if held_by_many else left

    def why_none(self, peer: Peer) -> str:
        """What is wrong with the peer, so that its rooms get no blocks; empty if nothing is."""
        if peer.quarantined > (self._an_eighth if peer.is_proven else 0):
            return f"has {peer.quarantined} blocks of failed requests in quarantine"
        if not peer.is_proven and peer.trial is not None:
            return f"has delivered no rows yet, and only room {peer.trial} may try"
        return ""
