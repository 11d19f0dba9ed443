"""Where charts, pictures and shapes lie over a sheet, and the columns beside them in which answers can be seen."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from embedding_relay.batch.workbook.xlsx.markup import Node, Parser, chunks, local, whole_number
from embedding_relay.batch.workbook.xlsx.sheet import MOST_COLUMNS, MOST_ROWS, Area

if TYPE_CHECKING:
    from embedding_relay.batch.workbook.xlsx.book import Book

# Lengths in drawings are in EMU, of which a pixel has so many.
PIXEL: Final = 9525
# A digit of Excel's usual font, and a column that nobody has made wider or narrower, in pixels.
DIGIT: Final = 7
USUAL_WIDTH: Final = 64


def beside(width: int, columns: int, rows: tuple[int, int], covered: Iterable[Area]) -> int:
    """The first column from `width` on from which `columns` of them are free in these rows, both ends included.

    When there are none, `width`: a drawing over the whole sheet leaves no better place.
    """
    first = width
    for area in sorted(covered, key=lambda area: area.first_column):
        shares_rows = area.first_row <= rows[1] and area.last_row >= rows[0]
        if shares_rows and area.first_column < first + columns and area.last_column >= first:
            first = area.last_column + 1
    return first if first + columns <= MOST_COLUMNS else width


def find_covered(book: Book, sheet: str) -> list[Area]:
    """A rectangle for each drawing. Where a drawing does not say how far down it reaches, to the end of the sheet."""
    edges = functools.cache(lambda: column_edges(book, sheet))
    found = list[Area]()
    for relation in book.relations(sheet).values():
        if relation.kind == "drawing" and relation.target:
            for anchor in book.parse(relation.target).below("twoCellAnchor", "oneCellAnchor", "absoluteAnchor"):
                if (area := _area(anchor, edges)) is not None:
                    found.append(area)
    return found


def _area(anchor: Node, edges: Callable[[], list[int]]) -> Area | None:
    begin, end, extent = anchor.child("from"), anchor.child("to"), anchor.child("ext")
    if begin is not None and end is not None:
        # The corner is an offset into its cell; a drawing that ends at offset 0 does not touch that cell.
        last_row = _number(end, "row") + (_number(end, "rowOff") > 0)
        last_column = _number(end, "col") - (_number(end, "colOff") == 0)
        return _checked(Area(_number(begin, "row") + 1, _number(begin, "col"), last_row, last_column))
    if extent is None:
        return None
    position = anchor.child("pos")
    if begin is not None:
        row, column = _number(begin, "row") + 1, min(_number(begin, "col"), MOST_COLUMNS - 1)
        left = (edges()[column - 1] if column else 0) + _number(begin, "colOff")
    elif position is not None:
        row, left = 1, whole_number(position.attributes.get("x", "")) or 0
        column = bisect.bisect_right(edges(), left)
    else:
        return None
    right = left + (whole_number(extent.attributes.get("cx", "")) or 0)
    return _checked(Area(row, column, MOST_ROWS, bisect.bisect_left(edges(), right)))


def _checked(area: Area) -> Area:
    return area._replace(
        last_row=max(area.first_row, area.last_row), last_column=max(area.first_column, area.last_column)
    )


def _number(corner: Node, name: str) -> int:
    node = corner.child(name)
    return (whole_number(node.text) if node is not None else None) or 0


def column_edges(book: Book, sheet: str) -> list[int]:
    """Where each column ends, from the left edge of the sheet."""
    usual = USUAL_WIDTH
    widths = dict[int, int]()
    reached = 0
    done = False

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal usual, reached, done
        match local(name):
            case "sheetFormatPr" if not done:
                usual = _pixels(attributes.get("defaultColWidth", ""), USUAL_WIDTH)
            case "col" if not done:
                hidden = attributes.get("hidden") in ("1", "true", "on")
                width = 0 if hidden else _pixels(attributes.get("width", ""), usual)
                first, last = (whole_number(attributes.get(key, "")) or 0 for key in ("min", "max"))
                # They ascend. In a file made by hand they may not, and the same columns could be named without end.
                for column in range(max(first, reached + 1), min(last, MOST_COLUMNS) + 1):
                    widths[column - 1] = width
                reached = max(reached, min(last, MOST_COLUMNS))
            case "sheetData":
                done = True

    with book.container.stream(sheet) as stream:
        parser = Parser(sheet, start)
        for chunk in chunks(stream):
            parser.feed(chunk)
            if done:
                break
    return list(itertools.accumulate(widths.get(column, usual) * PIXEL for column in range(MOST_COLUMNS)))


def _pixels(width: str, otherwise: int) -> int:
    """Of a width in characters, as Excel rounds it."""
    try:
        characters = float(width)
    except ValueError:
        return otherwise
    # Excel allows 255 characters; the rest is a number made up by hand, or none.
    return int((256 * characters + 128 // DIGIT) / 256 * DIGIT) if 0 <= characters <= 255 else otherwise
