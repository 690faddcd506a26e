"""A run that was cut anywhere goes on as if it had not been, and damage in its files is refused or cut, and said."""

from __future__ import annotations

import gzip
import random
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from evaluation_setup import setup

from keepkv.errors import KeepKVError
from keepkv.evaluation.journal import Journal
from keepkv.evaluation.rows import ITEMS, ItemRow
from keepkv.evaluation.runner import evaluate
from keepkv.evaluation.summary import summarise
from keepkv.measure import MadeWith, environment
from keepkv.measure.alone import alone as one_writer
from keepkv.measure.files import read_lines

pytestmark = pytest.mark.filterwarnings("ignore:.* items of each task", "ignore:of .* tokens, a budget of")


def test_wherever_a_run_is_cut_it_ends_the_same(tmp_path: Any, loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "revision", lambda: None)  # a commit made meanwhile is another evaluation
    some = setup(
        tasks=("niah-multivalue",), items=4, batch=2, budgets=(0.3, 0.6), modes=("agnostic", "aware"), lengths=(160,)
    )
    (tmp_path / "whole").mkdir()
    evaluate(*loaded, some, tmp_path / "whole")
    whole = {name: (tmp_path / "whole" / name).read_bytes() for name in ("items.jsonl", "maps.jsonl", "run.json")}
    rng = random.Random(0)
    for k in range(4):
        folder = tmp_path / str(k)
        folder.mkdir()
        for name in ("items.jsonl", "maps.jsonl", "speed.jsonl"):
            data = (tmp_path / "whole" / name).read_bytes()
            (folder / name).write_bytes(data[: rng.randrange(len(data) + 1)] if name == "items.jsonl" else data)
        (folder / "run.json").write_bytes(whole["run.json"])
        evaluate(*loaded, some, folder)
        assert (folder / "items.jsonl").read_bytes() == whole["items.jsonl"]
        assert sorted((folder / "maps.jsonl").read_text().splitlines()) == sorted(
            whole["maps.jsonl"].decode().splitlines()
        )
        assert len(list(read_lines(folder, "speed.jsonl"))) == len(list(read_lines(tmp_path / "whole", "speed.jsonl")))


def test_a_killed_run_is_resumed(tmp_path: Any) -> None:
    words = [
        sys.executable,
        "-m",
        "keepkv.cli",
        "eval",
        "-t",
        "niah-single-2",
        "-l",
        "160",
        "-b",
        "0.3",
        "--items",
        "3",
    ]
    words += ["--batch", "1", "--out"]
    kept = tmp_path / "killed"
    process = subprocess.Popen([*words, str(kept)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while not (kept / ITEMS).exists() or not (kept / ITEMS).stat().st_size:
        assert process.poll() is None and time.monotonic() - began < 120
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for folder in (kept, tmp_path / "whole"):
        subprocess.run([*words, str(folder)], check=True, capture_output=True)
    assert (kept / ITEMS).read_bytes() == (tmp_path / "whole" / ITEMS).read_bytes()


def test_another_evaluation_in_the_directory_is_refused(tmp_path: Any, loaded: Any) -> None:
    here, there = (MadeWith(device=device, dtype="float32", versions={}) for device in ("cpu", "cuda"))
    Journal(tmp_path, setup(), here, ItemRow)
    with pytest.raises(KeepKVError, match="items"):
        Journal(tmp_path, setup(items=9), here, ItemRow)
    with pytest.raises(KeepKVError, match="environment"):
        Journal(tmp_path, setup(), there, ItemRow)


@pytest.mark.parametrize("held", ["", "[]", "null", '{"model": ', "\0" * 40, "[" * 100_000, b"\xff\xfe"], ids=repr)
def test_a_damaged_run_is_refused(tmp_path: Any, held: str | bytes) -> None:
    """In one line that names the file. Before: errors of json and of dictionaries."""
    (tmp_path / "run.json").write_bytes(held.encode() if isinstance(held, str) else held)
    with pytest.raises(KeepKVError, match=r"run\.json.*is damaged"):
        Journal(tmp_path, setup(), MadeWith(device="cpu", dtype="float32", versions={}), ItemRow)
    with pytest.raises(KeepKVError, match=r"run\.json"):
        summarise(tmp_path)


def test_rows_that_stand_twice_are_refused_and_a_run_leaves_each_once(tmp_path: Any, loaded: Any) -> None:
    """Two runs in one directory made n = 4 of 2 items, and an interval too narrow."""
    whole = evaluate(*loaded, setup(), tmp_path)
    items = (tmp_path / ITEMS).read_bytes()
    lines = items.splitlines(keepends=True)
    (tmp_path / ITEMS).write_bytes(b"".join(line + line for line in lines))
    with pytest.raises(KeepKVError, match=r"a row stands twice: .*Run the evaluation again"):
        summarise(tmp_path)
    for twice in ([*lines, *lines], [lines[0], *lines], [line for line in lines for _ in range(2)]):
        (tmp_path / ITEMS).write_bytes(b"".join(twice))
        assert [c.score for c in evaluate(*loaded, setup(), tmp_path)] == [c.score for c in whole]
        assert (tmp_path / ITEMS).read_bytes() == items
    with one_writer(tmp_path), pytest.raises(KeepKVError, match="locked"):
        evaluate(*loaded, setup(), tmp_path)


def test_damage_in_any_file_of_rows_is_cut_and_said(tmp_path: Any, loaded: Any) -> None:
    evaluate(*loaded, setup(), tmp_path)
    whole = (tmp_path / ITEMS).read_bytes()
    for name in (ITEMS, "speed.jsonl", "maps.jsonl"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2] + b"\0\n" + data[len(data) // 2 :])
        with pytest.warns(UserWarning, match=f"{name}, line"):
            evaluate(*loaded, setup(), tmp_path)
        assert (tmp_path / ITEMS).read_bytes() == whole


def test_compressed_files_are_read_as_they_are(tmp_path: Any) -> None:
    for name in ("items.jsonl", "items-peer.jsonl"):
        (tmp_path / name).write_text(f'{{"from": "{name}"}}\n')
    plain = list(read_lines(tmp_path, ITEMS))
    assert len(plain) == 2
    for name in ("items.jsonl", "items-peer.jsonl"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
        assert list(read_lines(tmp_path, ITEMS)) == plain  # not twice
        (tmp_path / name).unlink()
        assert sorted(map(str, read_lines(tmp_path, ITEMS))) == sorted(map(str, plain))
