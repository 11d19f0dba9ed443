"""An .xlsx file as a whole: its sheets, its texts, which of its numbers are dates."""

from __future__ import annotations

import array
import contextlib
import os
import posixpath
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, NamedTuple

from embedding_relay.batch.errors import TooLarge, Unreadable
from embedding_relay.batch.workbook.container import Container, open_container
from embedding_relay.batch.workbook.limits import Limits
from embedding_relay.batch.workbook.xlsx.markup import Node, Parser, local, tree, whole_number

# How Excel writes a character that XML cannot hold, and an underscore that would look like such.
ESCAPED: Final = re.compile(r"_x([0-9A-Fa-f]{4})_")
# More than a sheet of a million rows and fifty columns has cells.
MOST_TEXTS: Final = 50_000_000
ROOT_RELATIONS: Final = "_rels/.rels"


class SheetPart(NamedTuple):
    name: str
    member: str
    hidden: bool


class Relation(NamedTuple):
    kind: str  # the last word of its type: "worksheet", "drawing"
    target: str  # a member of the container, or a URL
    external: bool


class Book:
    """Made by `open_book`."""

    def __init__(self, container: Container, texts: Texts) -> None:
        self.container = container
        self.texts = texts
        self.part = self._main_part()
        workbook = self.parse(self.part)
        properties = workbook.child("workbookPr")
        self.from_1904 = properties is not None and properties.attributes.get("date1904") in ("1", "true", "on")
        relations = self.relations(self.part)
        self.sheets = list(self._sheets(workbook, relations))
        self.date_styles, self.duration_styles = self._styles(self._related(relations, "styles"))

    def parse(self, member: str) -> Node:
        return tree(self.container.read(member, self.container.limits.part_bytes), member)

    def relations(self, member: str) -> dict[str, Relation]:
        """What a part refers to, by the ids that it uses."""
        folder, name = posixpath.split(member)
        found = self.container.find(posixpath.join(folder, "_rels", f"{name}.rels"))
        if found is None:
            return {}
        relations = {}
        for node in self.parse(found).below("Relationship"):
            target = node.attributes.get("Target", "")
            external = node.attributes.get("TargetMode") == "External"
            if not external:
                target = posixpath.normpath(posixpath.join("/", folder, target.replace("\\", "/"))).lstrip("/")
                target = self.container.find(target) or ""
            kind = node.attributes.get("Type", "").rpartition("/")[2]
            relations[node.attributes.get("Id", "")] = Relation(kind, target, external)
        return relations

    def _main_part(self) -> str:
        root = self.container.find(ROOT_RELATIONS)
        if root is not None:
            for relation in self.parse(root).below("Relationship"):
                if relation.attributes.get("Type", "").endswith("/officeDocument"):
                    target = self.container.find(relation.attributes.get("Target", ""))
                    if target is not None:
                        return target
        part = self.container.find("xl/workbook.xml")
        if part is None:
            raise Unreadable("the workbook is damaged: its main part is missing")
        return part

    def _related(self, relations: dict[str, Relation], kind: str) -> str | None:
        return next((relation.target for relation in relations.values() if relation.kind == kind), None) or None

    def _sheets(self, workbook: Node, relations: dict[str, Relation]) -> Iterator[SheetPart]:
        for node in workbook.below("sheet"):
            relation = relations.get(node.attributes.get("id", ""))
            # Sheets that are nothing but a chart have no cells.
            if relation is not None and relation.kind == "worksheet" and relation.target:
                hidden = node.attributes.get("state", "visible") != "visible"
                yield SheetPart(node.attributes.get("name", ""), relation.target, hidden)

    def _styles(self, member: str | None) -> tuple[set[int], set[int]]:
        """The numbers of the cell styles that show a number as a date, and as a duration."""
        dates: set[int] = set()
        durations: set[int] = set()
        if member is None:
            return dates, durations
        # openpyxl takes a sixth of a second to import; other kinds of workbooks do not need it.
        from openpyxl.styles.numbers import BUILTIN_FORMATS, is_date_format, is_timedelta_format

        styles = self.parse(member)
        own = {
            node.attributes.get("numFmtId"): node.attributes.get("formatCode", "") for node in styles.below("numFmt")
        }
        formats = styles.child("cellXfs")
        for index, style in enumerate(formats.children if formats is not None else ()):
            number = style.attributes.get("numFmtId", "0")
            code = own.get(number) or BUILTIN_FORMATS.get(whole_number(number) or 0, "General")
            if is_timedelta_format(code):
                durations.add(index)
            elif is_date_format(code):
                dates.add(index)
        return dates, durations


class Texts:
    """The texts that cells refer to by number, kept in a file: they may be larger than memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._ends = array.array("Q", [0])

    def add(self, text: str) -> None:
        if len(self._ends) > MOST_TEXTS:
            raise TooLarge(f"the workbook holds more than {MOST_TEXTS} texts")
        content = text.encode("utf-8", "replace")
        self._file.write(content)
        self._ends.append(self._ends[-1] + len(content))

    def complete(self) -> None:
        self._file.flush()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise Unreadable(f"the workbook is damaged: a cell refers to text {index} of {len(self)}")
        begin = self._ends[index]
        return os.pread(self._file.fileno(), self._ends[index + 1] - begin, begin).decode()


def find_sheet(book: Book, name: str) -> SheetPart:
    for sheet in book.sheets:
        if sheet.name == name:
            return sheet
    there = ", ".join(sheet.name for sheet in book.sheets) or "none"
    raise Unreadable(f"the workbook has no sheet {name!r}; there are: {there}")


@contextlib.contextmanager
def open_book(source: Path, limits: Limits) -> Iterator[Book]:
    with open_container(source, limits) as container, tempfile.TemporaryFile() as file:
        book = Book(container, Texts(file))
        main = book.relations(book.part)
        member = next((relation.target for relation in main.values() if relation.kind == "sharedStrings"), None)
        if member:
            read_texts(container, member, book.texts)
        yield book


def read_texts(container: Container, member: str, texts: Texts) -> None:
    pieces: list[str] = []
    wanted = False
    aside = size = 0  # depth within phonetic hints, which are not part of the text

    def start(name: str, _: dict[str, str]) -> None:
        nonlocal wanted, aside, size
        match local(name):
            case "si":
                pieces.clear()
                size = 0
            case "rPh":
                aside += 1
            case "t":
                wanted = not aside

    def end(name: str) -> None:
        nonlocal wanted, aside
        match local(name):
            case "si":
                texts.add(unescaped("".join(pieces)))
            case "rPh":
                aside -= 1
            case "t":
                wanted = False

    def data(text: str) -> None:
        nonlocal size
        if wanted:
            pieces.append(text)
            size += len(text)
            if size > container.limits.cell_chars:
                raise TooLarge(f"a text of the workbook is longer than {container.limits.cell_chars} characters")

    with container.stream(member) as stream:
        Parser(member, start, end, data).read(stream)
    texts.complete()


def unescaped(text: str) -> str:
    if "_x" not in text:
        return text
    return ESCAPED.sub(lambda found: chr(int(found.group(1), 16)), text)


def escaped(text: str) -> str:
    """What a spreadsheet shows as `text`, for it takes `_x0041_` for a character."""
    return ESCAPED.sub(lambda found: f"_x005F_{found.group()[1:]}", text)
