"""One writer at a time: a folder of rows is written by the process that holds its lock."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from keepkv.core.wholefile import reason
from keepkv.errors import KeepKVError

LOCK = ".keepkv-writer"
ROWS = "Wait until it has ended, or give another --out; two writers would count every item twice."


@contextmanager
def alone(folder: Path, remedy: str = ROWS) -> Iterator[None]:
    """Hold the lock of ``folder``, which is let go at the end or when the process dies, however it dies.

    remedy: what is said to who comes second.

    Raises ``KeepKVError`` where another process, or another part of this one, holds it.
    """
    path = folder / LOCK
    try:
        descriptor = _held(path, remedy)
    except OSError as error:
        raise KeepKVError(f"cannot write to {str(folder)!r}: {reason(error)}") from error
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        if sys.platform != "win32":  # there, a file that is open keeps its name
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _held(path: Path, remedy: str) -> int:
    """A descriptor of ``path``, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise KeepKVError(
                f"{str(path)!r} is locked: another process{_pid(path)} writes to this folder. {remedy}"
            ) from error
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder took the name away just now


def _pid(path: Path) -> str:
    try:
        text = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return f" ({text})" if text.isdigit() else ""


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError from error

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
