"""Files of sessions in an object store: what one machine keeps, another one brings; nothing half, nothing twice.

On a directory of this machine, which stands for the object store: the protocol of S3 is spoken in the service lane.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from embedding_relay.batch.errors import NotWhatWasSaved
from embedding_relay.batch.store.mirror import FilesAway, Mirror
from embedding_relay.batch.store.opening import open_mirror

ONE = "sessions/0123456789abcdef"
EVERYTHING = ["*"]


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def mirror(there: Path) -> Mirror:
    return Mirror.open(f"file://{there}")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here"


def written(folder: Path, **files: bytes) -> None:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_one_machine_keeps_another_brings(mirror: Mirror, here: Path, tmp_path: Path) -> None:
    written(here, source_csv=b"a", tasks_1__000000_jsonl=b"b", tasks_1__manifest_json=b"c", answers_1_csv=b"d")
    mirror.keep(ONE, here, ["source.*", "tasks.*"], verified=True)
    mirror.bring(ONE, tmp_path / "other", EVERYTHING)
    assert content_of(tmp_path / "other") == {
        "source.csv": b"a",
        "tasks.1/000000.jsonl": b"b",
        "tasks.1/manifest.json": b"c",
    }
    mirror.bring("sessions/another", tmp_path / "third", EVERYTHING)
    assert not (tmp_path / "third").exists()


def test_only_what_was_asked_for_is_brought_and_what_is_here_stays(mirror: Mirror, here: Path, tmp_path: Path) -> None:
    written(here, source_csv=b"there", answers_1_csv=b"x", answers_2_csv=b"y")
    mirror.keep(ONE, here, EVERYTHING)
    written(tmp_path / "other", source_csv=b"local")
    mirror.bring(ONE, tmp_path / "other", ["source.*", "answers.2.csv"])
    assert content_of(tmp_path / "other") == {"source.csv": b"local", "answers.2.csv": b"y"}
    assert mirror.sizes(ONE, ["answers.1.csv", "answers.3.csv"]) == {"answers.1.csv": 1}


def test_what_is_here_in_another_size_is_brought_again(mirror: Mirror, here: Path, tmp_path: Path) -> None:
    """A disk that was full, or somebody else, has left a part of it."""
    written(here, source_csv=b"the whole file")
    mirror.keep(ONE, here, EVERYTHING)
    written(tmp_path, other__source_csv=b"the whole")
    mirror.bring(ONE, tmp_path / "other", EVERYTHING)
    assert content_of(tmp_path / "other") == {"source.csv": b"the whole file"}


def test_an_upload_that_broke_off_is_made_again(mirror: Mirror, here: Path, there: Path) -> None:
    """Where the place shows files before they are whole. Without it the rest would never be there."""
    written(here, answers_1_csv=b"the whole file", answers_2_csv=b"whole")
    written(there / ONE, answers_1_csv=b"the whole", answers_2_csv=b"whole")
    mirror.keep(ONE, here, EVERYTHING, verified=True)
    assert content_of(there / ONE) == {"answers.1.csv": b"the whole file", "answers.2.csv": b"whole"}


def test_a_download_that_breaks_off_leaves_nothing(
    mirror: Mirror, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(here, source_csv=b"a whole file", tasks_1__000000_jsonl=b"b")
    mirror.keep(ONE, here, EVERYTHING)
    filesystem: Any = mirror._fs

    def break_off(_there: list[str], here: list[str]) -> None:
        for path in here:
            Path(path).write_bytes(b"a")
        raise OSError(errno.EIO, "remote end closed")

    monkeypatch.setattr(filesystem, "get", break_off)
    with pytest.raises(FilesAway, match="cannot be reached"):
        mirror.bring(ONE, tmp_path / "other", EVERYTHING)
    assert content_of(tmp_path / "other") == {}
    monkeypatch.undo()
    mirror.bring(ONE, tmp_path / "other", EVERYTHING)
    assert content_of(tmp_path / "other") == content_of(here)


def test_a_download_that_is_too_short_is_none(
    mirror: Mirror, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(here, source_csv=b"a whole file")
    mirror.keep(ONE, here, EVERYTHING)
    filesystem: Any = mirror._fs
    monkeypatch.setattr(filesystem, "get", lambda there, here: [Path(path).write_bytes(b"a whole") for path in here])
    with pytest.raises(FilesAway, match=r"sent only a part of source\.csv"):
        mirror.bring(ONE, tmp_path / "other", EVERYTHING)
    assert content_of(tmp_path / "other") == {}


def test_only_folders_that_can_hold_it_are_listed(
    mirror: Mirror, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session may have pictures by the thousand, each thousand of them a page of the listing."""
    written(here, source_csv=b"a", tasks_1__000000_jsonl=b"b", results_1_jsonl=b"c\n", pictures__1_png=b"d")
    mirror.keep(ONE, here, EVERYTHING)
    listed = list[str]()
    filesystem: Any = mirror._fs
    real = filesystem.find
    monkeypatch.setattr(filesystem, "find", lambda path, **how: (listed.append(path), real(path, **how))[1])
    mirror.bring(ONE, tmp_path / "other", ["source.*", "tasks.*", "results.*.jsonl*"])
    assert content_of(tmp_path / "other") == {
        "source.csv": b"a",
        "tasks.1/000000.jsonl": b"b",
        "results.1.jsonl": b"c\n",
    }
    assert sorted(path.rpartition("/")[2] for path in listed) == ["results.1.jsonl", "tasks.1"]


def test_results_that_come_in_are_kept_without_a_listing(
    mirror: Mirror, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filesystem: Any = mirror._fs

    def listing(*_: object, **__: object) -> None:
        raise AssertionError("something was listed")

    path, kept = here / "results.1.jsonl", 0
    with monkeypatch.context() as patched:
        for name in ("ls", "find", "info"):
            patched.setattr(filesystem, name, listing)
        for text, end in ((b"1\n2", 2), (b"1\n2\n", 4), (b"1\n2\n", 4), (b"1\n2\n3\n", 6)):
            path.write_bytes(text)
            kept = mirror.keep_results(ONE, path, kept)
            assert kept == end
    assert sorted(mirror.sizes(ONE, EVERYTHING)) == [f"results.1.jsonl/{begin:015}" for begin in (0, 2, 4)]
    mirror.bring(ONE, tmp_path / "other", EVERYTHING)
    assert content_of(tmp_path / "other") == {"results.1.jsonl": b"1\n2\n3\n"}
    path.unlink()
    assert mirror.keep_results(ONE, path, kept) == kept, "its session was deleted meanwhile"


def test_what_is_still_being_written_is_not_kept(mirror: Mirror, here: Path) -> None:
    written(here, upload_part=b"x", answers_1_part_csv=b"x", tasks_1_part__000000_jsonl=b"x", source_csv=b"x")
    (here / ".source.csv.1a2b").write_bytes(b"x")
    mirror.keep(ONE, here, EVERYTHING)
    assert mirror.sizes(ONE, EVERYTHING) == {"source.csv": 1}


def test_results_grow_in_pieces_of_whole_lines(mirror: Mirror, here: Path, tmp_path: Path) -> None:
    other, name = tmp_path / "other", "results.1.jsonl"
    for text, kept in ((b"1\n2\n3", b"1\n2\n"), (b"1\n2\n3\n", b"1\n2\n3\n"), (b"1\n2\n3\n4\n5", b"1\n2\n3\n4\n")):
        (here / name).write_bytes(text)
        mirror.keep(ONE, here, ["results.*.jsonl*"])
        mirror.bring(ONE, other, ["results.*.jsonl*"])
        assert (other / name).read_bytes() == kept
    assert sorted(mirror.sizes(ONE, EVERYTHING)) == [f"{name}/{begin:015}" for begin in (0, 4, 6)]
    mirror.bring(ONE, here, ["results.*.jsonl*"])
    assert (here / name).read_bytes() == b"1\n2\n3\n4\n5", "whoever writes them is ahead"


def test_results_that_a_crash_has_cut_here_are_completed(mirror: Mirror, here: Path, tmp_path: Path) -> None:
    for text in (b"first\n", b"first\nsecond\n"):
        written(here, results_7_jsonl=text)
        mirror.keep(ONE, here, EVERYTHING)
    for cut in (0, 3, 6, 9):
        written(tmp_path, other__results_7_jsonl=b"first\nsecond\n"[:cut])
        mirror.bring(ONE, tmp_path / "other", EVERYTHING)
        assert (tmp_path / "other" / "results.7.jsonl").read_bytes() == b"first\nsecond\n"


def test_a_manifest_comes_when_all_else_is_there(mirror: Mirror, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put = list[list[str]]()
    filesystem: Any = mirror._fs
    real = filesystem.put
    monkeypatch.setattr(filesystem, "put", lambda here, there: (put.append(there), real(here, there)))
    written(here, tasks_1__manifest_json=b"c", tasks_1__z_jsonl=b"b", tasks_1__a_jsonl=b"a")
    mirror.keep(ONE, here, EVERYTHING)
    assert [[path.rpartition("/")[2] for path in group] for group in put] == [["a.jsonl", "z.jsonl"], ["manifest.json"]]


@pytest.mark.parametrize("wrong", [b"", b"other"])
def test_what_is_not_there_as_it_was_written_is_not_saved(
    mirror: Mirror, here: Path, monkeypatch: pytest.MonkeyPatch, wrong: bytes
) -> None:
    filesystem: Any = mirror._fs
    monkeypatch.setattr(filesystem, "put", lambda here, there: [filesystem.pipe_file(path, wrong) for path in there])
    written(here, answers_1_csv=b"right")
    with pytest.raises(NotWhatWasSaved, match=r"answers\.1\.csv is not what was saved"):
        mirror.keep(ONE, here, EVERYTHING, verified=True)


def test_remove_takes_one_session_and_no_other(mirror: Mirror, here: Path, there: Path) -> None:
    written(here, source_csv=b"a")
    for owner in (ONE, "sessions/another"):
        mirror.keep(owner, here, EVERYTHING)
    mirror.remove(ONE)
    mirror.remove(ONE)
    assert set(content_of(there)) == {".check", "sessions/another/source.csv"}


def test_the_sweep_takes_what_is_old_and_unknown(mirror: Mirror, here: Path, there: Path) -> None:
    written(here, source_csv=b"a")
    for name in ("known", "old", "young"):
        mirror.keep(f"sessions/{name}", here, EVERYTHING)
    for name in ("known", "old"):
        os.utime(there / "sessions" / name / "source.csv", (time.time() - 2000, time.time() - 2000))
    mirror.sweep("sessions", 1000, {"known"}.__contains__)
    mirror.sweep("files", 1000, {"known"}.__contains__)
    assert {path.name for path in (there / "sessions").iterdir() if list(path.iterdir())} == {"known", "young"}


# ---- places that are none, and trouble


class Broken:
    """Of a filesystem as much as these tests use; every call raises what libraries raise."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def ls(self, path: str, detail: bool) -> list[dict[str, Any]]:
        raise self._error

    def pipe_file(self, path: str, content: bytes) -> None:
        raise self._error


class LibraryError(Exception):
    """As the libraries of S3 have: no OSError."""


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (LibraryError("Could not connect to the endpoint URL"), "cannot be reached"),
        (OSError(errno.EIO, "remote end closed"), "cannot be reached"),
        (PermissionError("403"), "refuses access"),
    ],
)
def test_errors_of_libraries_are_one_error_of_ours(here: Path, error: Exception, says: str) -> None:
    mirror = Mirror(Broken(error), "bucket")
    for use in (mirror.check, lambda: mirror.bring(ONE, here, EVERYTHING)):
        with pytest.raises(FilesAway, match=f"the object store with the files of the sessions {says}"):
            use()


def test_a_bucket_that_is_not_there() -> None:
    with pytest.raises(FilesAway, match="does not exist: make its bucket first"):
        Mirror(Broken(FileNotFoundError("The specified bucket does not exist")), "bucket").check()


@pytest.mark.parametrize(
    ("url", "says"), [("nonsense://a", "no place that fsspec can use"), ("adl://a/b", "pip install")]
)
def test_a_place_that_is_none(url: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Mirror.open(url)


def test_without_a_place_there_is_no_mirror() -> None:
    assert open_mirror("") is None


@pytest.fixture(autouse=True)
def _new_filesystems() -> Iterator[None]:
    """fsspec hands out one object for all who ask for the same place."""
    yield
    fsspec.AbstractFileSystem.clear_instance_cache()
