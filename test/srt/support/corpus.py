"""The files of hostile messages: what stands in them, with the words in braces replaced."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

CORPUS = Path(__file__).resolve().parent.parent / "relay" / "fuzz" / "corpus"

_REPEATED = re.compile(rb"\{(\d+)\*(.+?)\}", re.DOTALL)
_ESCAPED = re.compile(rb"\\(x[0-9a-f]{2}|n|\\)")


class Line(NamedTuple):
    is_message: bool
    frames: list[bytes]


def read_corpus(file: Path, words: Mapping[str, bytes]) -> list[Line]:
    return [_line(line, words) for line in file.read_bytes().split(b"\n") if line and not line.startswith(b"#")]


def _line(line: bytes, words: Mapping[str, bytes]) -> Line:
    kind, _, rest = line.partition(b" ")
    assert kind in (b"+", b"-"), line
    return Line(kind == b"+", [_frame(part.strip(b" "), words) for part in rest.split(b"|")] if rest else [])


def _frame(text: bytes, words: Mapping[str, bytes]) -> bytes:
    frame = _ESCAPED.sub(_unescaped, text)
    frame = _REPEATED.sub(lambda match: match[2] * int(match[1]), frame)
    for name, value in words.items():
        frame = frame.replace(b"{%s}" % name.encode(), value)
    return frame


def _unescaped(match: re.Match[bytes]) -> bytes:
    what = match[1]
    return {b"n": b"\n", b"\\": b"\\"}.get(what) or bytes([int(what[1:], 16)])
