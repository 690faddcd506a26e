"""Files are replaced whole or not at all, keep what they were, and are read only where they are files."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from keepkv.core import wholefile


def write(path: Path, text: bytes = b"new") -> None:
    wholefile.replace(path, lambda file: file.write(text))


@pytest.fixture(params=["without a name", "with a name"])
def drafts(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on systems that have files without a name, and on those that have not."""
    if request.param == "with a name":
        monkeypatch.setattr(wholefile, "_DESCRIPTORS", "/nowhere")


@pytest.mark.usefixtures("drafts")
def test_mode_and_links_stay(tmp_path: Path) -> None:
    """Before, a link became a file, its target stayed old, and every file had mode 0600."""
    old, link, chain, dangling = (tmp_path / name for name in ("old", "link", "chain", "dangling"))
    old.write_bytes(b"old")
    old.chmod(0o640)
    link.symlink_to("old")
    chain.symlink_to(link)
    dangling.symlink_to(tmp_path / "born")
    previous = os.umask(0o027)
    try:
        for path in (old, link, chain):
            write(path, path.name.encode())
            assert old.read_bytes() == path.name.encode() and old.stat().st_mode & 0o777 == 0o640
        write(dangling)
        assert (tmp_path / "born").read_bytes() == b"new" and (tmp_path / "born").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(previous)
    assert link.is_symlink() and chain.is_symlink() and dangling.is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"old", "link", "chain", "dangling", "born"}


@pytest.mark.usefixtures("drafts")
def test_where_writing_fails_all_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        wholefile.replace(path, fail)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs deaf to it
    try:
        with pytest.raises(KeyboardInterrupt):
            wholefile.replace(tmp_path / "b", lambda file: signal.raise_signal(signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/null")


@pytest.mark.skipif(os.name != "posix", reason="kinds of files of POSIX")
@pytest.mark.parametrize(
    ("make", "said"),
    [(folder, "a directory"), (os.mkfifo, "a named pipe"), (device, "a device"), (loop, "[Tt]oo many")],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_what_is_no_file_is_neither_written_nor_read(tmp_path: Path, make: Callable[[Path], None], said: str) -> None:
    path = tmp_path / "a"
    make(path)
    before = unchanging(path)
    with pytest.raises(OSError, match=said):
        write(path)
    with pytest.raises(OSError, match=said):
        wholefile.open_regular(path)  # and does not wait for what writes to a pipe
    assert unchanging(path) == before and list(tmp_path.iterdir()) == [path]


def unchanging(path: Path) -> list[int]:
    """What is known of a file; of a link all but when it was last looked at, since following it counts as a look."""
    return [x for at, x in enumerate(path.lstat()) if at != stat.ST_ATIME or not path.is_symlink()]


def test_a_name_that_is_too_long_is_said(tmp_path: Path) -> None:
    for act in (write, wholefile.open_regular):
        with pytest.raises(OSError, match="too long") as error:
            act(tmp_path / ("a" * 300))
        assert wholefile.reason(error.value) == "File name too long"


def test_a_long_name_is_written(tmp_path: Path) -> None:
    write(tmp_path / ("a" * 255))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="a system without files that have no name")
def test_killed_it_leaves_nothing(tmp_path: Path) -> None:
    """At any moment: the draft has no name until it is whole."""
    path = tmp_path / "a"
    path.write_bytes(b"old")
    code = f"""
import time, pathlib, runpy
replace = runpy.run_path({wholefile.__file__!r})["replace"]  # alone: the package takes seconds to load
def slow(file):
    file.write(b"x" * 1_000_000)
    file.flush()
    print(1, flush=True)
    time.sleep(60)
replace(pathlib.Path({str(path)!r}), slow)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    time.sleep(0.01)
    process.kill()
    process.wait()
    process.stdout.close()
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
