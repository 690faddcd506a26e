"""Does the mean over heads pay? ``python -m benchmarks.tada.run --name NAME --model PATH``: ``results/NAME.json``.

Correlation of heads and the three arms of ``keepkv calibrate tada``; then codes with and without centring, with and
without a Hadamard rotation, at equal bits of a code and at equal bits in all. Keys and values are those that the model
itself makes, every token is written in codes, and divergence is taken on texts that no search has seen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from keepkv import embedded_model, tasks
from keepkv.calibrate import batches, calibrate
from keepkv.calibrate.bit_search import average, greedy
from keepkv.calibrate.heads import Alike, compare_heads
from keepkv.calibrate.rounded import Divergence
from keepkv.engine.versions import CACHE
from keepkv.kernels.codes import BITS
from keepkv.measure.environment import MadeWith
from keepkv.store.codec import Codec
from keepkv.store.codec.tada import Tada, break_even, mean_bits
from keepkv.tasks.asking import encode
from keepkv.tasks.text import prose

HERE = Path(__file__).parent
TASKS = ("niah-multikey-1", "niah-multikey-2", "niah-multiquery", "variable-tracking", "qa-1")
CHOICES: dict[str, tuple[bool, dict[str, Any]]] = {  # name: turned, options
    "plain": (False, {"centre": False}),
    "centred": (False, {"centre": True}),
    "centred, 8-bit mean": (False, {"centre": True, "mean": "8bit"}),
    "turned": (True, {"centre": False}),
    "turned and centred": (True, {"centre": True}),
    "turned and centred, 8-bit mean": (True, {"centre": True, "mean": "8bit"}),
}
WHERE_IT_PAYS = "centred where it pays, 8-bit mean"


class Turned(Codec):
    """Another codec, given keys and values turned by a Hadamard matrix: D must be a power of two."""

    def __init__(self, inner: Codec) -> None:
        self.inner = inner

    def encode(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        return self.inner.encode(_turned(keys), _turned(values))

    def decode(self, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        keys, values = self.inner.decode(fields)
        return _turned(keys), _turned(values)


def _turned(x: Tensor) -> Tensor:
    """By H/√D, which is its own inverse."""
    h = torch.ones(1, 1, dtype=x.dtype)
    while len(h) < x.shape[-1]:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    turned: Tensor = x @ (h / x.shape[-1] ** 0.5)
    return turned


def asked(tokenizer: Any, items: int, length: int) -> list[Tensor]:
    """Contexts of tasks with their questions and replies, each cut to ``length`` tokens."""
    made = []
    for seed in range(items):
        for name in TASKS:
            item = encode(tokenizer, tasks.get(name).generate(tokenizer, length // 2, seed))
            ids = item.context + [t for one in item.asked for t in (*one.prompt, *one.answer)]
            made.append(torch.tensor([ids[:length]]))
    return made


@torch.no_grad()
def ablation(model: Any, texts: list[Tensor]) -> list[dict[str, Any]]:
    """A row for each choice and width of codes, and for each that has means what others do with as many bits in all."""
    divergence, (keys, values) = Divergence(model, texts), _contents(model, texts[0])
    layers = range(len(keys))
    sizes = [(keys[i].shape[-1] + values[i].shape[-1]) * keys[i].shape[1] for i in layers]
    rows: list[dict[str, Any]] = []

    paying = _paying(model, texts)

    def codec(choice: str, layer: int, bits: int) -> Codec:
        if choice == WHERE_IT_PAYS:
            return Tada(bits, mean="8bit", **paying[layer])
        turned, options = CHOICES[choice]
        return Turned(Tada(bits, **options)) if turned else Tada(bits, **options)

    def measure(choice: str, bits: tuple[int, ...], beside: str = "") -> dict[str, Any]:
        codecs = {i: codec(choice, i, b) for i, b in zip(layers, bits, strict=True)}
        found = [divergence.of(i, codecs) for i in range(len(texts))]
        fields = [codecs[i].encode(keys[i], values[i]) for i in layers]
        held = sum(x.nbytes for one in fields for x in one.values()) * 8 / sum(x.numel() for x in (*keys, *values))
        errors = [_errors(codecs[i], keys[i], values[i]) for i in layers]
        row = {
            "choice": choice, "codes": average(bits, sizes), "held": held, "beside": beside,
            "keys": fmean(x for x, _ in errors), "values": fmean(x for _, x in errors),
            "kl": fmean(found), "spread": stdev(found) / len(found) ** 0.5, "kl_of_texts": found,
        }  # fmt: skip
        rows.append(row)
        print(f"{choice:32} {row['codes']:.2f} {held:.2f} {row['kl']:.5f} {beside}", flush=True)
        return row

    means = [(choice, bits, measure(choice, (bits,) * len(layers))) for bits in BITS for choice in CHOICES]
    for bits in BITS if any(any(own.values()) for own in paying) else ():
        measure(WHERE_IT_PAYS, (bits,) * len(layers))
    for choice, turned in (("plain", False), ("turned", True)):
        alone = [_alone(divergence, partial(codec, choice, i), i) for i in layers]
        beside = next(row["held"] - bits for name, bits, row in means if name == choice)  # scales and zeros
        for other, bits, row in means:
            if CHOICES[other][1]["centre"] and CHOICES[other][0] == turned and bits < BITS[-1]:
                measure(choice, greedy(alone, sizes, min(8.0, row["held"] - beside)), f"{other}, {bits} bits")
    return rows


def _alone(divergence: Divergence, codec: Callable[[int], Codec], layer: int) -> Mapping[int, float]:
    """Divergence by bits where one layer alone is written in codes, on an eighth of the texts."""
    some = range(0, len(divergence.texts), 8)
    return {b: fmean(divergence.of(i, {layer: codec(b)}) for i in some) if b < 8 else 0.0 for b in BITS}


def _paying(model: Any, texts: list[Tensor]) -> list[dict[str, bool]]:
    """By layer, whether keys and values are above the break-even of 8-bit means."""

    def pays(one: Alike) -> bool:
        return one.rho >= break_even(one.heads, mean_bits("8bit", one.width))

    layers = compare_heads(model, texts).values()
    return [{"key_centre": pays(x["keys"]), "value_centre": pays(x["values"])} for x in layers]


def _contents(model: Any, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values of each layer."""
    layers = getattr(model(input_ids=ids, use_cache=True), CACHE).layers
    return [x.keys for x in layers], [x.values for x in layers]


def _errors(codec: Codec, keys: Tensor, values: Tensor) -> tuple[float, float]:
    """‖x̂ − x‖ / ‖x‖ of keys and of values."""
    found = codec.decode(codec.encode(keys, values))
    first, second = ((y - x).norm().item() / x.norm().item() for x, y in zip((keys, values), found, strict=True))
    return first, second


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="of the file, and of the model in tables")
    parser.add_argument("--model", help="directory; the embedded model if absent")
    parser.add_argument("--texts", choices=["asked", "prose"], default="asked", help="of tasks, or documentation")
    parser.add_argument("--pieces", type=int, default=64, help="texts to calibrate on; half as many for the rest")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 4.0], help="targets of the search")
    parser.add_argument("--proposals", type=int, default=200)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    a = parser.parse_args()
    torch.set_num_threads(1)
    path = a.model or embedded_model()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    wanted = a.pieces + a.pieces // 2
    if a.texts == "asked":
        texts = asked(tokenizer, -(-wanted // len(TASKS)), a.length)[:wanted]
    else:
        some = len(prose()) // wanted
        parts = ["".join(prose()[i * some : (i + 1) * some]) for i in range(wanted)]
        texts = batches(tokenizer, parts, wanted * a.length, a.length)  # the beginning of each part
    share = len(texts) * 2 // 3
    found: dict[str, Any] = {"name": a.name, "made_with": asdict(MadeWith.of(model, a.name)), "texts": a.texts}
    found |= {"pieces": [share, len(texts) - share], "length": a.length, "seed": 0, "proposals": a.proposals}
    found["calibrations"] = []
    for bits in a.bits:
        made = calibrate("tada", model, texts[:share], bits=bits, proposals=a.proposals).made_with
        print("\n".join(made["says"]), flush=True)
        found["calibrations"].append({"bits": bits, **made["found"]})
    found["ablation"] = ablation(model, texts[share:])
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / f"{a.name}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
