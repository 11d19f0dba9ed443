"""A zip file that a person made: one workbook and its pictures, unpacked under names of ours."""

from __future__ import annotations

import re
import shutil
import stat
import zipfile
from pathlib import Path
from typing import Final

import msgspec

from embedding_relay.batch.refusals import TooLarge, Unreadable
from embedding_relay.batch.workbook.container import Container
from embedding_relay.batch.workbook.limits import MIB
from embedding_relay.batch.workbook.references import (
    INDEX,
    SUFFIXES,
    UPLOADED,
    UploadIndex,
    normalized_path,
)

WORKBOOKS: Final = ("xlsx", "xlsm", "csv", "tsv", "jsonl", "ndjson")
# Looked for only to say what is wrong with them.
OTHER_WORKBOOKS: Final = ("xls", "xlsb", "ods", "numbers", "zip")
DRIVE: Final = re.compile(r"[A-Za-z]:")
UTF8_NAME: Final = 0x800
# What zip programs of other countries write without saying so.
OTHER_ENCODINGS: Final = ("utf-8", "gb18030", "cp932")
INNER: Final = "source.part"


def unpack(container: Container, folder: Path) -> tuple[Path, str]:
    """Put the pictures into `folder`/uploaded and the workbook beside it; answers its place and its name."""
    members = {name: info for name, info in container.members.items() if is_wanted(info)}
    workbook = find_workbook(list(members))
    target = folder / UPLOADED
    target.mkdir()
    files: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for name, info in members.items():
        suffix = suffix_of(name)
        if suffix not in SUFFIXES:
            continue
        if info.file_size > container.limits.picture_bytes:
            raise TooLarge(f"{name} in the zip file is larger than {container.limits.picture_bytes // MIB} MiB")
        file = f"{len(files) + 1:06}.{suffix}"
        path = normalized_path(name)
        if path in files:
            raise Unreadable(f"the zip file holds {path!r} twice")
        files[path] = file
        aliases |= {normalized_path(other): file for other in other_names(info)}
        extract(container, name, target / file)
    base = normalized_path(workbook).rpartition("/")[0]
    (target / INDEX).write_bytes(msgspec.json.encode(UploadIndex(base, aliases | files)))
    extract(container, workbook, folder / INNER)
    return folder / INNER, workbook


def is_wanted(info: zipfile.ZipInfo) -> bool:
    """Whether a member is one at all; names that lead elsewhere are refused though none of them is used as a path."""
    name = info.filename
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or DRIVE.match(name) or "\0" in name:
        raise Unreadable(f"the zip file holds a name that leads out of it: {name!r}")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise Unreadable(f"the zip file holds a link: {name!r}")
    # What macOS and others leave behind.
    return not info.is_dir() and parts[0] != "__MACOSX" and not parts[-1].startswith((".", "~$"))


def find_workbook(names: list[str]) -> str:
    found = [name for name in names if suffix_of(name) in WORKBOOKS]
    if len(found) == 1:
        return found[0]
    if found:
        raise Unreadable(f"the zip file holds {len(found)} workbooks, and one is expected: {', '.join(found[:5])}")
    others = [name for name in names if suffix_of(name) in OTHER_WORKBOOKS]
    if others:
        raise Unreadable(f"the zip file holds {others[0]}, which cannot be read: save it as .xlsx")
    raise Unreadable("the zip file holds no workbook: put an .xlsx, .csv or .jsonl file beside the pictures")


def suffix_of(name: str) -> str:
    return name.rpartition("/")[2].rpartition(".")[2].casefold()


def other_names(info: zipfile.ZipInfo) -> list[str]:
    """What the name may have been before a program wrote it without naming its encoding."""
    if info.flag_bits & UTF8_NAME or info.filename.isascii():
        return []
    names = []
    for encoding in OTHER_ENCODINGS:
        try:
            names.append(info.filename.encode("cp437").decode(encoding))
        except UnicodeError:
            continue
    return names


def extract(container: Container, name: str, place: Path) -> None:
    """zipfile hands over no more than the stated size, and the sum of these was checked."""
    with container.stream(name) as stream, place.open("wb") as file:
        shutil.copyfileobj(stream, file, MIB)
