"""``keepkv watch``: a generated video and a file of one's own, through a cap."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from keepkv import embedded
from keepkv.cli.program import program
from keepkv.cli.watch import shipped
from keepkv.cli.watch.run import Watcher, full_bytes
from keepkv.embedded import embedded_vlm
from keepkv.tasks.scenes import questions, story

FOLDER = str(Path(embedded.__file__).parent / "vlm")


def run(*args: str) -> Any:
    return CliRunner().invoke(program, ["watch", *args])


def test_the_generated_video() -> None:
    """Never more than the cap, as many bytes whatever the policy, and the full cache until its positions end."""
    done = run("--frames", "480", "--cap", "200", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    rows = {row["policy"]: row for row in told["rows"]}
    assert list(rows) == ["infinipot-v", "uniform", "sliding", "full"] and told["frames"] == 480
    for policy in ("infinipot-v", "uniform", "sliding"):
        row = rows[policy]
        assert row["entries"] <= row["peak_entries"] <= 200 and row["bytes"] == rows["sliding"]["bytes"]
        assert row["right"] == sum(x["right"] for x in row["replies"]) and len(row["replies"]) == 24
    assert rows["full"]["until"] == 420 and rows["full"]["bytes"] < told["full_bytes"]
    assert rows["full"]["right"] >= 0.9 * len(rows["full"]["replies"])
    assert rows["infinipot-v"]["right"] > max(rows["uniform"]["right"], rows["sliding"]["right"])


def test_questions_are_about_what_was_seen() -> None:
    video = shipped.scene(3, 600)
    due = shipped.asked(video, 3)
    assert due(0, 60) != [] and due(60, 120) == []
    known = {(x.text, x.answer) for x in questions(video.until(300))}
    assert all((x.text, x.expected) in known for x in due(240, 300))


def test_the_formula_is_what_a_full_cache_has() -> None:
    from transformers import DynamicCache

    from keepkv.engine.versions import CACHE

    model, processor = embedded_vlm()
    cache = DynamicCache(config=model.config)
    given = processor("<s><image><image>", story(random.Random(0), 8, 1).frames(0, 2))
    with torch.no_grad():
        model(**given, **{CACHE: cache})
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert full_bytes(model, given["input_ids"].shape[1]) == held


def test_your_own_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    scene = story(random.Random("own"), 40, 3)
    with av.open(str(tmp_path / "clip.mkv"), "w") as file:
        track = file.add_stream("ffv1", rate=10)
        track.width, track.height, track.pix_fmt = 48, 48, "bgr0"
        for frame in scene.frames():
            picture = av.VideoFrame.from_ndarray(frame.movedim(0, -1).contiguous().numpy(), format="rgb24")
            file.mux(track.encode(picture.reformat(format="bgr0")))
        file.mux(track.encode())
    asked = next(x for x in questions(scene) if x.kind == "place")
    done = run(str(tmp_path / "clip.mkv"), "--model", FOLDER, "-q", asked.text, "--asked-every", "32", "--cap", "512")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count(asked.text) == 2 and asked.answer in done.stdout and "40 frames" in done.stdout


@pytest.mark.parametrize(
    ("args", "why"),
    [
        (["-q", "what ?"], "give its file"),
        (["clip.mp4", "-q", "what ?"], "needs --model"),
        (["clip.mp4", "--model", "x"], "and a --question"),
        (["no-such.mp4", "--model", FOLDER, "-q", "what ?"], "no video file"),
        (["--cap", "60"], "Give a larger cap"),
        (["--policy", "infinipotv"], "infinipot-v"),
    ],
)
def test_what_is_refused(args: list[str], why: str) -> None:
    done = run(*args)
    assert done.exit_code == 2 and why in " ".join(done.stderr.split()) and "Traceback" not in done.stderr


def test_a_watcher_that_is_full_is_asked_no_more() -> None:
    model, processor = embedded_vlm()
    [*_, whole] = shipped.watchers(model, processor, ["sliding"], 288)
    assert isinstance(whole, Watcher) and whole.most == 420
    whole.frames = 421
    assert not whole.open
