"""The parent's side of a child process: start it, ask it, end it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from typing import Any

from keepkv.errors import KeepKVError


class RowFailed(KeepKVError):
    """A row that cannot be measured; the sweep goes on without it."""


class Session:
    """A process that was given ``spec`` and answers requests, each one line of JSON. Starting does not wait for it."""

    def __init__(self, command: list[str], spec: dict[str, Any], alone: bool = False) -> None:
        """alone: in an environment that must not see where this one's packages are."""
        environment = {key: value for key, value in os.environ.items() if not (alone and key == "PYTHONPATH")}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        self.words = tempfile.TemporaryFile("w+")
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=self.words, text=True, env=environment
            )
        except OSError as error:
            raise RowFailed(f"cannot start {command[0]!r}: {error.strerror}") from error
        self._send(spec)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer; raises ``RowFailed`` with what went wrong there."""
        self._send(request)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer; the first one comes without a request."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RowFailed(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RowFailed(answer["error"])
        return answer

    def close(self) -> None:
        """End the process; it has nothing left to say."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.words):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue  # a request that the process did not live to read

    def _send(self, value: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(value) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return  # it has ended: the missing answer will say why

    def _last_words(self) -> str:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return "the process was killed, most likely because memory ran out"
        self.words.seek(0)
        lines = [line.strip() for line in self.words.read().splitlines() if line.strip()]
        return f"the process ended with code {code}: {lines[-1] if lines else 'it said nothing'}"
