"""Prompts with pictures against the model's own forward of the same images."""

from __future__ import annotations

import pytest
import torch
from seeing_tokens import Letters

import keepkv
from helpers import vision_zoo as zoo
from keepkv.engine.versions import CACHE
from keepkv.errors import UnsupportedInput, UnsupportedModel
from keepkv.tasks.asking import reply
from keepkv.vision.seeing import MARK, Seeing, read

SIZES = {"qwen2-vl": (16, 24), "qwen2-vl-pairs": (16, 24), "qwen2.5-vl": (16, 24)}
NAMES = [*SIZES, "llava", "internvl", "smolvlm"]


def of(name: str) -> Seeing:
    return Seeing(zoo.model(name), Letters(), SIZES.get(name))


def pictures(seed: int, *steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 255, (n, 3, 20, 20), dtype=torch.uint8, generator=generator) for n in steps]


@pytest.mark.parametrize("name", NAMES)
def test_two_images_are_what_the_model_makes_of_them(name: str) -> None:
    """Positions are the model's own, and logits those of its forward without ours."""
    model, seeing = zoo.model(name), of(name)
    ids = seeing.encode(f"look {MARK} and {MARK} now")
    seen = seeing.seen(ids, pictures(0, 1, 1), torch.device("cpu"))
    assert int(seen.starts.sum()) == 2 and int(seen.vision.sum()) == 2 * seeing.cells
    cache = keepkv.Cache(model, "full")
    mask = read(model, cache, ids, seen, seeing)
    with torch.no_grad():
        last = torch.tensor([[9]])
        places = seen.places.amax() + 1 + torch.zeros_like(last)
        wide = torch.cat((mask, torch.ones_like(last)), 1)
        found = model(input_ids=last, attention_mask=wide, position_ids=places, **{CACHE: cache}).logits[0, -1]
        tokens = torch.tensor([[*ids, 9]])
        given = seeing.family.pixels(seen.pixels)
        if "qwen" in name:
            grid = torch.tensor([[1, *(2 * x for x in seeing.grid)]] * 2)
            kinds = (tokens == zoo.VIDEO).long() * 2
            given = {"pixel_values_videos": given["pixel_values_videos"], "video_grid_thw": grid}
            given["mm_token_type_ids"] = kinds
        wanted = model(input_ids=tokens, attention_mask=wide, **given).logits[0, -1]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2-vl", "llava"])
def test_a_video_and_words_behind_it(name: str) -> None:
    """What is asked behind a compressed prompt stands where it would without the compression."""
    model, seeing = zoo.model(name), of(name)
    ids = seeing.encode(f"a {MARK * 4} b")
    seen = seeing.seen(ids, pictures(1, 4), torch.device("cpu"))
    if name == "qwen2-vl":
        times = seen.places[0, 0][seen.vision[0]].view(4, -1)
        assert times[:, 0].diff().tolist() == [1, 1, 1] and bool((times == times[:, :1]).all())
    said = []
    for method, budget in (("full", None), ("snapkv", 1.0)):
        cache = keepkv.Cache(model, method, budget)
        mask = read(model, cache, ids, seen, seeing)
        said.append(reply(model, cache, mask, [seeing.encode("which?", False)], 5)[0])
        assert int(cache.shared.positions.ahead()) == int(seen.places.max()) + 1 - len(ids)  # type: ignore[arg-type]
    assert torch.equal(*said)


def test_what_does_not_fit_is_refused() -> None:
    seeing = of("llava")
    with pytest.raises(UnsupportedInput, match="one mark for each step"):
        seeing.seen(seeing.encode(f"a{MARK}"), pictures(0, 2), torch.device("cpu"))
    with pytest.raises(UnsupportedInput, match="colours"):
        seeing.seen(seeing.encode(MARK), [torch.zeros(1, 5, 6, 7)], torch.device("cpu"))
    with pytest.raises(UnsupportedInput, match="size="):
        Seeing(zoo.model("qwen2-vl"), Letters())
    with pytest.raises(UnsupportedModel, match="how pictures enter"):
        Seeing(zoo.model("gemma3"), Letters())


def test_text_comes_back() -> None:
    seeing = of("llava")
    text = f"ab {MARK * 2} cd"
    ids = seeing.encode(text, add_special_tokens=False)
    assert len(ids) == 6 + 2 * seeing.cells and seeing.decode(ids) == f"ab {MARK * (2 * seeing.cells)} cd"
    assert seeing.bos_token_id == 1
