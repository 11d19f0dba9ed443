"""What is accepted as an upload, told by its content, and what is refused with which sentence."""

import io
import stat
import zipfile
from pathlib import Path

import msgspec
import pytest

from embedding_relay.batch.errors import TooLarge, Unreadable
from embedding_relay.batch.workbook.images import INDEX, UPLOADED, load_uploaded
from embedding_relay.batch.workbook.limits import Limits
from embedding_relay.batch.workbook.upload import receive
from support.workbooks import picture, save_book, save_zip

ROWS = [["prompt"], ["hello"]]


def book_bytes(tmp_path: Path) -> bytes:
    return save_book(tmp_path / "made.xlsx", ROWS).read_bytes()


def take(tmp_path: Path, content: bytes, name: str, limits: Limits | None = None) -> tuple[str, Path]:
    upload = tmp_path / "upload.part"
    upload.write_bytes(content)
    folder = tmp_path / "session"
    folder.mkdir()
    return receive(upload, name, folder, limits or Limits())


# ---- zip files of a workbook and its pictures


def bundle(tmp_path: Path, members: dict[str, bytes]) -> bytes:
    return save_zip(tmp_path / "made.zip", members).read_bytes()


@pytest.mark.parametrize(
    ("content", "name", "kind"),
    [
        (b"prompt,image\nhello,\n", "table.csv", "csv"),
        (b"prompt\thello\n", "table.tsv", "csv"),
        (b"prompt\nhello\n", "no-suffix", "csv"),
        ("prompt\nhéllo\n".encode("utf-16"), "table.csv", "csv"),
        (b'{"prompt": "hello"}\n', "lines.jsonl", "jsonl"),
        (b'\xef\xbb\xbf\n {"prompt": "hello"}\n', "lines.txt", "jsonl"),
        (b'{"prompt": "hello"}\n', "wrong.csv", "jsonl"),
        (b"not json\n", "lines.jsonl", "jsonl"),
        (b"{curly},text\n", "table.csv", "csv"),
    ],
)
def test_texts_are_told_by_content_first(tmp_path: Path, content: bytes, name: str, kind: str) -> None:
    found, source = take(tmp_path, content, name)
    assert (found, source) == (kind, tmp_path / "session" / f"source.{kind}")
    assert source.read_bytes() == content
    assert not (tmp_path / "upload.part").exists()


@pytest.mark.parametrize("name", ["book.xlsx", "book.xlsm", "../../etc/passwd", "book.csv", "C:\\a\0b", ""])
def test_a_workbook_is_one_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    content = book_bytes(tmp_path)
    kind, source = take(tmp_path, content, name)
    assert (kind, source) == ("xlsx", tmp_path / "session/source.xlsx")
    assert source.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (b"", "a.csv", "empty"),
        (b" \n\n", "a.csv", "empty"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"x" * 600, "a.xls", "old Office"),
        (
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"x" * 600 + "EncryptedPackage".encode("utf-16-le"),
            "a.xlsx",
            "password",
        ),
        (b"%PDF-1.7\n", "a.pdf", "PDF"),
        (picture(), "a.png", "picture"),
        (picture(form="JPEG"), "a.csv", "picture"),
        (b"\x1f\x8b\x08\0", "a.csv.gz", "gzip"),
        (b"<html><table>", "a.xls", "web page"),
        (b"hello", "a.xlsx", "damaged"),
        (b'[{"prompt": "x"}]', "a.json", "one object per line"),
    ],
)
def test_what_is_no_workbook_is_named(tmp_path: Path, content: bytes, name: str, words: str) -> None:
    with pytest.raises(Unreadable, match=words):
        take(tmp_path, content, name)


@pytest.mark.parametrize(
    ("member", "words"),
    [
        ("mimetype", "OpenDocument"),
        ("Index/Document.iwa", "Numbers"),
        ("xl/workbook.bin", "xlsb"),
        ("word/document.xml", "Word"),
    ],
)
def test_other_programs_documents_are_named(tmp_path: Path, member: str, words: str) -> None:
    content = save_zip(tmp_path / "made", {"[Content_Types].xml": "", member: "x"}).read_bytes()
    with pytest.raises(Unreadable, match=words):
        take(tmp_path, content, "a.xlsx")


def test_too_large_is_said_before_it_is_read(tmp_path: Path) -> None:
    with pytest.raises(TooLarge, match="larger than 0 MiB"):
        take(tmp_path, b"x" * 100, "a.csv", Limits(upload_bytes=99))


@pytest.mark.parametrize(
    ("cell", "found"),
    [
        ("images/a.png", "red"),
        ("./images/a.png", "red"),
        ("images\\a.png", "red"),
        ("/images/a.png", "red"),
        ("IMAGES/A.PNG", "red"),
        ("images/A.png", "blue"),
        ("table/images/a.png", "red"),
        ("b.jpg", "green"),
        ("C:\\shop\\table\\images\\ü.png", None),
        ("images/ü.png", "yellow"),
        ("images/u\u0308.png", "yellow"),
        ("a.png", None),
        ("images/c.png", None),
        ("other", None),
    ],
)
def test_cells_find_the_pictures_of_the_zip_file(tmp_path: Path, cell: str, found: str | None) -> None:
    pictures = {
        "table/images/a.png": picture("red"),
        "table/images/A.png": picture("blue"),
        "elsewhere/b.jpg": picture("green", "JPEG"),
        "table/images/ü.png": picture("yellow"),
    }
    junk = {"__MACOSX/table/._rows.csv": b"", "table/.DS_Store": b"", "table/readme.txt": b"", "table/~$rows.xlsx": b""}
    kind, source = take(tmp_path, bundle(tmp_path, {"table/rows.csv": b"prompt\nhello\n", **pictures, **junk}), "a.zip")
    assert (kind, source.read_bytes()) == ("csv", b"prompt\nhello\n")
    file = load_uploaded(source.parent).find(cell)
    assert (file is None) == (found is None)
    if file is not None and found is not None:
        assert (source.parent / file).read_bytes() == picture(found, "JPEG" if found == "green" else "PNG")
    unpacked = {path.name for path in (source.parent / UPLOADED).iterdir()}
    assert unpacked == {"000001.png", "000002.png", "000003.jpg", "000004.png", INDEX}


def test_a_zip_file_may_hold_an_xlsx(tmp_path: Path) -> None:
    content = book_bytes(tmp_path)
    kind, source = take(tmp_path, bundle(tmp_path, {"a.xlsx": content, "a.png": picture()}), "a.zip")
    assert (kind, source.name, source.read_bytes()) == ("xlsx", "source.xlsx", content)


def test_names_that_an_old_program_wrote_in_its_own_encoding_are_found(tmp_path: Path) -> None:
    """Such a program wrote bytes and no word about them; zipfile takes them for a code page of 1981."""
    raw, written = "图片/一.png".encode("gb18030"), "XXXX/YY.png"
    content = bundle(tmp_path, {"rows.csv": b"prompt\nhello\n", written: picture()})
    assert len(raw) == len(written)
    _, source = take(tmp_path, content.replace(written.encode(), raw), "a.zip")
    assert load_uploaded(source.parent).find("图片/一.png") == f"{UPLOADED}/000001.png"


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"a.png": b""}, "no workbook"),
        ({"a.csv": b"x", "b.xlsx": b"x"}, "2 workbooks"),
        ({"a.xls": b"x"}, "a.xls, which cannot be read"),
        ({"a.csv": b"x", "../a.png": b""}, "leads out"),
        ({"a.csv": b"x", "/a.png": b""}, "leads out"),
        ({"a.csv": b"x", "b\\..\\..\\a.png": b""}, "leads out"),
        ({"a.csv": b"x", "C:a.png": b""}, "leads out"),
        ({"a.csv": b"x", "a.png": b"", "./a.png": b""}, "twice"),
        ({"a.csv": b"PK\x03\x04"}, "damaged"),
        ({"a.xlsx": b"x"}, "damaged"),
    ],
)
def test_zip_files_that_are_refused(tmp_path: Path, members: dict[str, bytes], words: str) -> None:
    with pytest.raises(Unreadable, match=words):
        take(tmp_path, bundle(tmp_path, members), "a.zip")


def test_a_zip_file_within_a_zip_file_is_not_opened(tmp_path: Path) -> None:
    inner = bundle(tmp_path, {"a.csv": b"prompt\nhello"})
    with pytest.raises(Unreadable, match="within a zip file"):
        take(tmp_path, bundle(tmp_path, {"a.xlsx": inner}), "a.zip")


def test_links_and_doubles_and_locks_are_refused(tmp_path: Path) -> None:
    def with_member(change: zipfile.ZipInfo, content: bytes) -> bytes:
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as file:
            file.writestr("a.csv", "prompt\nhello\n")
            file.writestr(change, content)
        return made.getvalue()

    link = zipfile.ZipInfo("a.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(Unreadable, match="link"):
        take(tmp_path, with_member(link, b"/etc/passwd"), "a.zip")
    double = with_member(zipfile.ZipInfo("b.csv"), b"x").replace(b"b.csv", b"a.csv")
    (tmp_path / "session").rmdir()
    with pytest.raises(Unreadable, match="twice"):
        take(tmp_path, double, "a.zip")
    locked = bytearray(with_member(zipfile.ZipInfo("a.png"), b"x"))
    directory = locked.rindex(b"PK\x01\x02")
    locked[directory + 8] |= 1
    (tmp_path / "session").rmdir()
    with pytest.raises(Unreadable, match="password"):
        take(tmp_path, bytes(locked), "a.zip")


def test_a_large_picture_is_refused_by_name(tmp_path: Path) -> None:
    content = bundle(tmp_path, {"a.csv": b"prompt\nx\n", "big.png": b"0" * 100})
    with pytest.raises(TooLarge, match=r"big\.png"):
        take(tmp_path, content, "a.zip", Limits(picture_bytes=99))


def test_the_index_is_json_that_another_worker_can_read(tmp_path: Path) -> None:
    _, source = take(tmp_path, bundle(tmp_path, {"d/a.csv": b"prompt\nx\n", "d/p/a.png": picture()}), "a.zip")
    index = msgspec.json.decode((source.parent / UPLOADED / INDEX).read_bytes())
    assert index == {"base": "d", "files": {"d/p/a.png": "000001.png"}}
