"""Streams on small random models: never more than the cap, exact below it, and questions that leave no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from video_streams import CELLS, NAMES, frames, ids, same, stream, watch

from helpers import vision_zoo as zoo
from keepkv.engine.receipt import held_by
from keepkv.engine.view import view_of
from keepkv.errors import BudgetError, KeepKVError, UnsupportedInput, UnsupportedModel
from keepkv.score import KNorm
from keepkv.store.base import allocated
from keepkv.video import VideoStream
from keepkv.video.policies import POLICIES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy", ["infinipot-v", "sliding"])
def test_the_cap_holds_at_any_moment(name: str, policy: str) -> None:
    """Streams of half the cap to many times it, pushed in pieces of any size, with questions in between; every long
    stream peaks where the others do, and holds as many bytes."""
    peaks, bytes_ = [], []
    for steps in (4, 8, 32, 64):
        made = stream(name, policy=policy, recent=0.25)
        seen, left, turn = watch(made), steps, 0
        while left:
            piece = min(left, 1 + turn % 3)
            made.push(frames(name, piece, turn))
            left, turn = left - piece, turn + 1
            if turn % 5 == 0:
                made.ask(ids(6, turn), 3)
        assert max(seen) <= made.cap and made.peak_entries == max(seen)
        peaks.append(max(seen))
        bytes_.append(made.bytes)
        assert (made.counts.compressions > 0) == (steps > 8)
        assert made.entries == 5 + made.counts.vision
    assert peaks[-1] == peaks[-2] and bytes_[-1] <= max(bytes_[:-1]) * 1.01


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl"])
def test_below_the_cap_a_stream_is_one_forward(name: str) -> None:
    """Block by block, the same logits as the model's own forward of prefix, video and question."""
    model, made, video = zoo.model(name), stream(name), frames(name, 6)
    made.push(video[:1])
    made.push(video[1:])
    question, size = ids(7, 2), CELLS[name]
    whole = torch.cat((ids(5, 1), torch.full((1, 6 * size), zoo.VIDEO), question), 1)
    time = torch.cat((torch.arange(5), (5 + torch.arange(6)).repeat_interleave(size), 11 + torch.arange(7)))
    row, column = torch.arange(size) // 3, torch.arange(size) % 3
    height = torch.cat((torch.arange(5), (5 + row).repeat(6), 11 + torch.arange(7)))
    width = torch.cat((torch.arange(5), (5 + column).repeat(6), 11 + torch.arange(7)))
    pixels = made.reader.family.pixels(video)
    with torch.no_grad():
        places = torch.stack((time, height, width))[:, None]
        wanted = model(input_ids=whole, position_ids=places, **pixels).logits[:, -1]
        with made.cache.transient():
            found = made.reader.text(question)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert made.counts.compressions == 0


@pytest.mark.parametrize("name", NAMES)
def test_to_drop_is_to_mask(name: str) -> None:
    """Logits of a question after a compression, and with everything held and what was dropped masked, head by head."""
    made = stream(name, recent=0.25)
    made.push(frames(name, 8))
    full = made.cache.copy()
    made.reader.compress(made._left)
    for layer, rest in zip(full.compressible, made.cache.compressible, strict=True):
        slots, kept = layer.store.view(), rest.store.view().positions
        assert kept.shape[2] == 5 + made._left < slots.shape[2]
        gone = ~(slots.positions[..., None] == kept[:, :, None]).any(-1)
        store = layer.store.empty()
        store.load(slots.with_(log_votes=slots.log_votes.masked_fill(gone, -1e4)))
        layer.store, layer.progress.compressed = store, True
    with made.cache.transient():
        found = made.reader.text(ids(6, 3))
    made.reader.cache, made.counts.edge, made.counts.issued = full, made.counts.edge - 6, made.counts.issued - 6
    torch.testing.assert_close(found, made.reader.text(ids(6, 3)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_question_leaves_no_trace(name: str, policy: str) -> None:
    """The same answer twice; what comes later is as if nobody had asked; what is held hangs on no question."""
    asked, silent = (stream(name, policy=policy, recent=0.25) for _ in range(2))
    first = asked.ask(ids(4, 9), 3)
    for turn in range(6):
        for made in (asked, silent):
            made.push(frames(name, 5, turn))
        answers = [asked.ask(ids(6, turn), 4) for _ in range(2)]
        assert torch.equal(*answers) and answers[0].shape == (1, 4)
    same(asked, silent)
    assert asked.counts.compressions > 2 and first.shape == (1, 3)
    assert torch.equal(asked.ask(ids(6, 8), 4), silent.ask(ids(6, 8), 4))


@pytest.mark.parametrize("name", NAMES)
def test_blocks_do_not_matter_where_compressions_coincide(name: str) -> None:
    one, two = (stream(name, block=n, steps=16) for n in (1, 2))
    for made in (one, two):
        for turn in range(20):
            made.push(frames(name, 2, turn))
    assert one.counts.compressions == two.counts.compressions > 3
    same(one, two, 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_two_streams_on_one_model_do_not_meet(name: str) -> None:
    def run(turns: list[tuple[VideoStream, int]]) -> None:
        for made, seed in turns:
            made.push(frames(name, 3, seed))
            made.ask(ids(5, seed), 3, keep=seed == 4)

    alone = [stream(name, recent=0.25) for _ in range(2)]
    mixed = [stream(name, recent=0.25) for _ in range(2)]
    for i, made in enumerate(alone):
        run([(made, 2 * turn + i) for turn in range(8)])
    run([(mixed[turn % 2], turn) for turn in range(16)])
    for a, b in zip(alone, mixed, strict=True):
        same(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_kept_turns_stay_and_count(name: str) -> None:
    made = stream(name, recent=0.25)
    made.push(frames(name, 3))
    answer = made.ask(ids(6, 2), 4, keep=True)
    for turn in range(10):
        made.push(frames(name, 4, turn))
    kept = made.cache.kept_positions(0)[0]
    turn_at = set(range(5 + 3 * CELLS[name], 5 + 3 * CELLS[name] + 6 + answer.shape[1]))
    assert all(turn_at | set(range(5)) <= set(head.tolist()) for head in kept)
    assert made.counts.kept == 10 and made.entries <= made.cap
    made.ask(ids(4, 3), 4, keep=True)
    second = made.counts.turns[1]
    made.ask(ids(8, 3), 4, keep=True)  # the oldest turn goes, whole
    kept = [set(head.tolist()) for layer in (0, 1) for head in made.cache.kept_positions(layer)[0]]
    assert made.counts.kept == 20 and made.counts.turns[0] == second
    assert all(not turn_at & head and set(range(*second)) <= head for head in kept)
    assert made.entries == made.counts.held <= made.cap
    for turn in range(10):
        made.push(frames(name, 4, turn))
    assert made.peak_entries <= made.cap
    with pytest.raises(BudgetError, match="a turn of 25 tokens does not fit text_reserve=24"):
        made.ask(ids(21, 3), 4, keep=True)


# --- positions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen2.5-vl", "llava", "internvl"])
@pytest.mark.parametrize("ticks", [1, 3])
def test_moved_slots_have_the_keys_of_where_they_stand(name: str, ticks: int) -> None:
    """Frame after frame, far beyond the limit: turned back from where they are, keys are what the model projected."""
    cells = CELLS[name]
    limit = 5 + 24 + (44 * ticks if "qwen" in name else 10 * cells)
    made, projected = stream(name, limit=limit, ticks=ticks, recent=0.25), []
    layer = made.cache.compressible[0]
    attention = zoo.model(name).get_decoder().layers[0].self_attn

    def catch(module: Any, args: Any, out: Tensor) -> None:
        projected.append(out.unflatten(-1, (2, -1)).transpose(1, 2))

    hook = attention.k_proj.register_forward_hook(catch)
    for turn in range(30):
        made.push(frames(name, 2, turn))
        assert made.counts.edge <= limit and made.counts.issued <= limit
    made.ask(ids(6, 1), 4, keep=True)
    made.push(frames(name, 20, 50))
    hook.remove()
    view = view_of(layer)
    assert float(view.slots.stats["moved"].abs().max()) > 0
    found = view.rope.unrotate(view.slots.keys, view.key_places())  # type: ignore[union-attr]
    wanted = torch.cat(projected, 2)
    wanted = wanted.gather(2, (view.slots.positions.long() - 5)[..., None].clamp(min=0).expand_as(found))
    torch.testing.assert_close(found[:, :, 5:], wanted[:, :, 5:], atol=1e-4, rtol=1e-3)
    times = view.key_places()
    times = times if times.dim() == 3 else times[..., 0]
    assert (times[..., 1:] >= times[..., :-1]).all() and int(times.max()) < limit
    newest = times[..., -1].unique()
    assert newest.numel() == 1, "the newest slot stands at one place in every head"


def test_absolute_positions_end_at_the_limit() -> None:
    made = stream("qwen2-vl", positions="absolute", limit=60)
    with pytest.raises(UnsupportedInput, match="37, and with 24 left to text the limit is 60: give positions='auto'"):
        made.push(frames("qwen2-vl", 100))
    assert made.counts.edge == 35
    made.ask(ids(4, 1), 2)


def test_modes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(KeepKVError, match="tells the cells of a frame by theirs: use 'time_compact'"):
        stream("qwen2-vl", positions="rerank")
    with pytest.raises(KeepKVError, match="use 'rerank'"):
        stream("llava", positions="time_compact")
    with pytest.raises(KeepKVError, match="'absolute', 'rerank'"):
        stream("llava", positions="later")
    for name, why in (
        ("qwen3-vl", "writes the time of every step"),
        ("gemma3", "both directions"),
        ("llava-next-video", "pools"),
    ):
        with pytest.raises(UnsupportedModel, match=why):
            VideoStream(zoo.model(name), 100)


@pytest.mark.parametrize("name", ["qwen2-vl", "llava"])
def test_a_stream_goes_on_from_its_files(name: str, tmp_path: Path) -> None:
    made = stream(name, recent=0.25, limit=200)
    made.push(frames(name, 30))
    made.ask(ids(4, 2), 3, keep=True)
    made.save(tmp_path / "stream")
    loaded = VideoStream.load(tmp_path / "stream", zoo.model(name))
    for one in (made, loaded):
        one.push(frames(name, 9, 3))
    same(made, loaded)
    assert torch.equal(made.ask(ids(6, 8), 4), loaded.ask(ids(6, 8), 4))
    assert made.timeline() == loaded.timeline()


@pytest.mark.parametrize("name", NAMES)
def test_the_timeline_counts_what_survives(name: str) -> None:
    made = stream(name, recent=0.25)
    for turn in range(30):
        made.push(frames(name, 1, turn))
    for layer in made.timeline():
        assert sum(layer.values()) == 2 * made.counts.vision
        assert layer[29] == 2 * CELLS[name] and max(layer) == 29


def test_any_score_is_a_policy() -> None:
    for policy in ("keydiff", "snapkv", KNorm()):
        made = stream("qwen2-vl", policy=policy, recent=0.25)
        seen = watch(made)
        for turn in range(20):
            made.push(frames("qwen2-vl", 2, turn))
        assert max(seen) <= made.cap and made.counts.compressions > 2
        assert made.ask(ids(4, 1), 2).shape == (1, 2)


def test_bytes_count_what_is_known_of_the_tokens() -> None:
    made = stream("qwen2-vl", recent=0.25)
    made.push(frames("qwen2-vl", 20))
    known = made.cache.shared.positions.known
    assert known is not None and known.at.nbytes > 8
    slots = allocated(x for layer in made.cache.layers for x in held_by(layer))
    assert made.bytes == made.cache.report().bytes == slots + known.at.nbytes + known.facts.nbytes
