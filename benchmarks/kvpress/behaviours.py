"""What happens around the method: padding, turns, chunks, memory; the same scenes in both libraries.

    python -m benchmarks.kvpress.behaviours --kvpress-python DIRECTORY/bin/python [--out results/behaviours.json]

Every scene runs ``model.generate`` as a user would call it, on a tiny random Llama in float32, and writes what was
measured; nothing is taken from either library's own statements.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import keepkv
from keepkv.core.budget import Budget

from . import models
from .outcome import Outcome
from .reference import Reference

NEW = 8
LONG, SHORT, TURN, CHUNK, RATIO = 256, 100, 100, 64, 0.5
HERE = Path(__file__).parent
PRESSES = {
    "knorm": {"press": "KnormPress", "options": {"compression_ratio": RATIO}},
    "snapkv": {"press": "SnapKVPress", "options": {"compression_ratio": RATIO, "window_size": 16}},
    "expected-attention": {"press": "ExpectedAttentionPress", "options": {"compression_ratio": RATIO}},
    "streaming-llm": {"press": "StreamingLLMPress", "options": {"compression_ratio": RATIO}},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "knorm": {"sinks": 0},
    "snapkv": {"window": 16, "sinks": 0},
    "expected-attention": {},
    "streaming-llm": {},
}


def adaptive(ratio: float, window: int = 32) -> dict[str, Any]:
    inner = {"press": "SnapKVPress", "options": {"compression_ratio": ratio, "window_size": window}}
    return {"press": "AdaKVPress", "options": {"press": inner}}


def make_prompts() -> dict[str, Tensor]:
    """A long prompt, a short one, both in one batch padded on the left, and a second turn."""
    long, short = models.prompt(LONG, 1), models.prompt(SHORT, 2)
    batch = torch.cat((long, torch.cat((torch.zeros(1, LONG - SHORT, dtype=torch.long), short), 1)))
    mask = torch.ones_like(batch)
    mask[1, : LONG - SHORT] = 0
    return {"long": long, "short": short, "batch": batch, "batch.mask": mask, "turn": models.prompt(TURN, 3)}


def generate(
    model: PreTrainedModel,
    cache: Any,
    ids: Tensor,
    mask: Tensor | None = None,
    turns: tuple[Tensor, ...] = (),
    **extra: Any,
) -> Outcome:
    """Our side of the worker's task "generate"."""
    fed: list[dict[str, Any]] = []

    def spy(module: Any, args: Any, kwargs: Any) -> None:
        positions = kwargs.get("position_ids")
        ends = [] if positions is None else [int(positions[-1, 0]), int(positions[-1, -1])]
        fed.append({"tokens": kwargs["input_ids"].shape[1], "positions": ends})

    hook = model.register_forward_pre_hook(spy, with_kwargs=True)
    logits, facts = [], []
    try:
        for i, more in enumerate((None, *turns)):
            ids = ids if more is None else torch.cat((ids, more), 1)
            out = model.generate(
                input_ids=ids,
                attention_mask=mask if mask is not None and i == 0 else torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
                **extra,
            )
            ids = out.sequences
            logits.append(torch.stack(out.logits, 1).float())
            facts.append({"fed": list(fed), "slots": int((cache.kept_positions(0) >= 0).sum(-1).max())})
            fed.clear()
    finally:
        hook.remove()
    return Outcome(logits=torch.cat(logits, 1), facts={"turns": facts, "bytes": cache.report().bytes})


def padding(theirs: dict[str, Outcome], model: PreTrainedModel, prompts: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Logits of the first decoded token of the padded row, against the same row alone; keys that row attends to."""
    rows = []
    for name in PRESSES:
        batch, alone = theirs[f"padded/{name}"], theirs[f"alone/{name}"]
        row: dict[str, Any] = {"method": name, "kvpress": {"error": batch.error}}
        if not batch.error:
            _, short, stored = batch.facts["turns"][0]["visible"][0]
            difference = (batch.logits[1, 1] - alone.logits[0, 1]).abs().max().item()
            row["kvpress"] = {"logits": difference, "keys_attended": short, "keys_stored": stored}
        caches = [keepkv.Cache(model, name, RATIO, **OPTIONS[name]) for _ in range(2)]
        both = generate(model, caches[0], prompts["batch"], prompts["batch.mask"])
        one = generate(model, caches[1], prompts["short"])
        difference = (both.logits[1, 1] - one.logits[0, 1]).abs().max().item()
        held = int((caches[0].kept_positions(0)[1, 0] >= 0).sum())
        row["keepkv"] = {"logits": difference, "slots_of_padded_row": held}
        rows.append(row)
    return rows


def second_turn(theirs: Outcome, model: PreTrainedModel, prompts: dict[str, Tensor]) -> dict[str, Any]:
    """First forward of the second turn: tokens and positions."""
    cache = keepkv.Cache(model, "snapkv", RATIO, **OPTIONS["snapkv"])
    mine = generate(model, cache, prompts["long"], turns=(prompts["turn"],))
    new = TURN + 1  # the last generated token was not fed yet
    expected = {"tokens": new, "positions": [LONG + NEW - 1, LONG + NEW + TURN - 1]}
    first = {name: o.facts["turns"][1]["fed"][0] for name, o in (("kvpress", theirs), ("keepkv", mine))}
    return {"expected": expected, **first}


def chunks(theirs: Outcome, model: PreTrainedModel, prompts: dict[str, Tensor]) -> dict[str, Any]:
    """Slots held after a prompt read in chunks, without the tokens that were generated."""
    result: dict[str, Any] = {"expected": int(LONG * RATIO), "kvpress": theirs.facts["turns"][0]["slots"] - (NEW - 1)}
    for schedule in ("immediate", "deferred"):
        when = keepkv.When(prefill=schedule)
        cache = keepkv.Cache(model, "snapkv", int(LONG * RATIO), when=when, **OPTIONS["snapkv"])
        mine = generate(model, cache, prompts["long"], prefill_chunk_size=CHUNK)
        result[f"keepkv, {schedule}"] = mine.facts["turns"][0]["slots"] - (NEW - 1)
    return result


def memory(reference: Reference, length: int = 2000, ratio: float = 0.75) -> list[dict[str, Any]]:
    """Bytes stored after the prompt, as a share of the plain cache."""
    rows = []
    for width in (64, 128):
        model = models.make_wide(width)
        prompts = {"p": models.prompt(length, 0), "p.next": models.prompt(2, 1)}
        run = {"id": "a", "task": "prefill", "prompt": "p", "continuation": "p.next", "press": adaptive(ratio)}
        theirs = reference.run(model, prompts, [run])[0]["a"].facts
        cache = keepkv.Cache(model, "adakv", budget=1 - ratio)
        shares = []
        with torch.no_grad():
            for tokens in (prompts["p"], prompts["p.next"][:, :1]):
                model(tokens, past_key_values=cache)
                receipt = cache.report()
                shares.append(receipt.bytes / receipt.full_bytes)
        share = {
            "kvpress": theirs["bytes"] / theirs["full_bytes"],
            "keepkv": shares[1],
            "keepkv, before decoding": shares[0],
        }
        rows.append({"head_dim": width, "budget": 1 - ratio, "tokens": length, **share})
    return rows


def rounding() -> dict[str, Any]:
    """How often int(n·(1−ratio)), as kvpress counts, is one below the share that was asked for."""
    grid = [(n, percent) for n in range(100, 1001) for percent in range(5, 100, 5)]
    seen = torch.tensor([n for n, _ in grid])
    exact = [n * (100 - percent) // 100 for n, percent in grid]
    theirs = [max(1, int(n * (1 - percent / 100))) for n, percent in grid]
    shares = [round(1 - percent / 100, 2) for _, percent in grid]
    mine = [int(Budget(share=s).per_head(x[None], 1)) for s, x in zip(shares, seen, strict=True)]
    wrong = {
        name: sum(a != b for a, b in zip(x, exact, strict=True)) for name, x in (("kvpress", theirs), ("keepkv", mine))
    }
    return {"cases": len(grid), "not_the_exact_floor": wrong, "kvpress, 100 tokens, ratio 0.9": int(100 * (1 - 0.9))}


def below_window(theirs: Outcome, model: PreTrainedModel, prompts: dict[str, Tensor]) -> dict[str, Any]:
    """A budget smaller than the window of SnapKV: 25 slots, window 64."""
    kept = theirs.kept[0][0]
    facts = {"kept": len(kept), "before_window": int((kept < LONG - 64).sum()), "newest_kept": int(kept.max())}
    try:
        keepkv.Cache(model, "snapkv", len(kept), window=64)
        answer = "accepted"
    except keepkv.KeepKVError as error:
        answer = f"{type(error).__name__}: {error}"
    return {"kvpress": facts, "keepkv": answer}


def adaptive_decoding(theirs: Outcome, model: PreTrainedModel, prompts: dict[str, Tensor]) -> dict[str, Any]:
    """Slots per head after ``TURN`` fed tokens, adaptive heads, target 64 every 16 tokens."""
    when = keepkv.When(prefill=None, every=16)
    cache = keepkv.Cache(model, "adakv", 64, window=8, sinks=0, when=when)
    with torch.no_grad():
        model(prompts["long"], past_key_values=cache)
        for token in prompts["turn"].unbind(1):
            model(token[:, None], past_key_values=cache)
    held = (cache.kept_positions(0) >= 0).sum(-1).float()
    stored = theirs.error or {"slots": theirs.facts["slots"]}
    return {"kvpress": stored, "keepkv": {"mean": held.mean().item(), "per_head": held[0].tolist()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress-python", required=True, help="python of the environment made by make_environment.sh")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "behaviours.json")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.disable_progress_bar()
    reference = Reference(arguments.kvpress_python, {"threads": arguments.threads})
    model, prompts = models.make("llama", 0), make_prompts()
    common = {"task": "generate", "new": NEW}
    runs: list[dict[str, Any]] = []
    for name, press in PRESSES.items():
        runs.append({**common, "id": f"padded/{name}", "prompt": "batch", "press": press})
        runs.append({**common, "id": f"alone/{name}", "prompt": "short", "press": press})
    runs.append({**common, "id": "turns", "prompt": "long", "turns": ["turn"], "press": PRESSES["snapkv"]})
    runs.append({**common, "id": "chunks", "prompt": "long", "chunk": CHUNK, "press": PRESSES["snapkv"]})
    snap = {"press": "SnapKVPress", "options": {"compression_ratio": 0.9}}
    runs.append({"id": "below", "task": "prefill", "prompt": "long", "continuation": "turn", "press": snap})
    decoding = {"base_press": adaptive(0.0, 8), "compression_interval": 16, "target_size": 64}
    press = {"press": "DecodingPress", "options": decoding}
    follow = {"task": "decode", "prompt": "long", "continuation": "turn", "press": press, "kept": False}
    runs.append({**follow, "id": "adaptive"})
    theirs, versions = reference.run(model, prompts, runs)
    document = {
        "versions": {
            "kvpress": versions,
            "keepkv": {n: version(n) for n in ("keepkv", "torch", "transformers")}
            | {"python": platform.python_version()},
        },
        "padding": padding(theirs, model, prompts),
        "second_turn": second_turn(theirs["turns"], model, prompts),
        "chunked_prefill": chunks(theirs["chunks"], model, prompts),
        "memory": memory(reference),
        "rounding": rounding(),
        "budget_below_window": below_window(theirs["below"], model, prompts),
        "adaptive_decoding": adaptive_decoding(theirs["adaptive"], model, prompts),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(document, indent=1, ensure_ascii=False)
    arguments.out.write_text(text + "\n", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
