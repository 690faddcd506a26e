"""Layers and heads given back: they hold what they held, and what is left is what a plain implementation finds."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoTokenizer, DynamicCache
from typer.testing import CliRunner
from zoo import VOCAB, model

import keepkv
from keepkv import tasks
from keepkv.allocate.base import Allocate, Known
from keepkv.cli.program import program
from keepkv.core.when import When
from keepkv.embedded import embedded_model
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError
from keepkv.evaluation.fidelity import LayersRow, by_layer, fidelity
from keepkv.evaluation.fidelity.giving_back import with_head, with_layers
from keepkv.evaluation.fidelity.layers import steps
from keepkv.evaluation.fidelity.passages import Passage, of_task, of_text
from keepkv.evaluation.setup import HELD_OUT, SEEDS, Variant
from keepkv.measure.files import read_rows
from keepkv.tasks.asking import encode
from keepkv.tasks.text import document

CONTEXT, LENGTH = 60, 80
SNAP = {"window": 8}


def ids(seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(seed))


def passage(tokens: Tensor) -> Passage:
    given = tokens.tolist()
    return Passage(given[:CONTEXT], ((given[CONTEXT : CONTEXT + 1], given[CONTEXT + 1 :]),))


def passages(n: int = 1) -> list[Passage]:
    return [passage(ids(1 + i)) for i in range(n)]


def caches(network: Any, method: str = "keepkv2", **options: Any) -> tuple[keepkv.Cache, keepkv.Cache]:
    """Compressed and not, of the same context."""
    whole = keepkv.Cache(network, method, 0.4, **options).copy(when=When("deferred"))
    with torch.inference_mode():
        network(input_ids=ids()[None, :CONTEXT], **{CACHE: whole})
        small = whole.copy()
        small.compress()
        whole.compressing = small.compressing = False
    return small, whole


def assert_same_slots(one: Any, other: Any, heads: list[int] | None = None) -> None:
    """The valid slots of two stores, head by head, whatever empty ones stand in front."""
    mine, theirs = one.view(), other.view()
    for head in range(mine.shape[1]) if heads is None else heads:
        for name in ("keys", "values", "log_votes", "positions"):
            pair = [getattr(slots, name)[0, head][slots.valid[0, head]] for slots in (mine, theirs)]
            assert torch.equal(*pair), (name, head)


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek-v3"])
def test_a_layer_given_back_holds_all_slots_and_the_others_what_they_held(name: str) -> None:
    small, whole = caches(model(name), "snapkv", **SNAP)
    layers = [layer.info.index for layer in small.compressible]
    before = small.report().kept
    twin = with_layers(small, whole, layers[:1])
    assert_same_slots(twin.layers[layers[0]].store, whole.layers[layers[0]].store)
    assert set(twin.report().kept[layers[0]][0]) == {CONTEXT} and len(layers) > 1
    for layer in layers[1:]:
        assert_same_slots(twin.layers[layer].store, small.layers[layer].store)
        assert max(twin.report().kept[layer][0]) < CONTEXT
    with torch.inference_mode():
        model(name)(input_ids=ids()[None, CONTEXT:], **{CACHE: twin})
    assert small.report().kept == before and whole.get_seq_length() == CONTEXT, "neither is changed"
    assert set(twin.report().kept[layers[0]][0]) == {LENGTH}


@pytest.mark.parametrize(("method", "options"), [("keepkv2", {}), ("keepkv", {"threshold": None}), ("h2o", {})])
def test_a_head_given_back_holds_all_its_slots_and_the_others_what_they_held(method: str, options: Any) -> None:
    small, whole = caches(model("llama"), method, **options)
    twin = with_head(small, whole, 1, 0)
    assert_same_slots(twin.layers[1].store, whole.layers[1].store, [0])
    assert_same_slots(twin.layers[1].store, small.layers[1].store, [1])
    assert_same_slots(twin.layers[2].store, small.layers[2].store)
    assert twin.layers[1].store.lengths[0, 0] == CONTEXT > small.layers[1].store.lengths[0, 0]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gemma4", "deepseek-v3"])
@pytest.mark.parametrize("method", ["snapkv", "random"])
def test_with_everything_given_back_nothing_is_lost(name: str, method: str) -> None:
    row = by_layer(model(name), passages(2), Variant(method, SNAP if method == "snapkv" else {}), 0.4)
    assert row.whole.values == (0.0, 0.0) and min(row.kl.values) > 1e-5


def plain_attention(allowed: dict[int, Tensor]) -> Callable[..., Any]:
    """Attention of float64 over every token, of which each KV head of a layer sees those ``allowed`` (H,S) bool of the
    context; of what is behind it, what came before."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        (_, heads, new, _), (_, groups, length, _) = query.shape, key.shape
        sees = torch.ones(new, length, dtype=torch.bool).tril(length - new).expand(groups, new, length).clone()
        if length > CONTEXT:
            sees[:, :, :CONTEXT] &= allowed[module.layer_idx][:, None]
        sees = sees.repeat_interleave(heads // groups, 0)
        keys, values = (x[0].double().repeat_interleave(heads // groups, 0) for x in (key, value))
        logits = query[0].double() @ keys.transpose(1, 2) * kwargs["scaling"]
        out = logits.masked_fill(~sees, float("-inf")).softmax(-1) @ values
        return out.transpose(0, 1)[None].to(query.dtype), None

    return attention


def plain_logits(network: nn.Module, allowed: dict[int, Tensor]) -> Tensor:
    """(T,V) float64 log-probabilities after each token behind the context, without keepkv."""
    AttentionInterface.register("plain-for-this-test", plain_attention(allowed))
    before = network.config._attn_implementation
    network.set_attn_implementation("plain-for-this-test")
    try:
        cache = DynamicCache()
        with torch.inference_mode():
            network(input_ids=ids()[None, :CONTEXT], **{CACHE: cache})
            logits = network(input_ids=ids()[None, CONTEXT:], **{CACHE: cache}).logits
    finally:
        network.set_attn_implementation(before)
    return logits[0].double().log_softmax(-1)


def test_what_is_left_is_what_a_plain_implementation_finds() -> None:
    """keepkv2 shares one budget over all layers: heads of all lengths, and masks over transformers' own cache."""
    network = model("llama")
    row = by_layer(network, passages(), Variant("keepkv2"), 0.4, heads=[1])
    small, whole = caches(network)
    everything = torch.ones(2, CONTEXT, dtype=torch.bool)
    kept = {i: torch.zeros(2, CONTEXT, dtype=torch.bool) for i in range(3)}
    for i, mask in kept.items():
        for head, positions in enumerate(small.kept_positions(i)[0]):
            mask[head, positions[positions >= 0].long()] = True
    assert len({int(head.sum()) for mask in kept.values() for head in mask}) > 2, "heads of different lengths"
    del small, whole  # the model has its own attention again
    full = plain_logits(network, dict.fromkeys(kept, everything))

    def left(allowed: dict[int, Tensor]) -> float:
        return float((full.exp() * (full - plain_logits(network, allowed))).sum(-1).mean())

    assert row.kl.mean == pytest.approx(left(kept), rel=1e-3)
    for i, one in enumerate(row.layers):
        assert (one.layer, one.head) == (i, None) and one.held == pytest.approx(float(kept[i].double().mean()))
        assert one.kl.mean == pytest.approx(left(kept | {i: everything}), rel=1e-3)
        assert one.accounts == pytest.approx(1 - one.kl.mean / row.kl.mean)
    for head, one in enumerate(row.heads):
        mask = kept[1].clone()
        mask[head] = True
        assert (one.layer, one.head) == (1, head) and one.held == pytest.approx(float(kept[1][head].double().mean()))
        assert one.kl.mean == pytest.approx(left(kept | {1: mask}), rel=1e-3)
    assert len({round(one.kl.mean, 6) for one in (*row.layers, *row.heads)}) == 5, "all different"


def test_as_it_is_the_kl_is_that_of_fidelity() -> None:
    """A text that goes on, deferred there too, so that the same slots stay."""
    options = {**SNAP, "when": When("deferred")}
    row = by_layer(model("llama"), passages(2), Variant("snapkv", options), 0.4, seed=3)
    segments = torch.stack([ids(1), ids(2)])
    *_, other = fidelity(model("llama"), segments, [("snapkv", options)], (0.4,), context=CONTEXT, seed=3, greedy=2)
    assert row.kl == other.metrics["kl"] and row.ratio == other.ratio


def test_questions_count_from_their_last_token_on() -> None:
    """Two pairs behind one context weigh the same, however long; what is asked is given."""
    [plain] = passages()
    tokens = ids().tolist()
    pairs = ((tokens[60:64], tokens[64:68]), (tokens[60:61], tokens[61:]))
    both, one, two = (
        by_layer(model("llama"), [Passage(plain.context, behind)], Variant("random"), 0.4)
        for behind in (pairs, pairs[:1], pairs[1:])
    )
    assert both.kl.mean == pytest.approx((one.kl.mean + two.kl.mean) / 2) and one.kl.mean != two.kl.mean
    assert two == by_layer(model("llama"), [plain], Variant("random"), 0.4)


@dataclass(frozen=True)
class AllButOne(Allocate):
    """Every slot to all layers but the second, which keeps a quarter."""

    ragged: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    def across(
        self, scores: list[Tensor], tiers: list[Tensor], budgets: list[Tensor], known: Known = ()
    ) -> list[Tensor]:
        valid = [(tier > 0).sum(-1) for tier in tiers]
        return [count // 4 if i == 1 else count for i, count in enumerate(valid)]


def test_a_layer_that_is_starved_is_marked() -> None:
    options = {"allocate": AllButOne(), "sinks": 2, "window": 2}
    row = by_layer(model("llama"), passages(2), Variant("keepkv2", options), 0.5)
    assert [one.held for one in row.layers] == [1, 0.25, 1]
    assert [one.accounts for one in row.layers] == pytest.approx([0, 1, 0], abs=1e-5)
    assert [(one.carries, one.starved) for one in row.layers] == [(False, False), (True, True), (False, False)]


def test_a_second_reading_and_a_seed_are_as_in_an_evaluation() -> None:
    asked = (("kvzip", 0), ("random", 0), ("random", 1))
    found = [by_layer(model("llama"), passages(), Variant(name), 0.4, seed=seed) for name, seed in asked]
    assert all(one.whole.mean == 0 and one.kl.mean > 0 for one in found)
    assert found[1].kl.mean != found[2].kl.mean


def test_what_a_codec_costs_is_left_with_everything_given_back() -> None:
    row = by_layer(model("llama"), passages(), Variant("snapkv", {**SNAP, "codec": "int4"}), 0.4)
    assert 0 < row.whole.mean < row.kl.mean


def test_what_cannot_be_measured_is_said() -> None:
    network, snap = model("llama"), Variant("snapkv", SNAP)
    with pytest.raises(KeepKVError, match="layer 7 is not compressed; those of this model are 0, 1, 2"):
        by_layer(network, passages(), snap, 0.4, heads=[7])
    with pytest.raises(KeepKVError, match="encoded once more"):
        by_layer(network, passages(), Variant("snapkv", {**SNAP, "codec": "int4"}), 0.4, heads=[1])
    with pytest.raises(KeepKVError, match="compressed nothing"):
        by_layer(network, passages(), snap, 500)
    with pytest.raises(KeepKVError, match="2048"):
        by_layer(network, [passage(ids().repeat(30))], snap, 0.4)
    with pytest.raises(KeepKVError, match="at least one"):
        by_layer(network, [], snap, 0.4)
    with pytest.raises(KeepKVError, match="one token at least that is given"):
        Passage([1, 2], (([], [3]),))
    small, whole = caches(network)
    with pytest.raises(KeepKVError, match="2 KV heads, numbered from 0: there is no head 2"):
        with_head(small, whole, 1, 2)


def test_every_step_is_told() -> None:
    told: list[str] = []
    by_layer(model("llama"), passages(2), Variant("random"), 0.4, heads=[1, 1], step=told.append)
    assert len(told) == steps(model("llama"), passages(2), [1, 1]) == 14
    assert told[:4] == ["text 1: full", "text 1: random", "text 1: everything given back", "text 1: layer 0"]


def test_passages_of_tasks_are_those_of_an_evaluation_and_of_a_text_go_on() -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_model())
    one, two = of_task(tokenizer, "niah-multikey-1", 300, 2, seed=1, plain=False)
    item = encode(tokenizer, tasks.get("niah-multikey-1").generate(tokenizer, 300, HELD_OUT + SEEDS))
    assert one == Passage(item.context, tuple((x.prompt, x.answer) for x in item.asked)) and one != two
    [judged] = of_task(tokenizer, "perplexity", 300, 1)
    assert [len(given) for given, _ in judged.behind] == [1]
    [only] = of_text(tokenizer, document(), 100, 1, 20)
    assert (len(only.context), [(len(a), len(b)) for a, b in only.behind], only.longest) == (100, [(1, 19)], 120)
    assert only.context[0] == tokenizer.bos_token_id


def run(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(program, ["layers", *args])
    assert result.exit_code == code, (result.output, result.exception)
    return result


SMALL = ("--items", "2", "--length", "512", "-m", "keepkv2", "-b", "0.3")


def test_the_verb_finds_layer_and_head_that_the_answers_of_the_model_in_the_package_hang_on(tmp_path: Path) -> None:
    [row] = json.loads(run(*SMALL, "--heads", "2", "--out", str(tmp_path), "--json").stdout)
    assert row["model"] == "embedded" and row["whole"]["mean"] == 0 and row["passages"] == 2
    assert [one["layer"] for one in row["layers"]] == [0, 1, 2, 3] and [one["head"] for one in row["heads"]] == [0, 1]
    most = max(row["layers"], key=lambda one: one["accounts"])
    assert most["layer"] == 2 and most["carries"] and not most["starved"], "it holds more than the others"
    [read] = read_rows(tmp_path, "layers.jsonl", LayersRow)
    assert read.to_dict() == row
    [line] = csv.DictReader((tmp_path / "layers.csv").open(newline="", encoding="utf-8"))
    assert float(line["accounts_layer_2"]) == row["layers"][2]["accounts"] and "kl_layer_2_head_1" in line


def test_the_verb_prints_a_table(tmp_path: Path) -> None:
    shown = run(*SMALL).stdout
    assert "2 contexts of 512 tokens" in shown and "layer 3" in shown and "carries" in shown
    text = tmp_path / "text.txt"
    text.write_text(document()[:4000], encoding="utf-8")
    assert "8 tokens that follow" in run(*SMALL, "--text", str(text), "--continue", "8").stdout
    assert "Examples:" in run("--help").stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--method", "snapvk"), ["snapvk", "Did you mean 'snapkv'"]),
        (("--task", "notess"), ["notess", "Did you mean 'notes'"]),
        (("--task", "long-decode"), ["long-decode", "choose another"]),
        (("--task", "notes", "--text", "x.txt"), ["give one of them"]),
        (("--text", "/nowhere/text.txt"), ["/nowhere/text.txt", "No such file"]),
        (("--heads", "9", "--length", "100", "--items", "1"), ["layer 9 is not compressed", "0, 1, 2, 3"]),
        (("--length", "100", "--budget", "4000", "--items", "1"), ["compressed nothing"]),
        (("--length", "100000"), ["tokens", "reads"]),
    ],
)
def test_one_line_and_code_2(args: tuple[str, ...], words: list[str]) -> None:
    result = run(*args, code=2)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ")
    assert all(word in result.stderr for word in words), result.stderr
