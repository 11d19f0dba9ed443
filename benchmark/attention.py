"""A vision tower on a CPU, with torch's own attention and with what an encode instance puts in its place.

    .venv/bin/python benchmark/attention.py [--families qwen2_5_vl qwen3_vl] [--sides 112 224 448 1120] [--quick]

SGLang's own towers of these families, tiny and with random weights, in one process with one thread. A picture of each
size goes through the tower in both ways by turns, and once more with its rows compared.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "test" / "srt"))
warnings.simplefilter("ignore")

import report  # noqa: E402
import torch  # noqa: E402
from report import Figures, Table  # noqa: E402

from support import scheduler, towers  # noqa: E402
from support.towers import Tower  # noqa: E402

Attention = contextlib.AbstractContextManager[object]


def milliseconds(tower: Tower, picture: Any, attention: Attention) -> float:
    with attention:
        began = time.perf_counter()
        tower([picture])
        return 1e3 * (time.perf_counter() - began)


def in_turns(tower: Tower, picture: Any, attention: Attention, rounds: int) -> tuple[Figures, Figures, Figures]:
    """In either way, and the ratios of single rounds."""
    plain, ours = [], []
    for _ in range(rounds):
        plain.append(milliseconds(tower, picture, contextlib.nullcontext()))
        ours.append(milliseconds(tower, picture, attention))
    return Figures.of(plain), Figures.of(ours), Figures.of(one / other for one, other in zip(ours, plain, strict=True))


def main() -> None:
    arguments = parsed()
    facts = report.machine()
    print(report.describe(facts))
    found = []
    with scheduler.serving("encode"):
        from sglang.srt.disaggregation.multimodal.masked_attention import MaskedAttention

        for family in arguments.families:
            table = Table(f"A tower of {family}, ms", "picture", "torch's own", "this plugin", "ratio", "equal bits")
            with towers.tower(family) as tower:
                for side in arguments.sides:
                    patches = side // tower.patch // 2 * 2
                    picture, attention = tower.picture(patches, patches), MaskedAttention()
                    expected = tower([picture])
                    with attention:
                        is_equal = all(torch.equal(tower([picture]), expected) for _ in range(2)) and attention.is_equal
                    rounds = 3 if arguments.quick or side > 600 else 40
                    figures = in_turns(tower, picture, attention, rounds)
                    table.row(f"{side}²", *figures, "yes" if is_equal else "no")
                    found.append({"family": family, "side": side, "figures": figures, "equal": is_equal})
    report.save(arguments.out, "attention", facts, found)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=towers.FAMILIES, default=list(towers.FAMILIES))
    parser.add_argument("--sides", type=int, nargs="+", default=[112, 224, 448, 1120])
    report.add_options(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sides = [112, 224]
    return arguments


if __name__ == "__main__":
    main()
