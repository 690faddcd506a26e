"""The leakage study: what a model that obeys only what it still sees would tell, and the numbers made of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import keepkv
from keepkv import tasks
from keepkv.engine.versions import CACHE
from keepkv.errors import KeepKVError
from keepkv.evaluation.leakage.curves import (
    area,
    complete,
    composite,
    curves,
    family_order,
    order_gap,
    peak,
    peak_change,
)
from keepkv.evaluation.leakage.rows import LeakageRow, Outcome, row_of
from keepkv.evaluation.leakage.study import OPTIONS, keep_rates, policy, prompt_of, study
from keepkv.measure import Ledger, MadeWith
from keepkv.metrics.rank import spearman
from keepkv.tasks.asking import compressed
from keepkv.tasks.secret import probed

HERE = MadeWith(device="cpu", dtype="float32", versions={})
REMOVED = (0.0, 0.1, 0.3, 0.45, 0.7, 0.9)


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from keepkv.embedded import embedded_model

    path = embedded_model()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def secret(tokenizer, seed, first="defence", length=160):
    return probed(tasks.get("secret").generate(tokenizer, length, seed, facts=3, questions=2, first=first))


@pytest.fixture(scope="module")
def items(loaded):
    return [secret(loaded[1], seed) for seed in range(12)]


def obedient(tokenizer):
    """A model that obeys a rule, and knows a fact, of which it sees more than half."""

    def speak(model, cache, mask, prompts, keep):
        said = []
        for prompt, sees in zip(prompts, keep, strict=True):
            [asked, probe] = prompt.asked
            told = probe.question.foil if sees["secret"] > 0.5 else " nothing"
            replies = [
                asked.question.answer if sees["directive"] > 0.5 else " nothing",
                probe.question.answer if sees["defence"] > 0.5 else told,
            ]
            said.append([tokenizer.encode(reply, add_special_tokens=False) for reply in replies])
        return said

    return speak


@pytest.fixture(scope="module")
def scripted(loaded, items):
    model, tokenizer = loaded
    parts = study(
        model, tokenizer, {"defence-first": items}, ["streaming-llm", "random"], REMOVED, ["none", "fair", "protect"],
        likelihood=False, speak=obedient(tokenizer),
    )  # fmt: skip
    return [row for part in parts for row in part]


# --- the shape of it -------------------------------------------------------------------------------------------------


def test_leakage_rises_and_falls(scripted):
    """The defence goes first, and the secret is told; then the secret goes as well."""
    curve = curves(scripted)["streaming-llm", "defence-first", "none"]
    leak = curve.means("leak")
    top = peak(curve)
    assert leak[0] == 0.0 and 0.0 < top.removed < 0.9 and top.leak > 0.5 and leak[-1] < 0.5 * top.leak
    assert top.leak_low < top.leak <= top.leak_high
    assert sorted(leak[1:], reverse=True) == leak[1:]


def test_spans_lower_the_peak(scripted):
    found = curves(scripted)
    none, fair, protect = (found["streaming-llm", "defence-first", how] for how in ("none", "fair", "protect"))
    assert peak(fair).leak < peak(none).leak and peak(protect).leak == 0.0
    change = peak_change(fair, none)
    assert change.mean == pytest.approx(peak(fair).leak - peak(none).leak) and change.high < 0
    assert peak_change(none, none).mean == peak_change(none, none).low == 0.0
    assert composite(fair, none).mean > 0 and composite(none, none).mean == 0


def test_keep_rates_are_what_the_spans_ask(scripted):
    found = curves(scripted)
    assert found["streaming-llm", "defence-first", "protect"].means("keep_defence") == [1.0] * len(REMOVED)
    for row in found["random", "defence-first", "fair"].rows:
        # Shares are rounded to whole tokens, of rules of eight tokens or so; sinks come on top.
        assert row.keep_defence == pytest.approx(1 - row.removed, abs=0.1)
        assert abs(row.bias) < 0.15
    none = found["streaming-llm", "defence-first", "none"].rows[1]
    assert none.keep_defence < 0.5 and none.measures["keep_rest"] > 0.9


def test_rows_say_all_that_a_report_reads(scripted):
    names = (
        "method order spans removed n failed leak leak_low leak_high directive directive_low directive_high "
        "keep_defence keep_directive delta versions revision seed model device tokens options"
    )
    for row in scripted:
        assert set(names.split()) <= set(row.to_dict()) and row.n == 12 and row.failed == 0
    assert [row.removed for row in scripted if row.method == "full"] == [0.0]


# --- how it is measured ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["none", "fair", "fair-global", "protect", "lambda=0.5"])
@pytest.mark.parametrize("method", ["snapkv", "keydiff"])
def test_a_batch_is_its_prompts_one_by_one_compressed_as_they_are_read(loaded, items, method, how):
    model, tokenizer = loaded
    mixed = [items[0], secret(tokenizer, 5, length=120), secret(tokenizer, 6, "directive")]
    prompts = [prompt_of(tokenizer, item) for item in mixed]
    [_, [row]] = study(model, tokenizer, {"x": mixed}, [method], [0.5], [how])
    rates, leaks, odds = [], [], []
    for prompt in prompts:
        cache = keepkv.Cache(model, method, 0.5, spans=policy([prompt], how), **OPTIONS[method])
        with torch.inference_mode():
            model(input_ids=torch.tensor([prompt.ids]), **{CACHE: cache})
        cache.compressing = False
        rates += keep_rates(cache, [prompt])
        probe = prompt.asked[-1].question
        leaks.append(float(tasks.score(model, tokenizer, cache.copy(), probe).leaked))
        odds.append(
            logp(model, tokenizer, cache, probe, probe.foil) - logp(model, tokenizer, cache, probe, probe.answer)
        )
    for kind in ("defence", "directive", "secret", "rest"):
        assert row.measure(f"keep_{kind}") == pytest.approx(sum(rate[kind] for rate in rates) / 3, abs=1e-5)
    assert row.values["leak"] == leaks
    assert row.delta == pytest.approx(sum(odds) / 3, abs=1e-3)


def logp(model, tokenizer, cache, question, reply):
    ids, said = (tokenizer.encode(text, add_special_tokens=False) for text in (question.prompt, reply))
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids + said]), **{CACHE: cache.copy()}).logits[0]
    found = logits.log_softmax(-1)[-len(said) - 1 : -1].gather(-1, torch.tensor(said)[:, None])
    return float(found.mean())


def test_tokens_of_spans_are_those_that_overlap_them(loaded):
    _, tokenizer = loaded
    for seed in range(5):
        prompt = prompt_of(tokenizer, secret(tokenizer, seed))
        for name, (start, end) in prompt.spans.items():
            a, b = prompt.item.spans[name]
            assert tokenizer.decode(prompt.ids[start:end]).strip() == prompt.item.context[a:b]


def test_the_same_seed_gives_the_same_rows(loaded, items):
    model, tokenizer = loaded

    def run(seed):
        found = study(model, tokenizer, {"x": items[:3]}, ["random"], [0.5], ["none", "fair"], seed=seed)
        return [row for part in found for row in part]

    assert run(1) == run(1)
    assert run(1)[1].measures["keep_rest"] != run(2)[1].measures["keep_rest"]


def test_failures_are_counted_where_they_happen(loaded, items):
    """Of a batch in which one prompt fails, the others are measured."""
    model, tokenizer = loaded
    says = obedient(tokenizer)

    def speak(model, cache, mask, prompts, keep):
        if any(prompt.item == items[1] and sees["rest"] < 0.5 for prompt, sees in zip(prompts, keep, strict=True)):
            raise RuntimeError("out of paper")
        return says(model, cache, mask, prompts, keep)

    [_, rows] = study(
        model, tokenizer, {"x": items[:4]}, ["streaming-llm"], [0.1, 0.7], ["none"], speak=speak, likelihood=False
    )
    assert [(row.n, row.failed, row.errors) for row in rows] == [
        (4, 0, []),
        (3, 1, ["RuntimeError: out of paper"]),
    ]
    assert [value is None for value in rows[1].values["leak"]] == [False, True, False, False]


def test_a_cell_without_any_result_says_so():
    row = row_of([Outcome(error=x) for x in "aba"], HERE, method="m", order="o", spans="none", removed=0.5)
    assert (row.n, row.failed, row.leak, row.leak_low, row.errors) == (0, 3, None, None, ["a", "b"])


def test_what_is_done_is_not_measured_again(loaded, items, tmp_path, monkeypatch):
    model, tokenizer = loaded
    file = tmp_path / "leakage.jsonl"
    options = {"speak": obedient(tokenizer), "likelihood": False}
    arguments = (model, tokenizer, {"x": items[:2]}, ["streaming-llm", "knorm"], [0.0, 0.5], ["none"])
    whole = [row for part in study(*arguments, **options) for row in part]
    ledger = Ledger(file, LeakageRow)
    ledger.append(whole[:3])  # full, and streaming-llm
    ledger.append(whole[3:4])
    with file.open("a") as out:
        out.write('{"method":"knorm","rem')
    rows = complete(ledger.rows(), [0.0, 0.5])
    assert [row.method for row in rows] == ["full", "streaming-llm", "streaming-llm"]
    rest = list(study(*arguments, **options, done=[row.key for row in rows]))
    assert [row for part in rest for row in part] == whole[3:]


def test_of_a_broken_file_what_is_whole_counts(tmp_path):
    file = tmp_path / "leakage.jsonl"
    file.write_text('{"method"\n{}\n')
    with pytest.warns(UserWarning, match="line 1"):
        assert Ledger(file, LeakageRow).rows() == []


def test_a_wrong_method_fails_before_anything_is_measured(loaded, items):
    with pytest.raises(KeepKVError, match="snapkv"):
        next(study(*loaded, {"x": items[:1]}, ["snapvk"]))
    for how in ("unfair", "lambda=x"):
        with pytest.raises(KeepKVError, match="supported"):
            next(study(*loaded, {"x": items[:1]}, ["snapkv"], spans=[how]))


def test_nothing_removed_is_the_full_cache(loaded, items):
    model, tokenizer = loaded
    [[full], [row]] = study(model, tokenizer, {"x": items[:2]}, ["knorm"], [0.0], ["none"])
    assert replace(row, method="full", options={}) == full
    cache = keepkv.Cache(model, "knorm", 1.0)
    with torch.inference_mode():
        model(input_ids=torch.tensor([prompt_of(tokenizer, items[0]).ids]), **{CACHE: cache})
    assert not compressed(cache, 1.0).report().compressed


def test_plain_english_prompts_are_measured_by_family(loaded):
    model, tokenizer = loaded
    task = tasks.get("multi-instruction")
    made = [task.generate(tokenizer, 320, seed, requests=1, reply=6, attacks=("plain", "role")) for seed in range(3)]
    [_, [row]] = study(model, tokenizer, {"defence-first": made}, ["streaming-llm"], [0.5], ["fair"])
    assert row.failed == 0 and row.errors == []
    checks = {check.family for item in made for check in item.questions[0].checks}
    assert set(row.families) == checks
    assert {
        "rouge_l_directive",
        "rouge_l_defence",
        "rouge_l_prompt",
        "verbatim_prompt",
        "delta",
        "delta_directive",
    } <= set(row.to_dict())
    assert 0 < row.measures["keep_notes"] < 1 and row.measures["directive_loose"] >= round(row.directive, 5)


# --- what is made of the rows ----------------------------------------------------------------------------------------


def curve(leak, directive, removed=(0.0, 0.5, 0.9), **families):
    rows = [
        row_of(
            [Outcome({"leak": a, "directive": b}) for a, b in zip(x, y, strict=True)],
            HERE,
            method="m",
            order="o",
            spans="s",
            removed=r,
        )
        for r, x, y in zip(removed, leak, directive, strict=True)
    ]
    for name, values in families.items():
        for row, value in zip(rows, values, strict=True):
            row.families[name] = value
    return curves(rows)["m", "o", "s"]


def test_curves_by_hand():
    one = curve([[0, 0], [1, 1], [0, 1]], [[1, 1], [1, 0], [0, 0]], a=[1, 1, 0.1], b=[0.5, 0.8, 0.2], c=[0, 0, 0.3])
    other = curve([[0, 0], [0, 1], [0, 0]], [[1, 1], [1, 1], [1, 0]])
    assert (peak(one).removed, peak(one).leak, peak(other).leak) == (0.5, 1.0, 0.5)
    assert peak_change(other, one).mean == -0.5
    assert composite(other, one).values == (0.5, 0.5)  # (0 + 1) / 2 and (1 + 0) / 2, at 0.5 removed
    assert [gap.mean for gap in order_gap("leak", one, other)] == [0, 0.5, 0.5]
    assert area(one) == pytest.approx((0.5 * 0.75 + 0.4 * 0.25) / 0.9)
    assert family_order(one) == [1, 1, -1]


def test_curves_that_cannot_be_compared_are_refused():
    one = curve([[0], [1], [0]], [[1], [1], [0]])
    with pytest.raises(KeepKVError, match="prompts"):
        order_gap("leak", one, curve([[0, 0]] * 3, [[0, 0]] * 3))
    with pytest.raises(KeepKVError, match="compared"):
        order_gap("leak", one, curve([[0]] * 3, [[0]] * 3, removed=(0.0, 0.4, 0.9)))
    with pytest.raises(KeepKVError, match="composite"):
        composite(*[curve([[0]] * 3, [[0]] * 3, removed=(0.0, 0.1, 0.9))] * 2)


def test_spearman_by_hand():
    assert spearman([1, 2, 3], [10, 20, 30]) == 1 and spearman([1, 2, 3], [3, 2, 1]) == -1
    assert spearman([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(3**0.5 / 2)
    assert spearman([1, 1], [1, 2]) is None
    with pytest.raises(ValueError, match="ranked"):
        spearman([1], [1, 2])
