"""The files of all sessions in an object store, for workers on machines that share no file system (`--files`).

Each machine works on its own copies; what is there counts. Before files are read, those that this machine lacks, or has
in another size, are brought; after they were written, they are kept, and only then is it said that they are saved. No
file changes once it is there, but for the results of a run, which grow: they are kept in pieces, each named by where it
begins.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from embedding_relay.batch.errors import NotWhatWasSaved

logger = logging.getLogger(__name__)

# What differs between kinds of places. Listings are never remembered: other machines write as well.
OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "s3": {"config_kwargs": {"connect_timeout": 5, "read_timeout": 60}},
    "file": {"auto_mkdir": True},
    "local": {"auto_mkdir": True},
}
PIECE: Final = re.compile(r"(results\.\d+\.jsonl)/(\d{15})")
RESULTS: Final = re.compile(r"results\.\d+\.jsonl")
MANIFEST: Final = "manifest.json"
CHUNK: Final = 2**22


class FilesAway(OSError):
    """The object store cannot be reached, or does not let us in, just now."""

    def __init__(self, why: str) -> None:
        super().__init__(errno.EIO, f"the object store with the files of the sessions {why}")


class Mirror:
    """Of folders that are named by `owner`: a session's id, or "files" for what clients of OpenAI's API upload."""

    def __init__(self, filesystem: Any, base: str) -> None:
        self._fs = filesystem
        self._base = base.rstrip("/")

    @classmethod
    def open(cls, url: str) -> Mirror:
        """Any URL that fsspec knows. Raises ValueError if it cannot be one, FilesAway if it cannot be used."""
        try:
            import fsspec

            options = OPTIONS.get(url.partition(":")[0], {})
            filesystem, base = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
        except ImportError:
            extra = "pip install 'sglang-embedding-relay[s3]', or what fsspec needs for another kind of place"
            raise ValueError(f"--files {url}: {extra}") from None
        except Exception as error:
            logger.debug("batch: %s: %s", url, error)
            raise ValueError(f"--files {url}: this is no place that fsspec can use, like s3://BUCKET/FOLDER") from None
        mirror = cls(filesystem, base)
        mirror.check()
        return mirror

    def check(self) -> None:
        """That it can be written and read."""
        path = f"{self._base}/.check"
        try:
            with _mapped():
                self._fs.pipe_file(path, b"written when a service starts\n")
                self._fs.cat_file(path)
        except FileNotFoundError:
            raise FilesAway("does not exist: make its bucket first") from None

    # ---- from there

    def bring(self, owner: str, folder: Path, patterns: Iterable[str]) -> None:
        """What is there under these names, and not in `folder`, or in another size."""
        there = self.sizes(owner, patterns)
        pieces: dict[str, dict[int, int]] = {}
        missing = dict[str, int]()
        for name, size in there.items():
            if piece := PIECE.fullmatch(name):
                pieces.setdefault(piece[1], {})[int(piece[2])] = size
            elif _size_here(folder / name) != size:
                missing[name] = size
        self._fetch(owner, folder, missing)
        for name, begins in pieces.items():
            self._append(owner, folder / name, begins)

    def sizes(self, owner: str, patterns: Iterable[str]) -> dict[str, int]:
        prefix, patterns = f"{self._base}/{owner}/", list(patterns)
        if not any("*" in pattern for pattern in patterns):
            return {name: size for name in patterns if (size := self._size(f"{prefix}{name}")) is not None}
        with _mapped():
            found = self._listed(prefix, [pattern.partition("/")[0] for pattern in patterns])
        names = {path.lstrip("/").removeprefix(prefix.lstrip("/")): size for path, size in found.items()}
        return {name: size for name, size in names.items() if _is_one_of(name, patterns)}

    def _listed(self, prefix: str, names: list[str]) -> dict[str, int]:
        """What is there under these names. Folders of other names are not read: there can be thousands of pictures."""
        found: dict[str, int] = {}
        try:
            entries = self._fs.ls(prefix.rstrip("/"), detail=True)
        except FileNotFoundError:
            return found
        for entry in entries:
            path = entry["name"].rstrip("/")
            if not _is_one_of(path.rpartition("/")[2], names):
                continue
            if entry["type"] == "directory":
                below = self._fs.find(path, detail=True)
                found |= {one: int(info["size"]) for one, info in below.items()}
            else:
                found[path] = int(entry["size"])
        return found

    def _size(self, path: str) -> int | None:
        with contextlib.suppress(FileNotFoundError), _mapped():
            return int(self._fs.info(path)["size"])
        return None

    def _fetch(self, owner: str, folder: Path, sizes: dict[str, int]) -> None:
        """Each beside its place first, so that a file that is there is a whole one."""
        names = list(sizes)
        if not names:
            return
        mark = secrets.token_hex(4)
        partial = {name: (folder / name).with_name(f".{Path(name).name}.{mark}") for name in names}
        for path in partial.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _mapped():
                places = [f"{self._base}/{owner}/{name}" for name in names]
                self._fs.get(places, [str(path) for path in partial.values()])
            for name, size in sizes.items():
                if _size_here(partial[name]) != size:
                    raise FilesAway(f"sent only a part of {name}")
            for name in sorted(names, key=_manifests_last):
                partial[name].rename(folder / name)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / names[0])) from None
        finally:
            for path in partial.values():  # a download that broke off, which may have filled the disk
                path.unlink(missing_ok=True)

    def _append(self, owner: str, path: Path, begins: dict[int, int]) -> None:
        """The pieces that `path` lacks. This machine's own results may be ahead of what is kept of them."""
        whole = max(begin + size for begin, size in begins.items())
        if path.exists() and path.stat().st_size >= whole:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = path.stat().st_size
            if size >= whole:
                return
            size = max((begin for begin in begins if begin <= size), default=0)
            file.truncate(size)
            for begin in sorted(begin for begin in begins if begin >= size):
                with _mapped():
                    file.write(self._fs.cat_file(f"{self._base}/{owner}/{path.name}/{begin:015}"))

    # ---- to there

    def keep(self, owner: str, folder: Path, patterns: Iterable[str], verified: bool = False) -> None:
        """What is in `folder` under these names, and not there, or in another size: an upload may have broken off.

        With `verified` it is read back from there.
        """
        patterns = list(patterns)
        there = self.sizes(owner, patterns)
        here = _files_in(folder, patterns)
        for name in filter(RESULTS.fullmatch, here):
            pieces = [piece for piece in map(PIECE.fullmatch, there) if piece and piece[1] == name]
            self.keep_results(
                owner, folder / name, max((int(piece[2]) + there[piece[0]] for piece in pieces), default=0)
            )
        whole = [name for name in here if not RESULTS.fullmatch(name)]
        new = sorted((name for name in whole if there.get(name) != _size_here(folder / name)), key=_manifests_last)
        # A manifest says that all other files are there, so it comes when they are.
        for group in (
            [name for name in new if not _manifests_last(name)],
            [name for name in new if _manifests_last(name)],
        ):
            if group:
                with _mapped():
                    places = [f"{self._base}/{owner}/{name}" for name in group]
                    self._fs.put([str(folder / name) for name in group], places)
        if not new:
            return
        there = self.sizes(owner, patterns)
        for name in new:
            if there.get(name) != _size_here(folder / name) or (verified and not self._same(owner, folder, name)):
                raise NotWhatWasSaved(f"{folder / name} is not what was saved")

    def _same(self, owner: str, folder: Path, name: str) -> bool:
        with (
            (folder / name).open("rb") as here,
            _mapped(),
            self._fs.open(f"{self._base}/{owner}/{name}", "rb") as there,
        ):
            while content := here.read(CHUNK):
                if there.read(len(content)) != content:
                    return False
        return True

    def keep_results(self, owner: str, path: Path, begin: int) -> int:
        """What has come after the first `begin` bytes, which are there; returns up to where it is there now.

        Whole lines only: what is behind the last one is still being written. It lists nothing, so that it may be called
        often.
        """
        if not path.exists():
            return begin  # its session was deleted meanwhile
        with path.open("rb") as file:
            file.seek(begin)
            rest = file.read()
        if whole := rest[: rest.rfind(b"\n") + 1]:
            with _mapped():
                self._fs.pipe_file(f"{self._base}/{owner}/{path.name}/{begin:015}", whole)
        return begin + len(whole)

    # ---- away with it

    def remove(self, owner: str, names: Iterable[str] | None = None) -> None:
        places = [f"{self._base}/{owner}"] if names is None else [f"{self._base}/{owner}/{name}" for name in names]
        for place in places:
            with contextlib.suppress(FileNotFoundError), _mapped():
                self._fs.rm(place, recursive=True)

    def sweep(self, owners: str, older_than: float, is_known: Callable[[str], bool]) -> None:
        """Remove what is below `owners`, was last written before `older_than` seconds, and belongs to nobody known."""
        now = time.time()
        with contextlib.suppress(FileNotFoundError), _mapped():
            for path in self._fs.ls(f"{self._base}/{owners}", detail=False):
                files = self._fs.find(path) or [path]
                if not is_known(path.rstrip("/").rpartition("/")[2]) and all(
                    now - self._fs.modified(file).timestamp() > older_than for file in files
                ):
                    self._fs.rm(path, recursive=True)


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _size_here(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _manifests_last(name: str) -> bool:
    return name.endswith(f"/{MANIFEST}")


def _files_in(folder: Path, patterns: list[str]) -> list[str]:
    """Whole ones: what is still being written has another name."""
    if not any("*" in pattern for pattern in patterns):
        return [name for name in patterns if (folder / name).is_file()]
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    whole = [str(path) for path in found if not any(part[0] == "." or ".part" in part for part in path.parts)]
    return [name for name in whole if _is_one_of(name, patterns)]


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    """What the libraries of object stores raise is their own business: here it is one error, with a reason of ours."""
    try:
        yield
    except FileNotFoundError:
        raise
    except PermissionError as error:
        logger.warning("batch: the object store: %s", error)
        raise FilesAway("refuses access: are its keys set?") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        logger.warning("batch: the object store: %s: %s", type(error).__name__, error)
        raise FilesAway("cannot be reached") from error
