"""Files that are whole or absent, and checksums that tell a damaged one.

`replacing` writes beside the target, makes the bytes durable and moves them into place in one step, so that a process
killed at any moment leaves the old file or the new one. `write_checked` puts a sha256 beside a file, in the format of
`sha256sum -c`. A full disk, a read-only folder and the like end in a `WriteError`, which names the file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


class DamagedFileError(RuntimeError):
    """Error of a file that is truncated or corrupt. The message names it."""


class CheckpointError(RuntimeError):
    """Error of a run's file that can't be read or written, most often a checkpoint. It names the file and a way out."""


class WriteError(CheckpointError):
    """Error of a file that can't be written, for a full disk or a read-only folder. It names the file and a way out."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a WriteError that names the file.

    Args:
        path: the file to name, whichever temporary one the system complains about.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            advice = "; free some space and give the command again: what was saved before is whole"
        elif error.errno in FORBIDDEN:
            advice = "; choose a folder that can be written to"
        elif isinstance(error, IsADirectoryError | FileExistsError | NotADirectoryError):
            advice = "; move away what lies in its place"
        else:
            advice = ""
        raise WriteError(f"{path} can't be written: {error.strerror or error}{advice}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on a clean exit it takes the place of `path` atomically and durably.

    Raises:
        WriteError: it can't be written; `path` is as it was before.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)  # the rename itself is durable only when its folder is
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def set_aside(path: Path, suffix: str) -> Path:
    """Rename a file to `<name>.<suffix>`, or `<name>.<suffix>.2` and so on: nothing that lies there is overwritten."""
    free = free_name(path, suffix)
    with writing(free):
        path.rename(free)
    return free


def copy_aside(path: Path, suffix: str) -> Path:
    """Copy a file to the name that `set_aside` would give it."""
    free = free_name(path, suffix)
    with replacing(free) as temporary:
        shutil.copyfile(path, temporary)
    return free


def free_name(path: Path, suffix: str) -> Path:
    """Return the first of `<name>.<suffix>`, `<name>.<suffix>.2`, ... at which nothing lies."""
    free, number = path.with_name(f"{path.name}.{suffix}"), 1
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}.{suffix}.{number}")
    return free


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_checked(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically by `write(temporary_path)`, with its checksum beside it.

    The checksum goes first: a file in place always has one, and one without its file means nothing.
    """
    with replacing(path) as temporary:
        try:
            write(temporary)
        except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a failed write
            with suppress(OSError):
                temporary.unlink(missing_ok=True)  # before the free space is counted
            free = shutil.disk_usage(path.parent).free
            reason = f"{str(error).splitlines()[0]} ({free / 2**20:,.0f} MiB are free on its disk)"
            raise OSError(errno.EFBIG, reason) from error
        write_text(checksum_path(path), f"{sha256(temporary)}  {path.name}\n")


def verify(path: Path) -> None:
    """Compare a file with its checksum.

    Raises:
        DamagedFileError: it is missing, can't be read, has no checksum, or its bytes are not the ones that were
            written.
    """
    checksum = checksum_path(path)
    try:
        if not path.is_file():
            raise DamagedFileError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}")
        if not checksum.is_file():
            raise DamagedFileError(f"{path} has no checksum beside it ({checksum.name})")
        expected, actual = checksum.read_bytes()[:64].decode("ascii", "replace"), sha256(path)
        size = path.stat().st_size
    except OSError as error:
        raise DamagedFileError(f"{path} can't be read: {error.strerror or error}") from error
    if len(expected) < 64 or not set(expected) <= set(string.hexdigits):
        raise DamagedFileError(f"{path} may be whole, but the checksum beside it is damaged ({checksum.name})")
    if actual != expected:
        raise DamagedFileError(
            f"{path} is truncated or corrupt: its sha256 should be {expected[:12]}..., and is {actual[:12]}... "
            f"({size} bytes)"
        )


def intact(path: Path) -> bool:
    """Return whether a file is there, with the bytes that were written."""
    try:
        verify(path)
    except DamagedFileError:
        return False
    return True


def checksum_path(path: Path) -> Path:
    """Return where the checksum of a file lies."""
    return path.with_name(f"{path.name}.sha256")


def sha256(path: Path) -> str:
    """Return the checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
