"""Files are whole or absent, and damage is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdistill.train.files import DamagedFileError, checksum_path, replacing, verify, write_checked, write_text


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path: Path) -> None:
    """Check that the target is touched only when everything was written."""
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half of it, then \udc80")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_target_is_untouched_until_the_end(tmp_path: Path) -> None:
    """Check that a reader sees the old file while the new one is written."""
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
    assert path.read_text(encoding="utf-8") == "new"


def test_the_checksum_is_that_of_sha256sum(tmp_path: Path) -> None:
    """Check that `sha256sum -c` reads it."""
    path = tmp_path / "a.bin"
    write_checked(path, lambda temporary: temporary.write_bytes(b"abc"))
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert checksum_path(path).read_text(encoding="utf-8") == f"{known}  a.bin\n"
    verify(path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "longer", "no checksum", "gone"])
def test_every_damage_is_noticed_by_name(tmp_path: Path, damage: str) -> None:
    """Check that the message names the file, whatever happened to the bytes."""
    path = tmp_path / "a.bin"
    content = bytes(range(256)) * 4
    write_checked(path, lambda temporary: temporary.write_bytes(content))
    if damage == "no checksum":
        checksum_path(path).unlink()
    elif damage == "gone":
        path.unlink()
    else:
        flipped = content[:100] + bytes([content[100] ^ 1]) + content[101:]
        damaged = {"truncated": content[:-1], "empty": b"", "one bit": flipped, "longer": content + b"\0"}
        path.write_bytes(damaged[damage])
    with pytest.raises(DamagedFileError, match=r"a\.bin"):
        verify(path)
