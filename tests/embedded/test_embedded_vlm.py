"""The model that sees: it ships, it answers, and a stream of it is its own forward."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

import keepkv
from keepkv import embedded
from keepkv.errors import UnsupportedInput
from keepkv.tasks.scenes import questions, story

FOLDER = Path(embedded.__file__).parent / "vlm"
SURE = ("colour", "place", "number", "seen", "now")


@pytest.fixture(scope="module")
def vlm() -> Any:
    return keepkv.embedded_vlm()


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 10e6


def test_it_answers_what_it_saw(vlm: Any) -> None:
    """At least nine of ten questions of each of five kinds, with all slots held."""
    model, processor = vlm
    right: dict[str, list[bool]] = defaultdict(list)
    for seed in range(4):
        scene = story(random.Random(f"test/{seed}"), 32, 6, 1)
        stream = keepkv.VideoStream(model, 400, processor, text_reserve=32)
        stream.prefix("<s>")
        stream.push(scene.frames())
        for asked in questions(scene):
            if asked.kind in SURE:
                right[asked.kind].append(stream.ask(asked.text, max_new_tokens=2) == asked.answer)
    assert set(right) == set(SURE)
    assert {kind: sum(x) / len(x) for kind, x in right.items() if sum(x) < 0.9 * len(x)} == {}


def test_a_stream_answers_as_generate_does(vlm: Any) -> None:
    model, processor = vlm
    scene = story(random.Random("generate"), 12, 3, 1)
    stream = keepkv.VideoStream(model, 200, processor, text_reserve=32)
    stream.prefix("<s>")
    stream.push(scene.frames())
    for asked in questions(scene)[:6]:
        given = processor("<s>" + "<image>" * 12 + " " + asked.text, scene.frames())
        out = model.generate(**given, max_new_tokens=4, do_sample=False)
        assert processor.decode(out[0, given["input_ids"].shape[1] :]) == stream.ask(asked.text, max_new_tokens=4)


def test_images_of_another_size_are_resized(vlm: Any) -> None:
    _, processor = vlm
    frames = story(random.Random(0), 8, 1).frames(0, 1)
    large = frames.repeat_interleave(4, -1).repeat_interleave(4, -2)
    same, resized = (processor("<image>", x)["pixel_values"] for x in (frames, large))
    assert same.shape == resized.shape and (same - resized).abs().mean() < 0.1


def test_images_and_places_for_them_must_agree(vlm: Any) -> None:
    _, processor = vlm
    with pytest.raises(UnsupportedInput, match="1 <image> in the text and 2 images"):
        processor("<s><image>", torch.zeros(2, 3, 48, 48, dtype=torch.uint8))
    with pytest.raises(UnsupportedInput, match="give \\(3,H,W\\), uint8"):
        processor("<s><image>", torch.zeros(1, 3, 48, 48))
