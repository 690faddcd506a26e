"""What a stream takes: frames of any kind, text, files; and what it refuses."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from video_streams import frames, ids, same, stream

from helpers import vision_zoo as zoo
from keepkv.errors import BudgetError, CacheStateError, KeepKVError, UnsupportedInput
from keepkv.video import VideoStream, frames_of


def test_patches_are_those_of_transformers() -> None:
    """The order of pixels within patches, and of patches that merge, against the model's own processor."""
    processor = pytest.importorskip("transformers").Qwen2VLImageProcessor
    try:
        theirs = processor(patch_size=4, merge_size=2, temporal_patch_size=1, do_resize=False)
    except ImportError as error:
        pytest.skip(str(error))
    image = torch.randint(0, 255, (16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = theirs(images=[image.numpy()], return_tensors="pt")
    made = stream("qwen2-vl")
    ours = made.reader.family.pixels(made.reader.family.look(image.movedim(-1, 0), (16, 24))[None])
    assert torch.equal(ours["video_grid_thw"], found["image_grid_thw"])
    torch.testing.assert_close(ours["pixel_values_videos"], found["pixel_values"].float(), atol=1e-5, rtol=1e-5)


def test_odd_frames_wait_for_their_step() -> None:
    """Two raw frames are a time step: one that is left over waits, and flush repeats it."""
    model, video = zoo.model("qwen2-vl-pairs"), frames("qwen2-vl", 7)
    made, other = (VideoStream(model, 5 + 24 + 8 * 6, text_reserve=24) for _ in range(2))
    for one in (made, other):
        one.prefix(ids(5, 1))
    assert made.push(video[:3]).steps == 1 and made.push(torch.empty(0, 3, 16, 24)).steps == 1
    assert made.push(video[3:]).steps == 3
    with pytest.raises(CacheStateError, match="flush"):
        made.save("nowhere")
    assert made.flush().steps == 4 and made.flush().steps == 4
    other.push(torch.cat((video, video[-1:])))
    same(made, other, 1e-5)
    made.reset()
    assert made.entries == 0 and made.push(video[:1]).steps == 0 and made.cache.shared.positions.known is None


def test_what_comes_first_comes_first() -> None:
    made = stream("qwen2-vl")
    with pytest.raises(CacheStateError, match="once"):
        made.prefix(ids(5, 1))


def test_frames_of_any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays with colours last, iterators, frames of another size; bytes are normalised, a file needs PyAV."""
    made, other = stream("qwen2-vl"), stream("qwen2-vl")
    video = np.random.default_rng(0).integers(0, 255, (4, 16, 24, 3), dtype=np.uint8)
    made.push(video)
    other.push(iter(video[:2]))
    other.push(torch.from_numpy(video[2:]).movedim(-1, 1))
    same(made, other)
    made.push(np.zeros((40, 60, 3), dtype=np.uint8))
    assert made.counts.steps == 5 and made.counts.vision == 30
    with pytest.raises(UnsupportedInput, match="no three colours"):
        made.push(torch.zeros(2, 16, 24, 4))
    with pytest.raises(UnsupportedInput, match=r"\(N,H,W,3\)"):
        made.push(torch.zeros(4))
    kept = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return kept(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnsupportedInput, match=r"keepkv\[video\]"):
        made.push("film.mp4")


def test_a_camera_is_opened_as_a_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its frames are taken one by one, from a stream that says nothing of how it is packed."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "film.mp4"), "w") as out:
        track = out.add_stream("mpeg4", rate=5)
        track.width, track.height, track.pix_fmt = 24, 16, "yuv420p"
        for _ in range(3):
            out.mux(track.encode(av.VideoFrame.from_ndarray(np.full((16, 24, 3), 90, dtype=np.uint8), format="rgb24")))
        out.mux(track.encode())
    opened, real = [], av.open

    def device(path: str, format: str | None = None) -> Any:
        opened.append((path, format))
        return real(str(tmp_path / "film.mp4"))

    monkeypatch.setattr(av, "open", device)
    seen = frames_of("/dev/video0")
    assert next(seen).shape == (3, 16, 24) and opened == [("/dev/video0", "v4l2")]
    assert len(list(frames_of("film.mp4"))) == 3 and opened[1] == ("film.mp4", None)


def test_what_cannot_fit_is_refused() -> None:
    model = zoo.model("qwen2-vl")
    with pytest.raises(KeepKVError, match="a cap above the reserve"):
        VideoStream(model, 100, text_reserve=100)
    with pytest.raises(KeepKVError, match="recent below target"):
        VideoStream(model, 100, recent=0.8, text_reserve=10)
    small = VideoStream(model, 40, text_reserve=10)
    with pytest.raises(BudgetError, match="30 vision slots may be held, a compression leaves 22"):
        small.push(frames("qwen2-vl", 1))
    made = stream("qwen2-vl")
    made.push(frames("qwen2-vl", 8))
    with pytest.raises(BudgetError, match="tokens of text do not fit"):
        made.ask(ids(20, 1), 10)
    with pytest.raises(KeepKVError, match="no processor"):
        made.ask("what?")
    with pytest.raises(KeepKVError, match="calibration"):
        stream("qwen2-vl", policy="kvzip")
    with pytest.raises(KeepKVError, match="policy"):
        stream("qwen2-vl", policy="infinipot")


class Words:
    """A tokenizer whose tokens are numbers."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def test_text_goes_through_a_tokenizer_and_answers_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.model("qwen2-vl")
    made, other = VideoStream(model, 77, Words(), text_reserve=24), stream("qwen2-vl")
    made.prefix(" ".join(map(str, ids(5, 1)[0].tolist())))
    for one in (made, other):
        one.push(frames("qwen2-vl", 6))
    came: list[int] = []
    answer = made.ask("7 8 9", 5, on_token=came.append)
    assert answer == " ".join(map(str, came)) and len(came) == 5
    assert other.ask(torch.tensor([[7, 8, 9]]), 5).tolist() == [came]  # type: ignore[union-attr]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [came[0]])
    assert made.ask("7 8 9", 5) == str(came[0])
