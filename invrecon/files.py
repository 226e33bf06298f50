"""Files that appear whole or not at all: written beside, synced, renamed."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import math
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from invrecon.errors import InputError

if TYPE_CHECKING:
    import h5py

TEMPORARY_SUFFIX = ".partial"
_REASONS = {
    errno.ENOSPC: "the disk is full: free some space or choose another --output",
    errno.EDQUOT: "the disk quota is used up: free some space or choose another --output",
    errno.EFBIG: "the file would be larger than allowed here: raise the limit or choose another --output",
    errno.EROFS: "the file system is read-only: choose another --output",
    errno.EACCES: "you may not write there: choose another --output",
    errno.EPERM: "you may not write there: choose another --output",
    errno.ENOTDIR: "a part of its path is a file, not a folder: choose another --output",
    errno.EEXIST: "a part of its path is a file, not a folder: choose another --output",
    errno.EISDIR: "a folder of that name is in the way: choose another --output",
    errno.ENAMETOOLONG: "its name is too long for this file system: shorten the case's file name",
}


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the same folder that becomes `path` on success and vanishes on failure.

    The temporary file is synced before `os.replace`, and its folder after, so a reader, a kill or a power cut
    finds the old file or the new one, never a part. Folders are created.

    Raises:
        InputError: The disk is full, a quota is used up, or the place cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:  # h5py reports a failed write as either
        code = _errno(error)
        if code not in _REASONS:
            raise
        raise InputError(f"Cannot write {path}: {_REASONS[code]}. Finished files are intact.") from error
    finally:
        with suppress(OSError):  # nothing to remove after the rename, or where the folder could not be made
            temporary.unlink()


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yields a binary file whose content appears at `path` as a whole when the block succeeds.

    Raises:
        InputError: As of `atomic_path`.
    """
    with atomic_path(path) as temporary, open(temporary, "xb") as file:
        yield file
        file.flush()


@contextmanager
def atomic_h5(path: str | os.PathLike[str]) -> Iterator[h5py.File]:
    """Yields an HDF5 file open for writing that appears at `path` as a whole when the block succeeds.

    Raises:
        InputError: As of `atomic_path`.
    """
    import h5py

    # HDF5's own file driver retries failed writes at close and at exit, which turns a full disk into a crash;
    # through a Python file object every failure is one OSError here.
    with atomic_path(path) as temporary, open(temporary, "x+b", buffering=0) as raw:
        guarded = _Guarded(raw)
        try:
            with h5py.File(guarded, "w") as file:
                yield file
        except Exception as error:
            raise guarded.failure or error  # noqa: B904
        if guarded.failure:
            raise guarded.failure


class _Guarded:
    """A file that remembers its first failure and then swallows writes, so that HDF5 can still close."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.raw = raw
        self.failure: OSError | None = None

    def _attempt(self, action: Any, *args: Any) -> Any:
        if self.failure is None:
            try:
                return action(*args)
            except OSError as error:
                self.failure = error
        return None

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        while len(rest) and self.failure is None:  # an unbuffered write may be short
            rest = rest[self._attempt(self.raw.write, rest) or 0 :]
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        self._attempt(self.raw.truncate, size)
        return size or 0

    def flush(self) -> None:
        self._attempt(self.raw.flush)

    def readinto(self, buffer: Any) -> int:
        return self.raw.readinto(buffer)  # type: ignore[attr-defined, no-any-return]

    def read(self, size: int = -1) -> bytes:
        return self.raw.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._attempt(self.raw.seek, offset, whence) or 0

    def tell(self) -> int:
        return self.raw.tell()


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes strict JSON, indented: NaN and infinities, which JSON has no word for, become null.

    Raises:
        InputError: As of `atomic_path`.
    """
    with atomic_write(path) as file:
        file.write((to_json(content, indent=2) + "\n").encode())


def to_json(content: Any, indent: int | None = None) -> str:
    """Strict JSON text of `content`; numbers of numpy and torch, and paths, are understood."""
    return json.dumps(_plain(content), indent=indent, ensure_ascii=False, allow_nan=False)


def read_csv(path: str | os.PathLike[str]) -> list[dict[str, str]]:
    """Returns what `write_csv` wrote, without the values that are absent; nothing where there is no such file."""
    if not Path(path).exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]


def write_csv(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]], fields: Sequence[str] = ()) -> None:
    """Writes one line a row under a header; absent values stay empty.

    Args:
        path: Where.
        rows: The rows; their keys need not agree.
        fields: Columns that come first; any further key of the rows follows in order of appearance.

    Raises:
        InputError: As of `atomic_path`.
    """
    import io

    rows = [{key: _plain(value, keep_nonfinite=True) for key, value in row.items()} for row in rows]
    header = list(dict.fromkeys([*fields, *(key for row in rows for key in row)]))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, header, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def sha256(path: str | os.PathLike[str]) -> str:
    """The file's SHA-256, in hexadecimal, read in blocks.

    Raises:
        InputError: The file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}; check the path and its permissions.") from error
    return digest.hexdigest()


def _plain(value: Any, keep_nonfinite: bool = False) -> Any:
    """`value` in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, keep_nonfinite) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item, keep_nonfinite) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if keep_nonfinite or math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy and torch
        return _plain(value.tolist(), keep_nonfinite)
    return str(value)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _errno(error: BaseException) -> int | None:
    """The error's number, also where h5py hides it in its message."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    return next((code for code in _REASONS if f"errno = {code}," in text), None)
