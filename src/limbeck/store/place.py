"""Place: where a store lies. A folder, or a URL that fsspec reads (`s3://bucket/store`). Captures are written to folders only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from limbeck.errors import StoreError


def is_url(path: str) -> bool:
    return "://" in path


class Place:
    """Reads the files of a store by name. `folder` is None behind a URL."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.folder = None if is_url(self.path) else Path(os.path.expanduser(self.path))
        self._fs: Any = None
        self._root = ""
        if self.folder is None:
            with self._named("store"):
                from fsspec.core import url_to_fs

                self._fs, self._root = url_to_fs(self.path)

    def __str__(self) -> str:
        return self.path

    def file(self, name: str) -> str:
        """A file as messages name it."""
        return str(self.folder / name) if self.folder else f"{self.path.rstrip('/')}/{name}"

    def size(self, name: str) -> int | None:
        """Bytes of a file; None where there is no such file."""
        with self._named(name):
            if self.folder:
                file = self.folder / name
                return file.stat().st_size if file.is_file() else None
            path = f"{self._root}/{name}"
            return int(self._fs.size(path)) if self._fs.isfile(path) else None

    def names(self) -> list[str]:
        """The names of all files."""
        with self._named("store"):
            if self.folder:
                return sorted(file.name for file in self.folder.iterdir() if file.is_file()) if self.folder.is_dir() else []
            found = self._fs.ls(self._root, detail=False) if self._fs.isdir(self._root) else []
            return sorted(str(name).rstrip("/").rpartition("/")[2] for name in found)

    def open(self, name: str) -> BinaryIO:
        """A file to read from, from any place in it."""
        with self._named(name):
            if self.folder:
                return open(self.folder / name, "rb")
            # no read-ahead: what is asked for are whole pieces, far from one another
            return self._fs.open(f"{self._root}/{name}", "rb", cache_type="none")  # type: ignore[no-any-return]

    def read(self, name: str) -> bytes:
        with self._named(name), self.open(name) as stream:
            return stream.read()

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Errors of the system or of a protocol's package, with the file's name."""
        try:
            yield
        except (OSError, ImportError, ValueError) as error:
            what = f"store {self.path!r}" if name == "store" else self.file(name)
            raise StoreError(f"{what}: cannot be read: {error}") from error
