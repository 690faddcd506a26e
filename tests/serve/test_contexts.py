"""Contexts: read once, kept by name, in memory while they are used and on the disk for good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zoo
from serving import DOCUMENT, QUESTIONS, encoded, greedy, loaded, said, serving, told

from keepkv.errors import ContextExists, ContextMissing, KeepKVError, TooLarge
from keepkv.serve.contexts.info import ContextInfo
from keepkv.serve.contexts.shelf import Shelf
from keepkv.serve.engine import Engine
from keepkv.serve.request import Compression, Failed, Finished
from keepkv.serve.settings import Settings

TEXT, QUESTION = encoded(DOCUMENT), encoded(QUESTIONS[1].prompt, first=False)
ASKED = Compression("snapkv", {}, 0.3)
SRC = Path(__file__).parents[2] / "src"


def make(engine: Engine, name: str, tokens: tuple[int, ...] = TEXT, **more: Any) -> ContextInfo:
    return engine.contexts.create(name, tokens, name.upper(), ASKED, **more).result(120)


def reply(engine: Engine, name: str) -> str:
    return said(engine.submit(greedy(QUESTION, 6, context=name)))


def test_they_survive_a_restart(tmp_path: Path) -> None:
    with serving(contexts=tmp_path) as engine:
        before = make(engine, "doc")
        first = reply(engine, "doc")
    with serving(contexts=tmp_path) as engine:
        assert [x.name for x in engine.contexts.list()] == ["doc"]
        info = engine.contexts.get("doc")
        assert not info.in_memory and info.receipt == json.loads(json.dumps(before.receipt)) and info.text == "DOC"
        assert engine.contexts.tokens("doc") == TEXT and info.survival == before.survival
        assert reply(engine, "doc") == first and engine.contexts.get("doc").in_memory


def test_what_is_deleted_is_given_back_at_once(tmp_path: Path) -> None:
    with serving(contexts=tmp_path) as engine:
        each = make(engine, "a", TEXT[:150]).bytes
        make(engine, "b", TEXT[:150])
        assert engine.stats().reserved == 2 * each
        engine.contexts.delete("b")
        assert engine.stats().reserved == each == engine.stats().context_bytes


def test_the_least_recently_used_are_left_to_the_disk(tmp_path: Path) -> None:
    with serving(contexts=tmp_path) as engine:
        each = make(engine, "a", TEXT[:150]).bytes
    with serving(contexts=tmp_path, context_bytes=int(2.5 * each)) as engine:
        for name in ("b", "c"):
            make(engine, name, TEXT[:150])
        first = reply(engine, "a")  # comes in, and b goes
        inside = [x.name for x in engine.contexts.list() if x.in_memory]
        assert inside == ["a", "c"] and engine.stats().context_bytes <= 2.5 * each
        reply(engine, "b")
        assert [x.name for x in engine.contexts.list() if x.in_memory] == ["a", "b"]
        assert reply(engine, "c") and reply(engine, "a") == first
        stats = engine.stats()
        assert stats.contexts == 3 and stats.contexts_in_memory == 2 and stats.context_disk > 0


def test_memory_that_a_request_needs_is_taken_from_contexts(tmp_path: Path) -> None:
    with serving(contexts=tmp_path) as engine:
        make(engine, "doc")
        need = engine._row(greedy(TEXT, 2), None).need  # type: ignore[arg-type]
        engine.worker.ledger.limit = need + 1000
        assert said(engine.submit(greedy(TEXT, 2)))
        assert not engine.contexts.get("doc").in_memory
    with serving() as engine:  # without a folder they stay, and the request can never be served
        make(engine, "doc")
        engine.worker.ledger.limit = need + 1000
        end = told(engine.submit(greedy(TEXT, 2)))[1]
        assert isinstance(end, Failed) and "delete some" in end.error


def test_names_and_replacing(tmp_path: Path) -> None:
    with serving(contexts=tmp_path) as engine:
        make(engine, "doc")
        with pytest.raises(ContextExists, match="'doc'"):
            make(engine, "doc")
        assert make(engine, "doc", TEXT[:100], replace=True).tokens == 100
        assert len(list(tmp_path.glob("*.safetensors"))) == 1
        for bad in ("", "../up", "a/b", "a.b", "-a", "x" * 101, "a b", "\0"):
            with pytest.raises(KeepKVError):
                make(engine, bad)
        with pytest.raises(ContextMissing, match="known are doc"):
            engine.contexts.get("other")
        with pytest.raises(ContextMissing):
            engine.submit(greedy(QUESTION, context="other"))
        with pytest.raises(KeepKVError, match="compressed when it was made"):
            engine.submit(greedy(QUESTION, context="doc", compression=ASKED))
        with pytest.raises(KeepKVError, match="kept for questions"):
            engine.contexts.create("g", TEXT, "", Compression("g-kv", {"when": _never()}, 0.5)).result(60)


def _never() -> Any:
    from keepkv.core.when import When

    return When(prefill=None, every=8)


def test_one_that_is_deleted_is_gone_and_who_runs_on_it_goes_on(tmp_path: Path) -> None:
    with serving(contexts=tmp_path, rows=1) as engine:
        make(engine, "doc")
        running = engine.submit(greedy(QUESTION, 60, context="doc"))
        running.get(60)
        late = engine.submit(greedy(QUESTION, 6, context="doc"))
        engine.contexts.delete("doc")
        assert isinstance(told(running)[1], Finished)
        end = told(late)[1]
        assert isinstance(end, Failed) and end.refused and "no context 'doc'" in end.error
        assert [x.name for x in tmp_path.iterdir()] == [".keepkv-writer"]
        with pytest.raises(ContextMissing):
            engine.contexts.delete("doc")


def test_two_requests_for_one_name_make_one(tmp_path: Path) -> None:
    with serving(contexts=tmp_path) as engine:
        futures = [engine.contexts.create("doc", TEXT[: 100 + i], "", ASKED) for i in range(2)]
        assert futures[0].result(60).tokens == 100
        with pytest.raises(ContextExists):
            futures[1].result(60)
        assert engine.contexts.get("doc").tokens == 100


def test_a_file_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    with serving(contexts=tmp_path) as engine:
        make(engine, "doc", tuple(x % zoo.VOCAB for x in TEXT[:60]))
    other = Engine(zoo.model("llama"), loaded()[1], Settings(rows=4, chunk=64, memory=1 << 30, contexts=tmp_path))
    other.start()
    try:
        assert "another model" in (other.contexts.get("doc").problem or "")
        with pytest.raises(ContextMissing, match="context 'doc' cannot be used: made with another model"):
            other.submit(greedy((1, 2, 3), context="doc"))
        assert other.contexts.create("mine", tuple(range(3, 60)), "", ASKED).result(60).problem is None
    finally:
        other.stop(0)


@pytest.mark.parametrize("what", ["facts", "cache", "gone"])
def test_damaged_files_are_refused_by_name_and_the_others_serve(tmp_path: Path, what: str) -> None:
    with serving(contexts=tmp_path) as engine:
        make(engine, "bad")
        make(engine, "good")
        expected = reply(engine, "good")
    [held] = tmp_path.glob("bad.*.safetensors")
    if what == "facts":
        (tmp_path / "bad.json").write_text("{")
    elif what == "cache":
        content = bytearray(held.read_bytes())
        content[len(content) // 2] ^= 255
        held.write_bytes(content)
    else:
        held.unlink()
    with serving(contexts=tmp_path) as engine:
        if what == "cache":  # the content is looked at when it is needed
            end = told(engine.submit(greedy(QUESTION, context="bad")))[1]
            assert isinstance(end, Failed) and end.refused and "context 'bad' cannot be used" in end.error
        assert engine.contexts.get("bad").problem
        with pytest.raises(ContextMissing, match="'bad' cannot be used"):
            engine.submit(greedy(QUESTION, context="bad"))
        assert reply(engine, "good") == expected
        assert make(engine, "bad", replace=True).problem is None and reply(engine, "bad") == expected


def test_what_was_never_acknowledged_is_removed(tmp_path: Path) -> None:
    with serving(contexts=tmp_path) as engine:
        make(engine, "doc")
    (tmp_path / "doc.json").rename(tmp_path / "kept")
    (tmp_path / "other.0123abcd.cache.safetensors").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("mine")
    with serving(contexts=tmp_path) as engine:
        assert engine.contexts.list() == []
    assert sorted(x.name for x in tmp_path.iterdir()) == ["kept", "notes.txt"]


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    with serving(contexts=tmp_path):
        second = Engine(*loaded(), Settings(contexts=tmp_path))
        with pytest.raises(KeepKVError, match="a folder of contexts of its own"):
            second.start()
    (tmp_path / "file").write_text("")
    with pytest.raises(KeepKVError, match="cannot use"):
        Engine(*loaded(), Settings(contexts=tmp_path / "file")).start()


def test_a_disk_that_is_full_by_the_settings_is_refused_with_the_number(tmp_path: Path) -> None:
    with serving(contexts=tmp_path, context_disk=50_000) as engine:
        with pytest.raises(TooLarge, match="of disk") as caught:
            make(engine, "doc")
        assert caught.value.needed > 50_000 and not list(tmp_path.glob("doc*"))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from keepkv.core import wholefile

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with serving(contexts=tmp_path) as engine:
        monkeypatch.setattr(wholefile, "replace", full)
        with pytest.raises(KeepKVError, match="No space left"):
            make(engine, "doc")
        monkeypatch.undo()
        assert not list(tmp_path.glob("doc*")) and engine.contexts.list() == []
        assert make(engine, "doc").tokens == len(TEXT)


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
from serving import *
from keepkv.serve.request import Compression

loaded()
for n in range(10):
    out, told = os.pipe()
    if not (child := os.fork()):
        engine = Engine(*loaded(), Settings(rows=2, chunk=64, memory=1 << 30, contexts=Path(sys.argv[1])))
        engine.start()
        for i in range(1000):
            name, asked = f"c{100 * n + i % 3}", Compression("snapkv", {}, 0.5)
            engine.contexts.create(name, encoded(DOCUMENT)[: 80 + i], name, asked, replace=True).result(600)
            os.write(told, f"{name} {80 + i}\\n".encode())
    os.close(told)
    acknowledged = os.fdopen(out)
    for _ in range(2 + n % 5):
        print(acknowledged.readline(), end="", flush=True)
    os.kill(child, signal.SIGKILL)
    print(acknowledged.read(), end="", flush=True)  # told before it died
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_ten_kills_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """Each process is killed in the middle of its work, at another moment; the next opens what it left."""
    script, folder, helpers = tmp_path / "killed.py", tmp_path / "contexts", Path(__file__).parents[1] / "helpers"
    script.write_text(KILLED)
    words = [sys.executable, str(script), str(folder), str(SRC), str(helpers)]
    ran = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr
    acknowledged = {name: int(tokens) for name, tokens in (line.split() for line in ran.stdout.splitlines())}
    assert len(acknowledged) >= 20
    with serving(contexts=folder) as engine:
        there = {x.name: x for x in engine.contexts.list()}
        assert all(x.problem is None for x in there.values())
        for name, tokens in acknowledged.items():
            assert there[name].tokens >= tokens, name  # one that was replaced a moment later may be the newer
        assert reply(engine, next(iter(acknowledged)))
        assert len(list(folder.glob("*.safetensors"))) == len(there)
        assert {json.loads(x.read_text())["name"] for x in folder.glob("*.json")} == set(there)


def test_a_shelf_without_a_folder_keeps_all() -> None:
    assert Shelf(None, 1, None).infos() == []
    with serving(context_bytes=10_000) as engine, pytest.raises(TooLarge, match="of memory"):
        make(engine, "doc")
