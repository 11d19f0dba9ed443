"""What somebody uploaded: its kind, told by its content, and the parts of a zip file unpacked under names of ours."""

from __future__ import annotations

import re
import shutil
import stat
import zipfile
from pathlib import Path, PurePosixPath
from typing import Final

import msgspec

from embedding_relay.batch.errors import TooLarge, Unreadable
from embedding_relay.batch.workbook.analysis import Kind
from embedding_relay.batch.workbook.container import Container, open_container, verify
from embedding_relay.batch.workbook.images import INDEX, SUFFIXES, UPLOADED, UploadIndex, normalized_path
from embedding_relay.batch.workbook.limits import MIB, Limits

WORKBOOKS: Final = ("xlsx", "xlsm", "csv", "tsv", "jsonl", "ndjson")
# Looked for only to say what is wrong with them.
OTHER_WORKBOOKS: Final = ("xls", "xlsb", "ods", "numbers", "zip")
DRIVE: Final = re.compile(r"[A-Za-z]:")
UTF8_NAME: Final = 0x800
# What zip programs of other countries write without saying so.
OTHER_ENCODINGS: Final = ("utf-8", "gb18030", "cp932")
INNER: Final = "source.part"
HEAD: Final = 2**16
ZIP: Final = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")
OLD_OFFICE: Final = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
ENCRYPTED_MARK: Final = "EncryptedPackage".encode("utf-16-le")
# First bytes of files that people send by mistake.
MISTAKES: Final = (
    (b"%PDF", "a PDF document"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"GIF8", "a picture"),
    (b"RIFF", "a picture or a sound"),
    (b"\x1f\x8b", "a gzip file: unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive: use a .zip file"),
    (b"Rar!", "a RAR archive: use a .zip file"),
    (b"{\\rtf", "a text document"),
)
WANTED: Final = "send an .xlsx, .csv or .jsonl file, or a .zip file of one of them and its pictures"


def receive(upload: Path, name: str, folder: Path, limits: Limits) -> tuple[Kind, Path]:
    """Bring `upload` to its place in `folder`; `name` is what its sender calls it, a hint and never a path."""
    size = upload.stat().st_size
    if size > limits.upload_bytes:
        raise TooLarge(f"the file is larger than {limits.upload_bytes // MIB} MiB")
    with upload.open("rb") as file:
        head = file.read(HEAD)
    if head.startswith(ZIP):
        with open_container(upload, limits) as container:
            if is_bundle(container):
                inner, inner_name = unpack(container, folder)
            else:
                check_workbook(container)
                return "xlsx", moved(upload, folder, "xlsx")
        kind = kind_of_inner(inner, inner_name, limits)
        path = moved(inner, folder, kind)
        upload.unlink()
        return kind, path
    kind = kind_of_text(upload, head, name)
    return kind, moved(upload, folder, kind)


def moved(path: Path, folder: Path, kind: Kind) -> Path:
    place = folder / f"source.{kind}"
    shutil.move(path, place)
    return place


def kind_of_inner(path: Path, name: str, limits: Limits) -> Kind:
    """The workbook of a zip file."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not head.startswith(ZIP):
        return kind_of_text(path, head, name)
    with open_container(path, limits) as container:
        if is_bundle(container):
            raise Unreadable(f"{name} is no workbook: a zip file within a zip file is not opened")
        check_workbook(container)
    return "xlsx"


def is_bundle(container: Container) -> bool:
    """Whether a zip file is one that a person made, and not a document of some program."""
    find = container.find
    return not (find("[Content_Types].xml") or find("mimetype") or find("Index/Document.iwa") or find("Index.zip"))


def check_workbook(container: Container) -> None:
    find = container.find
    if find("mimetype"):
        raise Unreadable("the file is an OpenDocument: save it as .xlsx")
    if find("Index/Document.iwa") or find("Index.zip"):
        raise Unreadable("the file is a document of Numbers: export it as .xlsx")
    if find("xl/workbook.bin"):
        raise Unreadable("the file is a binary workbook (.xlsb): save it as .xlsx")
    for part, what in (("word/document.xml", "a Word document"), ("ppt/presentation.xml", "a presentation")):
        if find(part):
            raise Unreadable(f"the file is {what}: {WANTED}")
    verify(container)


def kind_of_text(path: Path, head: bytes, name: str) -> Kind:
    suffix = PurePosixPath(name.replace("\\", "/")).suffix.casefold()
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start:
        raise Unreadable("the file is empty")
    if head.startswith(OLD_OFFICE):
        if ENCRYPTED_MARK in path.read_bytes():
            raise Unreadable("the workbook is protected by a password: save it without one")
        raise Unreadable("the file is an old Office document (.xls): save it as .xlsx")
    for mark, what in MISTAKES:
        if head.startswith(mark):
            raise Unreadable(f"the file is {what}; {WANTED}")
    if suffix in (".xlsx", ".xlsm", ".zip"):
        raise Unreadable(f"the file is called {suffix} and is none: it is damaged, or another program's file")
    if start.startswith(b"<"):
        raise Unreadable(f"the file is a web page or XML, whatever it is called; {WANTED}")
    if suffix in (".jsonl", ".ndjson") or begins_with_object(path):
        return "jsonl"
    if start.startswith(b"[") and suffix == ".json":
        raise Unreadable("the file is one JSON list: write one object per line (.jsonl)")
    return "csv"


def begins_with_object(path: Path) -> bool:
    with path.open("rb") as file:
        for line in file:
            text = line.removeprefix(b"\xef\xbb\xbf").strip()
            if text:
                break
        else:
            return False
    if not text.startswith(b"{"):
        return False
    try:
        return isinstance(msgspec.json.decode(text), dict)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


# ---- a zip file that a person made: one workbook and its pictures


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
