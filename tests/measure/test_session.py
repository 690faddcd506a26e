"""Processes that are asked: how they fail is told apart."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from keepkv.measure.session import RowFailed, Session


def failing(script: str, within: float | None = None) -> RowFailed:
    session = Session([sys.executable, "-c", script], {}, group=True)
    try:
        with pytest.raises(RowFailed) as failed:
            session.answer(within)
    finally:
        session.close()
    return failed.value


def test_errors_crashes_memory_and_time_are_told_apart() -> None:
    said = failing("""import json; print(json.dumps({"error": "no such file"}))""")
    assert said.how == "error" and "no such file" in str(said)
    assert failing("""import json; print(json.dumps({"error": "full", "how": "memory"}))""").how == "memory"
    crashed = failing("raise SystemExit('gone')")
    assert crashed.how == "crash" and "gone" in str(crashed)
    assert failing("import os; os.kill(os.getpid(), 9)").how == "memory"
    late = failing("import time; time.sleep(60)", within=0.3)
    assert late.how == "timeout" and "0.3 s" in str(late)


def test_what_a_process_started_ends_with_it() -> None:
    script = """
import json, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(json.dumps({"pid": child.pid}), flush=True)
time.sleep(60)
"""
    session = Session([sys.executable, "-c", script], {}, group=True)
    pid = session.answer()["pid"]
    session.close()
    if not Path("/proc").is_dir():
        pytest.skip("no /proc to look into")
    for _ in range(100):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.05)
    raise AssertionError("its child is still there")
