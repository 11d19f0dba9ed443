"""What a cell can say instead of holding a picture: a URL, a data URI, or the path of an uploaded file."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Final

import msgspec

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
