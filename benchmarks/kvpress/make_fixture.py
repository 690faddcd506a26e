"""Writes the reference that the offline tests compare with: kept slots and logits of kvpress on two tiny models.

    python -m benchmarks.kvpress.make_fixture --kvpress-python DIRECTORY/bin/python [--out tests/data/peers]

Weights travel with it, in half precision and exact. Prompts repeat no token: equal tokens have keys of equal norm in
the first layer, and which of two equals is kept is anybody's choice. Cases closer to a tie than ``MARGIN`` are left
out, where the scores that decided are recorded.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from keepkv.score import SCORES, Score

from . import ours
from .outcome import Outcome, compare
from .pairs import MATCHED, Pair
from .reference import Reference

LENGTH, NEW, WINDOW, VOCAB = 120, 4, 12, 160
RATIOS = (0.5, 0.75)
MARGIN = 2e-5
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "initializer_range": 0.15,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
KINDS = ("Llama", "Qwen3")
SKIP = {
    "pyramidkv", "pyramidkv, counts of kvpress",  # their counts per layer differ, on purpose
    "compactor", "compactor, filled as kvpress does",  # 107 tokens are no whole number of blocks of 256
    "compactor, blocks of 27, filled as kvpress does",  # but 108 are of 27: nothing is filled
    "non-causal-attention", "non-causal-attention, filled as kvpress does",  # nor are 120 of 256
    "chunk(knorm)", "chunk(keydiff)", "chunk(keydiff), each alone as in kvpress",  # their counts follow kvpress'
    "chunkkv(knorm)", "chunkkv(keydiff)",
}  # fmt: skip


def make(kind: str) -> Any:
    """A model whose float32 weights are exact in float16."""
    torch.manual_seed(7)
    config = getattr(transformers, f"{kind}Config")(**SHAPE)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            parameter.copy_(parameter.half().float())
    return model


def described(options: dict[str, Any]) -> dict[str, Any]:
    """Options as JSON: a score becomes its registered name and the fields that were changed."""
    out = dict(options)
    score = out.get("score")
    if isinstance(score, Score):
        name = next(n for n in SCORES if SCORES.factory(n) is type(score))
        changed = {f.name: getattr(score, f.name) for f in fields(score) if getattr(score, f.name) != f.default}
        out["score"] = {"name": name, **changed}
    return out


def ranked_by_its_scores(pair: Pair, ratio: float) -> bool:
    """Whether slots are kept by the scores that are recorded: a press around another one makes its own of them."""
    spec = pair.press(ratio, WINDOW)
    return spec["press"] == "AdaKVPress" or "press" not in spec["options"]


def margin(theirs: Outcome, shared: bool) -> float:
    """Smallest relative distance between a kept and a dropped score; over all heads of a layer where they share."""
    smallest = float("inf")
    for kept, scores in zip(theirs.kept, theirs.scores, strict=True):
        masks = torch.stack([torch.isin(torch.arange(LENGTH), x) for x in kept])
        groups = [(scores.flatten(), masks.flatten())] if shared else list(zip(scores, masks, strict=True))
        for values, mask in groups:
            distance = (values[mask][:, None] - values[~mask]).abs().min() / values[~mask].abs().max()
            smallest = min(smallest, distance.item())
    return smallest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvpress-python", required=True, help="python of the environment made by make_environment.sh")
    parser.add_argument("--out", type=Path, default=Path("tests/data/peers"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reference = Reference(arguments.kvpress_python, {"threads": 1})
    pairs = [pair for pair in MATCHED if pair.name not in SKIP]
    tensors: dict[str, Tensor] = {}
    cases: list[dict[str, Any]] = []
    left_out: list[str] = []
    for number, kind in enumerate(KINDS):
        model = make(kind)
        order = torch.randperm(VOCAB - 3, generator=torch.Generator().manual_seed(number))[: LENGTH + NEW] + 3
        ids, after = order[None, :LENGTH], order[None, LENGTH:]
        runs = [
            {"id": f"{pair.name}/{ratio}", "task": "prefill", "prompt": "p", "continuation": "next", "scores": True}
            | {"press": pair.press(ratio, WINDOW), "attention": "eager" if pair.eager else "sdpa"}
            for pair in pairs
            for ratio in RATIOS
        ]
        results, versions = reference.run(model, {"p": ids, "next": after}, runs)
        tensors |= {
            f"{kind}/weights/{name}": x.half() for name, x in model.state_dict().items() if name != "lm_head.weight"
        }
        tensors |= {f"{kind}/prompt": ids[0].short(), f"{kind}/next": after[0].short()}
        for pair in pairs:
            for ratio in RATIOS:
                theirs, name = results[f"{pair.name}/{ratio}"], f"{kind}/{pair.name}/{ratio}"
                theirs.logits = theirs.logits[0]
                if ranked_by_its_scores(pair, ratio) and margin(theirs, pair.name.startswith("adakv")) < MARGIN:
                    left_out.append(name)
                    continue
                budget = int(LENGTH * (1 - ratio))
                method, options = pair.method(WINDOW, ()), pair.options(WINDOW)
                agreement = compare(theirs, ours.prefill(model, ids, after, method, budget, **options))
                if agreement.differing:
                    raise SystemExit(f"{name}: {agreement.differing} slots differ; look before writing a reference")
                kept = torch.zeros(len(theirs.kept), SHAPE["num_key_value_heads"], LENGTH, dtype=torch.uint8)
                for layer, heads in enumerate(theirs.kept):
                    for head, indices in enumerate(heads):
                        kept[layer, head, indices] = 1
                tensors |= {f"{name}/kept": kept, f"{name}/logits": theirs.logits[-1].clone()}
                cases.append(
                    {"name": name, "model": kind, "method": method, "options": described(options), "budget": budget}
                )
    document = {"versions": versions, "config": SHAPE, "models": KINDS, "cases": cases, "too_close": left_out}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, f"{arguments.out}.safetensors")
    Path(f"{arguments.out}.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"{len(cases)} cases, left out as ties: {left_out}")


if __name__ == "__main__":
    main()
