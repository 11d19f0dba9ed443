"""Zip files that were cut, changed, or made to expand without end."""

import struct
from pathlib import Path

import pytest

from embedding_relay.batch.errors import TooLarge, Unreadable
from embedding_relay.batch.workbook.limits import MIB, Limits
from embedding_relay.batch.workbook.upload import receive
from support.workbooks import book_members, save_book, save_zip, sheet_xml, text_cell

ROWS = [["prompt"], ["hello"]]


ROWS_XML = f"<row>{text_cell('', 'prompt')}</row><row>{text_cell('', 'hello')}</row>"


def book_bytes(tmp_path: Path) -> bytes:
    return save_book(tmp_path / "made.xlsx", ROWS).read_bytes()


def take(tmp_path: Path, content: bytes, name: str, limits: Limits | None = None) -> tuple[str, Path]:
    upload = tmp_path / "upload.part"
    upload.write_bytes(content)
    folder = tmp_path / "session"
    folder.mkdir()
    return receive(upload, name, folder, limits or Limits())


def test_a_cut_workbook_is_refused(tmp_path: Path) -> None:
    content = book_bytes(tmp_path)
    with pytest.raises(Unreadable, match="damaged"):
        take(tmp_path, content[: len(content) // 2], "a.xlsx")


def test_a_changed_member_is_found_at_once(tmp_path: Path) -> None:
    made = save_zip(tmp_path / "made", book_members(sheet_xml(ROWS_XML)))
    content = bytearray(made.read_bytes())
    content[content.index(b"sheet1.xml") + 20] ^= 0xFF
    with pytest.raises(Unreadable, match="damaged"):
        take(tmp_path, bytes(content), "a.xlsx")


def test_a_bomb_is_refused_by_what_it_declares(tmp_path: Path) -> None:
    made = save_zip(tmp_path / "made", book_members(" " * (3 * MIB)))
    with pytest.raises(TooLarge, match="expands to 3 MiB"):
        take(tmp_path, made.read_bytes(), "a.xlsx", Limits(expanded_bytes=2 * MIB))


def test_a_bomb_that_lies_about_its_size_expands_to_no_more(tmp_path: Path) -> None:
    made = save_zip(tmp_path / "made", book_members(" " * (3 * MIB)))
    content = made.read_bytes().replace(struct.pack("<L", 3 * MIB), struct.pack("<L", 10))
    with pytest.raises(Unreadable, match="damaged"):
        take(tmp_path, content, "a.xlsx", Limits(expanded_bytes=2 * MIB))


def test_too_many_members_are_refused(tmp_path: Path) -> None:
    made = save_zip(tmp_path / "made", {f"{index}.png": "" for index in range(11)})
    with pytest.raises(TooLarge, match="11 members"):
        take(tmp_path, made.read_bytes(), "a.zip", Limits(members=10))
