"""Requests with pictures, drawn from the published figures of a trace; and how many of them were answered in time.

The trace is ServeGen's `mm-image`: 35 clients in 24 hours. Its distributions are known by some of their quantiles; what
lies between two of them is interpolated geometrically. It does not say which pictures repeat, so that is asked for.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

Curve = Sequence[tuple[float, float]]
"""(share of the draws that are smaller, value); two values for one share are a step."""

PICTURES: Final[Curve] = (
    *((0, 1), (0.798, 1), (0.798, 2), (0.864, 2), (0.864, 3), (0.94, 3), (0.94, 4), (0.961, 4), (0.961, 5)),
    *((0.971, 5), (0.971, 6), (0.99, 9), (0.999, 40), (1, 40)),
)
PICTURE_TOKENS: Final[Curve] = (
    *((0, 32), (0.25, 234), (0.5, 540), (0.7, 1196), (0.855, 1196), (0.9, 1224), (0.99, 1271), (1, 1280)),
)
TEXT_TOKENS: Final[Curve] = ((0, 10), (0.5, 106), (0.75, 1032), (0.9, 1914), (0.99, 3064), (1, 4096))
OUTPUT_TOKENS: Final[Curve] = ((0, 10), (0.5, 100), (0.9, 264), (0.99, 587), (1, 1024))

# Of all requests, those of each client: 3 make 39 %, 10 make 83 %, 35 all of them.
SHARES: Final = (*[0.13] * 3, *[0.44 / 7] * 7, *[0.17 / 25] * 25)
# The coefficients of variation of the gaps between the requests of a client; which has which is not published.
LEAST_VARIATION, MOST_VARIATION = 0.2, 7.2

IN_TIME: Final = 2.0
"""A request is answered in time within so many times what it takes alone."""


class Picture(NamedTuple):
    number: int
    """Pictures of one number are the same picture."""
    tokens: int


class Request(NamedTuple):
    at: float
    """When it arrives, where one arrives in each unit of time in the mean."""
    pictures: tuple[Picture, ...]
    text: int
    output: int

    @property
    def media(self) -> int:
        """Tokens of all pictures."""
        return sum(picture.tokens for picture in self.pictures)


def requests(count: int, seed: int, reuse: float = 0.0, most_pictures: int = 40) -> list[Request]:
    """`reuse`: the share of pictures that an earlier request has shown."""
    dice = random.Random(seed)
    shown: list[Picture] = []
    drawn: list[Request] = []
    for at in arrivals(count, dice):
        number = min(most_pictures, draw(PICTURES, dice))
        pictures = tuple(_pictures(number, shown, reuse, dice))
        drawn.append(Request(at, pictures, draw(TEXT_TOKENS, dice), draw(OUTPUT_TOKENS, dice)))
        shown += [picture for picture in pictures if picture.number >= len(shown)]
    return drawn


def _pictures(count: int, shown: Sequence[Picture], reuse: float, dice: random.Random) -> Iterator[Picture]:
    new = itertools.count(len(shown))
    for _ in range(count):
        if dice.random() < reuse and shown:
            yield dice.choice(shown)
        else:
            yield Picture(next(new), draw(PICTURE_TOKENS, dice))


def draw(curve: Curve, dice: random.Random) -> int:
    share = dice.random()
    after = bisect.bisect_right(curve, share, key=lambda point: point[0])
    (low, smaller), (high, larger) = curve[after - 1], curve[after]
    return round(smaller * (larger / smaller) ** ((share - low) / (high - low)))


def arrivals(count: int, dice: random.Random) -> list[float]:
    """Of all clients together, from 0 on, with a mean gap of one. The gaps of each client are Gamma distributed."""
    places = [place / (len(SHARES) - 1) for place in range(len(SHARES))]
    dice.shuffle(places)
    times: list[float] = []
    for share, place in zip(SHARES, places, strict=True):
        variation = LEAST_VARIATION * (MOST_VARIATION / LEAST_VARIATION) ** place
        shape = variation**-2
        at = -count * dice.random()  # before the first that counts, or each client would begin with one
        while at < 2 * count:
            if at >= 0:
                times.append(at)
            at += dice.gammavariate(shape, 1 / (share * shape))
    first, *others = sorted(times)[: count + 1]
    unit = (others[-1] - first) / count
    return [(at - first) / unit for at in (first, *others[:-1])]


# ---- goodput


def in_time(seconds: Sequence[float | None], alone: Sequence[float]) -> list[bool]:
    """Which were; None is a request that failed. `alone`: what each takes when nobody else asks."""
    return [one is not None and one <= IN_TIME * limit for one, limit in zip(seconds, alone, strict=True)]


def goodput(seconds: Sequence[float | None], alone: Sequence[float], rate: float) -> float:
    """Requests per second that were answered in time, where `rate` arrived per second."""
    good = in_time(seconds, alone)
    return rate * sum(good) / len(good)
