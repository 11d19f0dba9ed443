"""Where the pictures of a sheet are: floating over it, placed in cells by Excel, named by formulas of WPS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from embedding_relay.batch.workbook.xlsx.markup import Node, whole_number

if TYPE_CHECKING:
    from embedding_relay.batch.workbook.xlsx.book import Book

ANCHORS: Final = ("oneCellAnchor", "twoCellAnchor")

Item = TypeVar("Item")


class SheetPictures(msgspec.Struct, frozen=True):
    """All values are members of the container."""

    floating: Mapping[int, Mapping[int, Sequence[str]]] = {}  # by row (from 1), then column (from 0)
    placed: Sequence[str | None] = ()  # by the number that a cell gives as its value's metadata, less one
    named: Mapping[str, str] = {}

    def in_cell(self, metadata: str) -> str | None:
        number = whole_number(metadata)
        return self.placed[number - 1] if number is not None and 1 <= number <= len(self.placed) else None


def find_pictures(book: Book, sheet: str) -> SheetPictures:
    return SheetPictures(find_floating(book, sheet), find_placed(book), find_named(book))


def find_floating(book: Book, sheet: str) -> dict[int, dict[int, list[str]]]:
    """Pictures by their upper left corners."""
    floating: dict[int, dict[int, list[str]]] = {}
    for relation in book.relations(sheet).values():
        if relation.kind != "drawing" or not relation.target:
            continue
        targets = picture_targets(book, relation.target)
        for anchor in book.parse(relation.target).below(*ANCHORS):
            corner = anchor.child("from")
            row, column = (_integer(corner, name) for name in ("row", "col"))
            members = [
                targets[key] for node in anchor.below("blip") if (key := node.attributes.get("embed")) in targets
            ]
            # A drawing may say the same twice, for programs of different age.
            for member in dict.fromkeys(members):
                if row is not None and column is not None:
                    floating.setdefault(row + 1, {}).setdefault(column, []).append(member)
    return floating


def find_placed(book: Book) -> list[str | None]:
    """Excel's "Place in Cell": from a cell's metadata over rich values to the picture, one table after the other."""
    parts = [
        book.container.find(f"xl/{name}")
        for name in ("metadata.xml", "richData/rdrichvalue.xml", "richData/richValueRel.xml")
    ]
    structures_part = book.container.find("xl/richData/rdrichvaluestructure.xml")
    if None in parts or structures_part is None:
        return []
    metadata, values_part, relations_part = (part for part in parts if part is not None)
    keys = [[key.attributes.get("n") for key in s.below("k")] for s in book.parse(structures_part).below("s")]
    targets = picture_targets(book, relations_part)
    pictures = [targets.get(node.attributes.get("id", "")) for node in book.parse(relations_part).below("rel")]
    values = [_picture_of_value(value, keys, pictures) for value in book.parse(values_part).below("rv")]
    return _values_of_metadata(book.parse(metadata), values)


def _picture_of_value(value: Node, keys: list[list[str | None]], pictures: list[str | None]) -> str | None:
    structure = value.attributes.get("s", "")
    names = _item(keys, structure) or []
    for name, node in zip(names, value.below("v"), strict=False):
        if name == "_rvRel:LocalImageIdentifier":
            return _item(pictures, node.text.strip())
    return None


def _values_of_metadata(metadata: Node, values: list[str | None]) -> list[str | None]:
    types = [node.attributes.get("name", "") for node in metadata.below("metadataType")]
    rich = next(
        (node for node in metadata.below("futureMetadata") if node.attributes.get("name") == "XLRICHVALUE"), None
    )
    blocks: list[str | None] = []
    for block in rich.children if rich is not None else ():
        found = next(block.below("rvb"), None) if block.name == "bk" else None
        if block.name == "bk":
            blocks.append(None if found is None else _item(values, found.attributes.get("i", "")))
    placed: list[str | None] = []
    table = metadata.child("valueMetadata")
    for block in table.children if table is not None else ():
        record = block.child("rc")
        picture = None
        if record is not None:
            kind = whole_number(record.attributes.get("t", ""))
            # The type is counted from one, the value from zero.
            if kind and kind <= len(types) and types[kind - 1] == "XLRICHVALUE":
                picture = _item(blocks, record.attributes.get("v", ""))
        placed.append(picture)
    return placed


def find_named(book: Book) -> dict[str, str]:
    part = book.container.find("xl/cellimages.xml")
    if part is None:
        return {}
    targets = picture_targets(book, part)
    named = {}
    for picture in book.parse(part).below("pic"):
        properties, blip = next(picture.below("cNvPr"), None), next(picture.below("blip"), None)
        if properties is not None and blip is not None and (target := targets.get(blip.attributes.get("embed", ""))):
            named[properties.attributes.get("name", "")] = target
    return named


def picture_targets(book: Book, part: str) -> dict[str, str]:
    relations = book.relations(part)
    return {key: found.target for key, found in relations.items() if found.target and not found.external}


def _integer(node: Node | None, name: str) -> int | None:
    found = node.child(name) if node is not None else None
    return whole_number(found.text) if found is not None else None


def _item(items: Sequence[Item], index: str) -> Item | None:
    number = whole_number(index)
    return items[number] if number is not None and number < len(items) else None
