"""The parent's side of a child process: start it, ask it, end it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
from typing import Any, Literal

from keepkv.errors import KeepKVError

How = Literal["error", "crash", "memory", "timeout"]


class RowFailed(KeepKVError):
    """A row that cannot be measured; others go on without it. how: the process said why (``error``), ended by itself
    (``crash``), was killed or told that no memory was left (``memory``), or took longer than it was given."""

    def __init__(self, message: str, how: How = "error") -> None:
        super().__init__(message)
        self.how = how


class Session:
    """A process that was given ``spec`` and answers requests, each one line of JSON. Starting does not wait for it.

    What it starts itself ends with it, if ``group``: they are a process group of their own, which Ctrl-C does not
    reach and ``close`` ends.
    """

    def __init__(self, command: list[str], spec: dict[str, Any], alone: bool = False, group: bool = False) -> None:
        """alone: in an environment that must not see where this one's packages are."""
        self.group = group and hasattr(os, "killpg")
        environment = {key: value for key, value in os.environ.items() if not (alone and key == "PYTHONPATH")}
        environment["TOKENIZERS_PARALLELISM"] = "false"
        self.words = tempfile.TemporaryFile("w+")
        pipe = subprocess.PIPE
        try:
            self.process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=self.words, text=True, env=environment,
                start_new_session=self.group,
            )  # fmt: skip
        except OSError as error:
            raise RowFailed(f"cannot start {command[0]!r}: {error.strerror}") from error
        self._send(spec)

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request and wait for its answer; raises ``RowFailed`` with what went wrong there."""
        self._send(request)
        return self.answer()

    def answer(self, within: float | None = None) -> dict[str, Any]:
        """The next answer; the first one comes without a request. within: seconds, after which the process is ended."""
        assert self.process.stdout is not None
        late = threading.Event()

        def overdue() -> None:
            late.set()
            self._kill()

        watch = threading.Timer(within or 0, overdue)
        if within is not None:
            watch.start()
        line = self.process.stdout.readline()
        watch.cancel()
        if not line:
            raise RowFailed(f"no answer within {within:g} s", "timeout") if late.is_set() else self._last_words()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise RowFailed(answer["error"], answer.get("how", "error"))
        return answer

    def close(self) -> None:
        """End the process; it has nothing left to say."""
        self._kill()
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

    def _kill(self) -> None:
        if self.group:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                return  # all of them have ended
        elif self.process.poll() is None:
            self.process.kill()

    def _last_words(self) -> RowFailed:
        code = self.process.wait()
        if code == -signal.SIGKILL:
            return RowFailed("the process was killed, most likely because memory ran out", "memory")
        self.words.seek(0)
        lines = [line.strip() for line in self.words.read().splitlines() if line.strip()]
        return RowFailed(f"the process ended with code {code}: {lines[-1] if lines else 'it said nothing'}", "crash")
