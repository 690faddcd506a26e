"""Rotary positions apart from a token's index, and which tokens are vision: as the model has them, and row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import keepkv
from helpers import vision_zoo as zoo
from keepkv.core.tokens import CELL, IMAGE, KIND, STEP, TEXT, VIDEO
from keepkv.engine.rope_probe import rope_of
from keepkv.engine.versions import CACHE
from keepkv.engine.view import view_of
from keepkv.score.base import Score


class Looks(Score):
    """Needs RoPE undone, and asks for nothing."""

    needs_rope = True

    def __call__(self, view: keepkv.LayerView) -> Tensor:
        return -view.slots.positions.float()


def made(model: Any, budget: Any = 1.0, **options: Any) -> keepkv.Cache:
    return keepkv.Cache(model, keepkv.Method(Looks(), **options), budget)


def contents(model: Any, inputs: dict[str, Tensor], cache: keepkv.Cache) -> tuple[list[Tensor], Tensor]:
    """Keys of each layer before RoPE, as the model's own projections give them, (B,H,T,D), and the logits."""
    caught: list[Tensor] = []
    hooks = []
    for layer in model.get_decoder().layers:
        attention = layer.self_attn
        source = attention.k_norm if hasattr(attention, "k_norm") else attention.k_proj

        def catch(module: Any, args: Any, out: Tensor) -> None:
            wide = out.unflatten(-1, (2, -1)) if out.dim() == 3 else out
            caught.append(wide if wide.shape[1] == 2 else wide.transpose(1, 2))

        hooks.append(source.register_forward_hook(catch))
    with torch.no_grad():
        logits = model(**inputs, **{CACHE: cache}).logits
    for hook in hooks:
        hook.remove()
    return caught, logits


@pytest.mark.parametrize("name", zoo.ZOO)
def test_rope_is_undone_exactly_after_images(name: str) -> None:
    """Keys before RoPE are those that the model projected: text, vision, text behind it, and decoded tokens."""
    model, cache = zoo.model(name), made(zoo.model(name))
    parts = "tivt" if name in zoo.SECTIONED else "titit"
    told = [contents(model, zoo.prompt(name, 1, parts), cache)[0]]
    for _ in range(3):
        told.append(contents(model, {"input_ids": torch.tensor([[7]])}, cache)[0])
    for layer in cache.compressible:
        view = view_of(layer)
        assert view.rope is not None
        found = view.rope.unrotate(view.slots.keys, view.places(view.slots.positions))
        index = layer.info.index
        torch.testing.assert_close(found, torch.cat([x[index] for x in told], 2), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", zoo.SECTIONED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sections_are_found(name: str, dtype: torch.dtype) -> None:
    """In order as Qwen2-VL has them, interleaved as Qwen3-VL; in half precision too."""
    model = zoo.SECTIONED[name]().to(dtype)
    mixed = [0, 1, 2, 0, 1, 2, 0, 1] if name == "qwen3-vl" else [0, 0, 1, 1, 1, 2, 2, 2]
    for rope in rope_of(model).values():
        assert rope.axis.tolist() == mixed  # type: ignore[union-attr]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_which_tokens_are_vision_and_where_they_are(name: str) -> None:
    model, cache = zoo.model(name), made(zoo.model(name))
    prompt = zoo.prompt(name, 2, "tiit")
    contents(model, prompt, cache)
    ids, known = prompt["input_ids"], cache.shared.positions.known
    assert known is not None
    facts = known.of(torch.arange(ids.shape[1])[None])[0]
    assert facts[:, KIND].tolist() == [IMAGE if x == zoo.IMAGE else TEXT for x in ids[0].tolist()]
    size = int((ids == zoo.IMAGE).sum()) // 2
    vision = facts[facts[:, KIND] == IMAGE]
    assert vision[:, CELL].tolist() == [*range(size)] * 2 and vision[:, STEP].tolist() == [0] * size + [1] * size
    assert (facts[facts[:, KIND] == TEXT][:, CELL] == -1).all()


@pytest.mark.parametrize("name", zoo.SECTIONED)
def test_steps_of_a_video(name: str) -> None:
    model, cache = zoo.model(name), made(zoo.model(name))
    prompt = zoo.prompt(name, 2, "tvtv")
    contents(model, prompt, cache)
    facts = cache.shared.positions.known.of(torch.arange(prompt["input_ids"].shape[1])[None])[0]  # type: ignore[union-attr]
    vision = facts[facts[:, KIND] == VIDEO]
    assert vision[:, STEP].tolist() == [step for step in range(6) for _ in range(4)]
    assert vision[:, CELL].tolist() == [0, 1, 2, 3] * 6


@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize("method", ["keepkv2", "expected-attention", "compactor"])
def test_budget_1_and_rows_of_a_batch(name: str, method: str) -> None:
    """Tokens of the plain cache at budget 1; at half of it a padded row keeps and says what it does alone."""
    model = zoo.model(name)
    rows = [zoo.prompt(name, 3, "titt"), zoo.prompt(name, 4, "ti" if name != "gemma3" else "tit")]
    together = zoo.batch(name, rows)
    arguments = dict(max_new_tokens=4, do_sample=False)
    plain = model.generate(**together, **arguments)
    assert torch.equal(plain, model.generate(**together, **arguments, **{CACHE: keepkv.Cache(model, method, 1.0)}))
    cache = keepkv.Cache(model, method, 0.5)
    found = model.generate(**together, **arguments, **{CACHE: cache})
    for i, row in enumerate(rows):
        alone = keepkv.Cache(model, method, 0.5)
        assert torch.equal(model.generate(**row, **arguments, **{CACHE: alone})[0, -4:], found[i, -4:])
        for layer in alone.compressible:
            index = layer.info.index
            kept = [[set(x[x >= 0].tolist()) for x in c.kept_positions(index)[j]] for c, j in ((alone, 0), (cache, i))]
            assert kept[0] == kept[1]


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen3-vl", "llava"])
def test_facts_follow_rows_copies_and_files(name: str, tmp_path: Path) -> None:
    model, cache = zoo.model(name), keepkv.Cache(zoo.model(name), "compactor", 0.6)
    together = zoo.batch(name, [zoo.prompt(name, 5, "tit"), zoo.prompt(name, 6, "ttit")])
    contents(model, together, cache)
    seen = cache.seen
    at = torch.arange(int(seen.min()))[None].expand(2, -1)
    facts = cache.shared.positions.known.of(at)  # type: ignore[union-attr]
    cache.save(tmp_path / "cache")
    loaded = keepkv.Cache.load(tmp_path / "cache", model)
    twin = cache.copy()
    twin.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(loaded.shared.positions.known.of(at), facts)  # type: ignore[union-attr]
    assert torch.equal(twin.shared.positions.known.of(at), facts.flip(0))  # type: ignore[union-attr]
    other = cache.split([1])
    assert torch.equal(other.shared.positions.known.of(at[:1]), facts[1:])  # type: ignore[union-attr]
    cache.join(other)
    assert torch.equal(cache.shared.positions.known.of(at), facts)  # type: ignore[union-attr]
    cache.reset()
    assert cache.shared.positions.known is None


@pytest.mark.parametrize("name", zoo.SECTIONED)
def test_codecs_that_write_keys_before_rope(name: str) -> None:
    """What is written is what the model projected, and it is turned back to where it stood."""
    model = zoo.model(name)
    exact = made(model)
    written = keepkv.Cache(model, "full", 1.0, codec="lloyd-max", codec_options={"bits": 4, "centre": True})
    prompt = zoo.prompt(name, 7, "tivt")
    for cache in (exact, written):
        contents(model, prompt, cache)
    for one, two in zip(exact.compressible, written.compressible, strict=True):
        a, b = one.store.view().keys, two.store.view().keys
        assert float((a - b).norm() / a.norm()) < 0.12


@torch.no_grad()
@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize("method", ["full", "keepkv2"])
def test_a_second_turn_brings_another_image(name: str, method: str) -> None:
    """Two forwards, each with an image: logits of transformers' own cache, and what is known is that of one forward."""
    model = zoo.model(name)
    turns = [zoo.prompt(name, 8, "tit"), zoo.prompt(name, 9, "titt")]
    whole = {key: torch.cat([turn[key] for turn in turns], int(key.endswith(("ids", "mask")))) for key in turns[0]}
    if name == "smolvlm":
        whole["pixel_values"] = torch.cat([turn["pixel_values"] for turn in turns], 1)
    one, two = (keepkv.Cache(model, method, None if method == "full" else 1.0) for _ in range(2))
    given: list[Any] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs.get("position_ids")), with_kwargs=True
    )
    model(**whole, **{CACHE: one})
    hook.remove()

    def read(cache: Any) -> Tensor:
        start, found = 0, []
        for turn in turns:
            end = start + turn["input_ids"].shape[1]
            # Without positions a model with M-RoPE takes the second image for text.
            places = {} if given[0] is None else {"position_ids": given[0][..., start:end]}
            inputs = {key: x for key, x in turn.items() if key != "attention_mask"}
            found.append(model(**inputs, **places, **{CACHE: cache}).logits)
            start = end
        return torch.cat(found, 1)

    found, wanted = read(two), read(DynamicCache(config=model.config.get_text_config()))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    at = torch.arange(whole["input_ids"].shape[1])[None]
    assert torch.equal(one.shared.positions.known.of(at), two.shared.positions.known.of(at))  # type: ignore[union-attr]


@torch.no_grad()
@pytest.mark.parametrize(("name", "tokens"), [("llava-onevision", 13), ("llava-next-video", 12)])
def test_a_video_of_llava(name: str, tokens: int) -> None:
    """A video is one stretch there, with OneVision a token behind it: one step of one position for each."""
    model = zoo.model(name)
    ids = torch.randint(5, 280, (1, 30), generator=torch.Generator().manual_seed(1))
    ids[0, 8 : 8 + tokens] = zoo.VIDEO
    video = torch.randn(1, 3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values_videos=video)
    arguments = dict(max_new_tokens=5, do_sample=False)
    cache = keepkv.Cache(model, "keepkv2", 1.0)
    assert torch.equal(model.generate(**inputs, **arguments), model.generate(**inputs, **arguments, **{CACHE: cache}))
    facts = cache.shared.positions.known.of(torch.arange(30)[None])[0]  # type: ignore[union-attr]
    assert facts[8 : 8 + tokens, CELL].tolist() == [*range(tokens)]
    assert facts[8 : 8 + tokens, STEP].unique().tolist() == [0]
    assert facts[:, 0].tolist() == [*range(30)]
