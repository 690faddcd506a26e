"""Gates of Fast KVzip, trained: they foretell, they are in the authors' format, bad input is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM, AutoTokenizer

import keepkv
from keepkv import tasks
from keepkv.calibrate import calibrate, published
from keepkv.calibrate.fast_kvzip import Read, _fresh, _told, _trained
from keepkv.core.when import When
from keepkv.engine.cache import Cache
from keepkv.engine.passes.reread import feed, reread
from keepkv.errors import CalibrationError
from keepkv.score.learned.fast_kvzip import PREFIX
from keepkv.score.passes.kvzip import STAT
from keepkv.tasks.asking import encode


@pytest.fixture(scope="module")
def embedded() -> Any:
    path = keepkv.embedded_model()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def texts(tokenizer: Any, seeds: range) -> list[torch.Tensor]:
    made = (tasks.get("niah-multikey-1").generate(tokenizer, 320, seed) for seed in seeds)
    return [torch.tensor([encode(tokenizer, item).context]) for item in made]


@pytest.fixture(scope="module")
def taught(embedded: Any) -> keepkv.Calibration:
    model, tokenizer = embedded
    return calibrate("fast-kvzip", model, texts(tokenizer, range(10)), steps=200)


def test_what_a_gate_made_is_learnt() -> None:
    """Shares that one gate makes of random states are foretold by another after its training, and not before."""
    random = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(4000, 24, generator=random)
    made = {
        name: w * (3 if "proj" in name else 1) for name, w in _fresh(Read([x], [x[:, :2]], 2), 4, 3, random).items()
    }
    y = _told(made, x)
    gate = _fresh(Read([x], [y], 2), 4, 3, random)

    def correlation(gate: dict[str, torch.Tensor]) -> float:
        told = _told(gate, x[3000:]).detach()
        return min(float(torch.corrcoef(torch.stack((a, b)))[0, 1]) for a, b in zip(told.T, y[3000:].T, strict=True))

    before = correlation(gate)
    assert correlation(_trained(gate, x[:3000], y[:3000], 600, random)) > 0.65 > before + 0.3


def test_what_a_second_reading_attends_to_is_kept(embedded: Any, taught: keepkv.Calibration) -> None:
    """Of a text that was not met: the tenth of the slots that gates choose has most of what KVzip's own choice has, and
    more than the tenth that is the newest."""
    model, tokenizer = embedded
    (ids,) = texts(tokenizer, range(100, 101))
    teacher = Cache(model, "kvzip", 1.0, when=When("deferred"))
    feed(model, teacher, ids, ids.new_ones(1, 0))
    reread(model, teacher, ids)
    told = Cache(model, "fast-kvzip", 1.0, calibration=taught, when=When("deferred"))
    feed(model, told, ids, ids.new_ones(1, 0))
    worth = torch.stack([layer.store.view().stats[STAT] for layer in teacher.compressible]).flatten()
    ours = torch.stack([layer.store.view().stats["fast_kvzip"] for layer in told.compressible]).flatten()
    count = worth.numel() // 10
    best, chosen = worth.topk(count).values.sum(), worth[ours.topk(count).indices].sum()
    newest = torch.arange(ids.shape[1]).repeat(worth.numel() // ids.shape[1]).topk(count).indices
    assert chosen > 0.6 * best and chosen > 1.4 * worth[newest].sum()


def test_it_is_in_the_authors_format(embedded: Any, taught: keepkv.Calibration, tmp_path: Path) -> None:
    gates = [{name.removeprefix(PREFIX): x for name, x in held.items()} for held in taught.tensors.values()]
    torch.save({"module": gates}, tmp_path / "gates.pt")
    read = published("fast-kvzip", embedded[0], tmp_path / "gates.pt")
    for index, held in taught.tensors.items():
        assert held.keys() == read.tensors[index].keys()
        assert all(torch.equal(x, read.tensors[index][name]) for name, x in held.items())


def test_a_seed_decides(embedded: Any, taught: keepkv.Calibration) -> None:
    model, tokenizer = embedded
    again, other = (calibrate("fast-kvzip", model, texts(tokenizer, range(10)), steps=200, seed=s) for s in (0, 1))
    pairs = [
        (x, again.tensors[i][n], other.tensors[i][n]) for i, held in taught.tensors.items() for n, x in held.items()
    ]
    assert all(torch.equal(x, same) for x, same, _ in pairs) and not all(torch.equal(x, new) for x, _, new in pairs)


def test_what_cannot_be_trained_is_refused() -> None:
    model, ids = zoo.model("llama"), torch.randint(3, zoo.VOCAB, (6, 1, 40))
    with pytest.raises(CalibrationError, match="needs at least 5 texts of more than 8 tokens, 4 were given"):
        calibrate("fast-kvzip", model, ids[:4])
    for options in ({"rank": 0}, {"steps": 0}, {"anchors": -1}):
        with pytest.raises(CalibrationError, match="give positive numbers"):
            calibrate("fast-kvzip", model, ids, **options)


@pytest.mark.parametrize("name, method", [("embedded-gates", "keepkv3"), ("embedded-fast-kvzip", "fast-kvzip")])
def test_what_ships_loads_by_name(embedded: Any, name: str, method: str, tmp_path: Path, monkeypatch: Any) -> None:
    """A file of that name comes before it; another model refuses it."""
    model, tokenizer = embedded
    cache = Cache(model, method, 0.1, calibration=name)
    (ids,) = texts(tokenizer, range(1))
    with torch.no_grad():
        feed(model, cache, ids, ids.new_ones(1, 0))
    assert cache.report().compressed
    with pytest.raises(CalibrationError, match="was made for another model"):
        Cache(zoo.model("llama"), method, 0.1, calibration=name)
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b"no calibration")
    with pytest.raises(CalibrationError, match=name):
        Cache(model, method, 0.1, calibration=name)
