"""Do keepkv and kvpress keep the same slots?

    python -m benchmarks.kvpress.agreement --kvpress-python DIRECTORY/bin/python [--out results/agreement.json]
    python -m benchmarks.kvpress.agreement --kvpress-python DIRECTORY/bin/python --only compactor   # into the same file

Same weights, same prompts, same counts (kvpress rounds int(n·(1−ratio)), keepkv gets that number as its budget),
options that mean the same. Prints one row per method and writes every number with versions.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import keepkv
from keepkv import tasks
from keepkv.embedded import embedded_model

from . import models, ours
from .outcome import Outcome, compare, kept_lists
from .pairs import DECODING, DEFAULTS, EVERY, MATCHED, TARGET, Pair
from .reference import Reference
from .table import TIE, Row, show

RATIOS = (0.25, 0.5, 0.75, 0.9)
CONTINUATION = 3
REPEAT = ("\n\nRepeat the previous context exactly.", "\n")  # what KVzipPress asks of a model without chat template
HERE = Path(__file__).parent


def budget_of(length: int, ratio: float) -> int:
    """Slots that kvpress keeps."""
    return max(1, int(length * (1 - ratio)))


def run_model(
    reference: Reference,
    model: PreTrainedModel,
    prompts: list[tuple[str, torch.Tensor, torch.Tensor, int]],
    pairs: list[Pair],
    ratios: tuple[float, ...],
    rows: dict[str, Row],
) -> dict[str, str]:
    """Compare every pair on every prompt (name, ids, continuation, window) and ratio; fills ``rows``."""
    files = {name: ids for name, ids, _, _ in prompts} | {f"{name}.next": after for name, _, after, _ in prompts}
    runs = []
    for name, _, _, window in prompts:
        common = {"task": "prefill", "prompt": name, "continuation": f"{name}.next", "scores": True}
        runs.append({**common, "id": f"{name}/full", "press": None})
        for pair in pairs:
            attention = "eager" if pair.eager else "sdpa"
            for ratio in ratios:
                press = pair.press(ratio, window)
                runs.append({**common, "id": f"{name}/{pair.name}/{ratio}", "press": press, "attention": attention})
    results, versions = reference.run(model, files, runs)
    for name, ids, after, window in prompts:
        plain = results[f"{name}/full"].logits[0]
        model.set_attn_implementation("sdpa")
        noise = (plain - ours.plain(model, ids, after).logits).abs().max().item()
        for pair in pairs:
            for ratio in ratios:
                theirs = results[f"{name}/{pair.name}/{ratio}"]
                one_pair(rows[pair.name], pair, model, ids, after, window, ratio, theirs, noise)
    return versions


def one_pair(
    row: Row,
    pair: Pair,
    model: PreTrainedModel,
    ids: torch.Tensor,
    after: torch.Tensor,
    window: int,
    ratio: float,
    theirs: Outcome,
    noise: float,
) -> None:
    if theirs.error:
        row.errors.append(f"kvpress: {theirs.error}")
        return
    theirs.logits = theirs.logits[0]
    heads = len(theirs.kept[0])
    counts = tuple(count // heads for count in theirs.counts)
    try:
        mine = ours.prefill(
            model, ids, after, pair.method(window, counts), budget_of(ids.shape[1], ratio), **pair.options(window)
        )
    except ValueError as error:
        row.errors.append(f"keepkv: {type(error).__name__}: {error}")
        return
    row.comparisons.append(compare(theirs, mine))
    row.full.append(noise)
    share = [o.facts["bytes"] / o.facts["full_bytes"] for o in (theirs, mine)]
    row.bytes.append((ratio, *share))


def trained_model(reference: Reference, directory: str, seeds: int, pairs: list[Pair]) -> list[dict[str, Any]]:
    """Matched options over a trained model, reading texts of the package's own tasks."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = {p.name: Row(p.name, p.why) for p in pairs}
    prompts = []
    for i, task in enumerate(("niah-multikey-1", "variable-tracking", "secret")[:seeds]):
        context = tasks.get(task).generate(tokenizer, 500, i).context
        ids = tokenizer(context, return_tensors="pt").input_ids
        after = tokenizer(context, return_tensors="pt").input_ids[:, :CONTINUATION]
        prompts.append((task, ids, after, 32))
    run_model(reference, model, prompts, pairs, RATIOS, rows)
    return [row.summary() for row in rows.values()]


def reading_twice(reference: Reference, directory: str, seeds: int) -> list[dict[str, Any]]:
    """KVzip over the trained model, whose directory has the tokenizer that its press loads: the text in one piece, and
    in pieces. kvpress ranks the heads of each layer together (layerwise), as keepkv does."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    asked = torch.tensor([token for text in REPEAT for token in tokenizer.encode(text, add_special_tokens=False)])
    why = (
        "kvpress' softmax runs over the piece that is repeated, keepkv's over the whole text; another request per piece"
    )
    rows = {2048: Row("kvzip", ""), 128: Row("kvzip, pieces of 128 tokens", why)}
    for i, task in enumerate(("niah-multikey-1", "variable-tracking", "secret")[:seeds]):
        ids = tokenizer(tasks.get(task).generate(tokenizer, 500, i).context, return_tensors="pt").input_ids
        ids = ids[:, : ids.shape[1] // 20 * 20]  # so that every ratio is a whole number of slots
        after = ids[:, :CONTINUATION]
        runs = [
            {"id": f"{chunk}/{ratio}", "task": "prefill", "prompt": "p", "continuation": "next", "press": press}
            for chunk in rows
            for ratio in RATIOS
            for given in [{"compression_ratio": ratio, "layerwise": True, "chunk_size": chunk}]
            for press in [{"press": "KVzipPress", "options": given}]
        ]
        runs.append({"id": "full", "task": "prefill", "prompt": "p", "continuation": "next", "press": None})
        results, _ = reference.run(directory, {"p": ids, "next": after}, runs)
        noise = (results["full"].logits[0] - ours.plain(model, ids, after).logits).abs().max().item()
        cache = keepkv.Cache(model, "kvzip", 1.0, when=keepkv.When("deferred"))
        with torch.no_grad():
            last = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1]
        for chunk, row in rows.items():
            keepkv.reread(model, cache, ids, prompt_ids=asked, chunk=chunk)
            for ratio in RATIOS:
                theirs = results[f"{chunk}/{ratio}"]
                if theirs.error:
                    row.errors.append(f"kvpress: {theirs.error}")
                    continue
                theirs.logits, twin = theirs.logits[0], cache.copy(budget=round(ids.shape[1] * (1 - ratio)))
                twin.compress()
                kept = [kept_lists(twin.kept_positions(layer)) for layer in range(len(twin.layers))]
                size = twin.report()
                with torch.no_grad():
                    mine = Outcome(kept, torch.stack([last, *ours.feed(model, twin, after)], 1)[0].float())
                row.comparisons.append(compare(theirs, mine))
                row.full.append(noise)
                share = theirs.facts["bytes"] / theirs.facts["full_bytes"]
                row.bytes.append((ratio, share, size.bytes / size.full_bytes))
    return [row.summary() for row in rows.values()]


def while_decoding(
    reference: Reference, seeds: int, steps: tuple[int, ...] = (EVERY + 1, 2 * EVERY + 1)
) -> list[dict[str, Any]]:
    """Kept sets after one compression and after two, with the same tokens fed; the window is 8."""
    rows = {f"{pair.name}, {n} steps": Row(f"{pair.name}, {n} steps", pair.why) for pair in DECODING for n in steps}
    for name in ("llama", "qwen3"):
        for seed in range(seeds):
            model = models.make(name, seed)
            ids = models.prompt(100 + max(steps), seed)
            files = {"p": ids[:, :100], **{f"next{n}": ids[:, 100 : 100 + n] for n in steps}}
            runs = [
                {"id": f"{pair.name}/{n}", "task": "decode", "prompt": "p", "continuation": f"next{n}"}
                | {"press": pair.press(0.0, 8), "scores": True, "reorder": pair.reorder}
                for pair in DECODING
                for n in steps
            ]
            results, _ = reference.run(model, files, runs)
            for pair in DECODING:
                for n in steps:
                    theirs, row = results[f"{pair.name}/{n}"], rows[f"{pair.name}, {n} steps"]
                    if theirs.error:
                        row.errors.append(f"kvpress: {theirs.error}")
                        continue
                    theirs.logits = theirs.logits[0]
                    when = keepkv.When(prefill=None, every=EVERY)
                    made = pair.method(8, ())
                    options = {**pair.options(8), "when": when} if isinstance(made, str) else {}
                    mine = ours.prefill(model, files["p"], files[f"next{n}"], made, TARGET, True, **options)
                    row.comparisons.append(compare(theirs, mine))
    return [row.summary() for row in rows.values()]


def random_models(
    reference: Reference, seeds: int, same: list[Pair], usual: list[Pair]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Matched options over random models, prompts and ratios; defaults on the longest prompts."""
    matched, defaults = ({p.name: Row(p.name, p.why) for p in pairs} for pairs in (same, usual))
    versions: dict[str, str] = {}
    for name, lengths in models.LENGTHS.items():
        for seed in range(seeds):
            model = models.make(name, seed)
            prompts = []
            for length, window in lengths.items():
                ids = models.prompt(length + CONTINUATION, 10 * seed + length)
                prompts.append((f"p{length}", ids[:, :length], ids[:, length:], window))
            versions = run_model(reference, model, prompts, same, RATIOS, matched)
            if name == "llama-gqa":
                run_model(reference, model, prompts, usual, RATIOS[:3], defaults)
    tables = {"matched": matched, "defaults": defaults}
    return {name: [row.summary() for row in rows.values()] for name, rows in tables.items()}, versions


def finite(value: Any) -> Any:
    """JSON has neither infinity nor NaN: null."""
    if isinstance(value, dict):
        return {name: finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def named(pairs: list[Pair], only: str | None) -> list[Pair]:
    """Those whose names start with ``only``; all without it."""
    return [pair for pair in pairs if only is None or pair.name.startswith(only)]


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]], pairs: list[Pair]) -> list[dict[str, Any]]:
    """Rows ``new`` in the place of those of the same name in ``old``, in the order of ``pairs``."""
    rows = {row["method"]: row for row in (*old, *new)}
    return [rows[pair.name] for pair in pairs if pair.name in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress-python", required=True, help="python of the environment made by make_environment.sh")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "agreement.json")
    parser.add_argument("--model", default=embedded_model(), help="directory of a trained model; none: left out")
    parser.add_argument("--seeds", type=int, default=2, help="weights and prompts of each model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="pairs whose names start so; the other rows stay as they are in the file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.disable_progress_bar()
    reference = Reference(arguments.kvpress_python, {"threads": arguments.threads})
    only = arguments.only
    same, usual = named(MATCHED, only), named(DEFAULTS, only)
    tables, theirs = random_models(reference, arguments.seeds, same, usual)
    for title in ("matched", "defaults"):
        show(title, tables[title])
    if Path(arguments.model, "config.json").exists():
        tables["trained model"] = trained_model(reference, arguments.model, arguments.seeds, same)
        show("trained model", tables["trained model"])
        if only is None:
            tables["reading twice"] = reading_twice(reference, arguments.model, arguments.seeds)
            show("reading twice", tables["reading twice"])
    if only is None:
        tables["decoding"] = while_decoding(reference, arguments.seeds)
        show("decoding", tables["decoding"])
    mine = {name: version(name) for name in ("keepkv", "torch", "transformers")}
    document = {
        "versions": {"kvpress": theirs, "keepkv": {**mine, "python": platform.python_version()}},
        "settings": {"ratios": RATIOS, "seeds": arguments.seeds, "lengths": models.LENGTHS, "tie": TIE},
        "tables": tables,
    }
    if only is not None:
        held = json.loads(arguments.out.read_text("utf-8"))
        if held["versions"] != document["versions"]:
            raise SystemExit(f"{arguments.out} is of other versions: {held['versions']}, not {document['versions']}")
        order = {"matched": MATCHED, "trained model": MATCHED, "defaults": DEFAULTS}
        for title, rows in tables.items():
            held["tables"][title] = merged(held["tables"][title], rows, order[title])
        document = held
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(finite(document), indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
