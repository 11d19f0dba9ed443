"""Untrusted XML: expat without document types, and small parts as trees. Names lose their namespace prefixes."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import IO, Final
from xml.parsers import expat

import msgspec

from embedding_relay.batch.errors import TooLarge, Unreadable
from embedding_relay.batch.workbook.container import CheckedStream

CHUNK: Final = 2**16
MOST_DIGITS: Final = 12
MOST_TOKEN: Final = 2**23
MOST_NODES: Final = 2_000_000

Start = Callable[[str, dict[str, str]], object]


class Node(msgspec.Struct):
    name: str
    attributes: dict[str, str]
    children: list[Node] = msgspec.field(default_factory=list)
    text: str = ""

    def below(self, *names: str) -> Iterator[Node]:
        """All descendants of these names, in the order of the document."""
        waiting = [self]
        while waiting:
            node = waiting.pop()
            if node.name in names and node is not self:
                yield node
            waiting.extend(reversed(node.children))

    def child(self, name: str) -> Node | None:
        return next((node for node in self.children if node.name == name), None)


def local(name: str) -> str:
    return name.rpartition(":")[2]


def whole_number(text: str) -> int | None:
    """A count in an attribute; None if it is no number, or longer than any count."""
    text = text.strip()
    return int(text) if text.isdecimal() and len(text) < MOST_DIGITS else None


class Parser:
    """expat for one part. A tag or comment without an end is refused early: expat scans it anew for each chunk."""

    def __init__(
        self,
        what: str,
        start: Start | None = None,
        end: Callable[[str], object] | None = None,
        text: Callable[[str], object] | None = None,
    ) -> None:
        self._what = what
        self._fed = 0
        self._expat = expat.ParserCreate()
        self._expat.buffer_text = True
        self._expat.StartDoctypeDeclHandler = self._refuse_types
        self._expat.StartElementHandler = start
        self._expat.EndElementHandler = end
        self._expat.CharacterDataHandler = text

    @property
    def position(self) -> int:
        """Where the tag begins that a handler is called for. An empty element ends behind its only tag."""
        return self._expat.CurrentByteIndex

    def feed(self, chunk: bytes) -> None:
        self._parse(chunk, False)
        self._fed += len(chunk)
        if self._fed - self._expat.CurrentByteIndex > MOST_TOKEN:
            raise Unreadable(f"the workbook is damaged: {self._what} holds a tag without an end")

    def close(self) -> None:
        self._parse(b"", True)

    def read(self, stream: IO[bytes] | CheckedStream) -> None:
        for chunk in chunks(stream):
            self.feed(chunk)
        self.close()

    def _parse(self, chunk: bytes, final: bool) -> None:
        try:
            self._expat.Parse(chunk, final)
        except expat.ExpatError as error:
            where = f"line {error.lineno}, column {error.offset + 1}"
            raise Unreadable(f"the workbook is damaged: {self._what} is not well-formed at {where}") from None

    def _refuse_types(self, *_: object) -> None:
        raise Unreadable(f"{self._what} declares a document type, which no spreadsheet program writes")


def chunks(stream: IO[bytes] | CheckedStream) -> Iterator[bytes]:
    while chunk := stream.read(CHUNK):
        yield chunk


def tree(content: bytes, what: str) -> Node:
    """A whole part in memory; for parts that are small, so never for sheets."""
    root = Node("", {})
    open_nodes = [root]
    count = 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if count > MOST_NODES:
            raise TooLarge(f"{what} in the file holds more than {MOST_NODES} elements")
        node = Node(local(name), {local(key): value for key, value in attributes.items()})
        open_nodes[-1].children.append(node)
        open_nodes.append(node)

    def end(_: str) -> None:
        open_nodes.pop()

    def text(data: str) -> None:
        open_nodes[-1].text += data

    Parser(what, start, end, text).read(io.BytesIO(content))
    return root.children[0]
