"""Behind images a cache goes on at its own positions, whatever the model read in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

import keepkv
from keepkv.engine.versions import CACHE

IMAGE, START, END = 290, 292, 293
TEXT = dict(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, pad_token_id=0, eos_token_id=None,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
)  # fmt: skip
IDS = dict(image_token_id=IMAGE, video_token_id=291, vision_start_token_id=START, vision_end_token_id=END)


def qwen2() -> Any:
    vision = dict(depth=1, embed_dim=32, num_heads=2, hidden_size=64, mlp_ratio=2, patch_size=4, temporal_patch_size=1)
    config = t.Qwen2VLConfig(text_config={**TEXT, "head_dim": None}, vision_config=vision, vocab_size=300, **IDS)
    return t.Qwen2VLForConditionalGeneration(config)


def qwen25() -> Any:
    vision = dict(
        depth=1, hidden_size=32, num_heads=2, out_hidden_size=64, intermediate_size=64, patch_size=4,
        temporal_patch_size=1, window_size=16, fullatt_block_indexes=[0],
    )  # fmt: skip
    config = t.Qwen2_5_VLConfig(text_config={**TEXT, "head_dim": None}, vision_config=vision, vocab_size=300, **IDS)
    return t.Qwen2_5_VLForConditionalGeneration(config)


def qwen3() -> Any:
    vision = dict(
        depth=1, hidden_size=32, intermediate_size=64, out_hidden_size=64, num_heads=2, patch_size=4,
        spatial_merge_size=2, temporal_patch_size=1, deepstack_visual_indexes=[0], num_position_embeddings=64,
    )  # fmt: skip
    return t.Qwen3VLForConditionalGeneration(t.Qwen3VLConfig(text_config=TEXT, vision_config=vision, **IDS))


MODELS: dict[str, Callable[[], Any]] = {"qwen2-vl": qwen2, "qwen2.5-vl": qwen25, "qwen3-vl": qwen3}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    made = MODELS[request.param]().eval()
    for x in made.model.language_model.parameters():
        x.data.mul_(5 if x.dim() == 2 else 1)  # sharper, so that positions matter
    return made


def prompt(side: int, seed: int, text: int = 30) -> dict[str, Tensor]:
    """Text around an image of ``side`` × ``side`` patches, which counts as side²/4 tokens and side/2 positions."""
    generator = torch.Generator().manual_seed(seed)
    size = side * side // 4
    ids = torch.randint(5, 280, (1, text + size + 2), generator=generator)
    ids[0, 5], ids[0, 6 : 6 + size], ids[0, 6 + size] = START, IMAGE, END
    pixels = torch.randn(side * side, 48, generator=generator)
    return dict(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
        image_grid_thw=torch.tensor([[1, side, side]]), mm_token_type_ids=(ids == IMAGE).long(),
    )  # fmt: skip


A, B = prompt(8, 1), prompt(12, 2)
NEW = torch.randint(5, 280, (1, 9), generator=torch.Generator().manual_seed(3))


def cache(model: Any, method: str = "full", budget: Any = None, **options: Any) -> keepkv.Cache:
    return keepkv.Cache(model, method, budget, **options)


@torch.no_grad()
def read(model: Any, inputs: dict[str, Tensor], into: keepkv.Cache) -> keepkv.Cache:
    model(**inputs, **{CACHE: into})
    return into


@torch.no_grad()
def fed(model: Any, context: dict[str, Tensor], of: keepkv.Cache) -> Tensor:
    """Logits of a forward of new text, then of one more token."""
    ids = NEW.expand(of.batch_size, -1)
    first = model(input_ids=ids, **{CACHE: of}).logits
    return torch.cat((first, model(input_ids=ids[:, :1], **{CACHE: of}).logits), dim=1)


def generated(model: Any, context: dict[str, Tensor], of: keepkv.Cache) -> Tensor:
    """Logits of an answer to new text, from ``generate``; the image is not given again."""
    ids = torch.cat((context["input_ids"], NEW), dim=1).repeat(of.batch_size, 1)
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **{CACHE: of}, max_new_tokens=3, do_sample=False,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("ask", [fed, generated])
@pytest.mark.parametrize("method", ["full", "snapkv"])
def test_contexts_on_one_model_keep_their_positions(model: Any, ask: Any, method: str, tmp_path: Path) -> None:
    """Copied, saved, read before another: without the offsets logits are off by 0.23 to 0.60, unsaid."""
    options: dict[str, Any] = {} if method == "full" else {"window": 4, "sinks": 2}
    budget = None if method == "full" else 24
    first = read(model, A, cache(model, method, budget, **options))
    right = ask(model, A, first.copy())
    first.save(tmp_path / "a.safetensors")
    second = read(model, B, cache(model, method, budget, **options))
    other = ask(model, B, second.copy())
    for _ in range(2):
        assert torch.equal(ask(model, A, first.copy()), right)
        assert torch.equal(ask(model, B, second.copy()), other)
    model.model.rope_deltas = None  # as in a new process
    assert torch.equal(ask(model, A, keepkv.Cache.load(tmp_path / "a.safetensors", model)), right)


def test_the_positions_are_those_of_the_whole_text(model: Any) -> None:
    """What the offsets are for: new text behind a context is as if all had been read at once."""
    whole = {**A, "input_ids": torch.cat((A["input_ids"], NEW), dim=1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    whole["mm_token_type_ids"] = (whole["input_ids"] == IMAGE).long()
    with torch.no_grad():
        at_once = model(**whole).logits[:, -9:]
    first = read(model, A, cache(model))
    read(model, B, cache(model))
    assert torch.allclose(fed(model, A, first)[:, :9], at_once, atol=1e-3)


def test_text_alone_is_not_moved_by_an_image_read_before(model: Any) -> None:
    """transformers' own cache is: its text of one context goes on at the offset of another."""
    text = {name: x[:, :20] for name, x in prompt(8, 4).items() if name in ("input_ids", "attention_mask")}
    text["input_ids"] = NEW[:, :1].expand(1, 20) + torch.arange(20)
    right = fed(model, text, read(model, text, cache(model)))
    read(model, B, cache(model))
    assert torch.equal(fed(model, text, read(model, text, cache(model))), right)


def test_rows_take_their_offsets_along(model: Any) -> None:
    one, two = prompt(8, 1, text=50), B  # as long as each other, with other offsets
    first, second = read(model, one, cache(model)), read(model, two, cache(model))
    right = [fed(model, x, y.copy()) for x, y in ((one, first), (two, second))]
    both = first.copy()
    both.join(second.copy())
    assert both.shared.positions.offsets.flatten().tolist() == [-12, -30]
    assert torch.allclose(fed(model, one, both.copy()), torch.cat(right), atol=1e-3)
    last = both.copy().split([1])
    both.batch_select_indices(torch.tensor([1]))
    for alone in (last, both):
        assert torch.allclose(fed(model, two, alone), right[1], atol=1e-3)
    first.batch_repeat_interleave(3)
    assert torch.allclose(fed(model, one, first)[2], right[0][0], atol=1e-3)


def test_beams_and_images_in_a_generation(model: Any) -> None:
    """The whole prompt with its image through ``generate``: as with transformers' own cache."""
    options: dict[str, Any] = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    for beams in (1, 2):
        plain = model.generate(**A, num_beams=beams, **options)
        read(model, B, cache(model))
        out = model.generate(**A, num_beams=beams, **options, **{CACHE: cache(model)})
        assert torch.equal(out, plain)
