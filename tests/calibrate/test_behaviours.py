"""What heads look at: rows by hand, a model whose heads were planted, the gate, and files of others."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import zoo
from allocations import peak
from torch import Tensor

import keepkv
from keepkv.allocate.profile import MEASURED, PREFIX
from keepkv.calibrate import Needle, calibrate
from keepkv.calibrate.behaviours import _reliability, behaviours
from keepkv.calibrate.patterns import kv_heads
from keepkv.engine.fingerprint import fingerprint
from keepkv.engine.versions import CACHE
from keepkv.errors import CalibrationError
from keepkv.tasks.asking import Asked
from keepkv.tasks.base import Question

torch.set_num_threads(1)


def by_name(found: Tensor) -> dict[str, list[float]]:
    return dict(zip(MEASURED, found.tolist(), strict=True))


def one(row: list[float], start: int, needle: list[int], said: int, k: int) -> dict[str, float]:
    found = behaviours(torch.tensor([[row]]), start, needle, [said], k)
    return {name: x[0] for name, x in by_name(found).items()}


# --- rows by hand ------------------------------------------------------------------------------------------------

FOUR = [0.9, 0.0, 0.0, 0.0]  # the first tokens, which are left out


def test_a_row_by_hand() -> None:
    """Ten tokens, the needle at 6 … 8, the three most attended of which two lie in it."""
    got = one([*FOUR, 0.01, 0.2, 0.3, 0.1, 0.05, 0.02], 6, [70, 71, 72], 71, 3)
    tp, fp, fn = 0.4, 0.2, 0.05
    assert got["precision"] == pytest.approx(tp / (tp + fp)) and got["recall"] == pytest.approx(tp / (tp + fn))
    p, q = tp / (tp + fp), tp / (tp + fn)
    assert got["inf"] == pytest.approx(2 * p * q / (p + q)) and got["found"] == pytest.approx(tp)
    assert got["copy"] == pytest.approx(0.1) and math.isnan(got["compose"])  # 71 is said, and stands at 7
    back = sum(a * (1 - (i + 1) / 10) for i, a in enumerate([0.01, 0.2, 0.3, 0.1, 0.05, 0.02], 4))
    assert got["area"] == pytest.approx(back / 0.68)


def test_all_on_one_token_of_the_needle_and_none_at_all() -> None:
    got = one([*FOUR, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0], 6, [70, 71, 72], 9, 3)
    assert got["precision"] == got["recall"] == got["inf"] == got["compose"] == 1 and math.isnan(got["copy"])
    got = one([*FOUR, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0], 6, [70, 71, 72], 9, 3)
    assert got["precision"] == got["recall"] == got["inf"] == got["compose"] == 0
    got = one([1.0] + [0.0] * 9, 6, [70, 71, 72], 9, 3)  # everything on the first token: no denominator at all
    assert [got[name] for name in MEASURED if name != "copy"] == [0.0] * 6


def test_steps_are_averaged_each_among_its_kind() -> None:
    rows = torch.zeros(2, 3, 9)  # two heads, three steps
    rows[0, :, 6], rows[1, :, 4] = torch.tensor([0.2, 0.4, 0.6]), 1.0
    got = by_name(behaviours(rows, 5, [70, 71], [71, 70, 3], 1))
    assert got["copy"] == pytest.approx([0.1, 0.0])  # .2 of the step that says 71, 0 of the one that says 70
    assert got["compose"] == pytest.approx([0.6, 0.0]) and got["found"] == pytest.approx([0.4, 0.0])
    assert got["precision"] == [1.0, 0.0]


# --- planted heads -----------------------------------------------------------------------------------------------

WIDE, OUT, TURNS = 48, 48, 12  # identities of tokens; where heads write; dimensions of a head that rotate visibly
COPY, COMPOSE = 0, 1


def planted() -> Any:
    """One layer of four heads over 48 tokens, which predicts what its heads write. Head 0 looks for the token whose
    number is one higher, and writes it; head 1, at token 30, for tokens 20 to 22, and writes 40; two look anywhere."""
    config = transformers.LlamaConfig(
        vocab_size=WIDE, hidden_size=WIDE + OUT, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, head_dim=128, max_position_embeddings=2048, pad_token_id=0, bos_token_id=None,
        eos_token_id=None, tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1e30},
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    at = model.model.layers[0].self_attn
    head = lambda x, h: x[h * 128 : (h + 1) * 128]  # noqa: E731
    with torch.no_grad():
        for x in (at.v_proj.weight, at.o_proj.weight, model.model.layers[0].mlp.down_proj.weight):
            x.zero_()
        eye = torch.eye(WIDE)
        model.model.embed_tokens.weight.copy_(torch.cat((eye, torch.zeros(WIDE, OUT)), dim=1))
        model.lm_head.weight.copy_(torch.cat((torch.zeros(WIDE, OUT), eye), dim=1))
        same = torch.zeros(128, WIDE)
        same[TURNS : TURNS + WIDE] = eye
        for h in (COPY, COMPOSE):
            for x in (at.q_proj.weight, at.k_proj.weight):
                head(x, h).zero_()
            at.o_proj.weight[OUT:, h * 128 + TURNS : h * 128 + TURNS + WIDE] = eye
        head(at.q_proj.weight, COPY)[:, :WIDE] = 2 * same.roll(-1, dims=1)
        head(at.k_proj.weight, COPY)[:, :WIDE] = same
        head(at.v_proj.weight, COPY)[:, :WIDE] = same
        head(at.q_proj.weight, COMPOSE)[62, 30] = 2  # a dimension of its own
        head(at.k_proj.weight, COMPOSE)[62, 20:23] = 1
        head(at.v_proj.weight, COMPOSE)[TURNS + 40, 20:23] = 1
    return model


def run(kind: str, number: int, answer: list[int] | None = None) -> tuple[Tensor, Needle]:
    """A text of 60 tokens between 1 and 8, a needle in it, and its question: to copy 10 … 13 or to compose 40."""
    generator = torch.Generator().manual_seed(number)
    ids, start = torch.randint(1, 9, (1, 60), generator=generator), 8 + 5 * number
    needle, asked = ([10, 11, 12, 13], [9]) if kind == "copy" else ([20, 21, 22], [30])
    ids[0, start : start + len(needle)] = torch.tensor(needle)
    right = answer or (needle if kind == "copy" else [40])
    return ids, Needle(start, tuple(needle), Asked(Question("", ""), asked, right, len(right)), (tuple(right),), kind)


@pytest.fixture(scope="module")
def toy() -> Any:
    return planted()


@pytest.fixture(scope="module")
def runs() -> list[tuple[Tensor, Needle]]:
    return [run(kind, n) for n in range(8) for kind in ("copy", "compose")]


def measured(model: Any, runs: list[tuple[Tensor, Needle]], **options: Any) -> keepkv.Calibration:
    ids, needles = zip(*runs, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return calibrate("heads", model, ids, needles=needles, k=5, **options)


def test_planted_heads_are_found_each_by_its_label(toy: Any, runs: list[tuple[Tensor, Needle]]) -> None:
    """The copying head and the composing one above both others, each by what it does, and both by confusion."""
    made = measured(toy, runs)
    held = {name: made.tensors[0][PREFIX + name] for name in MEASURED}
    assert made.made_with["found"]["by"] == {"reply": 16}
    for name, head in (("copy", COPY), ("compose", COMPOSE)):
        assert held[name].argmax() == head and held[name][head] > 0.9
        assert held[name][head] > 5 * held[name].sort().values[-2]
    for name in ("inf", "precision", "recall", "found"):
        assert set(held[name].topk(2).indices.tolist()) == {COPY, COMPOSE}, name


def test_the_same_by_eager_attention_and_loops(runs: list[tuple[Tensor, Needle]]) -> None:
    """Rows of transformers' own attention in float64, every number by loops; query heads of a group by max and sum."""
    model = zoo.model("llama")
    some = [(ids, Needle(n.start, n.ids, Asked(n.asked.question, [5, 6], [7, 20, 11], 3), ((7, 20, 11),), n.sort))
            for ids, n in runs[:3]]  # fmt: skip
    by_max, by_sum = (measured(model, some, likely=0.0, group=group).tensors for group in ("max", "sum"))
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    totals: list[list[dict[str, list[float]]]] = []
    for ids, needle in some:
        fed = torch.cat((ids, torch.tensor([[5, 6, 7, 20]])), dim=1)
        with torch.no_grad():
            every = plain(fed, output_attentions=True).attentions
        totals.append([loops(x[0].double(), ids[0].tolist(), needle, [7, 20, 11]) for x in every])
    for layer in range(3):
        for name in MEASURED:
            each = torch.tensor([found[layer][name] for found in totals])  # (runs, query heads)
            for made, pick in ((by_max, Tensor.amax), (by_sum, Tensor.sum)):
                wanted = pick(each.view(3, 2, -1), -1).nanmean(0).nan_to_num(0)
                assert torch.allclose(made[layer][PREFIX + name], wanted, atol=1e-5), (layer, name)


def loops(attention: Tensor, context: list[int], needle: Needle, said: list[int]) -> dict[str, list[float]]:
    inside = range(needle.start, needle.start + len(needle.ids))
    found: dict[str, list[float]] = {name: [] for name in MEASURED}
    for head in attention:
        steps: dict[str, list[float]] = {name: [] for name in MEASURED}
        for step, token in enumerate(said):
            row = head[len(head) - len(said) + step, : len(context)].tolist()
            ranked = sorted(range(4, len(row)), key=lambda i: -row[i])[:5]
            tp = sum(row[i] for i in ranked if i in inside)
            fp = sum(row[i] for i in ranked) - tp
            whole = sum(row[i] for i in inside)
            p, q = tp / (tp + fp), tp / whole
            steps["precision"].append(p)
            steps["recall"].append(q)
            steps["inf"].append(2 * p * q / (p + q) if p + q else 0.0)
            steps["found"].append(tp)
            if token in needle.ids:
                steps["copy"].append(sum(row[i] for i in inside if context[i] == token))
            else:
                steps["compose"].append(whole)
            far = sum(row[i] * (1 - (i + 1) / len(row)) for i in range(4, len(row)))
            steps["area"].append(far / sum(row[4:]))
        for name, x in steps.items():
            found[name].append(sum(x) / len(x) if x else math.nan)
    return found


def test_attention_is_looked_at_a_few_rows_at_a_time() -> None:
    """At the peak less than the n × n weights of a single head; there are 12 of these."""
    model, n = zoo.model("llama"), 1000
    ids = torch.randint(3, zoo.VOCAB, (1, n), generator=torch.Generator().manual_seed(0))
    needle = Needle(200, tuple(ids[0, 200:204].tolist()), Asked(Question("", ""), [5, 6], [7, 8], 3), ((7, 8),))
    measured(model, [(ids[:, :40], Needle(20, (3,), needle.asked, needle.answers))], likely=0.0)  # what is made once
    assert peak(lambda: measured(model, [(ids, needle)], likely=0.0)) < n * n * 4


# --- the gate, and what is said of it ------------------------------------------------------------------------------


def test_failed_runs_are_ignored(toy: Any, runs: list[tuple[Tensor, Needle]]) -> None:
    wrong = [run("copy", n, [33, 34]) for n in range(4)]
    mixed = measured(toy, [*runs, *wrong])
    alone = measured(toy, runs)
    assert mixed.made_with["found"]["accepted"] == 16 and mixed.made_with["found"]["runs"] == 20
    assert all(torch.equal(x, mixed.tensors[0][name]) for name, x in alone.tensors[0].items())
    with pytest.raises(CalibrationError, match=r"the model knew none of 4 answers.*likely= than 0.3"):
        measured(toy, wrong)
    by = measured(toy, wrong, likely=0.0).made_with["found"]["by"]
    assert by == {"likelihood": 4}
    with pytest.raises(CalibrationError, match="give needles="):
        calibrate("heads", toy, [runs[0][0]])


def test_a_reply_counts_up_to_its_answer(toy: Any) -> None:
    """The reply goes on behind the answer, and may begin before it: 10 is said first, and then the answer 11 12."""
    ids, needle = run("copy", 1)
    late = Needle(needle.start, needle.ids, Asked(Question("", ""), [9], [11, 12], 4), ((11, 12),), "copy")
    assert measured(toy, [(ids, late)]).made_with["found"]["by"] == {"reply": 1}
    before = Needle(needle.start, needle.ids, Asked(Question("", ""), [9], [11, 12], 2), ((11, 12),), "copy")
    with pytest.raises(CalibrationError, match="none of 1"):
        measured(toy, [(ids, before)])  # its reply ends before


def test_halves_are_compared(toy: Any, runs: list[tuple[Tensor, Needle]]) -> None:
    found = measured(toy, runs).made_with["found"]["reliability"]
    assert set(found) == set(MEASURED) and measured(toy, runs, seed=0).made_with["found"]["reliability"] == found
    with pytest.warns(UserWarning, match="two halves of the runs rank alike by less than 0.8: .*inf"):
        calibrate("heads", toy, [runs[0][0]], needles=[runs[0][1]])  # one run has no halves
    stable = torch.arange(8.0).expand(6, 7, 8) + 0.01 * torch.rand(6, 7, 8)
    noise = torch.rand(6, 7, 8)
    assert min(_reliability({0: stable}, 0).values()) == 1.0  # type: ignore[type-var]
    assert max(_reliability({0: noise}, 0).values()) < 0.8  # type: ignore[operator, type-var]


def test_round_trip_and_another_model(toy: Any, runs: list[tuple[Tensor, Needle]], tmp_path: Path) -> None:
    made, path = measured(toy, runs), tmp_path / "heads.safetensors"
    made.save(path)
    read = keepkv.Calibration.load(path)
    assert read.digest == made.digest == measured(toy, runs).digest and read.made_with["options"]["needles"] == 16
    ids = torch.cat([ids for ids, _ in runs[:2]])
    kept = []
    for given in (made, path, keepkv.Calibration("heads", dict(reversed(made.tensors.items())), fingerprint(toy), {})):
        cache = keepkv.Cache(toy, "surface-logic-kv", 24, window=4, calibration=given)
        with torch.no_grad():
            toy(ids, **{CACHE: cache})
        kept.append(cache.report().kept)
    assert kept[0] == kept[1] == kept[2]
    assert kept[0][0][0][COPY] > kept[0][0][0][2] and sum(kept[0][0][0]) == 24 * 4
    with pytest.raises(CalibrationError, match="made for another model"):
        keepkv.Cache(zoo.model("llama"), "surface-logic-kv", 24, calibration=path)
    with pytest.raises(CalibrationError, match=r"HeadBudget needs a calibration 'heads'.*keepkv calibrate heads"):
        keepkv.Cache(toy, "surface-logic-kv", 24)


# --- profiles of others ----------------------------------------------------------------------------------------------


def test_published_patterns(tmp_path: Path) -> None:
    model = zoo.model("qwen3")  # 3 layers, 2 KV heads
    table = np.array([[0.5, 1.2], [0.1, -0.3], [0.9, 0.7]])
    np.savetxt(tmp_path / "full_attention_heads.tsv", table, delimiter="\t")
    made = calibrate("heads", model, [], pattern=str(tmp_path / "full_attention_heads.tsv"))
    assert np.allclose(torch.stack([made.tensors[i]["heads_full"] for i in range(3)]).numpy(), np.clip(table, 0, 1))
    assert made.made_with["found"] == {"pattern": "full_attention_heads.tsv"}
    cache = keepkv.Cache(model, "duo-attention", 20, sinks=2, window=4, calibration=made)
    with torch.no_grad():
        model(torch.randint(3, zoo.VOCAB, (1, 40)), **{CACHE: cache})
    # 120 slots: 6 in each head, and 84 for heads in order of the pattern, 34 for each.
    assert [rows[0] for rows in cache.report().kept.values()] == [[6, 40], [6, 6], [40, 22]]
    curves = np.random.default_rng(0).random((99, 3, 2)).astype(np.float32)
    np.save(tmp_path / "curve.npy", curves)
    found = calibrate("heads", model, [], pattern=str(tmp_path / "curve.npy"))
    assert found.tensors[1]["heads_curve"].tolist() == curves[:, 1].tolist()
    for name, wrong in (("a.tsv", table[:2]), ("b.tsv", table[:, :1]), ("c.npy", curves[:50])):
        path = tmp_path / name
        np.save(path, wrong) if name.endswith("npy") else np.savetxt(path, wrong, delimiter="\t")
        with pytest.raises(CalibrationError, match=r"this model needs (99 × )?3 layers × 2 KV heads"):
            calibrate("heads", model, [], pattern=str(path))
    (tmp_path / "d.tsv").write_text("not\tnumbers")
    for name in ("d.tsv", "missing.tsv"):
        with pytest.raises(CalibrationError, match="cannot read the pattern of heads"):
            calibrate("heads", model, [], pattern=str(tmp_path / name))
    np.save(tmp_path / "e.npy", np.array([{}]), allow_pickle=True)  # pickle is never read
    with pytest.raises(CalibrationError, match="cannot read the pattern of heads"):
        calibrate("heads", model, [], pattern=str(tmp_path / "e.npy"))


def test_heads_of_layers_that_are_compressed() -> None:
    assert kv_heads(zoo.model("llama")) == {0: 2, 1: 2, 2: 2} and kv_heads(zoo.model("gemma3")) == {1: 2, 3: 2}
