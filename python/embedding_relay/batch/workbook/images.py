"""The pictures of a row: what a cell can say (URL, data URI, path in the upload), and embedded ones saved as files."""

from __future__ import annotations

import binascii
import hashlib
import io
import os
import re
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final

import msgspec

from embedding_relay.batch.workbook.cells import Cell
from embedding_relay.batch.workbook.container import Container
from embedding_relay.batch.workbook.limits import MIB, Limits
from embedding_relay.batch.workbook.url_rules import UrlRules

UPLOADED: Final = "uploaded"
INDEX: Final = "index.json"
SUFFIXES: Final = ("png", "jpg", "jpeg", "jfif", "gif", "webp", "bmp", "tif", "tiff", "avif")
IS_URL: Final = re.compile(r"https?://", re.IGNORECASE)
IS_DATA: Final = re.compile(r"data:", re.IGNORECASE)
PICTURE_URL: Final = re.compile(rf"https?://[^?#]*\.({'|'.join(SUFFIXES)})([?#].*)?", re.IGNORECASE | re.DOTALL)
PICTURE_DATA: Final = re.compile(r"data:image/", re.IGNORECASE)
PICTURE_PATH: Final = re.compile(rf"[^\n]{{1,400}}\.({'|'.join(SUFFIXES)})", re.IGNORECASE)
# Several pictures in one cell: a line each, or URLs behind blanks, commas or semicolons.
BETWEEN: Final = re.compile(r"\s*[\r\n]+\s*|[\s,;|]+(?=https?://)", re.IGNORECASE)
PICTURES: Final = "pictures"
SHOWN: Final = 120
SCHEME: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:")
DATA_HEAD: Final = re.compile(r"data:image/[^;,]+;base64,", re.IGNORECASE)
# What may be sent to the endpoint, by Pillow's names, and the suffixes of the files.
FORMATS: Final = {
    "PNG": "png",
    "JPEG": "jpg",
    "MPO": "jpg",
    "GIF": "gif",
    "WEBP": "webp",
    "BMP": "bmp",
    "TIFF": "tif",
    "AVIF": "avif",
}


def split_references(text: str) -> list[str]:
    return [part.strip().rstrip(",;|") for part in BETWEEN.split(text.strip()) if part.strip(" ,;|\t")]


def is_picture(text: str) -> bool:
    """Whether it can hardly be anything else."""
    return bool(PICTURE_URL.match(text) or PICTURE_DATA.match(text) or PICTURE_PATH.fullmatch(text))


def is_reference(text: str) -> bool:
    """Whether it could be a picture, in a column that is called so."""
    return bool(IS_URL.match(text)) or is_picture(text)


def normalized_path(path: str) -> str:
    """One spelling for the same path: slashes, no leading "./", composed letters."""
    path = unicodedata.normalize("NFC", path.strip()).replace("\\", "/")
    return "/".join(part for part in path.split("/") if part not in ("", "."))


class UploadIndex(msgspec.Struct, frozen=True):
    """Which pictures came along in a zip file: their paths there, and the names of their files here."""

    base: str = ""  # the workbook's directory in the zip file, where relative paths begin
    files: dict[str, str] = {}


class Uploaded:
    """The uploaded pictures, by what cells call them."""

    def __init__(self, index: UploadIndex) -> None:
        self._base = index.base
        self._exact = index.files
        self._folded: dict[str, str] = {}
        self._by_name: dict[str, list[tuple[str, str]]] = {}
        for path, file in index.files.items():
            self._folded.setdefault(path.casefold(), file)
            self._by_name.setdefault(path.casefold().rpartition("/")[2], []).append((path.casefold(), file))

    def __len__(self) -> int:
        return len(self._exact)

    def find(self, path: str) -> str | None:
        """The file, relative to the session's folder: beside the workbook, from the top, or where only one fits."""
        path = normalized_path(path)
        beside = normalized_path(f"{self._base}/{path}")
        folded = path.casefold()
        file = self._exact.get(beside) or self._exact.get(path)
        file = file or self._folded.get(beside.casefold()) or self._folded.get(folded)
        if file is None:
            named = self._by_name.get(folded.rpartition("/")[2], [])
            fitting = {found for whole, found in named if f"/{whole}".endswith(f"/{folded}")}
            file = fitting.pop() if len(fitting) == 1 else None
        return None if file is None else f"{UPLOADED}/{file}"


def load_uploaded(folder: Path) -> Uploaded:
    try:
        content = (folder / UPLOADED / INDEX).read_bytes()
    except FileNotFoundError:
        return Uploaded(UploadIndex())
    return Uploaded(msgspec.json.decode(content, type=UploadIndex))


# ---- as a task refers to them


class NoImage(Exception):
    """A row names a picture that cannot be used; the message says why."""


def picture_format(file: IO[bytes]) -> str:
    """What kind of picture it is, by its header; NoImage if it is none."""
    from PIL import Image  # only workbooks with pictures need it

    try:
        with Image.open(file) as picture:
            kind = FORMATS.get(picture.format or "")
    except Exception as error:  # Pillow's readers raise anything at a malformed file
        if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
            raise NoImage("the picture has too many pixels") from None
        raise NoImage("it is not a picture that can be read") from None
    if kind is None:
        raise NoImage("it is a picture of a kind that cannot be asked about: use PNG or JPEG")
    return kind


class ImageFinder:
    """Remembers what it has looked at: a picture in a thousand rows is saved and examined once."""

    def __init__(self, folder: Path, container: Container | None, limits: Limits, urls: UrlRules) -> None:
        self._folder = folder
        self._container = container
        self._limits = limits
        self._urls = urls
        self._uploaded = load_uploaded(folder)
        self._known: dict[str, str | NoImage] = {}
        self._by_content: dict[bytes, str] = {}

    def find(self, cell: Cell) -> list[str]:
        """The pictures in a cell, over it, and named by its text, as a task refers to them."""
        saved = [self._once(f"member {member}", self._extract, member) for member in cell.pictures]
        return saved + [self._named(reference) for reference in split_references(cell.text)]

    def _once(self, key: str, make: Callable[[str], str], argument: str) -> str:
        if key not in self._known:
            try:
                self._known[key] = make(argument)
            except NoImage as error:
                self._known[key] = error
        known = self._known[key]
        if isinstance(known, NoImage):
            raise NoImage(str(known))
        return known

    def _named(self, reference: str) -> str:
        if IS_DATA.match(reference):
            return checked_data(reference, self._limits)
        file = self._uploaded.find(reference) if len(reference) < 1000 else None
        if file is not None:
            return self._once(f"file {file}", self._examined, file)
        if SCHEME.match(reference):
            if why := self._urls.refusal(reference):
                raise NoImage(f"{reference[:SHOWN]}: {why}")
            # SGLang recognises a URL by its scheme in lower case.
            scheme, _, rest = reference.partition(":")
            return f"{scheme.lower()}:{rest}"
        raise NoImage(
            f"the picture {reference[:SHOWN]!r} is not in the upload: "
            "put the workbook and its pictures into one .zip file"
        )

    def _examined(self, file: str) -> str:
        with (self._folder / file).open("rb") as content:
            picture_format(content)
        return file

    def _extract(self, member: str) -> str:
        assert self._container is not None
        if self._container.members[member].file_size > self._limits.picture_bytes:
            raise NoImage(f"the picture is larger than {self._limits.picture_bytes // MIB} MiB")
        content = self._container.read(member, self._limits.picture_bytes)
        digest = hashlib.sha256(content).digest()
        if digest not in self._by_content:
            kind = picture_format(io.BytesIO(content))
            # Named by its content, so that a look at the first rows and a split, which may read another sheet or other
            # columns, never give one name to two pictures.
            name = f"{PICTURES}/{digest.hex()[:32]}.{kind}"
            self._save(name, content)
            self._by_content[digest] = name
        return self._by_content[digest]

    def _save(self, name: str, content: bytes) -> None:
        """As one step, for another worker may be doing the same."""
        (self._folder / PICTURES).mkdir(exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=self._folder / PICTURES)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(partial, self._folder / name)


def checked_data(reference: str, limits: Limits) -> str:
    head = DATA_HEAD.match(reference)
    if head is None:
        raise NoImage('a data URI must begin with "data:image/…;base64,"')
    encoded = "".join(reference[head.end() :].split())
    try:
        content = binascii.a2b_base64(encoded, strict_mode=True)
    except (binascii.Error, ValueError):
        raise NoImage("the data URI is not correct base64: was the cell cut?") from None
    if len(content) > limits.picture_bytes:
        raise NoImage(f"the picture is larger than {limits.picture_bytes // MIB} MiB")
    picture_format(io.BytesIO(content))
    return head.group().lower() + encoded
