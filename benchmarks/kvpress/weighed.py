"""Do keepkv and kvpress keep the same slots where a text is read twice, or scores have a threshold?

    python -m benchmarks.kvpress.weighed --kvpress-python DIRECTORY/bin/python [--out results/weighed.json]

KVzip over all layers, KVzip+, KVgrad, KVCompose and DMS on the trained model, whose directory has the tokenizer that
these presses load; the same request to repeat the text, in one piece.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import keepkv
from keepkv import LayerView, tasks
from keepkv.allocate import Composite
from keepkv.embedded import embedded_model
from keepkv.engine.versions import CACHE
from keepkv.engine.view import view_of
from keepkv.observe.attention import strongest
from keepkv.score import KVCompose
from keepkv.score.passes.kvzip import STAT

from . import ours
from .agreement import CONTINUATION, HERE, RATIOS, REPEAT, finite
from .outcome import Outcome, compare, kept_lists
from .pairs import Given
from .reference import Reference
from .table import Row, show

CHUNK, DEFERRED = 2048, keepkv.When("deferred")
_TWICE = {"chunk_size": CHUNK}
_FIRST = "kvpress gives the first layer as many slots as the largest"
_BOUND = "a budget below all tokens is a bound: a layer whose slots all pass gives up one of each head"
_ORDER = (
    "kvpress: the largest of each query head, then their mean; keepkv: the mean of the query heads, then the largest"
)


@dataclass(frozen=True)
class LargestFirst(KVCompose):
    """The largest attention of each query head, and then the mean over those of a KV head, of a text in one piece."""

    def observe(self, view: LayerView) -> None:
        most = view.slots.stats[STAT]
        most.copy_(most.maximum(strongest(view, view.queries, view.query_positions).mean(2)))


@dataclass(frozen=True)
class Case:
    """press: of kvpress, and its options. method: ours. asked: whether the text is repeated on request. counts: whether
    each layer keeps as many slots as it does in kvpress: what remains to be compared is the score."""

    name: str
    press: str
    given: dict[str, Any]
    method: str | keepkv.Method
    options: dict[str, Any] = field(default_factory=dict)
    asked: bool = True
    counts: bool = False
    why: str = ""


CASES = [
    Case("kvzip, all layers", "KVzipPress", {**_TWICE}, "kvzip", {"allocate": "pooled"}),
    Case(
        "kvzip+", "KVzipPress", {**_TWICE, "kvzip_plus_normalization": True, "layerwise": True}, "kvzip", {"plus": True}
    ),
    Case(
        "kvzip+, all layers",
        "KVzipPress",
        {**_TWICE, "kvzip_plus_normalization": True},
        "kvzip",
        {"plus": True, "allocate": "pooled"},
    ),
    Case("kvgrad", "KVgradPress", {**_TWICE}, "kvgrad"),
    Case("kvcompose", "KVComposePress", {}, "kvcompose", {"sinks": 0}, asked=False, why=f"{_FIRST}; {_ORDER}"),
    Case("kvcompose, counts of kvpress", "KVComposePress", {}, "kvcompose", {"sinks": 0}, False, True, _ORDER),
    Case(
        "kvcompose, counts and order of kvpress",
        "KVComposePress",
        {},
        keepkv.Method(LargestFirst(), Composite(), sinks=0),
        asked=False,
        counts=True,
    ),
]
# score of DMS, its press, thresholds by the share of tokens that pass, and the window
THRESHOLDS = [("knorm", "KnormPress"), ("keydiff", "KeyDiffPress")]
WINDOW = 32


def run_cases(reference: Reference, directory: str, model: PreTrainedModel, ids: Tensor, asked: Tensor,
              rows: dict[str, Row]) -> dict[str, str]:  # fmt: skip
    after = ids[:, :CONTINUATION]
    runs = [{"id": "full", "task": "prefill", "prompt": "p", "continuation": "next", "press": None}]
    for case in CASES:
        for ratio in RATIOS:
            press = {"press": case.press, "options": {"compression_ratio": ratio, **case.given}}
            # It reads by eager attention, which cannot go on with layers of different lengths.
            eager = case.press == "KVComposePress"
            run = {**runs[0], "id": f"{case.name}/{ratio}", "press": press}
            runs.append({**run, "attention": "eager", "continuation": "none"} if eager else run)
    levels = {}
    for score, press in THRESHOLDS:
        levels[score] = thresholds(model, ids, score)
        for share, level in levels[score].items():
            options = {"press": {"press": press, "options": {}}, "threshold": level, "sliding_window_size": WINDOW}
            given = {"press": "DMSPress", "options": options}
            runs.append({**runs[0], "id": f"{score}/{share}", "press": given})
    results, versions = reference.run(directory, {"p": ids, "next": after, "none": after[:, :0]}, runs)
    noise = (results["full"].logits[0] - ours.plain(model, ids, after).logits).abs().max().item()
    for case in CASES:
        method, options = case.method, {**case.options, "when": DEFERRED}
        if isinstance(method, keepkv.Method):
            method, options = replace(method, when=DEFERRED), {}
        cache = keepkv.Cache(model, method, 1.0, **options)
        with torch.no_grad():
            last = model(ids, logits_to_keep=1, **{CACHE: cache}).logits[:, -1]
        keepkv.reread(model, cache, ids, prompt_ids=asked if case.asked else None, chunk=CHUNK)
        for ratio in RATIOS:
            theirs, method = results[f"{case.name}/{ratio}"], cache.settings.method
            if case.counts and not theirs.error:
                counts = tuple(count // len(theirs.kept[0]) for count in theirs.counts)
                method = replace(method, allocate=Given(counts=counts))
            twin = cache.copy(budget=round(ids.shape[1] * (1 - ratio)), method=method)
            twin.compress()
            enter(rows[case.name], theirs, model, twin, last, after, noise, ratio)
    for score, _ in THRESHOLDS:
        for share, level in levels[score].items():
            cache = keepkv.Cache(model, "dms", 0.9999, score=score, threshold=level, window=WINDOW, sinks=0)
            with torch.no_grad():
                last = model(ids, logits_to_keep=1, **{CACHE: cache}).logits[:, -1]
            enter(rows[f"dms({score})"], results[f"{score}/{share}"], model, cache, last, after, noise, 1 - share)
    return versions


def enter(row: Row, theirs: Outcome, model: PreTrainedModel, cache: keepkv.Cache, last: Tensor, after: Tensor,
          noise: float, ratio: float) -> None:  # fmt: skip
    """Compare what ``cache`` kept with ``theirs``."""
    if theirs.error:
        row.errors.append(f"kvpress: {theirs.error}")
        return
    theirs.logits = theirs.logits[0]
    kept = [kept_lists(cache.kept_positions(layer)) for layer in range(len(cache.layers))]
    size = cache.report()
    with torch.no_grad():
        fed = ours.feed(model, cache, after[:, : len(theirs.logits) - 1])
        mine = Outcome(kept, torch.stack([last, *fed], 1)[0].float())
    row.comparisons.append(compare(theirs, mine))
    row.full.append(noise)
    share = theirs.facts["bytes"] / theirs.facts["full_bytes"]
    row.bytes.append((ratio, share, size.bytes / size.full_bytes))


def thresholds(model: PreTrainedModel, ids: Tensor, score: str) -> dict[float, float]:
    """Levels that about such shares of all slots pass."""
    cache = keepkv.Cache(model, score, 1.0)
    with torch.no_grad():
        model(ids, **{CACHE: cache})
    found = torch.cat([cache.settings.method.score(view_of(x)).flatten() for x in cache.compressible])
    return {share: float(found.float().quantile(1 - share)) for share in (0.3, 0.6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress-python", required=True, help="python of the environment made by make_environment.sh")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "weighed.json")
    parser.add_argument("--model", default=embedded_model(), help="directory of a trained model")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    asked = torch.tensor([token for text in REPEAT for token in tokenizer.encode(text, add_special_tokens=False)])
    rows = {case.name: Row(case.name, case.why) for case in CASES}
    rows |= {f"dms({score})": Row(f"dms({score})", _BOUND) for score, _ in THRESHOLDS}
    reference, versions = Reference(arguments.kvpress_python, {"threads": 1}), {}
    for i, task in enumerate(("niah-multikey-1", "variable-tracking", "secret")):
        ids = tokenizer(tasks.get(task).generate(tokenizer, 500, i).context, return_tensors="pt").input_ids
        ids = ids[:, : ids.shape[1] // 20 * 20]  # so that every ratio is a whole number of slots
        versions = run_cases(reference, arguments.model, model, ids, asked, rows)
    table = [row.summary() for row in rows.values()]
    show("weighed", table)
    document = {"versions": versions, "settings": {"ratios": RATIOS, "window": WINDOW}, "table": finite(table)}
    arguments.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
