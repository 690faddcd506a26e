"""Files that hold what they held or all of the new content, and are read only where they are regular files."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_KINDS = (
    (stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip
_DESCRIPTORS = "/proc/self/fd"  # where Linux lets a file without a name be found


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Make what ``write`` writes the content of ``path``, and put it on the disk.

    A link is followed: its target is replaced. An existing file keeps its mode; a new one gets that of the umask. Where
    anything fails, ``path`` is as it was and nothing lies beside it. Raises ``OSError``, also where ``path`` is no
    regular file.

    Killed, a process leaves nothing where the system has files without a name (Linux, on most file systems).
    Elsewhere the draft ``.NAME.PID.draft`` stays. Other hard links of ``path`` keep the old content.
    """
    target = Path(os.path.realpath(path))
    mode = None
    with suppress(FileNotFoundError):
        found = os.stat(target)
        _refuse_irregular(found)
        mode = stat.S_IMODE(found.st_mode)
    draft = target.with_name(f".{target.name[:200]}.{os.getpid()}.draft")
    try:
        with _draft(draft) as file:
            if mode is not None:
                os.chmod(file.fileno() if os.chmod in os.supports_fd else draft, mode)
            write(file)
            file.flush()
            os.fsync(file.fileno())
            if not draft.exists():
                _name(file, draft)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    keep_name(target.parent)


def open_regular(path: Path) -> BinaryIO:
    """``path`` opened for reading, once it is known to be a regular file. Raises ``OSError`` with the true reason."""
    _refuse_irregular(os.stat(path))
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe would wait for a writer
    file = open(os.open(path, flags), "rb")
    try:
        _refuse_irregular(os.fstat(file.fileno()))  # it may have been exchanged meanwhile
    except OSError:
        file.close()
        raise
    return file


def reason(error: Exception) -> str:
    """Why a file could not be read or written, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def _draft(named: Path) -> Iterator[BinaryIO]:
    """A new file in the folder of ``named``: without a name where the system has such files, else ``named``."""
    flags = os.O_RDWR | getattr(os, "O_BINARY", 0)
    if hasattr(os, "O_TMPFILE") and os.path.exists(_DESCRIPTORS):
        try:
            descriptor = os.open(named.parent, flags | os.O_TMPFILE, 0o666)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
        else:
            with open(descriptor, "w+b") as file:
                yield file
            return
    with open(os.open(named, flags | os.O_CREAT | os.O_EXCL, 0o666), "w+b") as file:
        yield file


def _name(file: BinaryIO, path: Path) -> None:
    """Give a file without a name the name ``path``."""
    descriptors = os.open(_DESCRIPTORS, os.O_RDONLY)
    try:
        os.link(str(file.fileno()), path, src_dir_fd=descriptors, follow_symlinks=True)
    finally:
        os.close(descriptors)


def _refuse_irregular(found: os.stat_result) -> None:
    for is_kind, kind in _KINDS:
        if is_kind(found.st_mode):
            raise OSError(errno.EINVAL, f"it is {kind}, not a file")


def keep_name(folder: Path) -> None:
    """Put the names in ``folder`` on the disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network file systems have no such thing
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
