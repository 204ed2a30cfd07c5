"""Files that are whole or absent, and checksums that tell a damaged one.

`replacing` writes beside the target, makes the bytes durable and moves them into place in one step, so that a process
killed at any moment leaves the old file or the new one. `write_checked` puts a sha256 beside a file, in the format of
`sha256sum -c`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


class DamagedFileError(RuntimeError):
    """A file that is truncated or corrupt. The message names it."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on a clean exit it takes the place of `path` atomically and durably."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)  # the rename itself is durable only when its folder is
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_checked(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically by `write(temporary_path)`, with its checksum beside it.

    The checksum goes first: a file in place always has one, and one without its file means nothing.
    """
    with replacing(path) as temporary:
        write(temporary)
        write_text(checksum_path(path), f"{sha256(temporary)}  {path.name}\n")


def verify(path: Path) -> None:
    """Compare a file with its checksum.

    Raises:
        DamagedFileError: it is missing, has no checksum, or its bytes are not the ones that were written.
    """
    if not path.is_file():
        raise DamagedFileError(f"{path} does not exist")
    if not checksum_path(path).is_file():
        raise DamagedFileError(f"{path} has no checksum beside it ({checksum_path(path).name})")
    expected, actual = checksum_path(path).read_text(encoding="utf-8")[:64], sha256(path)
    if actual != expected:
        raise DamagedFileError(
            f"{path} is truncated or corrupt: its sha256 should be {expected[:12]}..., and is {actual[:12]}... "
            f"({path.stat().st_size} bytes)"
        )


def intact(path: Path) -> bool:
    """Whether a file is there, with the bytes that were written."""
    try:
        verify(path)
    except DamagedFileError:
        return False
    return True


def checksum_path(path: Path) -> Path:
    """Where the checksum of a file lies."""
    return path.with_name(f"{path.name}.sha256")


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
