"""Workbooks to test with: made by openpyxl, or by hand where openpyxl cannot make what programs write."""

import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import openpyxl
from openpyxl.drawing.image import Image as SheetImage
from PIL import Image

from embedding_relay.batch.tasks import Outcome, Result, Task
from embedding_relay.batch.workbook.analysis import Analysis, Choices, Kind
from embedding_relay.batch.workbook.analyze import analyze
from embedding_relay.batch.workbook.formats import check_answers, write_answers
from embedding_relay.batch.workbook.limits import Limits
from embedding_relay.batch.workbook.rows import read_tasks
from embedding_relay.batch.workbook.upload import receive
from embedding_relay.batch.workbook.url_rules import UrlRules

# Its own number, so that no name has to be looked up.
PICTURE_URL = "https://8.8.8.8/pictures/a.png"
NAMESPACE = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
RELATIONS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"

CONTENT_TYPES = (
    '<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
    '<Override PartName="/xl/workbook.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"/>'
    '<Override PartName="/xl/worksheets/sheet1.xml" '
    'ContentType="application/vnd.openxmlformats-officedocument.spreadsheetml.worksheet+xml"/></Types>'
)


class Received(NamedTuple):
    """An upload that has been received and analysed."""

    kind: Kind
    source: Path
    analysis: Analysis
    choices: Choices

    @property
    def folder(self) -> Path:
        return self.source.parent

    def tasks(self, urls: UrlRules | None = None, progress: list[float] | None = None) -> list[Task]:
        return list(
            read_tasks(
                self.source,
                self.kind,
                self.analysis,
                self.choices,
                self.folder,
                Limits(),
                urls or UrlRules(),
                (progress if progress is not None else []).append,
            )
        )

    def answered(self, results: Sequence[Result]) -> Path:
        out = self.folder / f"answers.{self.kind}"
        write_answers(self.source, self.kind, self.analysis, results, out)
        check_answers(out, self.kind, self.analysis, results)
        return out


def received(
    upload: Path, choices: Choices | None = None, limits: Limits | None = None, name: str = "", into: str = "session"
) -> Received:
    folder = upload.parent / into
    folder.mkdir()
    kind, source = receive(upload, name or upload.name, folder, limits or Limits())
    choices = choices or Choices()
    return Received(kind, source, analyze(source, kind, choices, limits or Limits()), choices)


def done(row: int, answer: str = "an answer", **others: Any) -> Result:
    return Result(row, Outcome.DONE, answer, prompt_tokens=3, completion_tokens=5, **others)


def picture(colour: str = "red", form: str = "PNG", size: int = 8) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(content, form)
    return content.getvalue()


def save_book(path: Path, rows: Iterable[Sequence[Any]], pictures: Mapping[str, bytes] | None = None) -> Path:
    """By openpyxl; `pictures` float over the cells that they are given for."""
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    for cell, content in (pictures or {}).items():
        book.active.add_image(SheetImage(io.BytesIO(content)), cell)
    book.save(path)
    return path


def save_zip(path: Path, members: Mapping[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def relations(kinds: Mapping[str, tuple[str, str]]) -> str:
    """By id: the last word of the type, and the target."""
    items = "".join(
        f'<Relationship Id="{key}" Type="{RELATIONS}/{kind}" Target="{target}"/>'
        for key, (kind, target) in kinds.items()
    )
    return (
        f'<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">{items}</Relationships>'
    )


def book_members(sheet: str | bytes, others: Mapping[str, bytes | str] | None = None) -> dict[str, bytes | str]:
    """The members of a workbook with one sheet, given as XML."""
    return {
        "[Content_Types].xml": CONTENT_TYPES,
        "_rels/.rels": relations({"rId1": ("officeDocument", "xl/workbook.xml")}),
        "xl/workbook.xml": f'<workbook xmlns="{NAMESPACE}" xmlns:r="{RELATIONS}"><sheets>'
        '<sheet name="Sheet1" sheetId="1" r:id="rId1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": relations({"rId1": ("worksheet", "worksheets/sheet1.xml")}),
        "xl/worksheets/sheet1.xml": sheet,
        **(others or {}),
    }


def sheet_xml(rows: str, before: str = "", after: str = "") -> str:
    return (
        f'<worksheet xmlns="{NAMESPACE}" xmlns:r="{RELATIONS}">{before}<sheetData>{rows}</sheetData>{after}</worksheet>'
    )


def text_cell(reference: str, text: str) -> str:
    place = f' r="{reference}"' if reference else ""
    return f'<c{place} t="inlineStr"><is><t>{text}</t></is></c>'


def save_sheet(path: Path, rows: str, before: str = "", after: str = "", **others: bytes | str) -> Path:
    """A workbook by hand, from the XML of its rows."""
    return save_zip(path, book_members(sheet_xml(rows, before, after), others))


def values(path: Path) -> list[tuple[Any, ...]]:
    """What openpyxl reads in the first sheet."""
    book = openpyxl.load_workbook(path)
    return list(book.worksheets[0].iter_rows(values_only=True))


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


# ---- a sheet with a column of pictures

RED, BLUE = picture("red"), picture("blue", "JPEG")


HEADER = f'<row r="1">{text_cell("A1", "prompt")}{text_cell("B1", "photo")}</row>'


def contents(book: Received, images: tuple[str, ...]) -> list[bytes]:
    return [(book.folder / image).read_bytes() for image in images]


# The parts of a workbook with two pictures that were placed in cells, as Excel writes them.
RICH = {
    "xl/metadata.xml": """<metadata xmlns="m" xmlns:xlrd="r"><metadataTypes count="2">
        <metadataType name="XLDAPR"/><metadataType name="XLRICHVALUE"/></metadataTypes>
        <futureMetadata name="XLRICHVALUE" count="2">
        <bk><extLst><ext uri="x"><xlrd:rvb i="0"/></ext></extLst></bk>
        <bk><extLst><ext uri="x"><xlrd:rvb i="1"/></ext></extLst></bk></futureMetadata>
        <cellMetadata count="1"><bk><rc t="1" v="0"/></bk></cellMetadata>
        <valueMetadata count="3"><bk><rc t="2" v="0"/></bk><bk><rc t="2" v="1"/></bk><bk><rc t="1" v="0"/></bk>
        </valueMetadata></metadata>""",
    "xl/richData/rdrichvaluestructure.xml": """<rvStructures xmlns="r" count="1"><s t="_localImage">
        <k n="_rvRel:LocalImageIdentifier" t="i"/><k n="CalcOrigin" t="i"/></s></rvStructures>""",
    "xl/richData/rdrichvalue.xml": """<rvData xmlns="r" count="2"><rv s="0"><v>1</v><v>5</v></rv>
        <rv s="0"><v>0</v><v>5</v></rv></rvData>""",
    "xl/richData/richValueRel.xml": """<richValueRels xmlns="r" xmlns:r="q"><rel r:id="rId1"/><rel r:id="rId2"/>
        </richValueRels>""",
    "xl/richData/_rels/richValueRel.xml.rels": relations(
        {"rId1": ("image", "../media/image1.png"), "rId2": ("image", "../media/image2.jpeg")}
    ),
    "xl/media/image1.png": RED,
    "xl/media/image2.jpeg": BLUE,
}


def placed(row: int, metadata: int) -> str:
    cell = f'<c r="B{row}" t="e" vm="{metadata}"><v>#VALUE!</v></c>'
    return f'<row r="{row}">{text_cell(f"A{row}", "what is it?")}{cell}</row>'
