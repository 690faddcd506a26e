"""Gates: what is fitted is least squares, what is foretold is there, and what cannot be fitted is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM, AutoTokenizer

import keepkv
from keepkv import tasks
from keepkv.calibrate import Exchange, calibrate, with_questions
from keepkv.calibrate.least_squares import Sums, foretold, solved
from keepkv.core.slots import LayerView
from keepkv.engine.versions import CACHE
from keepkv.engine.view import view_of
from keepkv.errors import CalibrationError
from keepkv.methods import make_method
from keepkv.score.learned.gates import BIAS, WEIGHT
from keepkv.tasks.asking import encode

LENGTH = 320


@pytest.fixture(scope="module")
def embedded() -> Any:
    path = keepkv.embedded_model()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def items(tokenizer: Any, seeds: range) -> list[Any]:
    return [encode(tokenizer, tasks.get("niah-multikey-1").generate(tokenizer, LENGTH, seed)) for seed in seeds]


@pytest.fixture(scope="module")
def taught(embedded: Any) -> keepkv.Calibration:
    """Gates of the embedded model, taught by its own tasks."""
    model, tokenizer = embedded
    made = items(tokenizer, range(10))
    asked = [[one.prompt + one.answer for one in item.asked] for item in made]
    return calibrate("gates", model, [torch.tensor([item.context]) for item in made], asked=asked)


def test_what_is_linear_is_found_to_the_last_weight() -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 500, 6).double(), torch.randn(2, 6).double(), torch.tensor([3.0, -1.0]).double()
    y = (x @ w[..., None])[..., 0] + b[:, None]
    sums = Sums()
    for part in (slice(0, 200), slice(200, 500)):
        sums.add(x[:, part], y[:, part, None])
    weight, bias = solved(sums, 1e-10, [6])
    torch.testing.assert_close(weight[:, 0], w, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(bias[:, 0], b, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(foretold(sums, weight), torch.ones(2, 1).double())


def test_predictions_are_spread_as_what_they_foretell() -> None:
    """Without the stretch noise would draw a head to its mean, and out of a budget that heads share."""
    torch.manual_seed(0)
    x = torch.randn(1, 4000, 3).double()
    y = x[..., 0] + 3 * torch.randn(1, 4000).double()
    sums = Sums()
    sums.add(x, y[..., None])
    weight, bias = solved(sums, 1e-7, [3])
    told = (x @ weight.mT)[..., 0] + bias
    torch.testing.assert_close(told.std(), y.std(), rtol=1e-6, atol=0)
    torch.testing.assert_close(told.mean(), y.mean(), rtol=1e-6, atol=1e-6)
    assert 0.07 < float(foretold(sums, weight)) < 0.13  # a tenth of the variance is not noise


def test_what_hardly_varies_counts_little() -> None:
    """Two features foretell y alike, one of them a norm that varies by a ten-thousandth, as of normalised keys. Before
    the noise: a weight of 10⁴, so that what codes do to the norm was worth more than all else (Gemma 3)."""
    torch.manual_seed(0)
    y = torch.randn(1, 2000).double()
    x = torch.stack((y + 0.1 * torch.randn(1, 2000).double(), 16 + 1e-4 * y), dim=-1)
    sums = Sums()
    sums.add(x, y[..., None])
    weight, _ = solved(sums, 0.003, [1, 1])
    assert 0.9 < float(weight[0, 0, 0]) < 1.1 and float(weight[0, 0, 1].abs()) < 0.1


def test_score_is_the_formula(embedded: Any, taught: keepkv.Calibration) -> None:
    """Against float64, with the model's own rotary matrices undone one token at a time."""
    model, tokenizer = embedded
    ids = torch.tensor([items(tokenizer, range(50, 51))[0].context])
    cache = keepkv.Cache(model, "keepkv3", 1.0, calibration=taught, when=keepkv.When("deferred"))
    with torch.no_grad():
        model(ids, **{CACHE: cache})
    for layer in cache.compressible:
        view: LayerView = view_of(layer)
        score = make_method("keepkv3", {}).score(view)
        slots, rope, known = view.slots, view.rope, taught.tensors[layer.info.index]
        assert rope is not None
        for head, at in ((0, 5), (1, 200)):
            key, value = (x[0, head, at].double() for x in (slots.keys, slots.values))
            angle = int(slots.positions[0, head, at]) * rope.inv_freq.double()
            first, second = key.chunk(2)
            before = torch.cat((first * angle.cos() + second * angle.sin(), second * angle.cos() - first * angle.sin()))
            x = torch.cat((before, value, before.norm()[None], value.norm()[None]))
            naive = (x * known[WEIGHT][head].double()).sum() + known[BIAS][head].double()
            torch.testing.assert_close(score[0, head, at].double(), naive, atol=1e-3, rtol=1e-4)


def test_facts_that_may_be_asked_for_stay(embedded: Any, taught: keepkv.Calibration) -> None:
    """Codes in other contexts, at .15 of the tokens: where they are read, in both heads of layer 1, all of them stay,
    and most in two heads more. `random` holds one or two of six anywhere."""
    model, tokenizer = embedded
    for item in items(tokenizer, range(60, 64)):
        cache = keepkv.Cache(model, "keepkv3", 0.15, calibration=taught)
        with torch.no_grad():
            model(torch.tensor([item.context]), **{CACHE: cache})
        text, found = item.context, []
        said = [next(i for i in range(len(text)) if text[i : i + len(x.answer)] == x.answer) for x in item.asked]
        for layer in cache.compressible:
            found += [sum(at in row for at in said) for row in cache.kept_positions(layer.info.index)[0].tolist()]
        assert len(said) == 6 and found[2:4] == [6, 6] and sum(x >= 4 for x in found) >= 4, found


def test_what_cannot_be_fitted_is_refused(taught: keepkv.Calibration, tmp_path: Any) -> None:
    model, ids = zoo.model("llama"), torch.randint(3, zoo.VOCAB, (3, 1, 40))
    with pytest.raises(CalibrationError, match="at least 5 texts of more than 8 tokens, 3 were given"):
        calibrate("gates", model, ids)
    with pytest.raises(CalibrationError, match="text 1 has 1 rows, and there are questions for 1 texts"):
        calibrate("gates", model, ids, asked=[[[5, 6]]])
    with pytest.raises(CalibrationError, match="choose from both, questions, text"):
        calibrate("gates", model, ids, behind="below")
    with pytest.raises(CalibrationError, match="give a positive number"):
        calibrate("gates", model, ids, noise=0.0)
    with pytest.raises(CalibrationError, match=r"needs a calibration 'gates'.*keepkv calibrate gates"):
        keepkv.Cache(model, "keepkv3", 24)
    with pytest.raises(CalibrationError, match="made for another model"):
        keepkv.Cache(model, "keepkv3", 24, calibration=taught)


def test_gates_of_another_width_are_refused() -> None:
    model = zoo.model("llama")
    good = calibrate("gates", model, torch.randint(3, zoo.VOCAB, (5, 1, 40)))
    short = {i: {WEIGHT: x[WEIGHT][:, 1:], BIAS: x[BIAS]} for i, x in good.tensors.items()}
    wrong = keepkv.Calibration(good.kind, short, good.fingerprint, good.made_with)
    cache = keepkv.Cache(model, "keepkv3", 24, calibration=wrong)
    with torch.no_grad(), pytest.raises(CalibrationError, match=r"gates of 2 heads and 33 numbers .* has 2 and 34"):
        model(torch.randint(3, zoo.VOCAB, (1, 40)), **{CACHE: cache})


def test_questions_are_hidden_in_the_texts_that_are_given(embedded: Any) -> None:
    tokenizer = embedded[1]
    text = " ".join(f"Every evening the keeper of lamp number {i} climbed the long stairs." for i in range(60))
    pieces, asked = with_questions(tokenizer, [text], 2400, 800, seed=3)
    assert len(pieces) == len(asked) == 3 and all(p.shape[0] == 1 and 500 < p.shape[1] <= 800 for p in pieces)
    assert all(
        "keeper" in tokenizer.decode(p[0]) and len(questions) >= 4 for p, questions in zip(pieces, asked, strict=True)
    )
    again = with_questions(tokenizer, [text], 2400, 800, seed=3)
    assert all(map(torch.equal, pieces, again[0])) and asked == again[1]
    with pytest.raises(CalibrationError, match="have 0 plain sentences, 20 are needed"):
        with_questions(tokenizer, ["x = 1"], 2400, 800)


def test_it_is_said_whether_the_model_answers(embedded: Any) -> None:
    model, tokenizer = embedded
    made = items(tokenizer, range(6))
    other = [one.answer for one in made[-1].asked]  # of which the other texts say nothing
    asked = [
        [Exchange(one.prompt, one.answer, wrong) for one, wrong in zip(item.asked, other, strict=False)]
        for item in made[:-1]
    ]
    made_of = calibrate("gates", model, [torch.tensor([item.context]) for item in made[:-1]], asked=asked)
    said = made_of.made_with["says"][0]
    count = sum(map(len, asked))
    told = f"the model tells {count} of {count} right answers"
    assert said == f"{told} from others of their kind, of which the text says nothing"
    swapped = [
        [Exchange(x[: -x.answer], list(x.wrong[-x.wrong.answer :]), list(x[-x.answer :])) for x in one] for one in asked
    ]
    worse = calibrate("gates", model, [torch.tensor([item.context]) for item in made[:-1]], asked=swapped)
    assert worse.made_with["found"]["told_apart"] == 0 and worse.made_with["says"][1].startswith("WARNING")
    plain = calibrate("gates", model, [torch.tensor([item.context]) for item in made[:-1]])
    assert plain.made_with["says"][0].startswith("share of the variance")
