"""Whether the queries of what comes after a text are like those of the text, and whether it matters.

    python benchmarks/successor/assumption.py --models embedded seed-1=../seeds/seed-1 [--contexts 4] [--out DIRECTORY]
    python benchmarks/successor/assumption.py --models qwen=PATH --plain --contexts 3     # tasks in plain English

Writes ``assumption.json`` and ``assumption.md`` to ``--out``; models that stand there already and are not named stay.
Minutes on one core. Of each context all queries are taken, and those of its questions and answers, before RoPE:

    alike      D² of question queries under the Gaussian of half of the context's, over D, next to that of the other
               half; the share of them beyond its 95 % quantile (0.05 if alike); AUC of a linear classifier that is
               tested on a context that it has not seen, next to that for a passage of the context as long.
    covered    the largest cosine of each question query with queries of the context.
    agree      the largest attention that questions give to each slot, next to the largest that queries of the context
               give, turned to positions behind it (the window: as they are): rank correlation, share of the best 10 %
               of slots that are found (0.10 by chance), attention held by the 10 % chosen over that of the best, and
               the share found of slots to which some question gives a fifth of its attention or more: what
               answers hang on. Not of sinks and the window, which are always kept.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from keepkv.score.future import Future
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from keepkv import tasks
from keepkv.core.rope import Rope
from keepkv.core.slots import EMPTY, LayerView
from keepkv.core.when import When
from keepkv.embedded import embedded_model
from keepkv.engine.cache import Cache
from keepkv.engine.view import look
from keepkv.evaluation.asking import Encoded, encode, pad, read, rows_of, step
from keepkv.evaluation.fidelity.replay import record
from keepkv.evaluation.setup import HELD_OUT
from keepkv.methods import Method
from keepkv.observe.attention import weights
from keepkv.observe.sample import GOLDEN
from keepkv.score.keydiff import KeyDiff

TASKS = ("niah-multikey-1", "qa-1", "niah-multivalue", "perplexity")
REFERENCES, WINDOW, SPAN = 256, 32, 128
SINKS, RECENT, SHARE, STRONG = 4, 16, 0.1, 0.2
APART = 8  # tokens between two queries of the context that are compared with each other
Found = dict[str, Tensor]


@dataclass(frozen=True)
class Heads:
    """One layer on one context. before (Hq,n,D), asked (Hq,m,D): queries of the context and of the questions before
    RoPE; received (H,n): the largest attention that the questions give; view: of the context."""

    before: Tensor
    asked: Tensor
    received: Tensor
    view: LayerView
    rope: Rope


@torch.inference_mode()
def capture(model: Any, item: Encoded) -> list[Heads]:
    """The compressible layers of ``model`` that turn by RoPE, on one context and its questions with their answers."""
    cache = Cache(model, Method(score=Future(queries=1), when=When("deferred")), 1.0)  # one that asks for the rotation
    calls = record(cache)
    mask = read(model, cache, [item.context])
    for layer in cache.layers:  # copies would record too
        layer.__dict__.pop("update", None), layer.__dict__.pop("attend", None)
    rows = [(one.prompt + one.answer)[:-1] for one in item.asked]  # nothing is predicted from the last token
    twin, own = rows_of(cache, mask, [0] * len(rows))
    later = record(twin)
    ids, new = pad(rows, model.device)
    step(model, twin, ids, torch.cat((own, new), 1))
    n, real = len(item.context), new.bool()
    where = (n - 1 + new.cumsum(1)).masked_fill(~real, EMPTY)
    found = []
    for first, second in zip(calls, later, strict=True):
        view, rope = look(cache.layers[first.layer]), cache.layers[first.layer].place.rope
        before = rope.unrotate(first.query[0].float(), torch.arange(n))
        asked = rope.unrotate(second.query.float(), where.clamp(min=0)[:, None]).transpose(0, 1)[:, real]
        given = weights(look(twin.layers[second.layer]), second.query, where)[..., :n]
        found.append(Heads(before, asked, given.amax((0, 2, 3)), view, rope))
    return found


def chosen(before: Tensor) -> dict[str, Tensor]:
    """Indices (Hq,r) of reference queries among ``before`` (Hq,n,D)."""
    heads, n, _ = before.shape
    towards = F.normalize(before, dim=-1).mean(1, keepdim=True)
    unlike = -F.cosine_similarity(before, towards, dim=-1)
    every = torch.arange(n).expand(heads, n)
    return {
        "all": every,
        "uniform": every[:, torch.linspace(0, n - 1, min(n, REFERENCES)).long()],
        "distinctive": unlike.topk(min(n, REFERENCES), dim=-1).indices,
        "window": every[:, -WINDOW:],
    }


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (Hq,r) of ``x`` (Hq,n,D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def quantile(x: Tensor, q: float) -> Tensor:
    """Over the last dimension."""
    return x.quantile(q, dim=-1)


def covered(heads: Heads) -> Found:
    """Per query head: the largest cosine of question queries with those of the context; and what it is worth."""
    before, asked = F.normalize(heads.before, dim=-1), F.normalize(heads.asked, dim=-1)
    n, found = before.shape[1], {}
    sets = {name: take(before, index) for name, index in chosen(heads.before).items()}
    sets["mean"] = F.normalize(before.mean(1, keepdim=True), dim=-1)
    for name, some in sets.items():
        best = (asked @ some.mT).amax(-1)
        found |= {f"cosine {name}": best.mean(-1), f"cosine10 {name}": quantile(best, 0.1)}
    some = torch.linspace(0, n - 1, min(n, asked.shape[1])).long()
    near = (some[:, None] - torch.arange(n)).abs() <= APART
    best = (before[:, some] @ before.mT).masked_fill(near, -1).amax(-1)
    return found | {"cosine itself": best.mean(-1), "cosine10 itself": quantile(best, 0.1)}


def references(heads: Heads) -> Found:
    """Scores (H,n) by name."""
    view, n, found = heads.view, heads.before.shape[1], {}
    for name, index in chosen(heads.before).items():
        ahead = n + 1 + (torch.arange(index.shape[1]) * GOLDEN) % SPAN
        where = index[0] if name == "window" else ahead
        turned = heads.rope.rotate(take(heads.before, index), where)
        parts = zip(turned.split(256, 1), where.split(256), strict=True)
        most = [weights(view, q[None], p[None])[0].amax((1, 2)) for q, p in parts]
        found[name] = torch.stack(most).amax(0)
    keys = view.slots.keys.float()[0]
    before = heads.rope.unrotate(keys, view.slots.positions[0])
    return found | {"leverage": leverage(before), "leverage turned": leverage(keys), "keydiff": KeyDiff()(view)[0]}


def spread(x: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Mean (H,1,D) and inverse covariance (H,D,D) of ``x`` (H,n,D)."""
    mean = x.mean(1, keepdim=True)
    covariance = (x - mean).mT @ (x - mean) / x.shape[1]
    level = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    return mean, torch.linalg.inv(covariance + ridge * level * torch.eye(x.shape[-1]))


def distance(x: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """(H,n) squared Mahalanobis distances."""
    return ((x - mean) @ inverse * (x - mean)).sum(-1)


def leverage(keys: Tensor) -> Tensor:
    """k̃ᵀ(Σ + λ)⁻¹k̃ of centred keys (H,n,D)."""
    return distance(keys, *spread(keys, 1e-2))


def agree(heads: Heads) -> Found:
    """Per KV head: how well each score orders slots as the questions do."""
    free = slice(SINKS, heads.received.shape[1] - RECENT)
    true = heads.received[:, free]
    count = round(SHARE * true.shape[1])
    best, strong = true.topk(count, dim=-1), true >= STRONG
    found = {"strong": strong.sum(-1).float()}
    for name, score in references(heads).items():
        picked = score[:, free].topk(count, dim=-1).indices
        both = (picked[:, :, None] == best.indices[:, None]).any(-1).float().mean(-1)
        ranks = [x.argsort(-1).argsort(-1).float() for x in (true, score[:, free])]
        a, b = (F.normalize(x - x.mean(-1, keepdim=True), dim=-1) for x in ranks)
        held = true.gather(-1, picked).sum(-1) / best.values.sum(-1)
        found |= {f"spearman {name}": (a * b).sum(-1), f"overlap {name}": both, f"held {name}": held}
        found[f"strong {name}"] = strong.gather(-1, picked).sum(-1).float()
    return found


def alike(before: Tensor, asked: Tensor) -> Found:
    """Per query head: distances of question queries under the Gaussian of half of the context's."""
    order = torch.randperm(before.shape[1], generator=torch.Generator().manual_seed(0))
    fit, held = before[:, order].chunk(2, dim=1)
    gaussian = spread(fit, 1e-3)
    inside, there = distance(held, *gaussian), distance(asked, *gaussian)
    d = before.shape[-1]
    beyond = (there > quantile(inside, 0.95)[:, None]).float().mean(-1)
    return {"d2 context": inside.mean(-1) / d, "d2 asked": there.mean(-1) / d, "beyond": beyond}


def auc(no: list[Tensor], yes: list[Tensor]) -> Tensor:
    """(H,) of a linear discriminant, mean over contexts that are left out in turn."""
    found = []
    for i in range(len(no)):
        a, b = (torch.cat([x for j, x in enumerate(some) if j != i], 1) for some in (no, yes))
        middle = [x.mean(1, keepdim=True) for x in (a, b)]
        own = [(x - m) * x.shape[1] ** -0.5 for x, m in zip((a, b), middle, strict=True)]  # classes weigh the same
        within = sum(x.mT @ x for x in own)
        level = within.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        across = torch.linalg.solve(within + 1e-2 * level * torch.eye(a.shape[-1]), (middle[1] - middle[0]).mT)
        low, high = ((x @ across)[..., 0] for x in (no[i], yes[i]))
        rank = torch.cat((high, low), -1).argsort(-1).argsort(-1)[:, : high.shape[1]].float() + 1
        m = high.shape[1]
        found.append((rank.sum(-1) - m * (m + 1) / 2) / (m * low.shape[1]))
    return torch.stack(found).mean(0)


def passages(before: list[Tensor], asked: list[Tensor]) -> Tensor:
    """``auc`` of a passage in the middle of each context, as long as its questions, against the rest."""
    inner, outer = [], []
    for x, y in zip(before, asked, strict=True):
        start = (x.shape[1] - (m := min(y.shape[1], x.shape[1] // 2))) // 2
        inner.append(x[:, start : start + m])
        outer.append(torch.cat((x[:, :start], x[:, start + m :]), 1))
    return auc(outer, inner)


@torch.inference_mode()
def measure(model: Any, tokenizer: Any, task: str, contexts: int, plain: bool) -> dict[str, list[list[float]]]:
    """Every measure as (layers, heads), a mean over contexts: query heads, or KV heads where slots are ranked."""
    sums: dict[str, list[Found]] = defaultdict(list)
    queries: list[list[tuple[Tensor, Tensor]]] = []
    for i in range(contexts):
        item = tasks.get(task).generate(tokenizer, 1024, HELD_OUT + i, plain=plain)
        item = item if tasks.get(task).asks else replace(item, framed=True)  # a text goes on without a template
        layers = capture(model, encode(tokenizer, item))
        queries.append([(x.before, x.asked) for x in layers])
        for x in layers:
            for name, value in (covered(x) | agree(x) | alike(x.before, x.asked)).items():
                sums[name].append(value)
    count = len(queries[0])
    found = {name: torch.stack(x).view(contexts, count, -1).mean(0) for name, x in sums.items()}
    pairs = [([c[i][0] for c in queries], [c[i][1] for c in queries]) for i in range(count)]
    if contexts > 1:
        found["auc"] = torch.stack([auc(*pair) for pair in pairs])
        found["auc passage"] = torch.stack([passages(*pair) for pair in pairs])
    return {name: [[round(v, 3) for v in row] for row in x.tolist()] for name, x in found.items()}


SETS = ("all", "uniform", "distinctive", "window", "mean", "itself")
SCORES = ("all", "uniform", "distinctive", "window", "leverage", "leverage turned", "keydiff")
TABLES = (  # title, measure, columns
    ("Alike: question queries under the context's Gaussian, and told apart by a line", "",
     ("d2 context", "d2 asked", "beyond", "auc passage", "auc")),
    ("Covered: largest cosine of question queries with the context's", "cosine ", SETS),
    ("Covered: the same, 10th percentile", "cosine10 ", SETS),
    ("Agree: rank correlation with what questions attend to", "spearman ", SCORES),
    ("Agree: share of the best 10 % of slots found", "overlap ", SCORES),
    ("Agree: attention held by the 10 % chosen, of what the best hold", "held ", SCORES),
    ("Agree: share found of slots that a question gives a fifth of its attention", "strong ", SCORES),
)  # fmt: skip


def tables(found: dict[str, Any]) -> str:
    """Means over layers and heads; of strong slots, the share of all of them."""
    text = [f"# Queries of questions and of their contexts\n\n```\n{(__doc__ or '').strip()}\n```"]
    for title, measure, columns in TABLES:
        text += [f"\n## {title}\n", f"| model | task | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
        for model, of_tasks in found.items():
            for task, x in of_tasks.items():
                means = {name: float(torch.tensor(rows).mean()) for name, rows in x.items()}
                whole = means["strong"] if measure == "strong " else 1.0
                cells = [
                    f"{means[name] / whole:.2f}" if name in means else "" for name in (measure + c for c in columns)
                ]
                text.append(f"| {model} | {task} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["embedded"], help="NAME=PATH, or 'embedded'")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--contexts", type=int, default=4)
    parser.add_argument("--plain", action="store_true", help="for models that were not trained on the tasks")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    path = a.out / "assumption.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for named in a.models:
        name, _, where = named.partition("=")
        where = where or embedded_model()
        model = AutoModelForCausalLM.from_pretrained(where, dtype=torch.bfloat16 if a.plain else torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(where)
        found.setdefault(name, {})
        for task in a.tasks:
            found[name][task] = measure(model, tokenizer, task, a.contexts, a.plain)
            path.write_text(json.dumps(found, separators=(",", ":")) + "\n")
            print(name, task, flush=True)
    (a.out / "assumption.md").write_text(tables(found))


if __name__ == "__main__":
    main()
