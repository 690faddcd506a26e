"""Our own server, in a process beside this one, on this machine alone."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from keepkv.errors import KeepKVError

PATIENCE = 300.0  # seconds until it must answer


class Server:
    """``keepkv serve`` of a model, or the ``command`` that is given, in which ``{port}`` is where it shall listen.

    Raises ``KeepKVError`` where it does not come up, with its last words.
    """

    def __init__(self, command: list[str], patience: float = PATIENCE) -> None:
        self.port = free_port()
        self.words = tempfile.TemporaryFile("w+")
        said = [word.replace("{port}", str(self.port)) for word in command]
        try:
            self.process = subprocess.Popen(said, stdout=self.words, stderr=self.words, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise KeepKVError(f"cannot start {said[0]!r}: {error.strerror}") from error
        try:
            self._wait(patience)
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def peak_bytes(self) -> int | None:
        """The most memory of its process since it began, where the system tells."""
        try:
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        except OSError:
            return None
        found = [line.split() for line in lines if line.startswith("VmHWM:")]
        return int(found[0][1]) * 1024 if found else None

    def close(self) -> None:
        """End it: gently, and then not."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self.words.close()

    def _wait(self, patience: float) -> None:
        until = time.monotonic() + patience
        while time.monotonic() < until:
            if self.process.poll() is not None:
                self.words.seek(0)
                lines = [line.strip() for line in self.words.read().splitlines() if line.strip()]
                raise KeepKVError(
                    f"the server ended with code {self.process.returncode}: {lines[-1] if lines else '–'}"
                )
            try:
                with urllib.request.urlopen(f"{self.address}/v1/models", timeout=5):
                    return
            except (OSError, urllib.error.URLError):
                time.sleep(0.1)
        raise KeepKVError(f"the server did not answer within {patience:g} s")


def own_command(model: str, device: str, dtype: str, rows: int) -> list[str]:
    """``keepkv serve`` as this Python has it."""
    return [
        sys.executable, "-m", "keepkv", "serve", model, "--host", "127.0.0.1", "--port", "{port}", "--device", device,
        "--dtype", dtype, "--rows", str(rows),
    ]  # fmt: skip


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
